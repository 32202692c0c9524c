"""Registration of an op with PyTorch, which is what lets torch.compile, export and opcheck see it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import library
from torch.utils._device import DeviceContext

# Of tensors that do nothing of their own when an op is called with them.
PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


def register_op(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    is_collective: bool = False,
) -> None:
    """Define ``flash_moe::<schema>`` for every device; ``fake`` gives the outputs' shapes and dtypes.

    ``backward`` is that of the first output, the only one that is differentiable, and is called where it has a
    gradient; of a collective, which every rank has to enter, always, with zeros if need be.
    """
    # define and impl rather than custom_op: half the host time of a call (2.6 against 5.5 us).
    op, signature = schema.split("(", maxsplit=1)
    name = f"flash_moe::{op}"
    library.define(name, f"({signature}")
    library.impl(name, "default", implementation)
    library.register_fake(name, fake)
    if backward is not None and setup_context is not None:
        if is_collective:
            library.register_autograd(name, backward, setup_context=setup_context)
        else:
            _register_autograd(name, backward, setup_context)


def _register_autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    def remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        # Else autograd would fill a gradient with zeros for every output that has none: of what is only saved, too.
        ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, output)

    def formula(ctx: Any, *grads: Any) -> Any:
        return (None,) * len(ctx.needs_input_grad) if grads[0] is None else backward(ctx, *grads)

    library.register_autograd(name, formula, setup_context=remember)


def is_recomputing() -> bool:
    """Whether this thread is inside a backward pass; a forward that runs there is one that ran before."""
    return torch._C._current_graph_task_id() != -1


def is_watched() -> bool:
    """Whether somebody has to see an op: a compiler, a tracer, a mode, or a transform such as vmap.

    Where nobody has, an op's implementation may be called past the dispatcher, with tensors of ``PLAIN_TYPES``. There
    are no public names for most of this; these are in torch 2.11 and in 2.13.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or _has_function_mode()
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._get_tracing_state() is not None
    )


def _has_function_mode() -> bool:
    """``torch.set_default_device`` is one, too, that watches nothing."""
    count = torch._C._len_torch_function_stack()
    return count > 1 or (count == 1 and not isinstance(torch.overrides._get_current_function_mode(), DeviceContext))
