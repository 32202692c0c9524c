"""What the code of traces costs a call of flash_decode without one: nothing, if it is compiled out.

Run: python benchmarks/trace_cost.py --commit COMMIT --out FILE [--tokens T]     on a GPU

Beside the kernel that runs the schedule stands a copy of its source without the lines that read the clock and record.
Both give the same bits; they are timed in turns, in a CUDA graph of eight layers whose weights are ten times the L2.
"""

import argparse
import importlib.util
import json
import re
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flash_moe import flash_decode
from flash_moe._moe_layer import Routing
from flash_moe.bench.machine import describe_machine
from flash_moe.bench.timing import CudaTimer, percentiles
from flash_moe.ops._triton import decode, decode_kernel
from flash_moe.testing import decode_arguments, make_decode_inputs

SIZES = (2048, 768, 128, 8)  # Qwen3-30B-A3B's H, I, E, K
NUM_LAYERS = 8
TURNS = 3
POLICIES = ("static", "queue")
TRACES = r" *start = now\(TRACE\)\n| *events = record\(.*\)\n"
NUM_TRACES = 8

Call = Callable[[], list[Tensor]]


def without_traces(folder: Path) -> ModuleType:
    """The kernel's module, from a source without these lines."""
    source, count = re.subn(TRACES, "", Path(decode_kernel.__file__).read_text(encoding="utf-8"))
    if count != NUM_TRACES:
        raise ValueError(f"decode_kernel.py: expected {NUM_TRACES} lines that trace; got {count}")
    path = folder / "decode_kernel_without_traces.py"
    path.write_text(source, encoding="utf-8")
    spec: Any = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_call(T: int, sizes: tuple[int, ...], policy: str, device: torch.device) -> Call:
    H, I, E, K = sizes
    layers = [make_decode_inputs(T, H, I, E, Routing(K), torch.bfloat16, device, seed) for seed in range(NUM_LAYERS)]
    calls = [
        partial(flash_decode, x, **decode_arguments(layer), backend="triton", policy=policy) for x, layer in layers
    ]
    return lambda: [call() for call in calls]


def run_with(kernel: Any, call: Callable[[], Any]) -> Any:
    """With that kernel in the place of the package's; calls prepared for the one are none of the other."""
    own = decode.decode_kernel
    forget()
    decode.decode_kernel = kernel
    try:
        return call()
    finally:
        decode.decode_kernel = own
        forget()


def forget() -> None:
    decode._prepared.clear()
    import_module("flash_moe.ops.flash_decode")._repeatable.clear()  # the package has a function of that name


def check_same_bits(call: Call, kernel: Any) -> None:
    if not all(map(torch.equal, call(), run_with(kernel, call))):
        raise ValueError("flash_decode: expected the same bits without the lines that trace; got others")


def measure(call: Call, kernels: dict[str, Any], timer: CudaTimer) -> dict[str, list[float]]:
    """Times of a layer, of all turns."""
    times: dict[str, list[float]] = {name: [] for name in kernels}
    for _ in range(TURNS):
        for name, kernel in kernels.items():
            replayed = run_with(kernel, lambda: timer.time_graph([lambda: call]))
            times[name] += [time / NUM_LAYERS for time in replayed.times]
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--commit", help="of the code; by default what git says")
    parser.add_argument("--out", type=Path, help="append the rows to this .jsonl file")
    args = parser.parse_args()
    device = torch.device("cuda")
    machine = describe_machine(device, args.commit)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    timer = CudaTimer(device, seconds=0.1)
    with tempfile.TemporaryDirectory() as folder:
        copy = without_traces(Path(folder)).decode_kernel
        kernels = {"triton": decode.decode_kernel, "triton, no trace code": copy}
        for policy in POLICIES:
            call = make_call(args.tokens, SIZES, policy, device)
            check_same_bits(call, copy)
            for name, times in measure(call, kernels, timer).items():
                row = {
                    "op": "flash_decode_trace",
                    "case": f"qwen3-30b-a3b, T {args.tokens}, {policy}, CUDA graph",
                    "backend": name,
                    "pass": "forward",
                    "dtype": "bfloat16",
                    "time_us": [round(time, 3) for time in percentiles(times)],
                }
                print(row["case"], name, row["time_us"], flush=True)
                if args.out:
                    with args.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row | machine) + "\n")


if __name__ == "__main__":
    main()
