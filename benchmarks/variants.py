"""Times every variant of every expert pass, for the cost model that chooses among them (expert_plan.py).

Run on a GPU: python benchmarks/variants.py [--case TxHxExK] [--out FILE] [--commit COMMIT]

A row has pass, variant, sizes, dtype, machine (what the cost model knows of the GPU), time_us [p20, p50, p80] of a call
in a CUDA graph with a cold L2, and where it comes from. Each variant's results are compared with those of gathering
first. A variant predicted to be SKIP_ABOVE times as slow as the best is left out.
tests/test_expert_plan.py holds the choice against these rows.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flash_moe.bench.cases import ANCHORS, Sizes, parse_sizes
from flash_moe.bench.machine import describe_machine
from flash_moe.bench.timing import CudaTimer, percentiles
from flash_moe.ops._triton import expert
from flash_moe.ops._triton.expert_plan import (
    BACKWARD_TABLES,
    BACKWARD_TOKENS,
    FORWARD,
    GATHER,
    VARIANTS,
    machine_of,
    predict_us,
    use_variant,
)
from flash_moe.ops._triton.launch import table_name
from flash_moe.testing import make_expert_inputs

RESULTS = Path(__file__).parent / "results" / "variants"
# Beside the anchors: few tokens, and tables around the size where the choice changes.
MORE_CASES = (
    *((T, 1024, 16384, 64) for T in (4, 16, 64, 256, 1024)),
    *((4096, 1024, E, 64) for E in (2048, 4096)),
    (1024, 1024, 1024, 32),
    (16384, 1024, 4096, 128),
)
SKIP_ABOVE = 5.0
# Inputs take turns within the graph while they are this small, so that each call finds its own cold.
COPIES, MAX_COPIES_NBYTES = 8, 2**33
SECONDS = 0.02
# Of the norm of a result: both are rounded once to 16 bits, from sums in another order.
MAX_ERROR = 8e-3

Call = Callable[[], tuple[Tensor, ...]]


def bind(sizes: Sizes, seed: int, device: torch.device) -> dict[str, Call]:
    """A call of each pass on random inputs."""
    (x, down, up, ids, weights), dout = make_expert_inputs(*sizes, torch.bfloat16, device, seed)
    with use_variant(GATHER):
        _, s = expert.expert_forward(x, down, up, ids, weights, "silu")
        _, _, ds, coefficients = expert.expert_backward_tokens(dout, x, down, up, ids, weights, s, "silu")
    return {
        FORWARD: partial(expert.expert_forward, x, down, up, ids, weights, "silu"),
        BACKWARD_TOKENS: partial(expert.expert_backward_tokens, dout, x, down, up, ids, weights, s, "silu"),
        BACKWARD_TABLES: partial(expert.expert_backward_tables, dout, x, ids, ds, coefficients, len(down)),
    }


def check(call: Call, variant: str) -> None:
    with use_variant(GATHER):
        wanted = call()
    with use_variant(variant):
        for actual, want in zip(call(), wanted, strict=True):
            error = torch.linalg.vector_norm(actual - want, dtype=torch.float32)
            error = (error / torch.linalg.vector_norm(want, dtype=torch.float32)).item()
            if not error <= MAX_ERROR:
                raise ValueError(f"{variant}: expected gathering's results to {MAX_ERROR}; got an error of {error:.1e}")


def measure(sizes: Sizes, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each pass and variant, without what all rows share."""
    machine = machine_of(torch.cuda.current_device())
    T, H, E, K = sizes
    nbytes = 2 * (2 * E * H + 2 * T * H + 8 * T * K)
    calls = [bind(sizes, seed, device) for seed in range(max(1, min(COPIES, MAX_COPIES_NBYTES // nbytes)))]
    for which, variants in VARIANTS.items():
        predicted = {variant: predict_us(which, variant, sizes, 2, machine) for variant in variants}
        for variant in variants:
            if predicted[variant] > SKIP_ABOVE * min(predicted.values()):
                continue
            check(calls[0][which], variant)
            timer = CudaTimer(device, SECONDS)
            with use_variant(variant):
                times = timer.time_graph([partial(lambda call: call, each[which]) for each in calls]).times
            timer.free()
            yield {
                "pass": which,
                "variant": variant,
                "sizes": dict(zip("THEK", sizes, strict=True)),
                "dtype": "bfloat16",
                "machine": machine._asdict(),
                "time_us": [round(time, 2) for time in percentiles(times)],
                "predicted_us": round(predicted[variant], 2),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="sizes TxHxExK; by default the anchors and some more")
    parser.add_argument("--out", type=Path, help=f"by default a file named after the GPU in {RESULTS}")
    parser.add_argument("--commit", help="of the code; by default what git says")
    arguments = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    fields = describe_machine(device, arguments.commit)
    path = arguments.out or RESULTS / f"{table_name(fields['gpu'])}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    cases = [parse_sizes("expert", case) for case in arguments.case or ()] or [*ANCHORS["expert"], *MORE_CASES]
    for sizes in cases:
        for row in measure(sizes, device):
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row | fields) + "\n")
            name = "x".join(map(str, sizes))
            print(f"{name:24} {row['pass']:16} {row['variant']:7} {row['time_us'][1]:9.1f} us  "
                  f"predicted {row['predicted_us']:9.1f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
