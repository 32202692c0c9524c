"""What every launch of flash_decode is to a call like an earlier one, whichever kernel it launches."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from flash_moe.ops._triton.counters import MAX_POLLS
from flash_moe.ops._triton.scratch import Scratch, keep
from flash_moe.schedule.tasks import Sizes


class PreparedCall(ABC):
    """Calls that differ in the addresses of their tensors alone."""

    scratch: Scratch[Any]
    """States: what programs tell each other, of which a stream and each captured call has one to itself."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        self.device_index: int | None = device.index
        self.has_launched = False
        self._own_of_stream: dict[int, Any] = {}

    @abstractmethod
    def __call__(self, tensors: Sequence[Tensor | None], logits: Tensor | None, out: Tensor) -> None:
        """``tensors``: the hidden states, which are on the current device, and the layer's."""

    @abstractmethod
    def _make_buffers(self) -> Any:
        """What nothing outlives a call in."""

    @abstractmethod
    def _own(self, state: Any, buffers: Any) -> Any:
        """What launches of one stream, or of one call in a graph, take."""

    @abstractmethod
    def _flag(self, state: Any) -> Tensor:
        """What is not zero where a program has given up waiting."""

    @property
    def flags(self) -> list[Tensor]:
        """Of each stream and graph."""
        return [self._flag(state) for state in (*self.scratch.of_stream.values(), *self.scratch.of_graphs)]

    def _make_own(self, stream: int, is_capturing: bool) -> Any:
        """A stream's, which are kept, or a captured call's, whose buffers are in its graph's memory."""
        if is_capturing:
            captured.add(self)
        state = self.scratch.get(stream, is_capturing=is_capturing)
        own = self._own(state, self._make_buffers() if is_capturing else keep(self._make_buffers, self.device))
        if not is_capturing:
            self._own_of_stream[stream] = own
            for given_up in self._own_of_stream.keys() - self.scratch.of_stream.keys():
                self._own_of_stream.pop(given_up, None)
        return own

    def again(self, tensors: Sequence[Any], return_router_logits: bool) -> Tensor | tuple[Tensor, Tensor] | None:
        """A call of ``flash_decode`` that is as an earlier one was; ``None`` where there is no longer room for it."""
        if self.device_index is not None and self.device_index != torch.cuda.current_device():
            with torch.cuda.device(self.device_index):
                return self.again(tensors, return_router_logits)
        out = torch.empty_like(tensors[0])
        logits = tensors[1].new_empty(self.sizes.T, self.sizes.E) if return_router_logits else None
        try:
            self(tensors, logits, out)
        except (RuntimeError, OutOfResources) as error:
            if not is_want_of_room(error):
                raise
            return None
        return out if logits is None else (out, logits)


# What graphs read is kept for ever: how long they live is not known here.
captured: set[PreparedCall] = set()


def is_want_of_room(error: Exception) -> bool:
    return isinstance(error, OutOfResources) or "cooperative" in str(error)


def check_flag(flag: Tensor) -> None:
    """Raise ``RuntimeError``, and take the flag down, where a program has raised it. Waits for the device."""
    if flag.any():
        flag.zero_()
        raise RuntimeError(
            f"flash_decode: expected every program to see the others' work within {MAX_POLLS} polls; one gave up, so "
            "the output of this call, or of one before it on this stream, is wrong"
        )
