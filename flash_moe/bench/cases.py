"""What is measured: sizes, dtype and routing of every case, and its random inputs.

T tokens, H hidden size, I intermediate size, E experts, K experts a token, N expert keys a half (E = N * N).
"""

from dataclasses import dataclass
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_moe.modules.flash_moe import FlashMoE, FlashMoEConfig
from flash_moe.testing import make_expert_inputs, make_mlp_inputs, make_router_inputs

# The letters of a case's sizes, and the name its rows have in the documents' tables.
LETTERS = {"router": "TNK", "expert": "THEK", "mlp": "THI", "layer": "THIEK"}
# flash_decode's cases are in decode_cases.py: several layers of a model, at several dtypes of weights and tokens.
DECODE = "decode"
OP_NAMES = {
    "router": "flash_router", "expert": "flash_expert", "mlp": "flash_mlp", "layer": "FlashMoE", DECODE: "flash_decode",
}  # fmt: skip
ROUTINGS = ("uniform", "zipf", "hot")
# Up to this many tokens a call is bound by latency: it is timed on an idle GPU, and once more replayed in a CUDA graph.
LATENCY_BOUND_TOKENS = 64

Sizes = tuple[int, ...]

_MAIN_EXPERT = (4096, 1024, 16384, 64)
# The default on a GPU. The last two expert cases have so many tokens an expert that dense products beat gathering.
ANCHORS: dict[str, tuple[Sizes, ...]] = {
    "router": ((4096, 64, 8), (4096, 128, 64), (32768, 128, 16), (4096, 320, 512), (1, 128, 64)),
    "expert": (
        _MAIN_EXPERT,
        (4096, 1024, 102400, 512),
        (16384, 1024, 102400, 512),
        (1024, 1024, 102400, 512),
        (1024, 1024, 4096, 32),
        (1024, 1024, 65536, 32),
        (8192, 2048, 1048576, 64),
        (1, 1024, 16384, 64),
        (4096, 1024, 1024, 64),
        (4096, 1024, 4096, 128),
    ),
    # The last has the active arithmetic of the layer at T 4096: 3 I and 2 K + 2 N rows of H a token.
    "mlp": ((4096, 1024, 4096), (16384, 1024, 1024), (8192, 2048, 8192), (4096, 1024, 4224)),
    "layer": tuple((T, 1024, 4096, 16384, 64) for T in (1, 2, 4, 8, 16, 32, 64, *(4**i for i in range(4, 9)))),
}
# For the pictures: T alone, then N or E alone.
SWEEP: dict[str, tuple[Sizes, ...]] = {
    "router": (
        *((4**i, 128, 64) for i in range(9)),
        *((4096, N, 64) for N in (32, 64, 256, 512, 1024)),
        *((4096, 320, K) for K in (1024, 2048, 4096)),
    ),
    "expert": (
        *((4**i, 1024, 16384, 64) for i in range(9)),
        *((4096, 1024, 4**i, 64) for i in (4, 5, 6, 8, 9, 10)),
    ),
    "mlp": tuple((4**i, 1024, 4096) for i in range(9)),
    "layer": tuple((4096, 1024, 4096, 4**i, 64) for i in (4, 5, 6, 8, 9, 10)),
}
# The default on a CPU.
SMALL: dict[str, tuple[Sizes, ...]] = {
    "router": ((64, 16, 8), (1, 16, 8)),
    "expert": ((64, 64, 256, 8), (1, 64, 256, 8)),
    "mlp": ((64, 64, 96),),
    "layer": ((64, 64, 96, 256, 8), (1, 64, 96, 256, 8)),
}
SETS = {"anchors": ANCHORS, "sweep": SWEEP, "small": SMALL}


@dataclass(frozen=True)
class Case:
    op: str
    """A key of ``OP_NAMES``."""
    sizes: Sizes
    """In the order of ``LETTERS[op]``."""
    dtype: torch.dtype
    routing: str | None = None
    """Of the experts' ids, one of ``ROUTINGS``; elsewhere None."""
    sparse_grad: bool = False
    """Of experts: the tables' gradients are row-sparse."""

    @property
    def name(self) -> str:
        return "x".join(map(str, self.sizes))

    @property
    def by_letter(self) -> dict[str, int]:
        return dict(zip(LETTERS[self.op], self.sizes, strict=True))

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def T(self) -> int:  # noqa: N802
        return self.sizes[0]

    def describe(self) -> str:
        text = ", ".join(f"{letter} {size}" for letter, size in self.by_letter.items())
        return text if self.routing in (None, "uniform") else f"{text}, {self.routing}"


class Inputs(NamedTuple):
    args: tuple[Any, ...]
    """The op's positional arguments; of the layer the tokens and ``LAYER_PARAMETERS``."""
    dout: Tensor
    """The gradient of the first output."""


LAYER_PARAMETERS = (
    "gate_proj.weight", "up_proj.weight", "down_proj.weight", "router_gate.weight", "down_embed.weight",
    "up_embed.weight",
)  # fmt: skip


