"""What programs of one launch of flash_decode tell each other in memory, and whose that memory is."""

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# State of this many calls that may be captured is made beside that of a stream, zeroed before any capture begins.
GRAPH_STATES = 64
MAX_STREAMS = 64


class State(NamedTuple):
    """Counters, takers, ready, doorbells and busy are zero between calls.

    Pairs and weights begin as numbers in range: a program that gave up waiting must not write astray.
    """

    counters: Tensor
    flag: Tensor
    takers: Tensor
    pairs: Tensor
    weights: Tensor
    keys: Tensor
    slots: Tensor
    ready: Tensor
    doorbells: Tensor
    busy: Tensor


class Buffers(NamedTuple):
    activated: Tensor
    products: Tensor


class Scratch:
    """Made at the first call on a stream and kept; each captured call has a state to itself, for ever.

    A graph may run beside anything, and how long it lives is not known here. Zeroing within a capture would be a launch
    of its own on each replay, so what graphs will need is zeroed before; beyond that it is done in the graph. What
    needs no zeros is the graph's own memory.
    """

    def __init__(self, make_states: Callable[[int], list[State]], make_buffers: Callable[[], Buffers]) -> None:
        self._make_states, self._make_buffers = make_states, make_buffers
        self.of_stream: OrderedDict[int, tuple[State, Buffers]] = OrderedDict()
        self._spare: list[State] = []
        self.of_graphs: list[State] = []

    def get(self, stream: int, *, is_capturing: bool) -> tuple[State, Buffers]:
        """For the current stream, whose handle is ``stream``; on a CPU 0."""
        if is_capturing:
            return self._take_spare(), self._make_buffers()
        found = self.of_stream.get(stream)
        if found is None:
            # Only a GPU's streams have handles, and graphs.
            num_spare = 0 if self.of_stream or not torch.cuda.is_available() else GRAPH_STATES
            state, *spare = self._make_states(1 + num_spare)
            self._spare += spare
            found = self.of_stream[stream] = state, self._make_buffers()
            if len(self.of_stream) > MAX_STREAMS:
                self.of_stream.popitem(last=False)
        return found

    def _take_spare(self) -> State:
        if not self._spare:
            return self._make_states(1)[0]
        self.of_graphs.append(self._spare.pop())
        return self.of_graphs[-1]
