"""BatchNorm over the tokens that are not padding, without a device synchronisation."""

from typing import cast

import torch
from torch import Tensor, nn


def masked_batch_norm(x: Tensor, token_mask: Tensor, norm: nn.BatchNorm1d) -> Tensor:
    """``norm`` in training on the rows of ``x [T, H]`` with a True ``token_mask [T]``; the others become 0.

    Updates the running statistics as ``norm`` does. Statistics are at least float32.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    token_weights = token_mask[:, None].to(wide.dtype)
    num_tokens = token_weights.sum()
    mean = (wide * token_weights).sum(0) / num_tokens.clamp(min=1)
    centered = (wide - mean) * token_weights
    sum_of_squares = centered.square().sum(0)
    _update_running(norm, mean, sum_of_squares / (num_tokens - 1).clamp(min=1), num_tokens)
    variance = sum_of_squares / num_tokens.clamp(min=1)
    return (centered * torch.rsqrt(variance + norm.eps)).to(x.dtype)


@torch.no_grad()
def _update_running(norm: nn.BatchNorm1d, mean: Tensor, unbiased_variance: Tensor, num_tokens: Tensor) -> None:
    # A batch that is all padding leaves the statistics as they are, and so does a single token, which has no variance:
    # to raise, as without a mask, would need the host to wait for the count.
    momentum = cast(float, norm.momentum)
    has_variance = num_tokens > 1
    for running, batch in ((norm.running_mean, mean), (norm.running_var, unbiased_variance)):
        running = cast(Tensor, running)
        running += momentum * torch.where(has_variance, batch - running, 0.0)
    cast(Tensor, norm.num_batches_tracked).add_(has_variance.to(torch.int64))