def find_cases(op: str, name: str | None, routing: str | None, device_type: str) -> list[Case]:
    """The cases of ``op`` called ``name``: a key of ``SETS``, or sizes such as ``4096x128x64``; None is the default.

    On a GPU the router comes in float32 and bfloat16, the rest in bfloat16; on a CPU all are float32. The first expert
    case of the default sets comes with every routing unless one is asked for.
    """
    on_gpu = device_type == "cuda"
    name = name or ("anchors" if on_gpu else "small")
    chosen = SETS[name][op] if name in SETS else (parse_sizes(op, name),)
    dtypes = [torch.float32] if not on_gpu else [torch.bfloat16]
    if op == "router" and on_gpu:
        dtypes = [torch.float32, torch.bfloat16]
    cases = []
    for sizes in chosen:
        routings: tuple[str | None, ...] = (None,)
        if op == "expert":
            every = routing is None and name in ("anchors", "small") and sizes == chosen[0]
            routings = ROUTINGS if every else (routing or "uniform",)
        cases += [Case(op, sizes, dtype, each) for dtype in dtypes for each in routings]
    return cases


def parse_sizes(op: str, name: str) -> Sizes:
    """``4096x128x64`` as integers. Raises ``ValueError`` where they are not the sizes of ``op``."""
    letters = LETTERS[op]
    parts = name.split("x")
    if len(parts) != len(letters) or not all(part.isdecimal() and int(part) > 0 for part in parts):
        shape = "x".join(letters)
        raise ValueError(f"case: expected one of {', '.join(SETS)}, or sizes {shape} of {op}; got {name!r}")
    return tuple(map(int, parts))


def dense_case(case: Case) -> Case:
    """An MLP of as many multiplications a token as a layer: beside the layer's own MLP of 3 I rows of H, the experts'
    2 K and the router's 2 N.
    """
    T, H, I, E, K = case.sizes
    return Case("mlp", (T, H, I + round((2 * K + 2 * isqrt(E)) / 3)), case.dtype)


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Random inputs; another seed gives others, in other memory."""
    if case.op == "router":
        T, N, K = case.sizes
        return Inputs(*make_router_inputs(T, N, K, case.dtype, device, seed))
    if case.op == "mlp":
        T, H, I = case.sizes
        return Inputs(*make_mlp_inputs(T, H, I, case.dtype, device, seed))
    if case.op == "layer":
        return _make_layer_inputs(case, device, seed)
    T, H, E, K = case.sizes
    (x, down, up, ids, weights), dout = make_expert_inputs(T, H, E, K, case.dtype, device, seed)
    if case.routing != "uniform":
        ids = make_ids(T, E, K, case.routing or "", torch.Generator(device).manual_seed(seed))
    return Inputs((x, down, up, ids, weights), dout)


def make_ids(T: int, E: int, K: int, routing: str, generator: torch.Generator) -> Tensor:
    """``[T, K]`` expert ids: "uniform"; "zipf", the r-th most popular taken 1 / r as often; or "hot", see below."""
    device = generator.device
    if routing == "zipf":
        return _zipf_ids(T, E, K, generator)
    ids = torch.randint(E, (T, K), generator=generator, device=device)
    if routing == "hot":  # every token takes the same eighth of its experts, at least one, and the rest at random
        shared = max(1, K // 8)
        ids[:, :shared] = torch.randperm(E, generator=generator, device=device)[:shared]
    return ids


def layer_config(case: Case, backend: str) -> FlashMoEConfig:
    _, H, I, E, K = case.sizes
    return FlashMoEConfig(
        hidden_size=H,
        intermediate_size=I,
        num_experts=E,
        num_experts_per_tok=K,
        backend=backend,  # type: ignore[arg-type] # the config checks it
    )


def _zipf_ids(T: int, E: int, K: int, generator: torch.Generator) -> Tensor:
    device = generator.device
    probability = 1 / torch.arange(1, E + 1, dtype=torch.float64, device=device)
    for _ in range(8):  # no token takes an expert twice: none is drawn more often than once in K draws
        probability = (probability / probability.sum()).clamp(max=1 / K)
    edges = probability.cumsum(0) / probability.sum()
    # Draw k comes from the k-th of K equal parts of the distribution, so that repeats within a token are rare.
    uniform = torch.rand(T, K, generator=generator, device=device, dtype=torch.float64)
    draws = (uniform + torch.arange(K, device=device)) / K
    rank = torch.searchsorted(edges, draws).clamp_(max=E - 1)
    return torch.randperm(E, generator=generator, device=device)[rank]


def _make_layer_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    T, H = case.sizes[:2]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        with torch.device(device):
            parameters = dict(FlashMoE(layer_config(case, "reference")).to(case.dtype).named_parameters())
            x, dout = torch.randn(T, H).to(case.dtype), torch.randn(T, H).to(case.dtype)
    return Inputs((x, *(parameters[name].detach() for name in LAYER_PARAMETERS)), dout)
