"""Sums of the pairs of one expert in Triton: short and long groups, borders of hot tiles, every bit the same again."""

import pytest
import torch
from torch import Tensor

from flash_moe.testing import poison_memory

sums = pytest.importorskip("flash_moe.ops._triton.expert_sums")
grouping = pytest.importorskip("flash_moe.ops._triton.grouping")

TILE = 16


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that a few dozen pairs are hot."""
    monkeypatch.setattr(sums, "MIN_HOT_TILE", TILE)


def make_rows(counts: list[int], K: int, H: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Indices ``[T, K]`` that take expert e counts[e] times, two ``[T, H]`` and two ``[T, K]``."""
    generator = torch.Generator(device).manual_seed(0)
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(device)
    indices = ids[torch.randperm(len(ids), generator=generator, device=device)].view(-1, K)
    T = len(indices)
    rows = (torch.randn(T, H, generator=generator, device=device).to(dtype) for _ in range(2))
    return indices, *rows, *(torch.randn(T, K, generator=generator, device=device) for _ in range(2))


def assert_sum(actual: Tensor, coefficients: Tensor, rows: Tensor, indices: Tensor) -> None:
    """Within one rounding to the result's dtype, and what float32 loses in a sum of that many terms."""
    T, K = indices.shape
    terms = (coefficients.double()[:, :, None] * rows.double()[:, None]).view(T * K, -1)
    want, size = (torch.zeros(*actual.shape, dtype=torch.float64, device=actual.device) for _ in range(2))
    want.index_add_(0, indices.flatten(), terms)
    size.index_add_(0, indices.flatten(), terms.abs())
    most = indices.flatten().bincount().max().item()
    budget = torch.finfo(actual.dtype).eps / 2 * want.abs() + most**0.5 * torch.finfo(torch.float32).eps * size
    assert ((actual.double() - want).abs() <= budget).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "counts",
    [
        [TILE, 0, TILE + 1, 2 * TILE - 1, 2 * TILE, 2 * TILE + 1, 3],
        [10 * TILE + 1, 1, 5 * TILE, 14],
        [1, 3 * TILE + 5, 0, 2],
        [TILE // 2] * 20,
    ],
    ids=str,
)
def test_groups_of_every_length(counts, dtype, device):
    counts += [0] * 200  # a low mean, so that MIN_HOT_TILE is what counts
    K, H = next(k for k in (3, 2, 1) if sum(counts) % k == 0), 37
    indices, x, dout, ds, coefficients = make_rows(counts, K, H, dtype, device)
    groups = grouping.group_by_expert(indices, len(counts))
    with poison_memory():
        ddown, dup = sums.expert_sums(dout, x, ds, coefficients, groups)
    assert_sum(ddown, ds, x, indices)
    assert_sum(dup, coefficients, dout, indices)
    with poison_memory():
        again = sums.expert_sums(dout, x, ds, coefficients, groups)
    assert torch.equal(ddown, again[0])
    assert torch.equal(dup, again[1])


def test_row_sparse_sums_of_hot_experts(device):
    counts = [0, 5 * TILE + 3, 0, 1, 2 * TILE, 0, 4] + [0] * 200
    indices, x, dout, ds, coefficients = make_rows(counts, 2, 37, torch.float32, device)
    want = sums.expert_sums(dout, x, ds, coefficients, grouping.group_by_expert(indices, len(counts)))
    groups, ids = grouping.group_by_distinct_expert(indices, len(counts))
    with poison_memory():
        rows = sums.expert_sums(dout, x, ds, coefficients, groups)
    for table, each in zip(want, rows, strict=True):
        assert torch.equal(torch.zeros_like(table).index_add_(0, ids, each), table)


@pytest.mark.parametrize("num_pairs, num_groups, H, tile", [(0, 0, 8, 16), (640, 4, 8, 512), (9, 9, 2048, 128)])
def test_no_group_of_twice_the_mean_is_hot(num_pairs, num_groups, H, tile):
    assert sums._hot_tile(num_pairs, num_groups, H) == tile
