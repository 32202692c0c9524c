"""Which config a kernel is launched with: shipped tables, one a GPU, looked up by the nearest sizes.

A table ``launch_tables/<gpu name>.json`` is written by ``flash-moe tune``; ``default.json`` serves every other GPU, the
interpreter, and kernels that a GPU's own table lacks. Nothing is tuned at run time.

The number of tokens picks a variant and an entry, and is no constant of a kernel: with the same entry another number
compiles nothing in router and experts, but for what Triton itself tells apart (1, multiples of 16). A sort of up to
1024 pairs, and what norms and multiplies few tokens, has a tile for each power of two that they need.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "launch_tables"
DEFAULT = "default"
# Far more than a process's models have sizes; a bound only so that sizes without end cannot fill the memory.
MAX_REMEMBERED = 4096
_CPU = -1

Sizes = tuple[int, ...]
Config = Mapping[str, int]


class Entry(NamedTuple):
    sizes: Sizes
    config: Config


@dataclass(frozen=True)
class Tile:
    """Of a product: rows and columns that a program computes, and how much of the contracted dimension a step takes."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# float32 does without tensor cores.
FLOAT32_TILE = Tile(32, 64, 32, 4, 2)

Table = Mapping[str, tuple[Entry, ...]]
"""Of each kernel its entries, one or more."""

# Not a context variable: autograd calls a backward's launcher from a thread of its own.
_forced: dict[str, tuple[Config | None, set[Sizes]]] = {}


def launch_config(kernel: str, device: torch.device, sizes: Sizes) -> Config:
    """The shipped config of ``kernel`` for the entry whose sizes are nearest, read-only.

    Distance is the sum over the sizes of ``|log2(size / entry's size)|``; of equally near entries the first is taken.
    The first size, the one that differs from call to call (tokens), is rounded to a power of two before that.

    Raises:
        ValueError: no table knows the kernel, it has another number of sizes, or a table is malformed.
    """
    if _forced and (forced := _forced.get(kernel)):
        config, asked = forced
        asked.add(sizes)
        if config is not None:
            return config
    index = device.index if device.type == "cuda" else _CPU
    first = sizes[0]
    return _nearest(kernel, index, (first * first).bit_length() // 2, sizes[1:])  # log2(first), rounded


def tile_config(kernel: str, table: Tensor, indices: Tensor, width: int) -> dict[str, int]:
    """``launch_config`` of an expert kernel on ``[E, H]`` and ``[T, K]``, its block no wider than ``width`` needs."""
    (T, K), (E, H) = indices.shape, table.shape
    config = dict(launch_config(kernel, table.device, (T, H, E, K)))
    config["BLOCK_H"] = min(config["BLOCK_H"], block_of(width))
    return config


def block_of(width: int) -> int:
    """The smallest block of columns that holds ``width`` of them."""
    return max(16, 1 << (width - 1).bit_length())


@contextmanager
def use_config(kernel: str, config: Config | None) -> Iterator[set[Sizes]]:
    """Within it ``kernel`` takes ``config``, on every thread, or with None what it takes anyway; for tuning and tests.

    Gives the set of sizes looked up meanwhile. If that stays empty no launcher asked, and the config has no effect.
    """
    before = _forced.get(kernel)
    asked: set[Sizes] = set()
    _forced[kernel] = (None if config is None else MappingProxyType(dict(config))), asked
    try:
        yield asked
    finally:
        if before is None:
            del _forced[kernel]
        else:
            _forced[kernel] = before


def is_forced(kernel: str) -> bool:
    """Whether this runs within ``use_config`` of ``kernel``: a pass that can do without it must not, then."""
    return kernel in _forced


def table_name(gpu: str) -> str:
    """The name of the table of a GPU: ``NVIDIA H200`` has ``nvidia_h200``."""
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_")


def read_table(path: Path) -> Table:
    """The entries of one file, checked. Raises ``ValueError`` naming the file and the field."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"launch table {path.name}: expected a JSON file; got {error}") from None
    table = {}
    for kernel, fields in _field(path, data, "kernels", dict).items():
        where = f"kernels.{kernel}"
        _expect(path, where, "an object with entries", fields, isinstance(fields, dict))
        entries = _field(path, fields, "entries", list, where)
        _expect(path, f"{where}.entries", "one entry or more", entries, bool(entries))
        table[kernel] = tuple(_entry(path, f"{where}.entries[{i}]", entry) for i, entry in enumerate(entries))
        lengths = {len(entry.sizes) for entry in table[kernel]}
        _expect(path, f"{where}.entries", "as many sizes in every entry", sorted(lengths), len(lengths) == 1)
    return MappingProxyType(table)


def nearest_entry(entries: Sequence[Entry], sizes: Sequence[int]) -> Entry:
    """The entry whose sizes are nearest in the logarithm; a size of 0 counts as 1."""

    def distance(entry: Entry) -> float:
        return sum(abs(math.log2(max(a, 1) / b)) for a, b in zip(sizes, entry.sizes, strict=True))

    return min(entries, key=distance)


@lru_cache(MAX_REMEMBERED)
def _nearest(kernel: str, index: int | None, log2_first: int, others: Sizes) -> Config:
    entries = _table_of(index).get(kernel) or _shipped(DEFAULT).get(kernel)
    sizes = (2**log2_first, *others)
    if entries is None:
        known = ", ".join(_shipped(DEFAULT))
        raise ValueError(f"launch table {DEFAULT}.json: expected entries of kernel {kernel!r}; got those of {known}")
    if len(sizes) != len(entries[0].sizes):
        raise ValueError(f"sizes: expected {len(entries[0].sizes)} of kernel {kernel!r}; got {len(sizes)}")
    return nearest_entry(entries, sizes).config


@lru_cache
def _table_of(index: int | None) -> Table:
    if index == _CPU:
        return _shipped(DEFAULT)
    name = table_name(torch.cuda.get_device_name(index))
    return _shipped(name if (FOLDER / f"{name}.json").exists() else DEFAULT)


@lru_cache
def _shipped(name: str) -> Table:
    return read_table(FOLDER / f"{name}.json")


def _entry(path: Path, where: str, entry: Any) -> Entry:
    _expect(path, where, "an object with sizes and config", entry, isinstance(entry, dict))
    sizes, config = _field(path, entry, "sizes", list, where), _field(path, entry, "config", dict, where)
    _expect(path, f"{where}.sizes", "one size or more", sizes, bool(sizes))
    for i, size in enumerate(sizes):
        _expect(path, f"{where}.sizes[{i}]", "an integer above 0", size, _is_integer(size) and size > 0)
    for name, value in config.items():
        _expect(path, f"{where}.config.{name}", "an integer, 0 or more", value, _is_integer(value) and value >= 0)
    return Entry(tuple(sizes), MappingProxyType(config))


def _field(path: Path, data: Any, name: str, kind: type, where: str = "") -> Any:
    found = data.get(name) if isinstance(data, dict) else None
    words = {dict: "an object", list: "a list"}[kind]
    _expect(path, f"{where}.{name}".lstrip("."), words, found, isinstance(found, kind))
    return found


def _expect(path: Path, where: str, expected: str, got: object, holds: bool) -> None:
    if not holds:
        raise ValueError(f"launch table {path.name}: {where}: expected {expected}; got {got!r}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
