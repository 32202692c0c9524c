"""What a result or a bug report has to say about the machine it came from."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import flash_moe
from flash_moe._backend import why_not_triton

PACKAGES = ("triton", "numpy", "safetensors", "typer", "rich", "matplotlib")
VARIABLES = ("FLASH_MOE_DEBUG", "TRITON_INTERPRET", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def describe_environment() -> dict[str, str]:
    """Names and values in the order in which to print them."""
    found = {
        "flash_moe": f"{flash_moe.__version__}{_commit()}",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "OS": platform.platform(),
        "CPU": f"{_cpu()}, {torch.get_num_threads()} threads used of {os.cpu_count()}",
        **_gpus(),
        "torch": torch.__version__,
        "CUDA (of torch)": torch.version.cuda or "none: a build for CPUs",
    }
    found |= {package: _package_version(package) for package in PACKAGES}
    found |= {f"backend {name}": state for name, state in backends().items()}
    names = list(VARIABLES) + sorted(name for name in os.environ if name.startswith("FLASH_MOE_"))
    found |= {name: os.environ.get(name, "not set") for name in names}
    return found


def backends() -> dict[str, str]:
    """Each backend with "available" or the reason why it is not."""
    return {"triton": _triton_state(), "torch": "available", "reference": "available (slow: the specification)"}


def _triton_state() -> str:
    if torch.cuda.is_available() or "not installed" in (why_not_triton("cuda") or ""):
        reason = why_not_triton("cuda")
        return f"not available: {reason}" if reason else "available"
    if why_not_triton("cpu") is None:
        return "available in Triton's interpreter on the CPU (TRITON_INTERPRET is set): slow, for tests"
    if torch.version.cuda is None:
        return "not available: this torch is a build for CPUs"
    return "not available: torch sees no CUDA device"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name") and ":" in line]
    return names[0] if names else platform.processor() or platform.machine()


def _gpus() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"GPU": "none that torch can use", "driver": _driver()}
    gpus = {}
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        gpus[f"GPU {i}"] = f"{properties.name}, {memory}, compute capability {properties.major}.{properties.minor}"
    return {**gpus, "driver": _driver()}


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return "unknown: there is no nvidia-smi"
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: nvidia-smi failed ({error})"


def _package_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit of a checkout, with a leading blank; nothing for an installed package."""
    root = Path(flash_moe.__file__).parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return f" (commit {described.strip()})"
