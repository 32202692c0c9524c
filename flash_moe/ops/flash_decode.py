"""One call for a whole gated-FFN MoE layer at decode: router, K experts a token, an optional shared expert."""

from collections.abc import Hashable
from importlib import import_module
from types import ModuleType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from flash_moe._activations import check_activation
from flash_moe._backend import check_triton, why_not_triton
from flash_moe._checks import (
    check_bool,
    check_coefficient,
    check_dtype,
    check_int,
    check_pairs,
    check_same_device,
    check_shape,
    check_tensor,
    float_dtypes,
)
from flash_moe._moe_layer import SCALE_BLOCK, SCORINGS, MoELayer, NoRoomError, Routing, SharedExpert
from flash_moe.ops._reference.decode import decode_reference
from flash_moe.ops._register import PLAIN_TYPES, is_watched, register_op
from flash_moe.schedule.policies import POLICIES
from flash_moe.schedule.trace import Trace

BACKENDS = ("auto", "triton", "torch", "reference")
# The arguments that are tensors, in the order of the op's schema.
_TENSORS = (
    "hidden_states", "router_weight", "gate_up_proj", "down_proj", "correction_bias", "shared_gate_proj",
    "shared_up_proj", "shared_down_proj", "shared_expert_gate", "gate_up_scale", "down_scale",
)  # fmt: skip
# Launches prepared for calls that have passed every check, by all that the checks look at. Without them the host would
# take longer than the GPU for few tokens.
_repeatable: WeakValueDictionary[Hashable, Any] = WeakValueDictionary()


