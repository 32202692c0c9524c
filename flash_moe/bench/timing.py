"""How a call is timed: warm, with a cold cache, many times, on the device's own clock."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

# Calls before any is timed. Only a call that takes more than half of the seconds of measuring gets fewer, as many as
# fit into this many times those seconds; each row says how many it had.
WARM_UP_CALLS, WARM_UP_TIMES = 50, 25
MIN_REPEATS, MAX_REPEATS = 5, 1000
# The buffer that is read between calls, in sizes of L2; reading leaves no dirty lines that a timed call would evict.
FLUSH_L2_SIZES = 4

Call = Callable[[], Any]


class Replayed(NamedTuple):
    times: list[float]
    """Of one call in the graph."""
    result: Any
    """What the first call returned, as the last replay left it."""
    warm_up_calls: int


def percentiles(times: Sequence[float]) -> list[float]:
    """p20, p50 and p80."""
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return [fifths[0], statistics.median(times), fifths[3]]


class CpuTimer:
    """Wall-clock times in microseconds. The cache is as the last call left it."""

    is_cold = False

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def warm_up(self, call: Call) -> int:
        return _warm_up(call, WARM_UP_TIMES * self.seconds, lambda: None)

    def time_eager(self, call: Call, idle_start: bool = False) -> list[float]:
        times: list[float] = []
        while len(times) < MIN_REPEATS or (sum(times) < self.seconds * 1e6 and len(times) < MAX_REPEATS):
            started = time.perf_counter()
            call()
            times.append((time.perf_counter() - started) * 1e6)
        return times

    def free(self) -> None:
        pass


class CudaTimer:
    """CUDA-event times in microseconds, L2 cold before every timed call."""

    is_cold = True

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.seconds = seconds
        l2_nbytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.zeros(FLUSH_L2_SIZES * l2_nbytes // 4, device=device)
        self._sum = torch.zeros((), device=device)

    def flush(self) -> None:
        torch.sum(self._buffer, dim=0, out=self._sum)

    def warm_up(self, call: Call) -> int:
        return _warm_up(call, WARM_UP_TIMES * self.seconds, torch.cuda.synchronize)

    def time_eager(self, call: Call, idle_start: bool = False) -> list[float]:
        """Times of ``call``. With ``idle_start`` the GPU has nothing to do when the call begins, so that the time is
        that of the call as a caller sees it; else work is queued and the time is the GPU's own.
        """
        repeats = self._repeats(call)
        starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(repeats)] for _ in range(2))
        for start, end in zip(starts, ends, strict=True):
            self.flush()
            if idle_start:
                torch.cuda.synchronize()
            start.record()
            call()
            end.record()
        return _elapsed(starts, ends)

    def time_graph(self, prepare: Sequence[Callable[[], Call]]) -> Replayed:
        """Times of one call in a replayed graph that holds one call of each.

        Each of ``prepare`` gives a call on memory of its own, so that in the graph, too, every call finds its inputs
        cold. It runs on the stream of the capture, since a backward follows its forward's stream.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            calls = [each() for each in prepare]
            for _ in range(3):
                for call in calls:
                    call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = [call() for call in calls]
        warm_up_calls = self.warm_up(graph.replay)
        times = self.time_eager(graph.replay)
        return Replayed([time / len(calls) for time in times], results[0], warm_up_calls)

    def free(self) -> None:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def _repeats(self, call: Call) -> int:
        torch.cuda.synchronize()
        started = time.perf_counter()
        self.flush()
        call()
        torch.cuda.synchronize()
        once = max(1e-6, time.perf_counter() - started)
        return min(MAX_REPEATS, max(MIN_REPEATS, int(self.seconds / once)))


Timer = CpuTimer | CudaTimer


def make_timer(device: torch.device, seconds: float) -> Timer:
    """A timer that measures each call for about ``seconds``, and warms it up before."""
    return CudaTimer(device, seconds) if device.type == "cuda" else CpuTimer(seconds)


def count_launches(call: Call) -> int | None:
    """Kernels, copies and fills that one call puts on the GPU; None where the profiler sees none."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    on_gpu = [event for event in profile.events() or [] if event.device_type.name == "CUDA"]
    return sum(not getattr(event, "is_user_annotation", False) for event in on_gpu) or None


def _warm_up(call: Call, seconds: float, wait: Call) -> int:
    """The number of calls made: WARM_UP_CALLS, or as many as fit into ``seconds``."""
    started = time.perf_counter()
    for count in range(1, WARM_UP_CALLS + 1):
        call()
        if count % 5 == 1 or count == WARM_UP_CALLS:
            wait()
            if time.perf_counter() - started > seconds:
                return count
    return WARM_UP_CALLS


def _elapsed(starts: Sequence[torch.cuda.Event], ends: Sequence[torch.cuda.Event]) -> list[float]:
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in zip(starts, ends, strict=True)]
