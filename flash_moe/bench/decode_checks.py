"""No decode row without right numbers: against float64, and against transformers' block on the same weights.

Router logits are exact, so everyone rounds the same ones and only ties may be broken otherwise: rows that tie are
compared by the scores of the experts they take, all others by experts and values.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_moe._moe_layer import MoELayer
from flash_moe.bench.checks import COMPETITOR_BOUND, MismatchError, require, worst_error
from flash_moe.bench.decode_cases import DecodeCase, DecodeInputs
from flash_moe.bench.decode_competitors import DecodeCompetitor, bind_block, bind_ours
from flash_moe.ops._reference.decode import (
    decode_experts_reference,
    decode_reference,
    decode_routing_reference,
    dequantize,
)
from flash_moe.testing import assert_no_worse_than

MAX_TIED = 0.05
# Relative RMS difference between our output and that of transformers' block.
MAX_DIFFERENCE = 0.01


@dataclass(frozen=True)
class Truth:
    """What a layer's output is compared with."""

    exact: Tensor
    """In float64, from the logits rounded to the router's dtype."""
    low: Tensor
    """As honest arithmetic in the case's dtype has it."""
    block: Tensor | None
    """As transformers' block has it; None where it is not installed or knows no such weights."""


def find_truth(inputs: DecodeInputs, has_block: bool) -> Truth:
    tokens, layer, logits, is_tied, _ = inputs
    weights, indices = decode_routing_reference(logits.double(), layer.routing)
    exact = decode_experts_reference(tokens.double(), _in_float64(layer), weights, indices)
    low, _ = decode_reference(tokens, layer)
    if not has_block or layer.gate_up_scale is not None:
        return Truth(exact, low, None)
    block = bind_block(inputs, "eager")
    with _whole_sums():
        _, scores, theirs = block.gate(tokens)
        out = block(tokens[None])[0]
    same_ids = (theirs.sort(dim=-1).values == indices.sort(dim=-1).values).all(dim=-1)
    require(bool((same_ids | is_tied).all()), "experts differ from those of transformers' block")
    ours = weights.sort(dim=-1).values
    close = torch.isclose(scores.sort(dim=-1).values.double(), ours, rtol=2 * torch.finfo(scores.dtype).eps, atol=1e-6)
    require(bool(close.all()), "scores differ from those of transformers' block")
    return Truth(exact, low, out)


@contextmanager
def _whole_sums() -> Iterator[None]:
    """Sums in float32 to their end: cuBLAS may else add up a few parts of one in 16 bits, and move a router logit."""
    matmul = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = [getattr(matmul, name) for name in names]
    try:
        for name in names:
            setattr(matmul, name, False)
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(matmul, name, value)


def tied_share(inputs: Sequence[DecodeInputs]) -> float:
    """Of the rows; raises ``MismatchError`` where so many tie that the comparison would say little."""
    share = torch.cat([each.is_tied for each in inputs]).double().mean().item()
    require(share < MAX_TIED, f"{share:.1%} of the rows tie, less than {MAX_TIED:.0%} expected")
    return share


def check_decode(
    case: DecodeCase,
    competitor: DecodeCompetitor,
    inputs: Sequence[DecodeInputs],
    calls: Sequence[Callable[[], Tensor]],
    truths: Sequence[Truth],
) -> tuple[float, float | None]:
    """The worst relative RMS errors of any layer, against float64 and, of ours, transformers' block.

    Raises:
        MismatchError: one of them is too large.
    """
    errors, differences = [], []
    for each, call, truth in zip(inputs, calls, truths, strict=True):
        out = call()
        rows = ~each.is_tied
        if competitor.is_ours:
            _check_ours(competitor, each, truth, out)
            if truth.block is not None:
                name = "difference from transformers' block"
                differences.append(worst_error((name,), (out[rows],), (truth.block[rows],), MAX_DIFFERENCE))
        errors.append(worst_error(("out",), (out[rows],), (truth.exact[rows],), COMPETITOR_BOUND[case.dtype]))
    return max(errors), max(differences, default=None)


def _check_ours(competitor: DecodeCompetitor, inputs: DecodeInputs, truth: Truth, out: Tensor) -> None:
    """All rows: our ties have one answer."""
    backend, policy = competitor.backend or "auto", competitor.policy or "auto"
    _, logits = bind_ours(backend, policy, inputs, return_router_logits=True)()
    require(torch.equal(logits, inputs.logits), "router logits differ from the reference's")
    try:
        assert_no_worse_than([truth.low], [truth.exact], [out], ["out"])
    except AssertionError as error:
        raise MismatchError(str(error)) from None


def _in_float64(layer: MoELayer) -> MoELayer:
    def widened(weights: Tensor, scale: Tensor | None) -> Tensor:
        return dequantize(weights, None if scale is None else scale.double()).double()

    return layer._replace(
        gate_up_proj=widened(layer.gate_up_proj, layer.gate_up_scale),
        down_proj=widened(layer.down_proj, layer.down_scale),
        gate_up_scale=None,
        down_scale=None,
    )
