"""Grouping of pairs by expert in Triton: every sort, offsets, distinct experts."""

import pytest
import torch
from torch import Tensor

from flash_moe.testing import poison_memory

grouping = pytest.importorskip("flash_moe.ops._triton.grouping")

SORTS = ("sort_pairs", "sort_tile", "sort_by_torch")
every_sort = pytest.mark.parametrize("sort", SORTS)


@pytest.fixture(autouse=True)
def small_tile(monkeypatch):
    """So that a few hundred pairs are more than one program sorts."""
    monkeypatch.setattr(grouping, "MAX_SINGLE_TILE", 128)


def make_indices(shape: tuple[int, int], num_experts: int, kind: str, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    indices = torch.randint(num_experts, shape, generator=generator, device=device)
    if kind == "hot":
        indices[:, 1:] = num_experts // 3
    elif kind == "one":
        indices.fill_(num_experts - 1)
    elif kind == "ends":
        indices = torch.where(indices % 2 == 0, 0, num_experts - 1)
    return indices


@every_sort
@pytest.mark.parametrize("kind", ["uniform", "hot", "one", "ends"])
@pytest.mark.parametrize(
    "T, K, E, dtype",
    [
        (1, 1, 1, torch.int64),
        (1, 2, 2, torch.int32),
        (31, 1, 2**31 - 1, torch.int32),
        (16, 2, 65536, torch.int64),
        (33, 3, 65537, torch.int64),
        (41, 7, 500, torch.int32),
        (41, 7, 65536, torch.int32),
        (41, 7, 2**20, torch.int64),
    ],
    ids=str,
)
def test_sorts(sort, T, K, E, dtype, kind, device):
    indices = make_indices((T, K), E, kind, device).to(dtype)
    want, want_order = indices.flatten().sort(stable=True)
    with poison_memory():
        keys, order, first = getattr(grouping, sort)(indices, E)
    assert torch.equal(keys.long() - first, want.long())
    assert torch.equal(order.long(), want_order)


@every_sort
def test_sorting_no_pair(sort, device):
    keys, order, _ = getattr(grouping, sort)(torch.empty(0, 3, dtype=torch.int64, device=device), 9)
    assert keys.shape == order.shape == (0,)


@pytest.mark.parametrize("kind", ["uniform", "hot", "one", "ends"])
@pytest.mark.parametrize(
    "T, K, E", [(0, 3, 5), (1, 1, 1), (2, 3, 64), (2, 3, 63), (41, 7, 200), (41, 7, 70_000)], ids=str
)
def test_groups(T, K, E, kind, device):
    indices = make_indices((T, K), E, kind, device)
    ids, order = indices.flatten().sort(stable=True)
    with poison_memory():
        groups = grouping.group_by_expert(indices, E)
        distinct, distinct_ids = grouping.group_by_distinct_expert(indices, E)
    experts = torch.arange(E + 1, device=device)
    assert torch.equal(groups.order.long(), order)
    assert torch.equal(groups.offsets.long(), torch.searchsorted(ids, experts))
    assert torch.equal(distinct.order.long(), order)
    assert torch.equal(groups.keys.long() - groups.first, ids)
    want, numbers, counts = ids.unique(return_inverse=True, return_counts=True)
    assert torch.equal(distinct.keys.long() - distinct.first, numbers)
    G = min(T * K, E)
    assert distinct_ids.dtype == torch.int64
    assert distinct_ids.tolist() == [want[g % len(want)].item() for g in range(G)]
    offsets = [0, *counts.cumsum(0).tolist()]
    assert distinct.offsets.tolist() == offsets + [T * K] * (G + 1 - len(offsets))


def test_the_examples(device):
    indices = torch.tensor([[2, 0], [2, 2]], device=device)
    groups = grouping.group_by_expert(indices, 4)
    assert (groups.order.tolist(), groups.offsets.tolist()) == ([1, 0, 2, 3], [0, 1, 1, 4, 4])
    groups, ids = grouping.group_by_distinct_expert(torch.tensor([[7, 2], [7, 7]], device=device), 9)
    assert (groups.order.tolist(), groups.offsets.tolist()) == ([1, 0, 2, 3], [0, 1, 4, 4, 4])
    assert ids.tolist() == [2, 7, 2, 7]


@pytest.mark.gpu
@every_sort
@pytest.mark.parametrize("kind", ["uniform", "hot", "one", "ends"])
@pytest.mark.parametrize(
    "T, K, E", [(16, 64, 16384), (4096, 64, 16384), (1000, 33, 65536), (4096, 512, 102_400), (999, 77, 2**20)], ids=str
)
def test_sorts_at_realistic_sizes(sort, T, K, E, kind, device, monkeypatch):
    monkeypatch.undo()
    if sort == "sort_tile" and T * K > grouping.MAX_SINGLE_TILE:
        pytest.skip("one program sorts few pairs only")
    indices = make_indices((T, K), E, kind, device)
    want, want_order = indices.flatten().sort(stable=True)
    for _ in range(3):
        keys, order, first = getattr(grouping, sort)(indices, E)
        assert torch.equal(keys.long() - first, want)
        assert torch.equal(order.long(), want_order)
