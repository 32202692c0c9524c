"""What a row says about where it comes from: device, versions, commit, date and the clock of the GPU."""

import platform
import shutil
import subprocess
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import flash_moe

# nvidia-smi takes about a tenth of a second, in which an idle GPU would slow down: this many flushes keep it busy.
BUSY_CALLS = 2000


def describe_machine(device: torch.device, commit: str | None) -> dict[str, Any]:
    """The fields that all rows of a run share. Raises ``ValueError`` where the commit is unknown."""
    where: dict[str, Any]
    if device.type == "cuda":
        gpu = torch.cuda.get_device_name(device)
        where = {"gpu": gpu, "driver": _nvidia_smi("driver_version", device), "cuda": torch.version.cuda}
    else:
        where = {"cpu": _cpu(), "threads": torch.get_num_threads()}
    commit = commit or find_commit()
    if commit is None:
        raise ValueError("commit: this is no git checkout, so rows need --commit to say what was measured; got none")
    date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {**where, "torch": torch.__version__, "triton": _version("triton"), "commit": commit, "date": date}


def find_commit() -> str | None:
    """The commit of the checkout, with ``-dirty`` where a tracked file other than a result differs."""
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/results")
    return None if commit is None else commit + ("-dirty" if changed else "")


def sm_clock_mhz(device: torch.device, keep_busy: Callable[[], object]) -> int | None:
    """The SM clock of a GPU at work; None where nothing tells."""
    try:
        return torch.cuda.clock_rate(device)
    except Exception:  # nvidia-ml-py may be missing, and its errors have no common base with torch's
        for _ in range(BUSY_CALLS):
            keep_busy()
        clock = _nvidia_smi("clocks.sm", device) or ""
        torch.cuda.synchronize()
        number = clock.partition(" ")[0]
        return int(number) if number.isdecimal() else None


def _nvidia_smi(query: str, device: torch.device) -> str | None:
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    command = ("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    found = _output(*command, f"--id=GPU-{uuid}") or _output(*command)
    return found.splitlines()[0] if found else None


def _git(*arguments: str) -> str | None:
    root = Path(flash_moe.__file__).parent.parent
    return _output("git", "-C", str(root), *arguments) if (root / ".git").exists() else None


def _output(*command: str) -> str | None:
    """What the command prints; None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
