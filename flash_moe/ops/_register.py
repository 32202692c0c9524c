"""Registration of an op with ``torch.library``, which is what lets torch.compile, export and opcheck see it."""

from collections.abc import Callable
from typing import Any

import torch


def register_op(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> None:
    """Define ``flash_moe::<schema>`` for every device; ``fake`` gives the outputs' shapes and dtypes."""
    # define and impl rather than custom_op: half the host time of a call (2.6 against 5.5 us).
    op, signature = schema.split("(", maxsplit=1)
    name = f"flash_moe::{op}"
    torch.library.define(name, f"({signature}")
    torch.library.impl(name, "default", implementation)
    torch.library.register_fake(name, fake)
    if backward is not None:
        torch.library.register_autograd(name, backward, setup_context=setup_context)
