"""flash_expert on a CPU against gathering [T, K, H]: prints both times and the ratio, and fails below the promise.

Run: python benchmarks/cpu_expert.py [--threads 2]. The implementations take turns, so that another program on the
machine slows both; each time is the best of the rounds' medians.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from flash_moe.bench.machine import describe_machine
from flash_moe.ops.flash_expert import flash_expert
from flash_moe.testing import assert_no_worse_than, make_expert_inputs, run_with_grads, to_float64

T, H, E, K = 4096, 256, 16384, 32
PROMISED = {"forward": 2.5, "forward_backward": 2.0}
BACKENDS = ("reference", "torch")  # the reference gathers [T, K, H] twice, through einsum and autograd


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--out", type=Path, help="append the rows to this .jsonl file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    inputs, dout = make_expert_inputs(T, H, E, K, getattr(torch, args.dtype), "cpu")
    check(inputs, dout)

    def forward(backend: str) -> None:
        with torch.no_grad():
            flash_expert(*inputs, backend=backend)

    def forward_backward(backend: str) -> None:
        run_with_grads(flash_expert, inputs, dout, backend=backend)

    print(f"T {T}, H {H}, E {E}, K {K}, {args.dtype}, {args.threads} threads, torch {torch.__version__}")
    print(f"{'':20}{'gather ms':>11}{'torch ms':>11}{'ratio':>8}{'promised':>10}")
    missed = False
    for name, function in (("forward", forward), ("forward_backward", forward_backward)):
        best = best_ms(function, args.rounds)
        if args.out:
            append_rows(args.out, name, args, best)
        gather_ms, torch_ms = best
        ratio = gather_ms / torch_ms
        missed |= ratio < PROMISED[name]
        print(f"{name:20}{gather_ms:11.1f}{torch_ms:11.1f}{ratio:7.1f}x{PROMISED[name]:9.1f}x")
    return int(missed)


def check(inputs: tuple[torch.Tensor, ...], dout: torch.Tensor) -> None:
    """Numbers before speed, on a slice of the tokens."""
    hidden_states, down_weights, up_weights, indices, routing_weights = inputs
    some = (hidden_states[:64], down_weights, up_weights, indices[:64], routing_weights[:64])
    exact = run_with_grads(flash_expert, to_float64(some), dout[:64].double(), backend="reference")
    low, actual = (run_with_grads(flash_expert, some, dout[:64], backend=backend) for backend in BACKENDS)
    assert_no_worse_than(low, exact, actual, ("out", "dx", "ddown", "dup", "dweights"))


def best_ms(function: Callable[[str], None], rounds: int, repeats: int = 5) -> list[float]:
    best = [math.inf, math.inf]
    for _ in range(rounds):
        for which, backend in enumerate(BACKENDS):
            times = [_time_ms(function, backend) for _ in range(repeats)]
            best[which] = min(best[which], median(times))
    return best


def append_rows(path: Path, pass_: str, args: argparse.Namespace, best: list[float]) -> None:
    machine = describe_machine(torch.device("cpu"), None)
    with path.open("a") as file:
        for backend, ms in zip(BACKENDS, best, strict=True):
            row = {
                "op": "flash_expert",
                "case": f"T {T}, H {H}, E {E}, K {K}",
                "backend": backend,
                "pass": pass_,
                "time_us": [round(ms * 1e3, 1)] * 3,
                "dtype": args.dtype,
                **machine,
            }
            file.write(json.dumps(row) + "\n")


def _time_ms(function: Callable[[str], None], backend: str) -> float:
    start = time.perf_counter()
    function(backend)
    return (time.perf_counter() - start) * 1e3


if __name__ == "__main__":
    sys.exit(main())
