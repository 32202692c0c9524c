"""How evenly a layer's experts are used, as tensors, so that asking costs no device synchronisation."""

from typing import NamedTuple

import torch
from torch import Tensor


class ExpertUsage(NamedTuple):
    """Pairs (token, expert) since the last reset and what they say; 0-dimensional tensors but for ``counts``."""

    counts: Tensor
    """``[E]``, int64."""
    dead_share: Tensor
    """The share of experts that no token chose."""
    unevenness: Tensor
    """KL divergence of the usage from uniform, in nats: 0 when even, log(E) when one expert takes all."""


def count_experts(indices: Tensor, num_experts: int, token_mask: Tensor | None = None) -> Tensor:
    """Pairs per expert, ``[E]`` int64, of ``indices [T, K]``; tokens with a False ``token_mask [T]`` do not count."""
    if token_mask is None:
        ones = torch.ones_like(indices)
    else:
        ones = token_mask.to(torch.int64)[:, None].expand_as(indices)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=indices.device)
    return counts.scatter_add_(0, indices.flatten(), ones.flatten())  # integers: any order gives the same bits


def summarize_usage(counts: Tensor) -> ExpertUsage:
    """
    Source: dead share and unevenness as in PEER, arXiv:2407.04153, section 3.3, with counts in place of scores.
    """
    share = counts.double() / counts.sum().clamp(min=1)
    divergence = torch.special.xlogy(share, share * counts.numel()).sum()
    return ExpertUsage(counts.clone(), (counts == 0).double().mean(), divergence)
