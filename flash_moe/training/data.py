"""Text as bytes: which files make a corpus, which of them are held out, and windows read from memory-mapped files.

A corpus is copied once, in pieces, into two files of the run folder, ``train.bin`` and ``heldout.bin``. Batches are
read through memory maps, so at no time is more than a piece of the corpus held in memory.
"""

import hashlib
import json
import mmap
import os
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from flash_moe.training.files import write_json

TRAIN_FILE, HELDOUT_FILE, RECORD_FILE = "train.bin", "heldout.bin", "corpus.json"
TEXT_SUFFIXES = frozenset({".py", ".pyi", ".txt", ".rst", ".md", ".html"})
# Installed packages and caches differ from machine to machine; the test suite is half of the library and mostly data.
EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test"})
HELDOUT_ONE_IN = 10
PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class Corpus:
    """What a run was trained on; ``sha256`` covers every file's relative path, size and content, in sorted order."""

    source: str
    split: str  # "file": whole files are held out; "position": the last tenth of every file is
    num_files: int
    num_bytes: int
    train_bytes: int
    heldout_bytes: int
    sha256: str


def find_files(data: str | Path | None) -> list[tuple[str, Path]]:
    """The text files of a corpus as (relative path with "/", path), sorted by the relative path.

    Args:
        data: ``None`` for the standard library's own source and documentation, a text file, or a folder: every file in
            it that does not look binary (no NUL in its first 8 KiB), hidden files and folders aside.

    Raises:
        ValueError: ``data`` does not exist.
    """
    if data is None:
        root = Path(sysconfig.get_path("stdlib"))
        return [(name, path) for name, path in _walk(root, EXCLUDED_FOLDERS) if path.suffix in TEXT_SUFFIXES]
    root = Path(data)
    if root.is_file():
        return [(root.name, root)]
    if root.is_dir():
        return [(name, path) for name, path in _walk(root, {"__pycache__"}) if _looks_like_text(path)]
    raise ValueError(f"data: expected a text file or a folder of them; {str(data)!r} does not exist")


def is_heldout(relative_path: str) -> bool:
    """Whether a file is held out: decided by its relative path alone, so the same on every machine and every day."""
    digest = hashlib.sha256(relative_path.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % HELDOUT_ONE_IN == 0


def build_corpus(data: str | Path | None, folder: str | Path, *, min_bytes: int = 2) -> Corpus:
    """Copy the corpus into ``folder`` as one file of bytes per split, and return its record.

    Whole files are held out by the hash of their relative path. Where that would leave either split with fewer than
    ``min_bytes`` bytes (a single file, a handful of them), the last tenth of every file is held out instead.

    Raises:
        ValueError: ``data`` does not exist, holds no text, or too little of it.
    """
    source = f"standard library of Python {platform.python_version()}" if data is None else str(Path(data).resolve())
    files = [(name, path, path.stat().st_size) for name, path in find_files(data)]
    num_bytes = sum(size for _, _, size in files)
    if num_bytes == 0:
        raise ValueError(f"data: expected text; found {len(files)} text files and no bytes in them in {source}")
    heldout_bytes = sum(size for name, _, size in files if is_heldout(name))
    by_position = min(heldout_bytes, num_bytes - heldout_bytes) < min_bytes
    if by_position:
        heldout_bytes = sum(size // HELDOUT_ONE_IN for _, _, size in files)
    if min(heldout_bytes, num_bytes - heldout_bytes) < min_bytes:
        raise ValueError(
            f"data: expected at least {min_bytes} bytes to train on and as many to hold out; "
            f"{source} gives {num_bytes - heldout_bytes} and {heldout_bytes}"
        )

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    whole, train_bytes, heldout_bytes = hashlib.sha256(), 0, 0
    with open(folder / TRAIN_FILE, "wb") as train, open(folder / HELDOUT_FILE, "wb") as heldout:
        for name, path, size in files:
            cut = size - size // HELDOUT_ONE_IN if by_position else 0 if is_heldout(name) else size
            whole.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
            for offset, piece in _pieces(path, size):
                whole.update(piece)
                before_cut = max(0, min(len(piece), cut - offset))
                train_bytes += train.write(piece[:before_cut])
                heldout_bytes += heldout.write(piece[before_cut:])
    corpus = Corpus(
        source=source,
        split="position" if by_position else "file",
        num_files=len(files),
        num_bytes=train_bytes + heldout_bytes,
        train_bytes=train_bytes,
        heldout_bytes=heldout_bytes,
        sha256=whole.hexdigest(),
    )
    write_json(folder / RECORD_FILE, asdict(corpus))
    return corpus


def load_corpus(folder: str | Path) -> Corpus:
    """The record of a corpus built earlier.

    Raises:
        ValueError: the folder holds no finished corpus, or its files changed size.
    """
    folder = Path(folder)
    try:
        corpus = Corpus(**json.loads((folder / RECORD_FILE).read_text()))
        sizes = [(folder / name).stat().st_size for name in (TRAIN_FILE, HELDOUT_FILE)]
    except (FileNotFoundError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"data: {folder} does not hold a finished corpus ({error})") from error
    if sizes != [corpus.train_bytes, corpus.heldout_bytes]:
        raise ValueError(
            f"data: expected {corpus.train_bytes} and {corpus.heldout_bytes} bytes in {folder}; found {sizes}"
        )
    return corpus


class ByteWindows:
    """Windows of ``length`` consecutive bytes of one memory-mapped file, as int64 ids in [0, 256)."""

    def __init__(self, path: str | Path, length: int):
        size = os.path.getsize(path)
        if size < length:
            raise ValueError(f"data: expected at least {length} bytes in {path}; found {size}")
        with open(path, "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.length = length
        self.num_starts = size - length + 1

    def random(self, count: int, generator: torch.Generator) -> Tensor:
        """``[count, length]`` windows at uniformly random positions."""
        return self._read(torch.randint(self.num_starts, (count,), generator=generator).tolist())

    def evenly_spaced(self, count: int) -> Tensor:
        """``[min(count, as many as fit), length]`` windows spread over the whole file: the same ones every time."""
        count = min(count, (self.num_starts - 1) // self.length + 1)
        return self._read([i * (self.num_starts - 1) // max(count - 1, 1) for i in range(count)])

    def _read(self, starts: list[int]) -> Tensor:
        joined = bytearray().join(self._bytes[start : start + self.length] for start in starts)
        return torch.frombuffer(joined, dtype=torch.uint8).view(len(starts), self.length).long()


def _walk(root: Path, excluded: frozenset[str] | set[str]) -> list[tuple[str, Path]]:
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in excluded and not name.startswith(".")]
        paths = [Path(folder, name) for name in names if not name.startswith(".")]
        found += [(path.relative_to(root).as_posix(), path) for path in paths if path.is_file()]
    return sorted(found)


def _looks_like_text(path: Path) -> bool:
    with open(path, "rb") as file:
        return b"\0" not in file.read(8192)


def _pieces(path: Path, size: int) -> Iterator[tuple[int, bytes]]:
    """The first ``size`` bytes of a file as (offset, piece): a file that grows meanwhile does not upset the record."""
    with open(path, "rb") as file:
        offset = 0
        while offset < size and (piece := file.read(min(PIECE_BYTES, size - offset))):
            yield offset, piece
            offset += len(piece)
