"""Which implementation of an op runs: "auto" decides by the tensor's device, an explicit choice never falls back."""

import os
from enum import Enum
from importlib.util import find_spec

from torch import Tensor


class Backend(str, Enum):
    TRITON = "triton"
    TORCH = "torch"
    REFERENCE = "reference"


def resolve_backend(requested: object, tensor: Tensor) -> Backend:
    """The backend for ``requested``: "auto" is triton for CUDA tensors, else torch.

    Raises:
        ValueError: ``requested`` is unknown, or is "triton" where Triton cannot run; the message says what to use.
    """
    if requested == "auto":
        requested = "triton" if tensor.is_cuda else "torch"
    if not isinstance(requested, str) or requested not in _NAMES:
        raise ValueError(f"backend: expected one of auto, {', '.join(_NAMES)}; got {requested!r}")
    backend = _NAMES[requested]
    if backend is Backend.TRITON:
        check_triton(tensor.device.type)
    return backend


def check_triton(device_type: str) -> None:
    """Raise ``ValueError``, with the reason and the cure, where the kernels cannot run on such tensors."""
    if reason := why_not_triton(device_type):
        raise ValueError(f"backend: expected torch or reference, since Triton cannot run here; got 'triton': {reason}")


def why_not_triton(device_type: str) -> str | None:
    """``None`` where the Triton kernels can run on tensors of ``device_type``, else the reason and the cure."""
    if not _TRITON_IS_INSTALLED:
        return 'triton is not installed; install it (Linux only) with "pip install triton", or use backend="torch"'
    if device_type == "cuda" or (device_type == "cpu" and _TRITON_INTERPRETS):
        return None
    return (
        f'the tensors are on {device_type!r}; move them to a CUDA device, use backend="torch", '
        "or set TRITON_INTERPRET=1 before the first import to run the kernels in Triton's interpreter"
    )


_TRITON_IS_INSTALLED = find_spec("triton") is not None
# Triton reads the variable when a kernel is decorated, so it cannot change within a process.
_TRITON_INTERPRETS = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")
_NAMES = {backend.value: backend for backend in Backend}
