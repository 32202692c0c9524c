"""A soak of flash_decode in one launch: many calls on changing tokens, eager and replayed, beside other work.

Run: python benchmarks/soak_decode.py [--calls N] [--sizes HxIxExK] [--tokens N] [--policy P] [--seed N] [--out FILE]
     on a GPU; `python benchmarks/tables.py` shows the rows in benchmarks/results/soak

Before anything is counted, each number of tokens T has some inputs, each computed once alone and compared with the
reference. Then several streams take turns: each replays a graph of calls with random T, which draws other inputs on
every replay, or calls eagerly. On two more streams matrix products and copies come and go. Every result is compared bit
by bit on the GPU; the host waits only when it prints a line. Exit code 1 if a row was wrong or a wait given up.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_moe import flash_decode
from flash_moe._moe_layer import MoELayer, Routing
from flash_moe.bench.machine import describe_machine
from flash_moe.ops._triton import decode as kernel
from flash_moe.schedule.policies import POLICIES
from flash_moe.testing import decode_arguments, make_decode_inputs

MAX_TOKENS = 128
INPUTS = 8  # of each T
STREAMS, GRAPHS, CALLS_OF_A_GRAPH, EAGER_CALLS = 3, 4, 32, 16  # graphs of a stream; eager calls in a row
EAGER_SHARE, LOAD_SHARE = 0.25, 0.5
# Relative to the norm of a token's output: two roundings to bfloat16 are a quarter of that.
MAX_ERROR = 0.01

Decode = Callable[[Tensor], Tensor]


class Question(NamedTuple):
    """Inputs of one T ``[INPUTS, T, H]``, and the bits of their results."""

    inputs: Tensor
    answers: Tensor


def make_questions(
    layer: MoELayer, pool: Tensor, tokens: Sequence[int], decode: Decode, generator: torch.Generator
) -> list[Question]:
    """For each number of tokens, rows of ``pool`` drawn at random. Raises ``ValueError`` if a result is wrong."""
    reference = _call(layer, "reference", "auto", pool).float()
    bounds = MAX_ERROR * reference.norm(dim=-1)
    questions = []
    for T in tokens:
        rows = torch.randint(len(pool), (INPUTS, T), generator=generator, device=pool.device)
        inputs = pool[rows]
        answers = torch.stack([decode(x) for x in inputs])
        errors = (answers.float() - reference[rows]).norm(dim=-1)
        if not bool((errors <= bounds[rows]).all()):
            raise ValueError(
                f"T {T}: expected the reference's output to {MAX_ERROR}; got an error of {errors.max():.2e}"
            )
        questions.append(Question(inputs, answers))
    return questions


class Stream:
    """Asks questions on a stream of its own, and counts the rows of results that are wrong."""

    def __init__(self, questions: Sequence[Question], decode: Decode, chance: random.Random) -> None:
        self.questions, self.decode, self.chance = questions, decode, chance
        self.stream = torch.cuda.Stream()
        device = questions[0].inputs.device
        self.wrong = torch.zeros((), dtype=torch.int64, device=device)
        self.replays = torch.zeros((), dtype=torch.int64, device=device)
        self.steps: list[Tensor] = []  # graphs read them, and do not own them
        torch.cuda.synchronize()
        self.graphs = [self._capture() for _ in range(GRAPHS)]

    def ask(self) -> int:
        """Queue some calls, and give how many."""
        with torch.cuda.stream(self.stream):
            if self.chance.random() >= EAGER_SHARE:
                self.chance.choice(self.graphs).replay()
                return CALLS_OF_A_GRAPH
            for question in self.chance.choices(self.questions, k=EAGER_CALLS):
                number = self.chance.randrange(INPUTS)
                self._check(question.inputs[number], question.answers[number])
            return EAGER_CALLS

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        questions = self.chance.choices(self.questions, k=CALLS_OF_A_GRAPH)
        steps = torch.tensor([self.chance.randrange(1, INPUTS, 2) for _ in questions], device=self.wrong.device)
        with torch.cuda.graph(graph, stream=self.stream):
            self.replays += 1
            numbers = (self.replays * steps) % INPUTS
            for question, number in zip(questions, numbers.split(1), strict=True):
                self._check(*(x.index_select(0, number)[0] for x in question))
        self.steps.append(steps)
        return graph

    def _check(self, x: Tensor, answer: Tensor) -> None:
        out = self.decode(x)
        bits = torch.int16 if out.itemsize == 2 else torch.int32
        self.wrong += (out.view(bits) != answer.view(bits)).any(dim=-1).sum()
        out.fill_(torch.nan)  # what is not written next time is not right by chance


class Load:
    """Matrix products and copies of random sizes on two streams, at random times."""

    def __init__(self, device: torch.device, chance: random.Random) -> None:
        self.chance, self.streams = chance, [torch.cuda.Stream() for _ in range(2)]
        self.factors = [torch.randn(size, size, dtype=torch.bfloat16, device=device) for size in (256, 1024, 4096)]
        self.copies = [torch.empty(2, nbytes, dtype=torch.uint8, device=device) for nbytes in (2**12, 2**20, 2**26)]
        self.host = torch.empty(2**22, dtype=torch.uint8, pin_memory=True)
        torch.cuda.synchronize()

    def add(self) -> None:
        for stream in self.streams:
            if self.chance.random() < LOAD_SHARE:
                with torch.cuda.stream(stream):
                    self.chance.choice((self._multiply, self._copy, self._fetch))()

    def _multiply(self) -> None:
        factor = self.chance.choice(self.factors)
        torch.mm(factor, factor)

    def _copy(self) -> None:
        pair = self.chance.choice(self.copies)
        pair[0].copy_(pair[1])

    def _fetch(self) -> None:
        self.copies[-1][0, : len(self.host)].copy_(self.host, non_blocking=True)


def count_flags() -> int:
    """Streams and graphs in which a program has given up waiting."""
    flags = [flag for prepared in kernel._prepared.values() for flag in prepared.flags]
    return int(torch.cat(flags).count_nonzero()) if flags else 0


def draw_token_counts(count: int, chance: random.Random) -> list[int]:
    """Different ones from 1 to 128, small ones as likely as large ones; both ends are among them."""
    found = {1, MAX_TOKENS}
    while len(found) < count:
        found.add(round(2 ** chance.uniform(0, 7)))
    return sorted(found)


def soak(calls: int, every: int, streams: Sequence[Stream], load: Load) -> Iterator[tuple[int, int, int, float]]:
    """After every so many calls: how many there were, rows wrong, waits given up, and seconds."""
    done, started = 0, time.perf_counter()
    for stop in (*range(every, calls, every), calls):
        while done < stop:
            load.add()
            done += sum(stream.ask() for stream in streams)
        torch.cuda.synchronize()
        wrong = sum(int(stream.wrong) for stream in streams)
        yield done, wrong, count_flags(), time.perf_counter() - started


def _call(layer: MoELayer, backend: str, policy: str, x: Tensor) -> Tensor:
    out = flash_decode(x, **decode_arguments(layer), backend=backend, policy=policy)
    assert isinstance(out, Tensor)  # the logits were not asked for
    return out


def _sizes(text: str) -> tuple[int, int, int, int]:
    H, I, E, K = map(int, text.split("x"))
    return H, I, E, K


def _count(text: str) -> int:
    count = int(text)
    if not 2 <= count <= MAX_TOKENS:
        raise ValueError
    return count


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--every", type=int, default=50_000, help="calls from line to line")
    parser.add_argument("--sizes", type=_sizes, default=(2048, 768, 128, 8), help="HxIxExK, by default Qwen3-30B-A3B's")
    parser.add_argument("--tokens", type=_count, default=24, help="how many different T from 1 to 128, 2 to 128")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--policy", choices=["auto", *POLICIES], default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="of the code; by default what git says")
    parser.add_argument("--out", type=Path, help="append what came out to this .jsonl file")
    return parser.parse_args(arguments)


def make_row(
    args: argparse.Namespace, tokens: Sequence[int], counts: tuple[int, int, int, float], machine: dict[str, Any]
) -> dict[str, Any]:
    """What ``--out`` is given, of ``counts`` as ``soak`` has them."""
    sizes = dict(zip("HIEK", args.sizes, strict=True))
    row = {"op": "soak", "sizes": sizes, "dtype": args.dtype, "policy": args.policy, "tokens": list(tokens)}
    return row | dict(zip(("calls", "wrong_rows", "flags", "seconds"), counts, strict=True)) | machine


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parse(arguments)
    (H, I, E, K), device, chance = args.sizes, torch.device("cuda"), random.Random(args.seed)
    machine = describe_machine(device, args.commit) if args.out else {}  # raises before the soak, not after it
    pool, layer = make_decode_inputs(
        INPUTS * MAX_TOKENS, H, I, E, Routing(K), getattr(torch, args.dtype), device, args.seed
    )
    decode = partial(_call, layer, "triton", args.policy)
    tokens = draw_token_counts(args.tokens, chance)
    questions = make_questions(layer, pool, tokens, decode, torch.Generator(device).manual_seed(args.seed))
    print(
        f"{torch.cuda.get_device_name()}, policy {args.policy}, {args.dtype}, T {tokens}: results verified", flush=True
    )
    streams = [Stream(questions, decode, random.Random(args.seed + i)) for i in range(STREAMS)]
    counts = (0, 0, 0, 0.0)
    for counts in soak(args.calls, args.every, streams, Load(device, chance)):
        done, wrong, flags, seconds = counts
        print(f"{done:>9} calls  {wrong:>6} wrong rows  {flags:>4} flags  {seconds:>8.1f} s", flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(make_row(args, tokens, counts, machine)) + "\n")
    return int(counts[1] > 0 or counts[2] > 0)


if __name__ == "__main__":
    sys.exit(main())
