"""Memory in which the programs of one launch tell each other things: cleared before a first call, and whose it is."""

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import torch
import triton

# As much is cleared for calls that may be captured, beside that of the first stream, before any capture begins.
GRAPH_CALLS = 64
MAX_STREAMS = 64

T = TypeVar("T")


def current_stream(device_index: int | None) -> tuple[int, bool]:
    """The handle of a GPU's current stream, which for a CPU, of index ``None``, is 0, and whether it is captured."""
    if device_index is None:
        return 0, False
    stream: int = triton.runtime.driver.active.get_current_stream(device_index)
    return stream, torch.cuda.is_current_stream_capturing()


def keep(make: Callable[[], T], device: torch.device) -> T:
    """What ``make`` allocates on the current stream, for longer than this call.

    In a thread of its own: before torch.compile makes a CUDA graph of a call ("reduce-overhead"), all that this thread
    allocates comes from the graph's memory, in which nothing may stay that is no result.
    """
    if device.type != "cuda":
        return make()
    stream = torch.cuda.current_stream(device)

    def make_there() -> T:
        with torch.cuda.stream(stream):
            return make()

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(make_there).result()


class Scratch(Generic[T]):
    """Made at the first call on a stream and kept; each captured call has some to itself, for ever.

    A graph may run beside anything, and how long it lives is not known here. Clearing within a capture would be a
    launch of its own on each replay, so what graphs will need is cleared before; beyond that it is done in the graph.
    """

    def __init__(self, make: Callable[[int], list[T]], device: torch.device) -> None:
        """``make(count)`` gives so many, cleared, that share nothing."""
        self._make, self._device = make, device
        self._num_spare = GRAPH_CALLS if device.type == "cuda" else 0
        self.of_stream: OrderedDict[int, T] = OrderedDict()
        self.of_graphs: list[T] = []
        self._spare: list[T] = []

    def get(self, stream: int, *, is_capturing: bool) -> T:
        """For the current stream of the device, whose handle is ``stream``; on a CPU 0."""
        if is_capturing:
            if not self._spare:
                return self._make(1)[0]  # from the graph's memory, not kept: each replay clears it again
            self.of_graphs.append(self._spare.pop())
            return self.of_graphs[-1]
        found = self.of_stream.get(stream)
        if found is None:
            found, *spare = keep(lambda: self._make(1 + self._num_spare), self._device)
            self._spare += spare
            self._num_spare = 0
            self.of_stream[stream] = found
            if len(self.of_stream) > MAX_STREAMS:
                self.of_stream.popitem(last=False)
        return found
