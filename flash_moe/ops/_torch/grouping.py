"""Sums over groups without atomics: sort by group, then add each group's run of rows in order."""

import torch
import torch.nn.functional as F
from torch import Tensor


def group_by_key(keys: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """``order [P]``, the positions of ``keys [P]`` by (key, position), and ``offsets [num_groups + 1]`` into it.

    Example: keys [2, 0, 2], 4 groups -> order [1, 0, 2], offsets [0, 1, 1, 3, 3].
    """
    sorted_keys, order = keys.sort(stable=True)
    bounds = torch.arange(num_groups + 1, dtype=keys.dtype, device=keys.device)
    return order, torch.searchsorted(sorted_keys, bounds)


def sum_groups(source: Tensor, rows: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
    """out[g] = sum over p in [offsets[g], offsets[g + 1]) of weights[p] * source[rows[p]]; an empty group is zero.

    ``source`` is float32: lower precisions would have ``weights`` rounded to them.
    """
    if rows.numel() == 0:  # nor need source have a row then
        return source.new_zeros(offsets.shape[0] - 1, source.shape[1])
    return F.embedding_bag(rows, source, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)
