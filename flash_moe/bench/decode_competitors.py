"""Who runs a decode layer: flash_decode by backend and policy, transformers' block, torch.compile, serving engines.

Each binds a layer and its tokens to a call of no arguments that returns the output alone. All use the same weights,
with no copy: the layouts are the same everywhere.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_moe._backend import why_not_triton
from flash_moe.bench.competitors import Lazy, compile_function, why_not
from flash_moe.bench.decode_cases import DecodeCase, DecodeInputs
from flash_moe.ops.flash_decode import flash_decode
from flash_moe.schedule.policies import POLICIES
from flash_moe.testing import decode_arguments

Call = Callable[[], Tensor]

OURS = ("triton", "torch")
EXPERTS_IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
TRANSFORMERS = tuple(f"transformers_{name}" for name in EXPERTS_IMPLEMENTATIONS)
PEERS = {"vllm": "vllm", "sglang": "sglang"}
NAMES = (*OURS, "reference", *TRANSFORMERS, "torch_compile", *PEERS)
# Both copy every pair's weights: 1.2 GB at 16 tokens of the reference model, and by then they are the slowest but one.
GATHERED_TOKENS = 16
GATHERING = ("transformers_batched_mm", "torch_compile")
# Compiling takes longer than all else; --backend torch_compile compiles any.
COMPILED_TOKENS = (1, 16)
# Loops over the experts hit, which the host has to know: milliseconds a layer, and nothing that a graph could hold.
LOOPS = ("reference", "transformers_eager")


@dataclass(frozen=True)
class DecodeCompetitor:
    name: str
    bind: Callable[[DecodeInputs], Call]
    backend: str | None = None
    policy: str | None = None
    """Both ``flash_decode``'s, of ours."""

    @property
    def is_ours(self) -> bool:
        return self.backend is not None

    @property
    def is_loop(self) -> bool:
        return self.name in LOOPS


@dataclass(frozen=True)
class Absence:
    """Who does not take a case, and why."""

    name: str
    reason: str


def check_names(names: tuple[str, ...], device: torch.device) -> None:
    """Raise ``ValueError`` where one of ``names`` is unknown, or cannot run here."""
    for name in names:
        if name not in NAMES:
            raise ValueError(f"backend: expected one of {', '.join(NAMES)}; got {name!r}")
        if reason := why_not_decode(name, device):
            raise ValueError(f"backend: {name} cannot run here: {reason}")


def why_not_decode(name: str, device: torch.device) -> str | None:
    """None where ``name`` can run on ``device``, else the reason."""
    if name == "triton":
        return why_not_triton(device.type)
    if name == "torch_compile":
        return why_not(name, device)
    if name in TRANSFORMERS:
        return None if find_spec("transformers") else "transformers is not installed"
    if name in PEERS:
        if device.type != "cuda":
            return "its kernels need a CUDA GPU"
        return None if find_spec(PEERS[name]) else f"{PEERS[name]} is not installed"
    return None


def find_decode_competitors(
    case: DecodeCase, first: DecodeInputs, device: torch.device, names: tuple[str, ...], policies: tuple[str, ...]
) -> list[DecodeCompetitor | Absence]:
    """Those of ``names``, by default all that can run here, each a competitor or why it does not take ``case``."""
    chosen = names or tuple(name for name in NAMES if name != "reference" or device.type == "cpu")
    found: list[DecodeCompetitor | Absence] = []
    for name in chosen:
        if why_not_decode(name, device):
            continue
        if name == "torch_compile" and not names and (device.type == "cpu" or case.T not in COMPILED_TOKENS):
            continue
        if name in OURS:
            found += _find_ours(name, first, policies)
        elif name in GATHERING and case.T > GATHERED_TOKENS:
            found.append(Absence(name, f"copies the weights of every pair: at most {GATHERED_TOKENS} tokens"))
        elif first.layer.gate_up_scale is not None and name != "reference":
            found.append(Absence(name, "is measured with weights of 16 bits or more"))
        else:
            found.append(DecodeCompetitor(name, _binder(name)))
    return found


def bind_block(inputs: DecodeInputs, experts_implementation: str) -> Any:
    """transformers' Qwen3 MoE block around the layer's own weights."""
    layer = inputs.layer
    E, H, I = layer.down_proj.shape
    block_class, config_class = _qwen3()
    config = config_class(
        hidden_size=H, moe_intermediate_size=I, num_experts=E, hidden_act=layer.hidden_act,
        num_experts_per_tok=layer.routing.num_experts_per_tok, norm_topk_prob=layer.routing.norm_topk_prob,
        experts_implementation=experts_implementation,
    )  # fmt: skip
    with torch.device("meta"):
        block = block_class(config).eval()
    block.gate.weight = nn.Parameter(layer.router_weight, requires_grad=False)
    block.experts.gate_up_proj = nn.Parameter(layer.gate_up_proj, requires_grad=False)
    block.experts.down_proj = nn.Parameter(layer.down_proj, requires_grad=False)
    return block


