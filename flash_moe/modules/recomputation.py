"""What a training forward does once, though activation checkpointing runs that forward again during the backward.

Checkpointing computes a region a second time, inside the backward pass, to have its activations back. Whatever else the
forward does must then not happen again: statistics move once, and a loss kept aside gives its gradient once.
"""

from typing import Any

import torch
from torch import Tensor

from flash_moe.ops._register import is_recomputing, register_op


def add_once(buffer: Tensor, increment: Tensor | int) -> None:
    """``buffer += increment``, which has no graph, but not in a recomputed forward."""
    if torch.compiler.is_compiling():
        # One graph runs in both passes, so the question is asked when it runs.
        buffer.add_(torch.where(torch.ops.flash_moe.is_first_forward(buffer), increment, 0))
    elif not is_recomputing():
        buffer.add_(increment)


def copy_once(buffer: Tensor, value: Tensor) -> None:
    """``buffer.copy_(value)``, but not in a recomputed forward, which finds what the first one copied."""
    if torch.compiler.is_compiling():
        buffer.copy_(torch.where(torch.ops.flash_moe.is_first_forward(buffer), value, buffer))
    elif not is_recomputing():
        buffer.copy_(value)


def _is_first_forward(like: Tensor) -> Tensor:
    return torch.full((), not is_recomputing(), dtype=torch.bool, device=like.device)


def _is_first_forward_fake(like: Tensor) -> Tensor:
    return like.new_empty((), dtype=torch.bool)


register_op("is_first_forward(Tensor like) -> Tensor", _is_first_forward, _is_first_forward_fake)


class LossOnTheSide:
    """A loss that a module keeps in an attribute, beside its output, with the right gradient under checkpointing.

    With ``use_reentrant=False`` the first forward has a graph, and so has its loss; the recomputed one would only keep
    the recomputed tensors alive and is dropped. With ``use_reentrant=True`` the first forward runs under ``no_grad``:
    its loss is a leaf, whose gradient autograd has ready before it recomputes what is below, and the recomputed loss
    passes that gradient on.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self._gradients: list[Tensor] = []  # of this backward pass, that no recomputation has taken yet

    def keep(self, loss: Tensor | None, output: Tensor) -> Tensor:
        """Make ``loss`` the value; returns ``output``, through which the gradient flows if it has no other way."""
        if torch.compiler.is_compiling():
            # To set even the same value would be a side effect, which the compiler does not allow under checkpointing.
            if loss is not None or self.value is not None:
                self.value = loss
        elif loss is None or not is_recomputing():
            self.value = loss if loss is None or torch.is_grad_enabled() else self._as_leaf(loss)
        else:
            if self._gradients and torch.is_grad_enabled():
                output = _AddLoss.apply(output, loss, self._gradients.pop())
            if not _in_checkpoint_hooks():
                self.value = loss
        return output

    def _as_leaf(self, loss: Tensor) -> Tensor:
        if torch.is_inference_mode_enabled():
            return loss
        gradients = self._gradients

        def remember(gradient: Tensor) -> None:
            if not gradients:  # what nobody takes is forgotten when this pass is over
                torch.autograd.Variable._execution_engine.queue_callback(gradients.clear)
            gradients.append(gradient)

        leaf = loss.detach().requires_grad_()
        leaf.register_hook(remember)
        return leaf

    def __getstate__(self) -> dict[str, Any]:
        # A loss belongs to the graph of its forward, which can be neither copied nor pickled.
        return {"value": None, "_gradients": []}


class _AddLoss(torch.autograd.Function):
    """``output`` as it is, with ``gradient`` for ``loss``; saves no tensor, since a recomputation may be without it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad_output, ctx.gradient, None


def _in_checkpoint_hooks() -> bool:
    """Whether tensors saved now go to ``torch.utils.checkpoint`` with ``use_reentrant=False``."""
    hooks: tuple[Any, Any] | None = torch._C._autograd._top_saved_tensors_default_hooks(True)  # None, whatever its type
    return hooks is not None and getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint"
