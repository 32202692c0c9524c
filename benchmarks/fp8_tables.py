"""An idea beyond the goals: expert tables in fp8 with a scale a row, for inference at half the bytes.

Run: python benchmarks/fp8_tables.py --commit COMMIT --out FILE     on a GPU that knows float8_e4m3fn

The kernels that gather are those of the library, which take fp8 rows as they are; only the step between them, which
applies the scales, is new. Rows give bfloat16 and fp8 tables at the same sizes, and the relative error of each.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_moe.bench.machine import describe_machine
from flash_moe.bench.timing import CudaTimer, percentiles
from flash_moe.ops._reference.expert import expert_reference
from flash_moe.ops._triton import expert
from flash_moe.ops._triton.launch import launch_config
from flash_moe.testing import make_expert_inputs

CASES = ((4096, 1024, 16384, 64), (4096, 1024, 102400, 512), (1024, 1024, 65536, 32), (8192, 2048, 1048576, 64))
FP8, FP8_MAX = torch.float8_e4m3fn, 448.0
BLOCK = 1024
# A token's exact result is compared on this many tokens: the reference gathers [T, K, H] in float64.
CHECKED = 16


@triton.jit
def _scaled_coefficients_kernel(
    partials_ptr, weights_ptr, indices_ptr, down_scales_ptr, up_scales_ptr, out_ptr, P, NUM_SLICES, BLOCK: tl.constexpr
):
    """silu(x . down) * w with both tables' scales."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = pair < P
    e = tl.load(indices_ptr + pair, mask=mask, other=0)
    s = tl.zeros([BLOCK], tl.float32)
    for i in range(NUM_SLICES):
        s += tl.load(partials_ptr + i.to(tl.int64) * P + pair, mask=mask, other=0.0)
    s *= tl.load(down_scales_ptr + e, mask=mask, other=0.0)
    weights = tl.load(weights_ptr + pair, mask=mask, other=0.0).to(tl.float32)
    coefficients = s * tl.sigmoid(s) * weights * tl.load(up_scales_ptr + e, mask=mask, other=0.0)
    tl.store(out_ptr + pair, coefficients, mask=mask)


def quantize(table: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in fp8, and the scale that each is to be multiplied by."""
    scales = table.float().abs().amax(1).clamp(min=1e-12) / FP8_MAX
    quantized = torch.empty_like(table, dtype=FP8)
    for start in range(0, len(table), 65536):  # a float32 copy of a large table would not fit beside it
        part = slice(start, start + 65536)
        quantized[part] = (table[part].float() / scales[part, None]).to(FP8)
    return quantized, scales


def forward(x: Tensor, down: Tensor, up: Tensor, ids: Tensor, weights: Tensor, scales: tuple[Tensor, Tensor]) -> Tensor:
    (T, K), (E, H) = ids.shape, down.shape
    partials = expert._dots(x, down, ids)
    coefficients = torch.empty(T, K, device=x.device)
    _scaled_coefficients_kernel[(triton.cdiv(T * K, BLOCK),)](
        partials, weights, ids, *scales, coefficients, T * K, len(partials), BLOCK
    )
    out = torch.empty_like(x)
    config = launch_config("token_sums", x.device, (T, H, E, K))
    grid = (T, triton.cdiv(H, config["BLOCK_H"]))
    expert._token_sums_kernel[grid](coefficients, up, ids, out, H, K, **config)
    return out


def measure(case: tuple[int, ...], dtype: torch.dtype, timer: CudaTimer) -> dict[str, object]:
    T, H, E, K = case
    (x, down, up, ids, weights), _ = make_expert_inputs(T, H, E, K, torch.bfloat16, "cuda")
    some = slice(0, CHECKED)
    exact = expert_reference(*(each.double() for each in (x[some], down, up)), ids[some], weights[some].double())
    ones = torch.ones(E, device="cuda")
    down_scales, up_scales = ones, ones
    if dtype is FP8:
        (down, down_scales), (up, up_scales) = quantize(down), quantize(up)
    call = partial(forward, x, down, up, ids, weights, (down_scales, up_scales))
    error = ((call()[some].double() - exact).norm() / exact.norm()).item()
    assert error < (0.1 if dtype is FP8 else 0.003), error
    prepare: list[Callable[[], Callable[[], Tensor]]] = [lambda: call]
    times = percentiles(timer.time_graph(prepare).times)
    return {
        "op": "flash_expert_fp8",
        "case": f"T {T}, H {H}, E {E}, K {K}, relative error {100 * error:.2f} %",
        "backend": "triton",
        "pass": "forward",
        "dtype": str(dtype).removeprefix("torch."),
        "time_us": [round(time, 3) for time in times],
        "gb_per_s": 2 * T * K * H * dtype.itemsize / times[1] / 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", help="of the code; by default what git says")
    parser.add_argument("--out", type=Path, help="append the rows to this .jsonl file")
    args = parser.parse_args()
    device = torch.device("cuda")
    machine = describe_machine(device, args.commit)
    timer = CudaTimer(device, seconds=0.3)
    for case in CASES:
        for dtype in (torch.bfloat16, FP8):
            row = {**measure(case, dtype, timer), **machine}
            print(row["case"], row["dtype"], row["time_us"], f"{row['gb_per_s'] / 1e3:.2f} TB/s")
            if args.out:
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            timer.free()


if __name__ == "__main__":
    main()