def flash_decode(
    hidden_states: Tensor,
    router_weight: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    num_experts_per_tok: int,
    *,
    norm_topk_prob: bool = True,
    scoring: str = "softmax",
    correction_bias: Tensor | None = None,
    num_expert_groups: int = 1,
    topk_groups: int = 1,
    routed_scaling_factor: float = 1.0,
    hidden_act: str = "silu",
    shared_gate_proj: Tensor | None = None,
    shared_up_proj: Tensor | None = None,
    shared_down_proj: Tensor | None = None,
    shared_expert_gate: Tensor | None = None,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    backend: str = "auto",
    policy: str = "auto",
    trace: Trace | None = None,
    return_router_logits: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A MoE layer of gated experts: out[t] = sum_k w[t,k] * down[e] (act(gate[e] x[t]) * up[e] x[t]), e = e[t,k].

    Router logits, the choice of K experts, their weights, both products and the weighted sum are one call, for
    inference only. The layouts are those of transformers, so that a model's weights are used as they are.

    Args:
        hidden_states: ``[T, H]``, float32, float16 or bfloat16; T may be 0.
        router_weight: ``[E, H]``. Logits are rounded to its dtype, that of ``hidden_states`` or float32; scores are
            float32. Ties go to the lowest expert id.
        gate_up_proj: ``[E, 2I, H]``, gate rows, then up rows, in the dtype of ``hidden_states``, or float8_e4m3fn.
        down_proj: ``[E, H, I]``, likewise.
        num_experts_per_tok: K, from 1 to the number of experts that groups leave to choose from.
        norm_topk_prob: let the K weights of a token sum to 1, before ``routed_scaling_factor``.
        scoring: "softmax" over the E logits of a token, or "sigmoid" of each.
        correction_bias: ``[E]``, added to the scores to choose experts (and groups), and to nothing else.
        num_expert_groups, topk_groups: choose from the ``topk_groups`` groups of consecutive experts whose two best
            biased scores have the largest sums. E must be a multiple of the number of groups.
        routed_scaling_factor: multiplies the weights of the routed experts.
        hidden_act: "silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2" or "identity".
        shared_gate_proj, shared_up_proj, shared_down_proj: ``[Is, H]``, ``[Is, H]`` and ``[H, Is]``: an expert that
            every token takes with weight 1, or, with ``shared_expert_gate [1, H]``, sigmoid(shared_expert_gate . x).
        gate_up_scale, down_scale: float32, with float8 weights ``[E, R, C]``: ``[E, R]``, a scale a row, or
            ``[E, ceil(R / 128), ceil(C / 128)]``, a scale a block of 128 x 128.
        backend: "triton" (one launch, at most 128 tokens and 1024 experts), "torch" (CPU: the schedule, interpreted;
            CUDA: PyTorch's own kernels, without waiting for the device), or "reference". "auto" is "triton" on a GPU
            where it takes the call and its programs have room at once, a launch for every 128 tokens of a call on more
            for which PyTorch has no grouped product, else "torch". An explicit choice never falls back.
        policy: which program takes which task: "static", "queue" or "actor", which give the same bits. "auto" is what
            measured best; in one launch, for up to six tokens, eight in float32, of a layer without groups and shared
            expert, with at most 16 experts a token of 1024 and 64 pairs in all, a kernel without a schedule, whose sums
            have an order of their own. Only "auto" where no schedule runs.
        trace: a ``Trace`` to fill with every task and every wait, for which the call waits; only where a schedule runs,
            and always of one: where "auto" would take the kernel without, the output differs by roundings then.
        return_router_logits: return the logits, too.
    Returns:
        ``[T, H]`` in ``hidden_states.dtype``, accumulated in float32; or that and the logits ``[T, E]``. The same bits
        on every run with the same ``policy``, and with or without a ``trace`` under one that is asked for by name.
    Raises:
        ValueError: a shape or device disagrees, an argument is out of range or belongs to another one that is missing,
            or a gradient would be asked for; the message names the argument, what was expected and what came.
        TypeError: a dtype or type is not supported.
    Source: the routing of DeepSeek-V3, arXiv:2412.19437; the schedule, docs/flash_decode.md.
    """
    given = (
        hidden_states, router_weight, gate_up_proj, down_proj, correction_bias, shared_gate_proj, shared_up_proj,
        shared_down_proj, shared_expert_gate, gate_up_scale, down_scale,
    )  # fmt: skip
    options = (
        num_experts_per_tok, norm_topk_prob, scoring, num_expert_groups, topk_groups, routed_scaling_factor,
        hidden_act, policy, backend, return_router_logits,
    )  # fmt: skip
    signature = _signature(given, options) if trace is None and backend in ("auto", "triton") else None
    if signature is not None and (prepared := _prepared_for(signature)) is not None:
        results: Tensor | tuple[Tensor, Tensor] | None = prepared.again(given, return_router_logits)
        if results is not None:
            return results
    routing = Routing(
        num_experts_per_tok, norm_topk_prob, scoring, correction_bias, num_expert_groups, topk_groups,
        routed_scaling_factor,
    )  # fmt: skip
    check_activation(hidden_act)
    check_bool("return_router_logits", return_router_logits)
    _check_weights(hidden_states, router_weight, gate_up_proj, down_proj, backend)
    _check_routing(routing, hidden_states.shape[0], router_weight.shape[0], backend)
    _check_scale("gate_up", gate_up_proj, gate_up_scale, hidden_states, backend)
    _check_scale("down", down_proj, down_scale, hidden_states, backend)
    shared = _check_shared(hidden_states, shared_gate_proj, shared_up_proj, shared_down_proj, shared_expert_gate)
    layer = MoELayer(router_weight, gate_up_proj, down_proj, routing, hidden_act, shared, gate_up_scale, down_scale)
    _check_execution(hidden_states, layer, backend, policy, trace)
    tensors = dict(zip(_TENSORS, given, strict=True))
    check_same_device(**{name: x for name, x in tensors.items() if x is not None})
    _check_no_gradient(tensors)
    if backend == "reference":
        out, logits = decode_reference(hidden_states, layer)
    else:
        x, *weights = (None if x is None else x.contiguous() for x in tensors.values())
        if trace is None:
            out, logits = torch.ops.flash_moe.flash_decode(x, *weights, *_options(layer), policy, backend)
            if signature is not None:
                _remember(signature, hidden_states, layer, policy, backend)
        else:  # an op takes no Python objects
            name = _backend_of(hidden_states, layer, backend)
            out, logits = _implementation(name).decode_traced(x, layer, policy, trace)
    return (out, logits) if return_router_logits else out


def _signature(tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> Hashable | None:
    """All that the checks look at; ``None`` where a call has to be an op, or a tensor is not as kernels take them."""
    if is_watched():
        return None
    is_grad_enabled = torch.is_grad_enabled()
    parts = [options, *map(type, options)]  # 1, 1.0 and True are equal
    for x in tensors:
        if x is None:
            parts.append(None)
            continue
        is_plain = type(x) in PLAIN_TYPES and x.layout is torch.strided and x.is_contiguous() and not x.is_neg()
        if not is_plain or (is_grad_enabled and x.requires_grad):
            return None
        parts += (x.shape, x.dtype, x.device)
    return tuple(parts)


def _prepared_for(signature: Hashable) -> Any:
    try:
        return _repeatable.get(signature)
    except TypeError:  # an option that cannot be hashed, which its check refuses
        return None


def _remember(signature: Hashable, x: Tensor, layer: MoELayer, policy: str, backend: str) -> None:
    if _backend_of(x, layer, backend) == "triton":
        prepared = _implementation("triton").prepared_for(x, layer, policy)
        if prepared is not None:
            _repeatable[signature] = prepared


def _check_weights(x: Tensor, router_weight: Tensor, gate_up_proj: Tensor, down_proj: Tensor, backend: str) -> None:
    check_shape("hidden_states", x, (None, None), "[T, H]")
    check_dtype("hidden_states", x, float_dtypes(backend))
    H = x.shape[1]
    check_shape("router_weight", router_weight, (None, H), "[E, H]")
    check_dtype("router_weight", router_weight, (x.dtype, torch.promote_types(x.dtype, torch.float32)))
    E = router_weight.shape[0]
    check_shape("down_proj", down_proj, (E, H, None), "[E, H, I]")
    I = down_proj.shape[2]
    check_shape("gate_up_proj", gate_up_proj, (E, 2 * I, H), "[E, 2I, H]")
    for name, size in (("hidden_states", H), ("router_weight", E), ("down_proj", I)):
        if size == 0:
            raise ValueError(f"{name}: expected no size of 0 but that of T; got H {H}, E {E}, I {I}")


def _check_routing(routing: Routing, T: int, E: int, backend: str) -> None:
    check_bool("norm_topk_prob", routing.norm_topk_prob)
    if routing.scoring not in SCORINGS:
        raise ValueError(f"scoring: expected one of {', '.join(SCORINGS)}; got {routing.scoring!r}")
    check_int("num_expert_groups", routing.num_expert_groups, 1, E)
    if E % routing.num_expert_groups:
        raise ValueError(f"num_expert_groups: expected a divisor of {E} experts; got {routing.num_expert_groups}")
    check_int("topk_groups", routing.topk_groups, 1, routing.num_expert_groups)
    check_int(
        "num_experts_per_tok", routing.num_experts_per_tok, 1, E // routing.num_expert_groups * routing.topk_groups
    )
    check_pairs("hidden_states", T, routing.num_experts_per_tok)
    check_coefficient("routed_scaling_factor", routing.routed_scaling_factor)
    if routing.correction_bias is not None:
        check_shape("correction_bias", routing.correction_bias, (E,), "[E]")
        check_dtype("correction_bias", routing.correction_bias, float_dtypes(backend))


def _check_scale(name: str, weights: Tensor, scale: Tensor | None, x: Tensor, backend: str) -> None:
    if scale is None:
        check_dtype(f"{name}_proj", weights, (x.dtype,))
        return
    check_dtype(f"{name}_proj", weights, (torch.float8_e4m3fn,))
    check_tensor(f"{name}_scale", scale)
    check_dtype(f"{name}_scale", scale, (torch.promote_types(x.dtype, torch.float32),))
    E, R, C = weights.shape
    if scale.dim() == 3:
        blocks = (E, -(-R // SCALE_BLOCK), -(-C // SCALE_BLOCK))
        check_shape(f"{name}_scale", scale, blocks, "[E, blocks of rows, blocks of columns]")
    else:
        check_shape(f"{name}_scale", scale, (E, R), "[E, rows]")


def _check_shared(
    x: Tensor, gate_proj: Tensor | None, up_proj: Tensor | None, down_proj: Tensor | None, gate: Tensor | None
) -> SharedExpert | None:
    projections = {"shared_gate_proj": gate_proj, "shared_up_proj": up_proj, "shared_down_proj": down_proj}
    missing = [name for name, each in projections.items() if each is None]
    if len(missing) == 3 and gate is None:
        return None
    if gate_proj is None or up_proj is None or down_proj is None:
        given = [name for name in (*projections, "shared_expert_gate") if name not in missing]
        raise ValueError(f"{missing[0]}: expected all three projections of the shared expert; got only {given}")
    H = x.shape[1]
    check_shape("shared_gate_proj", gate_proj, (None, H), "[Is, H]")
    Is = gate_proj.shape[0]
    if Is == 0:
        raise ValueError("shared_gate_proj: expected at least 1 row; got 0; leave the shared expert out instead")
    check_shape("shared_up_proj", up_proj, (Is, H), "[Is, H]")
    check_shape("shared_down_proj", down_proj, (H, Is), "[H, Is]")
    if gate is not None:
        check_shape("shared_expert_gate", gate, (1, H), "[1, H]")
    for name, each in (*projections.items(), ("shared_expert_gate", gate)):
        if each is not None:
            check_dtype(name, each, (x.dtype,))
    return SharedExpert(gate_proj, up_proj, down_proj, gate)


def _check_execution(x: Tensor, layer: MoELayer, backend: str, policy: str, trace: object) -> None:
    """The schedule runs in one launch, or where "torch" is given CPU tensors; else there is nothing to choose."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}; got {backend!r}")
    if policy not in ("auto", *POLICIES):
        raise ValueError(f"policy: expected one of auto, {', '.join(POLICIES)}; got {policy!r}")
    if trace is not None and not isinstance(trace, Trace):
        raise TypeError(f"trace: expected a Trace or None; got {type(trace).__name__}")
    if backend == "triton":
        check_triton(x.device.type)
    if trace is not None and backend == "triton" and not x.is_cuda:
        raise ValueError(
            'trace: expected None with backend="triton" in Triton\'s interpreter, which has no clock; got a Trace'
        )
    if (policy == "auto" and trace is None) or _backend_of(x, layer, backend) == "triton":
        return
    if backend == "reference" or x.device.type != "cpu":
        where = f'backend="{backend}"' if backend == "reference" else f"device {x.device}"
        if policy != "auto":
            raise ValueError(f"policy: expected 'auto' with {where}, which runs no schedule; got {policy!r}")
        raise ValueError(f"trace: expected None with {where}, which runs no schedule; got a Trace")


def _backend_of(x: Tensor, layer: MoELayer, backend: str) -> str:
    """What "auto" is: one launch on a GPU wherever it takes the call."""
    if backend != "auto":
        return backend
    return "triton" if _kernel_takes(x, layer) else "torch"


def _kernel_takes(x: Tensor, layer: MoELayer) -> bool:
    return x.is_cuda and why_not_triton("cuda") is None and _implementation("triton").takes(x, layer)


def _check_no_gradient(tensors: dict[str, Tensor | None]) -> None:
    if not torch.is_grad_enabled():
        return
    for name, x in tensors.items():
        if x is not None and x.requires_grad:
            raise ValueError(
                f"{name}: expected no gradient to be asked for, since flash_decode is for inference only; got "
                "requires_grad=True; call it under torch.no_grad() or torch.inference_mode()"
            )


def _options(layer: MoELayer) -> tuple[Any, ...]:
    routing = layer.routing
    return (
        routing.num_experts_per_tok, routing.norm_topk_prob, routing.scoring, routing.num_expert_groups,
        routing.topk_groups, float(routing.routed_scaling_factor), layer.hidden_act,
    )  # fmt: skip


def _unflatten(
    router_weight: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    correction_bias: Tensor | None,
    shared_gate_proj: Tensor | None,
    shared_up_proj: Tensor | None,
    shared_down_proj: Tensor | None,
    shared_expert_gate: Tensor | None,
    gate_up_scale: Tensor | None,
    down_scale: Tensor | None,
    num_experts_per_tok: int,
    norm_topk_prob: bool,
    scoring: str,
    num_expert_groups: int,
    topk_groups: int,
    routed_scaling_factor: float,
    hidden_act: str,
) -> MoELayer:
    routing = Routing(
        num_experts_per_tok, norm_topk_prob, scoring, correction_bias, num_expert_groups, topk_groups,
        routed_scaling_factor,
    )  # fmt: skip
    shared = None
    if shared_gate_proj is not None and shared_up_proj is not None and shared_down_proj is not None:
        shared = SharedExpert(shared_gate_proj, shared_up_proj, shared_down_proj, shared_expert_gate)
    return MoELayer(router_weight, gate_up_proj, down_proj, routing, hidden_act, shared, gate_up_scale, down_scale)


def _implementation(backend: str) -> ModuleType:
    return import_module(f"flash_moe.ops._{backend}.decode")


def _forward(hidden_states: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *flat, policy, backend = arguments
    layer = _unflatten(*flat)
    name = _backend_of(hidden_states, layer, backend)
    try:
        if backend == "auto" and name == "torch" and _goes_in_pieces(hidden_states, layer):
            return _in_pieces(hidden_states, layer)
        return _implementation(name).decode_forward(hidden_states, layer, policy)
    except NoRoomError:
        if backend != "auto":
            raise
        return _implementation("torch").decode_forward(hidden_states, layer, "auto")


def _goes_in_pieces(x: Tensor, layer: MoELayer) -> bool:
    """Whether it is too many tokens for one launch, each piece is not, and PyTorch has no grouped product for them.

    Without one, PyTorch multiplies every token with every expert in float32.
    """
    if not _kernel_takes(x[:1], layer) or x.shape[0] <= _implementation("triton").MAX_TOKENS:
        return False
    return not _implementation("torch").fits_grouped_products(x, layer)


def _in_pieces(x: Tensor, layer: MoELayer) -> tuple[Tensor, Tensor]:
    kernel = _implementation("triton")
    pieces = [kernel.decode_forward(piece, layer, "auto") for piece in x.split(kernel.MAX_TOKENS)]
    return torch.cat([out for out, _ in pieces]), torch.cat([logits for _, logits in pieces])


def _forward_fake(hidden_states: Tensor, router_weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden_states), router_weight.new_empty(hidden_states.shape[0], router_weight.shape[0])


register_op(
    "flash_decode(Tensor hidden_states, Tensor router_weight, Tensor gate_up_proj, Tensor down_proj, "
    "Tensor? correction_bias, Tensor? shared_gate_proj, Tensor? shared_up_proj, Tensor? shared_down_proj, "
    "Tensor? shared_expert_gate, Tensor? gate_up_scale, Tensor? down_scale, int num_experts_per_tok, "
    "bool norm_topk_prob, str scoring, int num_expert_groups, int topk_groups, float routed_scaling_factor, "
    "str hidden_act, str policy, str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
