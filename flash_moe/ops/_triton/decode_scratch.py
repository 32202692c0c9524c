"""What the programs of one launch of flash_decode tell each other."""

from typing import NamedTuple

from torch import Tensor

from flash_moe.ops._triton.relaunch import Kept


class State(NamedTuple):
    """Counters, takers, ready, doorbells and busy are zero between calls.

    Pairs and weights begin as numbers in range: a program that gave up waiting must not write astray.
    """

    counters: Tensor
    flag: Tensor
    takers: Tensor
    pairs: Tensor
    weights: Tensor
    slots: Tensor
    ready: Tensor
    doorbells: Tensor
    busy: Tensor


class Buffers(NamedTuple):
    """Nothing in them outlives a call. ``logits`` are the router's where the caller does not ask for them."""

    keys: Tensor
    activated: Tensor
    products: Tensor
    logits: Tensor


class Own(NamedTuple):
    """What belongs to one stream, or to one call in a graph; ``kept`` is all of it that every launch takes."""

    state: State
    buffers: Buffers
    kept: Kept
