"""What ``flash-moe bench decode`` measures: a few tokens through several MoE layers, each with its own weights.

T tokens, H hidden size, I intermediate size, E experts, K experts a token.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flash_moe._moe_layer import MoELayer, Routing
from flash_moe.bench.cases import DECODE, Case
from flash_moe.bench.work import Work
from flash_moe.ops._reference.decode import decode_routing_reference, router_logits_reference
from flash_moe.testing import make_decode_inputs

# H, I, E, K, all with a softmax of the logits whose K best are renormalised.
MODELS = {"qwen3-30b-a3b": (2048, 768, 128, 8)}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
MAX_TOKENS = max(TOKENS)
SMALL = ("64x48x16x4", (1, 5))
SETS = ("anchors", "small")
# How the layer's weights are scaled, or "none". Tokens and router of an fp8 layer have the device's default dtype.
FORMATS = {"bfloat16": "none", "float16": "none", "float32": "none", "fp8_row": "row", "fp8_block": "block"}
# Eight layers of the reference model are ten times L2 even at one token, so none finds its weights there.
NUM_LAYERS = {"cuda": 8, "cpu": 2}
# Tokens to choose from, and of their logits' dtype, how many steps apart the K-th and the next are if they can be; see
# draw_tokens. At the reference model's sizes in bfloat16 half of the pool is.
POOL_TOKENS, CLEAR_STEPS = 4 * MAX_TOKENS, 4
# Of two: makes the deviation of the reference model's logits about 1, and keeps them exact in float32.
ROUTER_SCALE = 2**-3


@dataclass(frozen=True)
class DecodeCase(Case):
    """``sizes`` are T, H, I, E, K."""

    model: str = ""
    format: str = ""
    """A key of ``FORMATS``; ``dtype`` is that of the tokens."""

    @property
    def name(self) -> str:
        return f"{self.model}:T{self.T}"

    @property
    def by_letter(self) -> dict[str, int]:
        return dict(zip("THIEK", self.sizes, strict=True))

    @property
    def dtype_name(self) -> str:
        return self.format

    def describe(self) -> str:
        return f"{self.model}, T {self.T}"


class DecodeInputs(NamedTuple):
    tokens: Tensor
    """``[T, H]``"""
    layer: MoELayer
    logits: Tensor
    """``[T, E]``, exact: no order of the sums can give others."""
    is_tied: Tensor
    """``[T]``: the K-th and the next logit are equal, so that experts other than ours may be chosen, too."""
    pool_tied_share: float
    """Of all that the tokens were drawn from."""


def find_decode_cases(name: str | None, formats: tuple[str, ...], device_type: str) -> list[DecodeCase]:
    """``anchors`` (the default on a GPU), ``small`` (on a CPU), or a model such as ``qwen3-30b-a3b:T1,8``.

    Raises:
        ValueError: ``name`` is none of these.
    """
    default = torch.bfloat16 if device_type == "cuda" else torch.float32
    if name is None:
        name = "anchors" if device_type == "cuda" else "small"
    model: str
    tokens: tuple[int, ...]
    if name == "small":
        model, tokens = SMALL
    elif name in ("anchors", "sweep"):
        model, tokens = next(iter(MODELS)), TOKENS
    else:
        model, tokens = _parse(name)
    sizes = MODELS.get(model) or tuple(map(int, model.split("x")))
    cases = []
    for each in formats or (str(default).removeprefix("torch."),):
        dtype = default if each.startswith("fp8") else getattr(torch, each)
        cases += [DecodeCase(DECODE, (T, *sizes), dtype, model=model, format=each) for T in tokens]
    return cases


def _parse(name: str) -> tuple[str, tuple[int, ...]]:
    model, colon, some = name.partition(":T")
    counts = some.split(",") if colon else list(map(str, TOKENS))
    is_known = model in MODELS or re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3}", model)
    if not is_known or not all(count.isdecimal() and 1 <= int(count) <= MAX_TOKENS for count in counts):
        expected = f"{', '.join(SETS)}, or {', '.join(MODELS)} or sizes HxIxExK, with or without tokens as in"
        raise ValueError(
            f"case: expected one of {expected} {next(iter(MODELS))}:T1,8, at most {MAX_TOKENS}; got {name!r}"
        )
    return model, tuple(map(int, counts))


def make_pools(case: DecodeCase, device: torch.device) -> list[tuple[Tensor, MoELayer]]:
    """A layer and tokens to draw from, for each of the layers: the same ones at every T."""
    _, H, I, E, K = case.sizes
    pools = []
    for seed in range(NUM_LAYERS[device.type]):
        tokens, layer = make_decode_inputs(
            POOL_TOKENS, H, I, E, Routing(K), case.dtype, device, seed, scale=FORMATS[case.format]
        )
        pools.append((tokens, layer._replace(router_weight=layer.router_weight * ROUTER_SCALE)))
    return pools


def draw_tokens(case: DecodeCase, pool: Tensor, layer: MoELayer) -> DecodeInputs:
    """The first T tokens of ``pool`` whose choice of experts is clear; close ones, then ties, only where those run out.

    In bfloat16 one random row in fifteen ties at 128 experts of which 8 are chosen. Which experts it takes is a matter
    of taste, and where the two logits are a step apart, of whether cuBLAS adds up parts of a sum in bfloat16:
    competitors would differ in what they compute.
    """
    logits = router_logits_reference(pool, layer.router_weight)
    K = layer.routing.num_experts_per_tok
    ranked = logits.float().sort(dim=-1, descending=True).values
    last, following = ranked[:, K - 1 : -1][:, :1], ranked[:, K:][:, :1]  # K = E leaves nothing to tie with
    is_tied = (last == following).any(dim=-1)
    is_close = (last - following <= CLEAR_STEPS * torch.finfo(logits.dtype).eps * last.abs()).any(dim=-1)
    chosen = (is_tied.int() + is_close.int()).argsort(stable=True)[: case.T]
    share = is_tied.double().mean().item()
    return DecodeInputs(pool[chosen], layer, logits[chosen], is_tied[chosen], share)


def count_experts(inputs: DecodeInputs) -> int:
    """Distinct experts that the tokens take."""
    _, indices = decode_routing_reference(inputs.logits, inputs.layer.routing)
    return int(indices.unique().numel())


def count_decode_work(case: DecodeCase, inputs: list[DecodeInputs]) -> Work:
    """Of a layer, the mean over all: router, weights and scales of the experts hit, tokens and output, each once."""
    T, H, I, E, K = case.sizes
    layer = inputs[0].layer
    tensors = (layer.gate_up_proj, layer.down_proj, layer.gate_up_scale, layer.down_scale)
    expert_nbytes = sum(x[0].numel() * x.element_size() for x in tensors if x is not None)
    hit = sum(map(count_experts, inputs))
    nbytes = (E * H + 2 * T * H) * case.dtype.itemsize + hit * expert_nbytes // len(inputs)
    return Work(nbytes=nbytes, flops=2 * T * E * H + 6 * T * K * H * I)
