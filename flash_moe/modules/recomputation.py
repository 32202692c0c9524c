"""What a training forward does once, though activation checkpointing runs that forward again during the backward.

Checkpointing computes a region a second time, inside the backward pass, to have its activations back. Whatever else the
forward does must then not happen again: statistics move once, and a loss kept aside gives its gradient once.
"""

from typing import Any

import torch
from torch import Tensor

from flash_moe._checks import debug_enabled
from flash_moe.ops._register import is_recomputing, register_op

# How many forwards of one module may wait for their backward: the micro-batches of a pipeline, or a model's depth where
# all of it is one layer.
MAX_WAITING = 64
# The relative distance of two keys of one forward: far above rounding, and far below sqrt(2), that of two forwards'.
NEAR = 0.1


def add_once(buffer: Tensor, increment: Tensor | int) -> None:
    """``buffer += increment``, which has no graph, but not in a recomputed forward."""
    if torch.compiler.is_compiling():
        # One graph runs in both passes, so the question is asked when it runs.
        buffer.add_(torch.where(torch.ops.flash_moe.is_first_forward(buffer), increment, 0))
    elif not is_recomputing():
        buffer.add_(increment)


def value_in_forward(memory: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``value``; in a recomputed forward, what it was when that forward ran first.

    ``key``: numbers by which a recomputed forward knows itself again. ``memory [MAX_WAITING, 2, *key.shape]`` keeps
    keys and values of the last forwards, the newest first. A compiled recomputation need not repeat its forward's bits,
    so the nearest key is taken, and of equal ones the newest.

    Raises:
        RuntimeError: no key is near; on a GPU asked under ``FLASH_MOE_DEBUG=1`` alone, and never by compiled code.
    """
    if not torch.compiler.is_compiling():
        if not is_recomputing():
            memory.copy_(_with(memory, key, value))
            return value
        if not memory.is_cuda or debug_enabled():
            _check_known(memory, key)
        return _recall(memory, key)
    is_first = torch.ops.flash_moe.is_first_forward(memory)
    memory.copy_(torch.where(is_first, _with(memory, key, value), memory))
    return torch.where(is_first, value, _recall(memory, key))


def _with(memory: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.cat((torch.stack((key, value))[None], memory[:-1]))


def _recall(memory: Tensor, key: Tensor) -> Tensor:
    return memory[:, 1].index_select(0, _distances(memory, key).argmin(keepdim=True)).squeeze(0)


def _check_known(memory: Tensor, key: Tensor) -> None:
    if _distances(memory, key).min() > NEAR * key.abs().sum():
        raise RuntimeError(
            f"checkpointing: expected the recomputation of one of this layer's last {len(memory)} training forwards; "
            f"got another; at most {len(memory)} may wait for their backward, and each has to be repeated as it was"
        )


def _distances(memory: Tensor, key: Tensor) -> Tensor:
    # argmin would take a NaN, of a forward that overflowed, for the least.
    return (memory[:, 0] - key).abs().flatten(1).sum(1).nan_to_num(torch.inf, torch.inf)


def has_own_activations() -> bool:
    """Whether this forward has a graph with its activations, so that nobody runs it again; compiled code says no."""
    if torch.compiler.is_compiling() or is_recomputing() or not torch.is_grad_enabled():
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None


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
