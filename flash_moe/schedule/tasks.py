"""The tasks of ``flash_decode``: what a tile of each kind is, what it waits for, what it costs, and its integers.

T tokens, H hidden size, I intermediate size, E experts, K experts a token.
"""

from dataclasses import dataclass, fields
from enum import IntEnum
from typing import ClassVar

from torch import Tensor

from flash_moe._checks import check_int
from flash_moe._moe_layer import MoELayer

# In place of the number of a slot: the shared expert's tiles, and tasks that belong to no expert.
SHARED = -1
NO_SLOT = -2
NO_COUNTER = -1

# The words of a serialized task, three vectors of four.
TASK_WORDS = (
    "kind", "slot", "begin", "end", "first_token", "end_token", "counter", "fixed", "per_hit", "signals", "step",
    "reserved",
)  # fmt: skip


class Kind(IntEnum):
    ROUTE = 0
    SELECT = 1
    GATE_UP = 2
    DOWN = 3
    COMBINE = 4


@dataclass(frozen=True)
class Sizes:
    """Of one call: the layer's, and bytes of an element of the tokens, of the experts' weights and of the router's."""

    T: int
    H: int
    I: int
    E: int
    K: int
    shared_intermediate_size: int = 0
    itemsize: int = 2
    weight_itemsize: int = 2
    router_itemsize: int = 2

    def __post_init__(self) -> None:
        for field in fields(self):
            low = 0 if field.name in ("T", "shared_intermediate_size") else 1
            check_int(field.name, getattr(self, field.name), low, 2**31 - 1)
        check_int("K", self.K, 1, self.E)

    @property
    def num_slots(self) -> int:
        return min(self.E, self.T * self.K)

    @property
    def expected_hits(self) -> int:
        """Distinct experts hit, were each token's choice uniform."""
        return max(1, round(self.E * (1 - (1 - self.K / self.E) ** self.T)))

    @property
    def expected_tokens(self) -> int:
        """Of an expert that is hit."""
        return max(1, round(self.T * self.K / self.expected_hits))


def sizes_of(hidden_states: Tensor, layer: MoELayer) -> Sizes:
    """Of a call of ``flash_decode``."""
    T, H = hidden_states.shape
    return Sizes(
        T, H, layer.down_proj.shape[2], layer.down_proj.shape[0], layer.routing.num_experts_per_tok,
        shared_intermediate_size=layer.shared.gate_proj.shape[0] if layer.shared is not None else 0,
        itemsize=hidden_states.dtype.itemsize,
        weight_itemsize=layer.down_proj.dtype.itemsize,
        router_itemsize=layer.router_weight.dtype.itemsize,
    )  # fmt: skip


@dataclass(frozen=True)
class Tiles:
    """How much one task does, along the dimension that its kind is cut in."""

    route_experts: int = 1
    route_tokens: int = 16
    select_tokens: int = 8
    gate_up_columns: int = 32
    down_columns: int = 64
    combine_tokens: int = 16
    combine_columns: int = 256
    """Rounded up to a multiple of ``down_columns``."""
    lead: int = 8

    def __post_init__(self) -> None:
        for field in fields(self):
            check_int(field.name, getattr(self, field.name), 1, 2**31 - 1)


@dataclass(frozen=True)
class Rates:
    """What a GPU is taken to do in logical time. The first is a stream's rate on an H200, the others are round figures.

    With them Qwen3-30B-A3B's 8 tokens take 132 us by the static policy and 130 by the queue, as in the traces of
    ``docs/images``. The actor takes 403: its scheduler hands out one task at a time here, in a thirtieth of the time
    that the kernel's takes for one (6,049 us in all), which however can hand out all that it finds (184 us).

    Each program has an equal share of every rate, whatever the others do: crude, but the same on every run.
    """

    bytes_per_second: float = 4.27e12
    cached_bytes_per_second: float = 8e12
    flops_per_second: float = 5e14
    task_ns: int = 600
    """From a task's first load to its result when it moves next to nothing."""
    hop_ns: int = 700
    """From a release by one program to an acquire by another; also an atomic addition and its answer."""
    atomic_ns: int = 4
    """Between two atomic additions to one address."""
    dispatch_ns: int = 120
    """A scheduler's work for a task that it hands out."""


