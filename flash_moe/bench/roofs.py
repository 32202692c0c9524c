"""What this machine does at best on a case's bytes and operations, measured in the same run.

Nothing of an op runs here: only PyTorch's own kernels, and on a GPU the plainest ones of ``ops/_triton/memory.py``. Of
all that do the same the fastest counts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_moe._backend import why_not_triton
from flash_moe.bench.cases import LATENCY_BOUND_TOKENS, Case, Inputs
from flash_moe.bench.timing import CpuTimer, Timer, percentiles
from flash_moe.bench.work import FORWARD, Work, gradient_rows

# Beyond this a stream's time grows in proportion.
MAX_STREAM_NBYTES = {"cuda": 2**31, "cpu": 2**25}
COPY_NBYTES = {"cuda": 2**31, "cpu": 2**25}
MATMUL_SIZE = {"cuda": 8192, "cpu": 512}
# Calls in one graph, each on its own memory, which also bounds that memory.
MAX_STREAMS, STREAMS_NBYTES = 16, 2**30
# A stream's buffer holds a multiple of this many bytes, since a ragged end would keep loads narrow.
STREAM_STEP = 256
# Rows that one program sums where there are too few tokens for one each to fill the chip.
FEW_ROWS = 8


@dataclass(frozen=True)
class Roof:
    """The fastest that this machine's parts allow: the slowest of them, since they can work at the same time."""

    bound: str
    """The part that decides: "stream", "gather" or "matmul"."""
    time_us: float
    parts_us: dict[str, float] = field(default_factory=dict)
    gather_us: float | None = None
    """Of experts: gathering every row, also where dense products are faster and decide."""


