"""Argument checks. Each raises before anything is launched and names the argument, what was expected and what came."""

import math
import os

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Pair numbers are int32 in the kernels and in every sort.
MAX_PAIRS = 2**31 - 1


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor; got {type(value).__name__}")


def check_shape(name: str, tensor: Tensor, expected: tuple[int | None, ...], legend: str) -> None:
    """``expected`` has ``None`` where any size will do; ``legend`` names the dimensions, "[T, H]" say."""
    check_tensor(name, tensor)
    if tensor.dim() != len(expected):
        raise ValueError(f"{name}: expected {len(expected)} dimensions {legend}; got shape {tuple(tensor.shape)}")
    for size, want in zip(tensor.shape, expected, strict=True):
        if want is not None and size != want:
            shown = ", ".join("any" if want is None else str(want) for want in expected)
            raise ValueError(f"{name}: expected shape {legend} = ({shown}); got {tuple(tensor.shape)}")


def check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        shown = ", ".join(str(dtype) for dtype in dict.fromkeys(allowed))
        raise TypeError(f"{name}: expected dtype {shown}; got {tensor.dtype}")


def float_dtypes(backend: str) -> tuple[torch.dtype, ...]:
    """What an op takes: three dtypes, and float64 too where the reference is asked for as an oracle."""
    return (*FLOAT_DTYPES, torch.float64) if backend == "reference" else FLOAT_DTYPES


def check_same_device(**tensors: Tensor) -> None:
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != first.device:
            raise ValueError(f"{name}: expected device {first.device}, as {first_name} has; got {tensor.device}")


def check_int(name: str, value: int, low: int, high: int) -> None:
    """``value`` must be an integer in ``[low, high]``."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an integer; got {type(value).__name__} {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected an integer from {low} to {high}; got {value}")


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False; got {value!r}")


def check_coefficient(name: str, value: object) -> None:
    """``value`` must be a finite number, 0 or more."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number; got {type(value).__name__} {value!r}")
    if not 0 <= value < math.inf:  # which a NaN fails, and torch.compile can trace
        raise ValueError(f"{name}: expected a finite number, 0 or more; got {value!r}")


def check_pairs(name: str, num_tokens: int, num_experts_per_tok: int) -> None:
    # Divided, not multiplied: torch.export solves this for a symbolic number of tokens.
    if num_experts_per_tok > 0 and num_tokens > MAX_PAIRS // num_experts_per_tok:
        raise ValueError(
            f"{name}: expected at most {MAX_PAIRS} (token, expert) pairs; "
            f"got {num_tokens} tokens x {num_experts_per_tok} experts; split the batch"
        )


def check_ids_in_range(name: str, ids: Tensor, end: int) -> None:
    """On a GPU this waits for the device, so callers run it there only when ``debug_enabled()``."""
    if ids.numel() == 0:
        return
    low, high = (bound.item() for bound in torch.aminmax(ids))
    if low < 0 or high >= end:
        raise ValueError(f"{name}: expected ids from 0 to {end - 1}; got ids from {low} to {high}")


def debug_enabled() -> bool:
    return os.environ.get("FLASH_MOE_DEBUG", "0") == "1"