@dataclass(frozen=True)
class Cost:
    nbytes: int
    """Of weights, which come from memory."""
    cached_nbytes: int
    """Of all else, which is small enough to stay in the L2 cache."""
    flops: int

    def time_ns(self, rates: Rates, num_programs: int) -> int:
        """In one of ``num_programs`` programs."""
        loads = self.nbytes / rates.bytes_per_second + self.cached_nbytes / rates.cached_bytes_per_second
        return rates.task_ns + round(max(loads, self.flops / rates.flops_per_second) * num_programs * 1e9)


@dataclass(frozen=True)
class Need:
    """A task may start when ``counter`` has reached ``fixed + per_hit * (number of slots hit)``."""

    counter: int = NO_COUNTER
    fixed: int = 0
    per_hit: int = 0

    def required(self, hits: int) -> int:
        return self.fixed + self.per_hit * hits


@dataclass(frozen=True)
class Task:
    """A tile ``[begin, end)`` of what its kind is cut in, for tokens ``[first_token, end_token)`` or a slot's own."""

    kind: ClassVar[Kind]
    begin: int
    end: int
    need: Need
    signals: int
    """The counter that is one higher when the task is done."""
    slot: int = NO_SLOT
    first_token: int = 0
    end_token: int = 0
    step: int = 0

    def cost(self, sizes: Sizes, tokens: int) -> Cost:
        """Bytes and operations; ``tokens`` is the number of those that take the slot's expert."""
        raise NotImplementedError

    def serialize(self) -> tuple[int, ...]:
        """Integers in the order of ``TASK_WORDS``."""
        need = self.need
        return (
            self.kind, self.slot, self.begin, self.end, self.first_token, self.end_token, need.counter, need.fixed,
            need.per_hit, self.signals, self.step, 0,
        )  # fmt: skip

    @property
    def width(self) -> int:
        return self.end - self.begin


class Route(Task):
    """Router logits of experts ``[begin, end)`` for tokens ``[first_token, end_token)``."""

    kind = Kind.ROUTE

    def cost(self, sizes: Sizes, tokens: int) -> Cost:
        rows, H = self.end_token - self.first_token, sizes.H
        weights = self.width * H * sizes.router_itemsize
        cached = rows * (H * sizes.itemsize + self.width * sizes.router_itemsize)
        is_first = self.first_token == 0  # later tokens find the weights in the cache
        return Cost(weights * is_first, cached + weights * (not is_first), 2 * rows * H * self.width)


class Select(Task):
    """The K experts of tokens ``[first_token, end_token)``, in ascending order of ids, and their weights."""

    kind = Kind.SELECT

    def cost(self, sizes: Sizes, tokens: int) -> Cost:
        rows = self.end_token - self.first_token
        return Cost(0, rows * (sizes.E * sizes.router_itemsize + sizes.K * 8), rows * sizes.E * sizes.K)


class GateUp(Task):
    """act(gate x) * up x for columns ``[begin, end)`` of I; their gate rows and their up rows are read."""

    kind = Kind.GATE_UP

    def cost(self, sizes: Sizes, tokens: int) -> Cost:
        H, rows = sizes.H, 2 * self.width
        weights = rows * H * (sizes.itemsize if self.slot == SHARED else sizes.weight_itemsize)
        return Cost(weights, tokens * (H + self.width) * sizes.itemsize, 2 * tokens * rows * H)


class Down(Task):
    """Rows ``[begin, end)`` of a slot's down projection, times what its GATE_UP tiles made; float32 out."""

    kind = Kind.DOWN

    def cost(self, sizes: Sizes, tokens: int) -> Cost:
        shared = self.slot == SHARED
        I = sizes.shared_intermediate_size if shared else sizes.I
        weights = self.width * I * (sizes.itemsize if shared else sizes.weight_itemsize)
        return Cost(weights, tokens * (I * sizes.itemsize + self.width * 4), 2 * tokens * self.width * I)


class Combine(Task):
    """Output columns ``[begin, end)`` of tokens ``[first_token, end_token)``: their pairs in ascending order of ids."""

    kind = Kind.COMBINE

    def cost(self, sizes: Sizes, tokens: int) -> Cost:
        elements = (self.end_token - self.first_token) * self.width
        terms = sizes.K + (sizes.shared_intermediate_size > 0)
        return Cost(0, elements * (4 * terms + sizes.itemsize), 2 * elements * terms)
