"""Groups of equal keys, numbered by the distinct keys that occur: nothing is as large as the range of the keys."""

import torch
from torch import Tensor


def group_by_distinct_key(keys: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """``order [P]``, ``offsets [num_groups + 1]`` into it, and the groups' keys ``distinct [num_groups]``.

    ``num_groups``, known without asking the device, is at least the number of distinct keys. The groups beyond those
    are empty and repeat the distinct keys in turn, so that no key gets many of them.

    Example: keys [7, 2, 7], 3 groups -> order [1, 0, 2], offsets [0, 1, 3, 3], distinct [2, 7, 2].
    """
    sorted_keys, order = keys.sort(stable=True)
    starts = torch.ones_like(sorted_keys, dtype=torch.bool)
    torch.ne(sorted_keys[1:], sorted_keys[:-1], out=starts[1:])
    groups = starts.cumsum(0)  # from 1
    numbers = torch.arange(num_groups + 1, device=keys.device)
    offsets = torch.searchsorted(groups, numbers + 1)
    return order, offsets, sorted_keys[offsets[numbers[:-1] % groups[-1:]]]
