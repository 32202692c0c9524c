"""How much a case must do at least, from one formula for each op and pass: bytes and floating-point operations.

Bytes: every input that is needed is read once and every output written once. An expert's row counts once however many
tokens take it in ``nbytes``, and once for each token that takes it in ``row_nbytes``: the first is what memory must
move, the second what the caches must deliver to a kernel that gathers.
"""

from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from flash_moe.bench.cases import Case, Inputs

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward_backward"
ID_NBYTES = 8
FLOAT_NBYTES = 4


@dataclass(frozen=True)
class Work:
    nbytes: int
    flops: int | None = None
    """Of the products; the router has none."""
    row_nbytes: int | None = None


def passes_of(case: Case) -> tuple[str, ...]:
    """A layer's backward runs with its forward, as a training step has it.

    BatchNorm cannot train on one token. Of two it leaves signs, whose gradient by the tokens is nothing but rounding:
    in 16 bits no two implementations agree on it.
    """
    if case.op != "layer":
        return FORWARD, BACKWARD
    return (FORWARD, BOTH) if case.T > 2 else (FORWARD,)


def gradient_rows(case: Case) -> int:
    """Of experts: how many rows the gradient of a table has."""
    T, E, K = (case.by_letter[letter] for letter in "TEK")
    return min(T * K, E) if case.sparse_grad else E


def count_work(case: Case, which: str, inputs: Inputs) -> Work:
    """The least that pass ``which`` of ``case`` must do."""
    forward = which == FORWARD
    s = case.dtype.itemsize
    if case.op == "router":
        T, N, K = case.sizes
        return Work(nbytes=2 * T * N * s + T * K * (s + ID_NBYTES))  # backward: the same arrays the other way
    if case.op == "mlp":
        T, H, I = case.sizes
        if forward:
            return Work(nbytes=(2 * T * H + 3 * H * I) * s, flops=6 * T * H * I)
        if which == BOTH:  # x, out, dout, dx; the weights and their gradients
            return Work(nbytes=(4 * T * H + 6 * H * I) * s, flops=18 * T * H * I)
        # x, dout, dx; the weights and their gradients; the saved gate and up
        return Work(nbytes=(3 * T * H + 6 * H * I + 2 * T * I) * s, flops=12 * T * H * I)
    if case.op == "expert":
        return _expert_work(case, forward, inputs.args[3])
    return _layer_work(case, forward)


def _expert_work(case: Case, forward: bool, ids: Tensor) -> Work:
    T, H, _, K = case.sizes
    P, s = T * K, case.dtype.itemsize
    rows = 2 * int(torch.unique(ids).numel()) * H * s
    if forward:
        nbytes = 2 * T * H * s + rows + P * (ID_NBYTES + s)
        return Work(nbytes=nbytes, flops=4 * P * H, row_nbytes=2 * P * H * s)
    # x, dout, dx; ids, weights and their gradient, saved pre-activations; two table gradients, of sparse ones the ids
    nbytes = 3 * T * H * s + rows + P * (ID_NBYTES + 2 * s + FLOAT_NBYTES) + 2 * gradient_rows(case) * H * s
    nbytes += ID_NBYTES * gradient_rows(case) if case.sparse_grad else 0
    return Work(nbytes=nbytes, flops=8 * P * H, row_nbytes=4 * P * H * s)


def _layer_work(case: Case, forward: bool) -> Work:
    T, H, I, E, K = case.sizes
    P, N, s = T * K, isqrt(E), case.dtype.itemsize
    dense = 3 * H * I + 2 * N * H
    rows = 2 * E * -torch.expm1(torch.tensor(-P / E, dtype=torch.float64)).item() * H  # of a uniform routing
    flops = 4 * P * H + 6 * T * H * I + 4 * T * H * N
    if forward:
        return Work(nbytes=int((2 * T * H + dense + rows + 2 * T * N) * s), flops=flops)
    return Work(nbytes=int((4 * T * H + 2 * dense + rows + 2 * E * H + 2 * T * N) * s), flops=3 * flops)
