"""What stands beside the layer in its table and is no competitor of `flash-moe bench layer`, since it is the layer
itself, called in another way: through torch.compile, and in float32 under autocast.

Run: python benchmarks/layer.py --commit COMMIT --out FILE [--mode MODE] [--case TxHxIxExK]     on a GPU

    eager     the layer as `flash-moe bench layer` has it, in the same process as the compiled one
    compiled  torch.compile(layer, fullgraph=True, dynamic=True): one compilation for all T from 2 on
    reduce-overhead  torch.compile(layer, fullgraph=True, mode="reduce-overhead"), which makes CUDA graphs by itself:
              the first T is compiled for itself, what follows for any
    in line   the layer without a stream of its own for the MLP, in a graph, where `eager` has one
    autocast  parameters and tokens in float32 under bfloat16 autocast, with norm_topk_prob: as flash-moe train runs it

Forward is evaluation without gradients, forward and backward is training. Both are called eagerly, but for in line, and
in a CUDA graph, but for reduce-overhead. A compiled layer is compared with the eager one before it is timed.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from flash_moe import FlashMoE, FlashMoEConfig
from flash_moe.bench.cases import Sizes, parse_sizes
from flash_moe.bench.machine import describe_machine
from flash_moe.bench.timing import CudaTimer, percentiles
from flash_moe.ops._triton import expert_mlp, layer_inference

T_OF = {
    "eager": (1, 64, 4096), "compiled": (1, 64, 4096), "reduce-overhead": (1, 64, 4096), "in line": (64, 4096),
    "autocast": (4096,),
}  # fmt: skip
COMPILED: dict[str, dict[str, Any]] = {"compiled": {"dynamic": True}, "reduce-overhead": {"mode": "reduce-overhead"}}
SIZES = (1024, 4096, 16384, 64)
IDLE_START_TOKENS = 64  # as in flash-moe bench: so few are timed on an idle GPU
# Of the norm: both round to bfloat16, and a logit that rounds otherwise may choose another expert.
MAX_ERROR = 0.05
SECONDS = 0.2

Call = Callable[[], Any]


class InLine(expert_mlp.SideStream):
    """No stream beside the current one."""

    def __init__(self, like: Tensor) -> None:
        self._current = None


@contextmanager
def in_line() -> Iterator[None]:
    with patch.object(expert_mlp, "SideStream", InLine), patch.object(layer_inference, "SideStream", InLine):
        yield


def make_layer(mode: str, sizes: Sizes) -> nn.Module:
    H, I, E, K = sizes
    config = FlashMoEConfig(
        hidden_size=H, intermediate_size=I, num_experts=E, num_experts_per_tok=K, norm_topk_prob=mode == "autocast"
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        layer = FlashMoE(config)
    return layer if mode == "autocast" else layer.to(torch.bfloat16)


def bind(mode: str, layer: nn.Module, call: Call, T: int, sizes: Sizes, which: str) -> Call:
    """The call of a pass on tokens that stay the same."""
    generator = torch.Generator("cuda").manual_seed(T)
    dtype = torch.float32 if mode == "autocast" else torch.bfloat16
    x, dout = torch.randn(2, T, sizes[0], generator=generator, device="cuda").to(dtype)
    context = (
        partial(torch.autocast, "cuda", torch.bfloat16, cache_enabled=False) if mode == "autocast" else nullcontext
    )
    if which == "forward":
        return partial(_forward, call, x, context)
    leaves = [x.requires_grad_(), *layer.parameters()]
    return partial(_forward_backward, call, x, dout, leaves, context)


def new_step(call: Call) -> Any:
    """What the step before returned may be overwritten."""
    torch.compiler.cudagraph_mark_step_begin()
    return call()


def _forward(call: Call, x: Tensor, context: Callable[[], AbstractContextManager[Any]]) -> Tensor:
    with torch.no_grad(), context():
        return call(x)[0]


def _forward_backward(
    call: Call, x: Tensor, dout: Tensor, leaves: list[Tensor], context: Callable[[], AbstractContextManager[Any]]
) -> tuple[Tensor, ...]:
    with context():
        y = call(x)[0]
    return (y.detach(), *torch.autograd.grad(y, leaves, dout.to(y.dtype)))


def check(actual: Call, expected: Call) -> None:
    for x, want in zip(_tuple(actual()), _tuple(expected()), strict=True):
        error = ((x.float() - want.float()).norm() / want.float().norm()).item()
        if not error <= MAX_ERROR:
            raise ValueError(
                f"compiled: expected the eager layer's results to {MAX_ERROR}; got an error of {error:.1e}"
            )


def measure(mode: str, tokens: Sizes, sizes: Sizes, timer: CudaTimer) -> Iterator[dict[str, Any]]:
    with in_line() if mode == "in line" else nullcontext():
        yield from _measure(mode, tokens, sizes, timer)


def _measure(mode: str, tokens: Sizes, sizes: Sizes, timer: CudaTimer) -> Iterator[dict[str, Any]]:
    layer = make_layer(mode, sizes)
    call: Call = torch.compile(layer, fullgraph=True, **COMPILED[mode]) if mode in COMPILED else layer
    for which in ("forward", "forward_backward"):
        layer.train(which != "forward")
        for T in reversed(tokens):  # the largest first: a single token is compiled for itself
            if T == 1 and which != "forward":
                continue  # BatchNorm cannot train on one token
            bound = bind(mode, layer, call, T, sizes, which)
            if mode == "reduce-overhead":
                bound = partial(new_step, bound)
            if mode in COMPILED:
                check(bound, bind(mode, layer, layer, T, sizes, which))
            timer.warm_up(bound)
            if mode != "in line":
                yield _row(mode, which, T, sizes, "", timer.time_eager(bound, idle_start=T <= IDLE_START_TOKENS))
            if mode != "reduce-overhead":
                yield _row(mode, which, T, sizes, ", CUDA graph", timer.time_graph([lambda bound=bound: bound]).times)
            del bound
            timer.free()


def _row(mode: str, which: str, T: int, sizes: Sizes, launch: str, times: list[float]) -> dict[str, Any]:
    H, I, E, K = sizes
    return {
        "op": "FlashMoE",
        "case": f"T {T}, H {H}, I {I}, E {E}, K {K}{launch}",
        "backend": f"triton, {mode}",
        "pass": which,
        "dtype": "bfloat16",
        "time_us": [round(time, 3) for time in percentiles(times)],
    }


def _tuple(x: Any) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", action="append", choices=list(T_OF), help="may be repeated; by default all")
    parser.add_argument("--case", help="sizes TxHxIxExK in place of the documented layer's")
    parser.add_argument("--commit", help="of the code; by default what git says")
    parser.add_argument("--out", type=Path, help="append the rows to this .jsonl file")
    args = parser.parse_args()
    machine = describe_machine(torch.device("cuda"), args.commit)
    timer = CudaTimer(torch.device("cuda"), SECONDS)
    case = parse_sizes("layer", args.case) if args.case else None
    for mode in args.mode or T_OF:
        tokens, sizes = (case[:1], case[1:]) if case else (T_OF[mode], SIZES)
        for row in measure(mode, tokens, sizes, timer):
            print(f"{row['backend']:20} {row['case']:56} {row['pass']:16} {row['time_us'][1]:10.1f} us", flush=True)
            if args.out:
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row | machine) + "\n")


if __name__ == "__main__":
    main()
