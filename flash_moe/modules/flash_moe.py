"""FlashMoE: many one-neuron experts behind a Cartesian-product router, beside a dense gated MLP.

T tokens, H hidden size, I intermediate size, E = N * N experts, N keys a half of the router, K experts per token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_moe._activations import check_activation
from flash_moe._checks import (
    check_bool,
    check_coefficient,
    check_dtype,
    check_int,
    check_same_device,
    check_shape,
    check_tensor,
    float_dtypes,
)
from flash_moe.modules.biased_routing import bias_in_forward, biased_routing, update_bias
from flash_moe.modules.expert_usage import ExpertUsage, count_experts, summarize_usage
from flash_moe.modules.quantization import QuantizedTable, check_for_inference, quantize_tables, table_scales
from flash_moe.modules.rank_sums import spans_ranks
from flash_moe.modules.recomputation import MAX_WAITING, LossOnTheSide, add_once
from flash_moe.modules.router_losses import load_balancing_loss, router_z_loss
from flash_moe.modules.token_batch_norm import eps_of, token_batch_norm, token_batch_norm_gate
from flash_moe.ops._register import is_watched
from flash_moe.ops.expert_mlp import expert_mlp
from flash_moe.ops.flash_expert import flash_expert
from flash_moe.ops.flash_gate import fuses_gate
from flash_moe.ops.flash_router import flash_routing
from flash_moe.ops.layer_inference import RepeatedInference, layer_inference, repeated_inference

NORMS = ("batch", "rms", "none")
BACKENDS = ("auto", "triton", "torch", "reference")
_TABLES = ("down_embed", "up_embed")
_ROUTED_WEIGHTS = ("router_gate", *_TABLES)
_DENSE_WEIGHTS = (*_ROUTED_WEIGHTS, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class FlashMoEConfig:
    """Everything that shapes a ``FlashMoE`` layer. Invalid values raise ``ValueError`` or ``TypeError`` at once."""

    hidden_size: int
    """H, at least 1."""
    intermediate_size: int
    """I, the dense branch's width; 0 for no dense branch."""
    num_experts: int
    """E, a perfect square: the router has sqrt(E) row keys and as many column keys."""
    num_experts_per_tok: int
    """K, from 1 to E."""
    hidden_act: str = "silu"
    """Of the experts and of the dense branch: "silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2" or "identity"."""
    norm_topk_prob: bool = False
    """Divide a token's K routing weights by their sum."""
    router_norm: Literal["batch", "rms", "none"] = "batch"
    """What the router sees: tokens after BatchNorm or RMSNorm, both without a learned scale, or as they are."""
    router_sync: bool = False
    """While training, take BatchNorm's statistics, and the loads that move ``router_bias``, over the tokens of all
    ranks of the default process group, if there is one. Every rank must then call the layer equally often.
    """
    router_aux_loss_coef: float = 0.0
    """Weight of the load-balancing loss in ``FlashMoE.router_loss``; 0 leaves it out."""
    router_z_loss_coef: float = 0.0
    """Weight of the router z-loss in ``FlashMoE.router_loss``; 0 leaves it out."""
    router_bias_update_rate: float = 0.0
    """How far a training forward moves each key's selection bias, against its load; 0 leaves the bias out."""
    track_expert_usage: bool = False
    """Count the pairs each expert receives, for ``FlashMoE.expert_usage()``."""
    sparse_grad: bool = False
    """Row-sparse gradients of ``down_embed`` and ``up_embed``, for ``torch.optim.SparseAdam``. DistributedDataParallel,
    FSDP2 and ``torch.nn.utils.clip_grad_norm_`` do not take them; ``flash_moe.modules.grad_norm.clip_grad_norm_`` does.
    """
    backend: Literal["auto", "triton", "torch", "reference"] = "auto"
    """Of all three ops; "auto" is triton for CUDA tensors, else torch."""

    def __post_init__(self) -> None:
        check_int("hidden_size", self.hidden_size, 1, 2**31 - 1)
        check_int("intermediate_size", self.intermediate_size, 0, 2**31 - 1)
        check_int("num_experts", self.num_experts, 1, 2**31 - 1)
        if math.isqrt(self.num_experts) ** 2 != self.num_experts:
            below = math.isqrt(self.num_experts)
            raise ValueError(
                f"num_experts: expected a perfect square (the router pairs sqrt(E) row keys with sqrt(E) column keys); "
                f"got {self.num_experts}, between {below**2} and {(below + 1) ** 2}"
            )
        check_int("num_experts_per_tok", self.num_experts_per_tok, 1, self.num_experts)
        check_activation(self.hidden_act)
        for name, value, allowed in (("router_norm", self.router_norm, NORMS), ("backend", self.backend, BACKENDS)):
            if value not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}; got {value!r}")
        for name in ("norm_topk_prob", "router_sync", "track_expert_usage", "sparse_grad"):
            check_bool(name, getattr(self, name))
        for name in ("router_aux_loss_coef", "router_z_loss_coef", "router_bias_update_rate"):
            check_coefficient(name, getattr(self, name))

    @property
    def num_expert_keys(self) -> int:
        """N, the square root of ``num_experts``."""
        return math.isqrt(self.num_experts)


