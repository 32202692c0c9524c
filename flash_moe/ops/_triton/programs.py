"""Programs of one launch that wait for each other: counters that nobody ever clears, and where they live.

A counter only grows, by as many arrivals in every launch, and wraps around. How many launches there were stands beside
them, so a program knows what to wait for. A wait that takes too long gives up: nothing can hang. For a single program a
wait is over in the order of the program, and that is what the interpreter runs.
"""

from collections import OrderedDict

import torch
import triton
import triton.language as tl
from torch import Tensor

# A cache line each: how many launches there were, then the counters.
LAUNCHES, FIRST_COUNTER = tl.constexpr(0), 1
LINE = tl.constexpr(32)
# Polls that a program makes in all before it gives up: about a second, an atomic taking most of a microsecond.
MAX_POLLS = 2**20
# Counters of this many calls that may be captured are made beside those of a stream, cleared before any capture begins.
GRAPH_CALLS = 64
MAX_REMEMBERED = 256


@triton.jit
def arrive(counter_ptr):
    tl.debug_barrier()  # every thread has stored its part before the program arrives
    tl.atomic_add(counter_ptr, 1, sem="release")


@triton.jit
def wait(counter_ptr, launches, count, polls_left):
    """Until all ``count`` arrivals of this launch are there, or no polls are left; gives how many are."""
    end = (launches + 1) * count
    missing = end - tl.atomic_add(counter_ptr, 0, sem="acquire")
    while (missing > 0) & (polls_left > 0):
        missing = end - tl.atomic_add(counter_ptr, 0, sem="acquire")
        polls_left -= 1
    return polls_left


class Counters:
    """Cleared memory by stream, kept; each captured call has some to itself, for ever.

    A graph may run beside anything, and how long it lives is not known here. Clearing within a capture would be a
    launch of its own on each replay, so what graphs will need is cleared before; beyond that it is done in the graph.
    """

    def __init__(self, num_counters: int) -> None:
        self._numel = (FIRST_COUNTER + num_counters) * LINE.value
        self._of_stream: OrderedDict[tuple[torch.device, int], Tensor] = OrderedDict()
        self._spare: dict[torch.device, list[Tensor]] = {}
        self._of_graphs: list[Tensor] = []

    def get(self, device: torch.device, stream: int) -> Tensor:
        """For the current stream of ``device``, whose handle is ``stream``; on a CPU 0."""
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            if not self._spare.get(device):
                return self._make(device, 1)[0]
            self._of_graphs.append(self._spare[device].pop())
            return self._of_graphs[-1]
        found = self._of_stream.get((device, stream))
        if found is None:
            found, *spare = self._make(device, 1 + GRAPH_CALLS * (device not in self._spare))
            self._spare.setdefault(device, spare)
            self._of_stream[device, stream] = found
            if len(self._of_stream) > MAX_REMEMBERED:
                self._of_stream.popitem(last=False)
        return found

    def _make(self, device: torch.device, count: int) -> list[Tensor]:
        return list(torch.zeros(count, self._numel, dtype=torch.int32, device=device).unbind())
