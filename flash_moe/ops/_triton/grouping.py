"""Pairs grouped by expert, without atomics and without waiting for the device. P pairs, G groups."""

from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    numbers: Tensor
    """``[P]``, int32: the group of each pair, ascending."""
    order: Tensor
    """``[P]``, int64: the pairs by group, and within a group by number."""
    offsets: Tensor
    """``[G + 1]``, int32: group g is pairs offsets[g] to offsets[g + 1] of ``order``."""


def group_by_expert(indices: Tensor, num_experts: int) -> Groups:
    """A group for each of ``num_experts`` experts.

    Example: indices [[2, 0], [2, 2]], 4 experts -> numbers [0, 2, 2, 2], order [1, 0, 2, 3], offsets [0, 1, 1, 4, 4].
    """
    sorted_ids, order = torch.sort(indices.to(torch.int32).flatten(), stable=True)
    experts = torch.arange(num_experts + 1, dtype=torch.int32, device=indices.device)
    return Groups(sorted_ids, order, torch.searchsorted(sorted_ids, experts, out_int32=True))


def group_by_distinct_expert(indices: Tensor, num_groups: int) -> tuple[Groups, Tensor]:
    """A group for each distinct expert, and the experts' ids ``[num_groups]``, int64; nothing is as large as E.

    ``num_groups``, known without asking the device, is at least the number of distinct experts. The groups beyond those
    are empty and repeat the experts in turn, so that no expert gets many of them.

    Example: indices [[7, 2], [7, 7]], 3 groups -> numbers [0, 1, 1, 1], order [1, 0, 2, 3], offsets [0, 1, 4, 4], ids
    [2, 7, 2].
    """
    sorted_ids, order = torch.sort(indices.to(torch.int32).flatten(), stable=True)
    starts = torch.ones_like(sorted_ids, dtype=torch.bool)
    torch.ne(sorted_ids[1:], sorted_ids[:-1], out=starts[1:])
    numbers = starts.cumsum(0, dtype=torch.int32) - 1
    rows = torch.arange(num_groups + 1, dtype=torch.int32, device=indices.device)
    offsets = torch.searchsorted(numbers, rows, out_int32=True)
    ids = sorted_ids[offsets[rows[:-1] % (numbers[-1:] + 1)]].long()
    return Groups(numbers, order, offsets), ids
