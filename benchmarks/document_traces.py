"""The traces that docs/flash_decode.md shows, drawn again: each policy, and the actor's scheduler as others build it.

Run: python benchmarks/document_traces.py --commit COMMIT [--out FOLDER]     on a GPU

Qwen3-30B-A3B at 8 tokens. Of each policy a picture and a summary; of the actor with one order at a time, with four
schedulers and with both a summary. The last lines of a summary say what was traced, and where.
"""

import argparse
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

from flash_moe import ops
from flash_moe.bench.machine import describe_machine
from flash_moe.bench.timeline import draw_timeline
from flash_moe.bench.tracing import find_sizes, say_what_was_traced, trace_kernel
from flash_moe.ops._triton import decode
from flash_moe.ops._triton.decode_config import Config

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
MODEL, TOKENS = "qwen3-30b-a3b", 8
# A file's name, the policy, and in what its launch differs from what the policy takes.
TRACES: tuple[tuple[str, str, dict[str, int]], ...] = (
    ("static", "static", {}),
    ("queue", "queue", {}),
    ("actor", "actor", {}),
    ("actor_1_order", "actor", {"batch": 1}),
    ("actor_4_schedulers", "actor", {"schedulers": 4}),
    ("actor_4_schedulers_1_order", "actor", {"schedulers": 4, "batch": 1}),
)


@contextmanager
def launched_with(changes: dict[str, int]) -> Iterator[None]:
    config_of = decode.config_of

    def changed(T: int, itemsize: int, weight_itemsize: int) -> Config:
        return config_of(T, itemsize, weight_itemsize)._replace(**changes)

    with (
        patch.object(decode, "config_of", changed),
        patch.object(decode, "_prepared", OrderedDict()),
        patch.object(ops.flash_decode, "_repeatable", {}),
    ):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="of the code; by default what git says")
    parser.add_argument("--out", type=Path, default=IMAGES, help="by default where the document looks for them")
    args = parser.parse_args()
    fields = describe_machine(torch.device("cuda"), args.commit)
    where = ", ".join([*(f"{name} {fields[name]}" for name in ("gpu", "torch", "triton", "commit")), fields["date"]])
    args.out.mkdir(parents=True, exist_ok=True)
    for name, policy, changes in TRACES:
        with launched_with(changes):
            found = trace_kernel(find_sizes(MODEL, TOKENS), policy, seed=0)
        path = args.out / f"decode_trace_{name}.txt"
        path.write_text(f"{found.summary()}\n{say_what_was_traced(found, False)}\n{where}\n", encoding="utf-8")
        if not changes:
            draw_timeline(found, path.with_suffix(".png"))
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