def _find_ours(backend: str, first: DecodeInputs, policies: tuple[str, ...]) -> list[DecodeCompetitor | Absence]:
    """A competitor for each policy that ``backend`` takes; where it runs no schedule, one for the backend itself.

    One launch has one for "auto", too, which is a kernel of its own for a few tokens.
    """
    found: list[DecodeCompetitor | Absence] = []
    for policy in policies or (("auto", *POLICIES) if backend == "triton" else POLICIES):
        if (reason := _refusal(backend, policy, first)) is None:
            found.append(_ours(backend, policy))
        else:
            found.append(Absence(f"{backend}_{policy}", reason))
    if policies or not all(isinstance(each, Absence) for each in found):
        return found
    reason = _refusal(backend, "auto", first)
    return [_ours(backend, "auto") if reason is None else Absence(backend, reason)]


def _refusal(backend: str, policy: str, first: DecodeInputs) -> str | None:
    """What the op says against this call. A call that fails in another way is taken, and will fail in its row."""
    try:
        bind_ours(backend, policy, first)()
    except ValueError as error:
        return str(error)
    except Exception:
        return None
    return None


def bind_ours(backend: str, policy: str, inputs: DecodeInputs, **options: Any) -> Callable[[], Any]:
    arguments = decode_arguments(inputs.layer)
    return partial(flash_decode, inputs.tokens, **arguments, backend=backend, policy=policy, **options)


def _ours(backend: str, policy: str) -> DecodeCompetitor:
    name = backend if policy == "auto" else f"{backend}_{policy}"
    return DecodeCompetitor(name, partial(bind_ours, backend, policy), backend, policy)


def _binder(name: str) -> Callable[[DecodeInputs], Call]:
    if name == "reference":
        return partial(bind_ours, "reference", "auto")
    if name == "torch_compile":
        compiled = Lazy(partial(compile_function, gathered_decode))
        return lambda inputs: partial(compiled, inputs.tokens, *_weights(inputs), inputs.layer.routing[0])
    if name in TRANSFORMERS:
        return partial(_bind_transformers, name.removeprefix("transformers_"))
    return partial(_bind_peer, name, {"vllm": _make_vllm, "sglang": _make_sglang}[name])


def _weights(inputs: DecodeInputs) -> tuple[Tensor, Tensor, Tensor]:
    return inputs.layer.router_weight, inputs.layer.gate_up_proj, inputs.layer.down_proj


def gathered_decode(x: Tensor, router_weight: Tensor, gate_up_proj: Tensor, down_proj: Tensor, K: int) -> Tensor:
    """The reference with the chosen experts' weights gathered, since a compiled graph ends where the host loops."""
    logits = F.linear(x, router_weight).float()
    chosen, indices = logits.topk(K, dim=-1)
    weights, ids = chosen.softmax(dim=-1), indices.flatten()
    pairs = x.repeat_interleave(K, dim=0)[..., None]
    gate, up = torch.bmm(gate_up_proj[ids], pairs)[..., 0].chunk(2, dim=-1)
    activated = (F.silu(gate.float()) * up.float()).to(x.dtype)
    products = torch.bmm(down_proj[ids], activated[..., None]).view(*indices.shape, -1)
    return (products.float() * weights[..., None]).sum(dim=1).to(x.dtype)


@lru_cache
def _qwen3() -> tuple[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what transformers says of other packages while it is imported
        module = import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
        return module.Qwen3MoeSparseMoeBlock, import_module("transformers").Qwen3MoeConfig


def _bind_transformers(experts_implementation: str, inputs: DecodeInputs) -> Call:
    block, tokens = bind_block(inputs, experts_implementation), inputs.tokens[None]
    return lambda: block(tokens)[0]


def _bind_peer(name: str, make: Callable[[DecodeInputs], Call], inputs: DecodeInputs) -> Call:
    """Peers' interfaces change from version to version: another one than ours is no reason to fail."""
    try:
        call = make(inputs)
        call()
    except (ImportError, AttributeError, TypeError) as error:
        raise NotImplementedError(f"{name} has another interface here: {error}") from None
    return call


def _make_vllm(inputs: DecodeInputs) -> Call:
    fused_moe = import_module("vllm.model_executor.layers.fused_moe")
    x, (router_weight, gate_up_proj, down_proj) = inputs.tokens, _weights(inputs)
    K, renormalize = inputs.layer.routing[:2]

    def call() -> Tensor:
        weights, indices, *_ = fused_moe.fused_topk(x, F.linear(x, router_weight), K, renormalize)
        return fused_moe.fused_experts(x, gate_up_proj, down_proj, weights, indices)

    return call


def _make_sglang(inputs: DecodeInputs) -> Call:
    moe = "sglang.srt.layers.moe"
    fused_moe = import_module(f"{moe}.fused_moe_triton.fused_moe").fused_moe
    runner_config = import_module(f"{moe}.moe_runner").MoeRunnerConfig(inplace=False)
    topk = import_module(f"{moe}.topk")
    x, (router_weight, gate_up_proj, down_proj) = inputs.tokens, _weights(inputs)
    K, renormalize = inputs.layer.routing[:2]
    config = topk.TopKConfig(top_k=K, renormalize=renormalize)

    def call() -> Tensor:
        chosen = topk.select_experts(x, F.linear(x, router_weight), config)
        return fused_moe(x, gate_up_proj, down_proj, chosen, moe_runner_config=runner_config)

    return call