class Roofs:
    """Measures what is asked for once and remembers it."""

    def __init__(self, timer: Timer, device: torch.device) -> None:
        self.timer, self.device = timer, device
        self._known: dict[object, float] = {}

    def roof(self, case: Case, which: str, inputs: Inputs, work: Work) -> Roof:
        """The roof of pass ``which``. Experts: gathering rows, or where that is faster dense products over all E."""
        parts = {"stream": self.stream_us(work.nbytes)}
        gather_us = None
        if case.op in ("expert", "layer"):
            gather_us, dense_us = self._expert_us(case, which, inputs)
            parts |= {"gather": gather_us} if gather_us <= dense_us else {"matmul": dense_us}
        if case.op in ("mlp", "layer"):
            dense_flops = work.flops or 0
            if case.op == "layer":  # the gathered rows' products need no matrix unit
                T, H, _, _, K = case.sizes
                dense_flops -= (4 if which == FORWARD else 12) * T * K * H
            parts["matmul"] = parts.get("matmul", 0.0) + self._matmul_us(dense_flops, case.dtype)
        bound = max(parts, key=parts.__getitem__)
        return Roof(bound, parts[bound], parts, gather_us)

    def copy_gb_per_s(self) -> float:
        """Device to device, bytes read and written."""
        nbytes = COPY_NBYTES[self.device.type]

        def measure() -> float:
            source, target = (torch.ones(nbytes // 8, device=self.device) for _ in range(2))
            return self._best([[lambda: target.copy_(source)], [partial(torch.neg, source, out=target)]])

        return nbytes / self._once(("copy",), measure) / 1e3

    def stream_us(self, nbytes: int) -> float:
        """Reading ``nbytes`` once."""
        functions: list[Callable[[Tensor], object]] = [torch.sum]
        if self._has_triton:
            from flash_moe.ops._triton import memory

            functions += [partial(memory.read_once, config=config) for config in memory.READ_CONFIGS]
        return self._stream(nbytes, "read", functions)

    def fill_us(self, nbytes: int) -> float:
        """Writing ``nbytes`` once."""
        return self._stream(nbytes, "fill", [Tensor.zero_, partial(torch.fill_, value=1.0)])

    def gather_us(self, table: Tensor, ids: Tensor, label: object) -> float:
        """Summing rows of ``table`` as ``ids [T, K]`` say; ``label`` names the distribution of the ids."""
        key = ("gather", tuple(table.shape), tuple(ids.shape), table.dtype, label)
        return self._once(key, lambda: self._best([[call] for call in self._gathers(table, ids)]))

    def matmul_tflops(self, dtype: torch.dtype) -> float:
        size = MATMUL_SIZE[self.device.type]

        def measure() -> float:
            a, b = (torch.randn(size, size, device=self.device, dtype=dtype) for _ in range(2))
            return self._median([partial(torch.mm, a, b)])

        return 2 * size**3 / self._once(("matmul", dtype), measure) / 1e6

    @property
    def _has_triton(self) -> bool:
        return self.device.type == "cuda" and why_not_triton("cuda") is None

    def _gathers(self, table: Tensor, ids: Tensor) -> list[Callable[[], object]]:
        """Calls that sum the rows, each in its own way."""
        if not self._has_triton:
            return [partial(F.embedding_bag, ids, table, mode="sum")]
        from flash_moe.ops._triton import memory

        # A thread of embedding_bag loads one element at a time. The sums mean nothing, so they may be of wider ones.
        row_nbytes = table.shape[1] * table.element_size()
        wide = next(dtype for dtype in (torch.float64, torch.float32, table.dtype) if row_nbytes % dtype.itemsize == 0)
        calls: list[Callable[[], object]] = [partial(F.embedding_bag, ids, table.view(wide), mode="sum")]
        parts = [ids]
        if ids.shape[0] <= LATENCY_BOUND_TOKENS and ids.shape[1] % FEW_ROWS == 0:
            parts.append(ids.view(-1, FEW_ROWS))
        return calls + [partial(memory.sum_rows, table, part, c) for part in parts for c in memory.SUM_CONFIGS]

    def _expert_us(self, case: Case, which: str, inputs: Inputs) -> tuple[float, float]:
        """Of gathering every pair's rows, and of dense products over all experts.

        A table's gradient is written while the tokens' rows, which the cache holds, are gathered for it.
        """
        if case.op == "expert":
            T, H, E, K = case.sizes
            x, table, _, ids, _ = inputs.args
        else:
            T, H, _, E, K = case.sizes
            (x, *_, table), _ = inputs
            ids = torch.randint(E, (T, K), device=self.device, generator=torch.Generator(self.device).manual_seed(0))
        label = case.routing or "uniform"
        gather = 2 * self.gather_us(table, ids, label)
        products = 2
        if which != FORWARD:
            tokens = torch.randint(T, (T, K), device=self.device, generator=torch.Generator(self.device).manual_seed(0))
            tables = 2 * gradient_rows(case) * H * case.dtype.itemsize
            backward = gather + max(2 * self.gather_us(x, tokens, "tokens"), self.fill_us(tables))
            gather, products = (backward, 4) if case.op == "expert" else (gather + backward, 6)
        # Dense products go through the whole tables, whoever takes what.
        whole_us = self.stream_us(2 * E * H * case.dtype.itemsize)
        dense = max(whole_us, self._matmul_us(products * 2 * T * E * H, case.dtype))
        return gather, dense

    def _matmul_us(self, flops: int, dtype: torch.dtype) -> float:
        return flops / self.matmul_tflops(dtype) / 1e6

    def _stream(self, nbytes: int, name: str, functions: Sequence[Callable[[Tensor], object]]) -> float:
        measured = -(-min(nbytes, MAX_STREAM_NBYTES[self.device.type]) // STREAM_STEP) * STREAM_STEP

        def measure() -> float:
            count = max(1, min(MAX_STREAMS, STREAMS_NBYTES // measured))
            streams = [torch.ones(measured // 4, device=self.device) for _ in range(count)]
            return self._best([[partial(function, each) for each in streams] for function in functions])

        return self._once((name, measured), measure) * max(1.0, nbytes / measured)

    def _best(self, ways: Sequence[Sequence[Callable[[], object]]]) -> float:
        """The least of the median times of several ways to do the same."""
        return min(self._median(calls) for calls in ways)

    def _median(self, calls: Sequence[Callable[[], object]]) -> float:
        """The median time of one of ``calls``, all of them in one graph where there are graphs."""
        with torch.no_grad():
            if isinstance(self.timer, CpuTimer):
                self.timer.warm_up(calls[0])
                return percentiles(self.timer.time_eager(calls[0]))[1]
            return percentiles(self.timer.time_graph([partial(_same, call) for call in calls]).times)[1]

    def _once(self, key: object, measure: Callable[[], float]) -> float:
        if key not in self._known:
            self._known[key] = measure()
            self.timer.free()
        return self._known[key]


def _same(call: Callable[[], object]) -> Callable[[], object]:
    return call
