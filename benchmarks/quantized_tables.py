"""Expert tables of 8 bits with a scale a row beside those of 16: what inference gains in time and loses in accuracy.

Run: python benchmarks/quantized_tables.py --commit COMMIT --out FILE     on a GPU that knows float8_e4m3fn

Rows give bfloat16, fp8 and int8 tables at the same sizes, in a CUDA graph and with a cold L2: of flash_expert, then of
the whole layer. The relative error of each is that of the output against the bfloat16 tables' in float64; of the layer,
whose routing stays the same, against the layer before.
"""

import argparse
import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flash_moe import FlashMoE, FlashMoEConfig
from flash_moe.bench.machine import describe_machine
from flash_moe.bench.timing import CudaTimer, percentiles
from flash_moe.modules.quantization import DTYPES, quantize_table, row_scales
from flash_moe.ops.flash_expert import flash_expert
from flash_moe.testing import make_expert_inputs

CASES = (
    (1, 1024, 16384, 64),
    (4096, 1024, 16384, 64),
    (4096, 1024, 102400, 512),
    (1024, 1024, 65536, 32),
    (8192, 2048, 1048576, 64),
)
# T, H, I, E, K
LAYER_CASES = ((1, 1024, 4096, 16384, 64), (64, 1024, 4096, 16384, 64), (4096, 1024, 4096, 16384, 64))
# Above what rounding the tables to each format makes of random rows: 0.17 %, 3.9 % and 1.1 %.
MAX_ERRORS = {"bf16": 0.003, "fp8": 0.05, "int8": 0.015}
# A token's exact result is compared on this many tokens: the reference gathers [T, K, H] in float64.
CHECKED = 16

Call = Callable[[], Tensor]


def make_calls(case: tuple[int, ...]) -> tuple[dict[str, Call], Tensor]:
    """A call for each kind of table, and the exact results of the first tokens."""
    (x, down, up, ids, weights), _ = make_expert_inputs(*case, torch.bfloat16, "cuda")
    some = slice(0, CHECKED)
    # The rows of these tokens' pairs alone: a table of several GB in float64 would not fit beside it.
    rows, chosen = ids[some].unique(return_inverse=True)
    exact = flash_expert(
        *(each.double() for each in (x[some], down[rows], up[rows])),
        chosen,
        weights[some].double(),
        backend="reference",
    )
    calls = {"bf16": partial(flash_expert, x, down, up, ids, weights)}
    for name, dtype in DTYPES.items():
        tables = [quantize_table(table, row_scales("table", table, dtype), dtype) for table in (down, up)]
        scales = dict(zip(("down_scale", "up_scale"), (table.scale for table in tables), strict=True))
        calls[name] = partial(flash_expert, x, *(table.weight for table in tables), ids, weights, **scales)
    return calls, exact


def make_layer_calls(case: tuple[int, ...]) -> tuple[dict[str, Call], Tensor]:
    """A call for each kind of table, and what the layer gave before."""
    T, H, I, E, K = case
    torch.manual_seed(0)
    config = FlashMoEConfig(hidden_size=H, intermediate_size=I, num_experts=E, num_experts_per_tok=K)
    with torch.device("cuda"):
        layer = FlashMoE(config).to(torch.bfloat16).eval()
        x = torch.randn(T, H).to(torch.bfloat16)
    layers = {"bf16": layer, **{name: copy.deepcopy(layer).quantize_tables(name) for name in DTYPES}}
    calls: dict[str, Call] = {name: partial(_output, each, x) for name, each in layers.items()}
    return calls, calls["bf16"]()[:CHECKED].double()


@torch.no_grad()
def _output(layer: FlashMoE, x: Tensor) -> Tensor:
    return layer(x)[0]


def measure(case: tuple[int, ...], name: str, call: Call, exact: Tensor, timer: CudaTimer) -> dict[str, object]:
    error = ((call()[:CHECKED].double() - exact).norm() / exact.norm()).item()
    assert error < MAX_ERRORS[name], error
    dtype = DTYPES.get(name, torch.bfloat16)
    prepare: list[Callable[[], Call]] = [lambda: call]
    times = percentiles(timer.time_graph(prepare).times)
    is_layer = len(case) == len(LAYER_CASES[0])
    sizes = ", ".join(f"{letter} {size}" for letter, size in zip("THIEK" if is_layer else "THEK", case, strict=True))
    row: dict[str, object] = {
        "op": "FlashMoE_quantized" if is_layer else "flash_expert_quantized",
        "case": f"{sizes}, CUDA graph, relative error {100 * error:.2f} %",
        "backend": "triton",
        "pass": "forward",
        "dtype": str(dtype).removeprefix("torch."),
        "time_us": [round(time, 3) for time in times],
    }
    if not is_layer:
        T, H, _, K = case
        row["gb_per_s"] = 2 * T * K * H * dtype.itemsize / times[1] / 1e3
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", help="of the code; by default what git says")
    parser.add_argument("--layer", action="store_true", help="only the layer")
    parser.add_argument("--out", type=Path, help="append the rows to this .jsonl file")
    args = parser.parse_args()
    device = torch.device("cuda")
    machine = describe_machine(device, args.commit)
    timer = CudaTimer(device, seconds=0.3)
    for case in LAYER_CASES if args.layer else (*CASES, *LAYER_CASES):
        calls, exact = make_calls(case) if case in CASES else make_layer_calls(case)
        for name, call in calls.items():
            row = {**measure(case, name, call, exact, timer), **machine}
            print(row["op"], row["case"], row["dtype"], row["time_us"])
            if args.out:
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
        del calls, call
        timer.free()


if __name__ == "__main__":
    main()