class FlashMoE(nn.Module):
    """A dense gated MLP plus K of E one-neuron experts a token, picked by a Cartesian-product router.

    With x the tokens ``[T, H]``::

        router_logits = router_gate(router_norm(x)) as [2, T, N]
        scores, experts = top K of the pair sums of router_logits
        weights = exp(scores - log-sum-exp of both halves), divided by their sum over K with norm_topk_prob
        (with router_bias_update_rate, experts are the top K of router_logits + router_bias; weights as before)
        y = sum_k weights[k] * act(x . down_embed[e_k]) * up_embed[e_k]  +  down_proj(act(gate_proj x) * up_proj x)

    Scores and weights are float32, whatever the dtype of ``x``. Under autocast the router's norm and gate keep
    the parameters' dtype, and the MLP and the experts run in the autocast dtype.

    Attributes:
        router_loss: ``None``, or, while training with ``router_aux_loss_coef`` or ``router_z_loss_coef`` above 0,
            the weighted sum of those losses in the last forward: add it to the task's loss. Each forward replaces it.

    Initialisation, for inputs of unit variance: ``gate_proj``, ``up_proj``, ``router_gate`` and the rows of
    ``down_embed`` give unit-variance products; ``down_proj`` has standard deviation 1 / sqrt(I), and ``up_embed`` the
    one that makes the routed branch as large as the dense one, given how routing weights start (``expert_up_std``).
    """

    # Of the class, so that layers pickled before there was one have it, too.
    _last_inference: tuple[FlashMoEConfig, RepeatedInference] | None = None

    def __init__(self, config: FlashMoEConfig) -> None:
        super().__init__()
        self.config = config
        H, I, N = config.hidden_size, config.intermediate_size, config.num_expert_keys
        self.num_expert_keys = N
        if I > 0:
            self.gate_proj = nn.Linear(H, I, bias=False)
            self.up_proj = nn.Linear(H, I, bias=False)
            self.down_proj = nn.Linear(I, H, bias=False)
        self.router_norm = _router_norm(config)
        self.router_gate = nn.Linear(H, 2 * N, bias=False)
        self.down_embed = nn.Embedding(config.num_experts, H)
        self.up_embed = nn.Embedding(config.num_experts, H)
        self._router_loss = LossOnTheSide()
        if config.router_bias_update_rate > 0:
            self.register_buffer("router_bias", torch.zeros(2, N, dtype=torch.float32))
            # What the last training forwards chose by: a recomputation must choose the same, though the bias has moved.
            in_use = torch.zeros(MAX_WAITING, 2, 2, N, dtype=torch.float32)
            self.register_buffer("router_bias_in_use", in_use, persistent=False)
        if config.track_expert_usage:
            counts = torch.zeros(config.num_experts, dtype=torch.int64)
            self.register_buffer("expert_counts", counts, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as the class describes, and reset the norm's statistics and the usage counts."""
        config = self.config
        if isinstance(self.down_embed, QuantizedTable):
            raise ValueError("down_embed: expected a table to draw anew; got a quantized one; make another layer")
        if config.intermediate_size > 0:
            nn.init.normal_(self.gate_proj.weight, std=config.hidden_size**-0.5)
            nn.init.normal_(self.up_proj.weight, std=config.hidden_size**-0.5)
            nn.init.normal_(self.down_proj.weight, std=config.intermediate_size**-0.5)
        if isinstance(self.router_norm, nn.BatchNorm1d):
            self.router_norm.reset_parameters()
        nn.init.normal_(self.router_gate.weight, std=config.hidden_size**-0.5)
        nn.init.normal_(self.down_embed.weight, std=config.hidden_size**-0.5)
        nn.init.normal_(self.up_embed.weight, std=expert_up_std(config))
        if config.router_bias_update_rate > 0:
            cast(Tensor, self.router_bias).zero_()
            cast(Tensor, self.router_bias_in_use).zero_()
        if config.track_expert_usage:
            self.reset_expert_usage()

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply the layer.

        Args:
            hidden_states: ``[..., H]``, usually ``[B, S, H]`` or ``[T, H]``; T is the product of all but H.
            attention_mask: ``[...]`` as the leading dimensions, 0 or False for padding. A padded token takes no part in
                BatchNorm, losses and usage counts, its output is 0, and what it holds, NaN even, changes nothing else.
        Returns:
            ``y`` like ``hidden_states``, and ``router_logits [2, T, N]``: the gate products, before log-softmax.
        Raises:
            ValueError: a shape or device disagrees, one token alone is to be trained through BatchNorm, or the tables
                are quantized and a gradient is asked for.
        """
        weights = self._weights()
        is_inference = attention_mask is None and self._is_inference()
        if is_inference and (repeated := self._infer_again(hidden_states, weights)) is not None:
            return repeated
        self._check_input(hidden_states, weights)
        x = hidden_states.reshape(-1, self.config.hidden_size)
        token_mask = None if attention_mask is None else _token_mask(attention_mask, hidden_states)
        if token_mask is not None:
            # With their inputs zeroed, whatever they held, padded tokens are zero in every later product and gradient.
            x = x.masked_fill(~token_mask[:, None], 0.0)
        if is_inference and self._is_plain(x):
            y, router_logits = self._infer(x, weights)
            self._remember(hidden_states, weights)
            return y.view(hidden_states.shape), router_logits
        router_logits = self._router_logits(x, token_mask)
        y = self._mixture(x, router_logits, weights, token_mask)
        # No view of a tensor that nobody else has: an in-place operation on one would lose FSDP2's backward hook.
        return torch.ops.aten._unsafe_view(y, hidden_states.shape), router_logits

    @property
    def router_loss(self) -> Tensor | None:
        """``None``, or, while training with a coefficient above 0, the weighted sum of the last forward's losses."""
        return self._router_loss.value

    def expert_usage(self) -> ExpertUsage:
        """Usage since the last ``reset_expert_usage``, as tensors on the device; needs ``track_expert_usage``."""
        return summarize_usage(self._counts())

    def reset_expert_usage(self) -> None:
        self._counts().zero_()

    def quantize_tables(self, dtype: Literal["fp8", "int8"]) -> "FlashMoE":
        """Put ``down_embed`` and ``up_embed`` into 8 bits with a float32 scale a row, in place; returns the layer.

        "fp8" is float8_e4m3fn, "int8" is symmetric; a row's largest magnitude becomes the format's. The layer is for
        inference from then on: none of its parameters asks for a gradient, and conversions leave the tables alone.
        Its state has ``down_embed.scale`` and ``up_embed.scale`` ``[E]`` beside the weights, and loads into a layer
        that was quantized in the same way.

        Raises:
            ValueError: ``dtype`` is unknown, the tables are quantized already, or a weight is not finite.
        """
        quantize_tables(self, _TABLES, dtype)
        self.requires_grad_(False)
        return self

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in vars(self.config).items())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FlashMoE":
        # The bias stays in float32 when the layer is converted: in 16 bits its small steps would be lost.
        biases = {name: buffer for name, buffer in self._buffers.items() if name.startswith("router_bias")}
        super()._apply(fn, recurse)
        for name, exact in biases.items():
            converted = self._buffers[name]
            if exact is not None and converted is not None and converted.dtype != exact.dtype:
                self._buffers[name] = exact.to(converted.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # What a launch consists in can be neither copied nor pickled.
        return {**self.__dict__, "_last_inference": None}

    def _counts(self) -> Tensor:
        if not self.config.track_expert_usage:
            raise ValueError("track_expert_usage: expected True in FlashMoEConfig to ask for expert usage; got False")
        return cast(Tensor, self.expert_counts)

    def _weights(self) -> dict[str, Tensor]:
        """Every parameter by the name of its submodule, looked up once a call."""
        modules: dict[str, Any] = self._modules
        weights = {}
        for name in _DENSE_WEIGHTS if self.config.intermediate_size > 0 else _ROUTED_WEIGHTS:
            # Past nn.Module.__getattr__, which takes the host 0.7 us for a module and again for its parameter. A weight
            # that is no parameter, but computed or a view, is asked for in the ordinary way.
            module = modules[name]
            weight = module._parameters.get("weight")
            weights[name] = module.weight if weight is None else weight
        return weights

    def _check_input(self, hidden_states: Tensor, weights: dict[str, Tensor]) -> None:
        H = self.config.hidden_size
        check_tensor("hidden_states", hidden_states)
        if hidden_states.dim() < 2 or hidden_states.shape[-1] != H:
            raise ValueError(
                f"hidden_states: expected shape [..., {H}], 2 or more dimensions; got {tuple(hidden_states.shape)}"
            )
        check_same_device(hidden_states=hidden_states, router_gate=weights["router_gate"])
        if isinstance(self._modules["down_embed"], QuantizedTable):
            check_for_inference(self.training, hidden_states)
        dtype, device = hidden_states.dtype, hidden_states.device
        allowed = float_dtypes(self.config.backend)
        if not torch.is_autocast_enabled(device.type):
            check_dtype("hidden_states", hidden_states, (weights["router_gate"].dtype,))
            check_dtype("hidden_states", hidden_states, allowed)
            allowed = (dtype,)
        check_dtype("hidden_states", hidden_states, allowed)
        # All of them now: an op would notice too, but only after the norm's statistics have moved.
        for name, weight in weights.items():
            if weight.device != device or weight.dtype not in allowed:
                check_same_device(**{"hidden_states": hidden_states, f"{name}.weight": weight})
                if not isinstance(self._modules[name], QuantizedTable):
                    check_dtype(f"{name}.weight", weight, allowed)
        trains_norm = self.training and self.config.router_norm == "batch"
        if trains_norm and hidden_states.numel() == H and not self._across_ranks():
            raise ValueError(
                "hidden_states: expected 2 or more tokens, since BatchNorm cannot train on one; got 1; "
                'train on more tokens at a time, call eval(), or configure router_norm="rms" or "none"'
            )

    def _router_logits(self, x: Tensor, token_mask: Tensor | None) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            # Autocast would round the logits to 16 bits, and with them which experts win.
            with torch.autocast(x.device.type, enabled=False):
                return self._router_logits(x.to(self.router_gate.weight.dtype), token_mask)
        if token_mask is None and self._fuses_gate(x):
            products = token_batch_norm_gate(x, cast(nn.BatchNorm1d, self.router_norm), self.router_gate.weight)
        else:
            products = self.router_gate(self._normalize(x, token_mask))
        return products.view(-1, 2, self.num_expert_keys).transpose(0, 1)

    def _fuses_gate(self, x: Tensor) -> bool:
        """Whether Triton takes norm and gate in one product."""
        return self._has_plain_gate() and not self._across_ranks() and fuses_gate(x, self.config.backend)

    def _has_plain_gate(self) -> bool:
        """Whether norm and gate are plain ones, in the layer's own mode, that nobody watches."""
        modules: dict[str, Any] = self._modules
        norm, gate = modules["router_norm"], modules["router_gate"]
        return (
            type(norm) is nn.BatchNorm1d
            and type(gate) is nn.Linear
            and norm.training == self.training
            and not (_is_watched(norm) or _is_watched(gate))
        )

    def _normalize(self, x: Tensor, token_mask: Tensor | None) -> Tensor:
        across_ranks = self._across_ranks()
        if x.shape[0] == 0 and not across_ranks:
            return x  # BatchNorm refuses to train on nothing; its statistics stay as they are
        if self.training and isinstance(self.router_norm, nn.BatchNorm1d):
            return token_batch_norm(x, self.router_norm, token_mask, across_ranks=across_ranks)
        return self.router_norm(x)

    def _across_ranks(self) -> bool:
        return self.config.router_sync and self.training and spans_ranks()

    def _is_inference(self) -> bool:
        """Whether ``layer_inference`` may be the whole of this forward, if config and tensors suit it."""
        return not (self.training or torch.is_grad_enabled()) and self._has_plain_gate()

    def _is_plain(self, x: Tensor) -> bool:
        """Whether config and tensors suit ``layer_inference``."""
        config = self.config
        return (
            not torch.is_autocast_enabled(x.device.type)
            and config.intermediate_size > 0
            and "router_bias" not in self._buffers
            and not table_scales(self._modules["down_embed"], self._modules["up_embed"])
            and fuses_gate(x, config.backend)
        )

    def _infer_again(self, hidden_states: Tensor, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Outputs, if this call differs from one that was checked in nothing but addresses and numbers.

        The checks and the way to a kernel take the host longer than the kernel takes for one token.
        """
        if is_watched() or (last := self._last_inference) is None:
            return None
        config, inference = last
        tensors, eps = self._tensors(hidden_states, weights)
        if config is not self.config or not inference.takes(tensors, eps):
            return None
        self._router_loss.value = None
        return inference.launch(*tensors)

    def _remember(self, hidden_states: Tensor, weights: dict[str, Tensor]) -> None:
        """Make it possible to infer again, after this call of ``layer_inference``."""
        if is_watched() or self.config.track_expert_usage:
            return
        config, (tensors, eps) = self.config, self._tensors(hidden_states, weights)
        options = (config.num_experts_per_tok, config.norm_topk_prob, config.hidden_act)
        if (inference := repeated_inference(tensors, eps, *options)) is not None:
            self._last_inference = config, inference

    def _tensors(self, hidden_states: Tensor, weights: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], float]:
        """What ``layer_inference`` takes, in its op's order, and the norm's eps."""
        norm: Any = self._modules["router_norm"]
        router_gate, *others = weights.values()
        buffers = norm._buffers
        return (hidden_states, router_gate, buffers.get("running_mean"), buffers.get("running_var"), *others), norm.eps

    def _infer(self, x: Tensor, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        config, norm = self.config, cast(nn.BatchNorm1d, self.router_norm)
        y, router_logits, *experts = layer_inference(
            x,
            weights["router_gate"],
            (cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var), eps_of(norm)),
            weights["down_embed"],
            weights["up_embed"],
            (weights["gate_proj"], weights["up_proj"], weights["down_proj"]),
            config.num_experts_per_tok,
            norm_topk_prob=config.norm_topk_prob,
            hidden_act=config.hidden_act,
            wants_indices=config.track_expert_usage,
        )
        if experts:
            add_once(self._counts(), count_experts(experts[0], config.num_experts))
        return self._router_loss.keep(None, y), router_logits

    def _mixture(
        self, x: Tensor, router_logits: Tensor, parameters: dict[str, Tensor], token_mask: Tensor | None
    ) -> Tensor:
        config = self.config
        weights, experts = self._choose(router_logits)
        router_loss = self._account(router_logits, experts, token_mask)
        arguments = (x, parameters["down_embed"], parameters["up_embed"], experts, weights)
        options: dict[str, Any] = table_scales(self._modules["down_embed"], self._modules["up_embed"])
        options |= {name: getattr(config, name) for name in ("hidden_act", "backend", "sparse_grad")}
        if config.intermediate_size > 0:
            dense_weights = (parameters["gate_proj"], parameters["up_proj"], parameters["down_proj"])
            y = expert_mlp(*arguments, dense_weights, **options)
        else:
            y = flash_expert(*arguments, **options)
        return self._router_loss.keep(router_loss, y)

    def _choose(self, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Routing weights and experts, both ``[T, K]``."""
        config = self.config
        sizes = (self.num_expert_keys, config.num_experts_per_tok)
        options: dict[str, Any] = {"norm_topk_prob": config.norm_topk_prob, "backend": config.backend}
        if "router_bias" not in self._buffers:
            return flash_routing(router_logits, *sizes, **options)
        bias = cast(Tensor, self.router_bias)
        if self.training:
            bias = bias_in_forward(cast(Tensor, self.router_bias_in_use), router_logits, bias)
        return biased_routing(router_logits, bias, *sizes, **options)

    def _account(self, router_logits: Tensor, experts: Tensor, token_mask: Tensor | None) -> Tensor | None:
        """Count the experts' usage and move the selection bias; returns ``router_loss``."""
        config = self.config
        moves_bias = self.training and "router_bias" in self._buffers
        wants_aux = self.training and config.router_aux_loss_coef > 0
        wants_z = self.training and config.router_z_loss_coef > 0
        # float32 in 16-bit layers too; float64 stays for the reference backend.
        dtype = torch.promote_types(router_logits.dtype, torch.float32)
        token_weights = None if token_mask is None else token_mask.to(dtype)
        losses = []
        if wants_aux or moves_bias or config.track_expert_usage:
            counts = count_experts(experts, config.num_experts, token_mask)
            if config.track_expert_usage:
                add_once(self._counts(), counts)
            if moves_bias:
                bias = cast(Tensor, self.router_bias)
                update_bias(bias, counts, config.router_bias_update_rate, across_ranks=self._across_ranks())
            if wants_aux:
                log_probs = F.log_softmax(router_logits, dim=-1, dtype=dtype)
                losses.append(config.router_aux_loss_coef * load_balancing_loss(log_probs, counts, token_weights))
        if wants_z:
            losses.append(config.router_z_loss_coef * router_z_loss(router_logits, token_weights))
        return sum(losses[1:], start=losses[0]) if losses else None


def expert_up_std(config: FlashMoEConfig) -> float:
    """Standard deviation of ``up_embed`` at the start: 1 / sqrt(sum_k weight_k^2) for the weights routing starts with.

    Unit-variance logits make E sums of variance 2, and the k-th largest of those is near their quantile (k - 1/2) / E;
    a sum s has weight exp(s) / (N e^(1/2))^2. The dense branch's output has the mean square of act at unit-variance
    input, and so has a routed output whose squared weights, times this variance, sum to 1.
    """
    E, K = config.num_experts, config.num_experts_per_tok
    normal = NormalDist(sigma=math.sqrt(2))
    weights = [math.exp(normal.inv_cdf(1 - (k + 0.5) / E)) / (E * math.e) for k in range(K)]
    total = sum(weights) if config.norm_topk_prob else 1.0
    return total / math.sqrt(sum(weight**2 for weight in weights))


def _router_norm(config: FlashMoEConfig) -> nn.Module:
    if config.router_norm == "batch":
        return nn.BatchNorm1d(config.hidden_size, affine=False)
    if config.router_norm == "rms":
        return nn.RMSNorm(config.hidden_size, eps=1e-6, elementwise_affine=False)
    return nn.Identity()


def _is_watched(module: nn.Module) -> bool:
    before, after = module._forward_pre_hooks, module._forward_hooks
    return bool(before or after or module._backward_pre_hooks or module._backward_hooks)


def _token_mask(attention_mask: Tensor, hidden_states: Tensor) -> Tensor:
    check_shape("attention_mask", attention_mask, tuple(hidden_states.shape[:-1]), "[...]")
    check_same_device(hidden_states=hidden_states, attention_mask=attention_mask)
    return attention_mask.reshape(-1) != 0
