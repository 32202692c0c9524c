"""The activations an expert may use, by the names transformers gives them, as plain PyTorch functions."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def _relu2(x: Tensor) -> Tensor:
    return torch.relu(x).square()


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": torch.relu,
    "relu2": _relu2,
    "identity": _identity,
}


def check_activation(hidden_act: str) -> None:
    """Raise ``ValueError`` unless ``hidden_act`` is a key of ``ACTIVATIONS``."""
    if hidden_act not in tuple(ACTIVATIONS):  # a tuple compares; a dict would hash, and a list cannot be hashed
        raise ValueError(f"hidden_act: expected one of {', '.join(ACTIVATIONS)}; got {hidden_act!r}")
