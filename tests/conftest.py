"""The device the tests run on. Without a GPU the Triton kernels run in Triton's interpreter, on the CPU."""

import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.multiprocessing

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Triton reads this when it is imported, so it stands before any import of flash_moe or triton.
    os.environ["TRITON_INTERPRET"] = "1"
RANKS_TIME_LIMIT = 100  # seconds, starting the processes included
HAS_TRITON = find_spec("triton") is not None
if HAS_TRITON and not HAS_GPU:
    import quick_interpreter

    quick_interpreter.install()
# Small tensors everywhere: on a large host the hand-out to a hundred threads would cost more than the work.
# Of several workers each has its share of the cores.
torch.set_num_threads(max(1, min(torch.get_num_threads(), 4) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if not HAS_TRITON and getattr(item, "callspec", None) and item.callspec.params.get("backend") == "triton":
            item.add_marker(pytest.mark.skip(reason="needs triton, which there is for Linux only"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture
def load_benchmark() -> Callable[[str], ModuleType]:
    """Gives the module of ``benchmarks/<name>.py``, a new one every time."""
    return _load_benchmark


def _load_benchmark(name: str) -> ModuleType:
    spec: Any = spec_from_file_location(name, Path(__file__).parents[1] / "benchmarks" / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def compiler() -> str:
    """The torch.compile backend: inductor where it can build its kernels, else aot_eager, which traces just as much."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    has_headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    return "inductor" if has_headers and shutil.which(compiler) else "aot_eager"


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list[Any]]:
    """Runs ``work(rank, device_type, folder)`` in processes of their own; gives what each saved as ``<rank>.pt``."""
    return _run_ranks


def _run_ranks(work: Callable[..., None], device_type: str, folder: Path, num_ranks: int) -> list[Any]:
    context = torch.multiprocessing.spawn(work, (device_type, folder), nprocs=num_ranks, join=False)
    end = time.monotonic() + RANKS_TIME_LIMIT
    try:
        # join raises what a process raised, with its traceback, and ends the others.
        while not context.join(timeout=1):
            assert time.monotonic() < end, f"expected the processes to end within {RANKS_TIME_LIMIT} seconds"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", map_location=device_type) for rank in range(num_ranks)]


@pytest.fixture
def print_throughput(device: torch.device) -> Callable[..., None]:
    """On a GPU, print time, speed-up, TB/s and peak memory of each function; on a CPU, nothing."""
    return _print_throughput if device.type == "cuda" else lambda *_: None


def _print_throughput(title: str, nbytes: int, functions: dict[str, Callable[[], object]]) -> None:
    """``nbytes``: what any implementation must move. The others are compared with the first of ``functions``."""
    from flash_moe.testing import peak_nbytes

    print(f"\n{title}, {torch.cuda.get_device_name()}\n{'':10}{'ms':>9}{'speed-up':>10}{'TB/s':>8}{'peak MiB':>10}")
    first_ms = None
    for name, function in functions.items():
        ms = _median_ms(function)
        first_ms = first_ms or ms
        peak_mib = peak_nbytes(function, "cuda") / 2**20
        print(f"{name:10}{ms:9.3f}{first_ms / ms:9.2f}x{nbytes / ms / 1e9:8.2f}{peak_mib:10.1f}")


def _median_ms(function: Callable[[], object], repeats: int = 20) -> float:
    for _ in range(3):
        function()
    start, end = ([torch.cuda.Event(enable_timing=True) for _ in range(repeats)] for _ in range(2))
    for i in range(repeats):
        start[i].record()
        function()
        end[i].record()
    torch.cuda.synchronize()
    return sorted(s.elapsed_time(e) for s, e in zip(start, end, strict=True))[repeats // 2]
