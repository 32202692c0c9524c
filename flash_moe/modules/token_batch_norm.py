"""BatchNorm over the tokens that are not padding, without a device synchronisation; its statistics move once a step."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_moe.modules.recomputation import add_once, is_recomputing


def token_batch_norm(x: Tensor, norm: nn.BatchNorm1d, token_mask: Tensor | None = None) -> Tensor:
    """``norm`` in training on the rows of ``x [T, H]`` with a True ``token_mask [T]``; the others become 0.

    Updates the running statistics as ``norm`` does, but not in a forward that activation checkpointing runs again.
    Statistics are at least float32.
    """
    if token_mask is None and not torch.compiler.is_compiling():
        return _native_batch_norm(x, norm)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean, variance, num_tokens = _statistics(wide, token_mask)
    _update_running(norm, mean, variance, num_tokens)
    normed = (wide - mean) * torch.rsqrt(variance + norm.eps)
    if token_mask is not None:
        normed = normed * token_mask[:, None].to(wide.dtype)
    return normed.to(x.dtype)


def _native_batch_norm(x: Tensor, norm: nn.BatchNorm1d) -> Tensor:
    # A momentum of 0 leaves the running statistics as they are.
    momentum = 0.0 if is_recomputing() else cast(float, norm.momentum)
    add_once(cast(Tensor, norm.num_batches_tracked), 1)
    return F.batch_norm(x, norm.running_mean, norm.running_var, training=True, momentum=momentum, eps=norm.eps)


def _statistics(wide: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean ``[H]``, variance ``[H]`` (over the number of tokens) and the number of tokens."""
    if token_mask is None:
        variance, mean = torch.var_mean(wide, dim=0, correction=0)
        return mean, variance, wide.new_full((), wide.shape[0])
    token_weights = token_mask[:, None].to(wide.dtype)
    num_tokens = token_weights.sum()
    mean = (wide * token_weights).sum(0) / num_tokens.clamp(min=1)
    variance = ((wide - mean) * token_weights).square().sum(0) / num_tokens.clamp(min=1)
    return mean, variance, num_tokens


@torch.no_grad()
def _update_running(norm: nn.BatchNorm1d, mean: Tensor, variance: Tensor, num_tokens: Tensor) -> None:
    # A batch that is all padding leaves the statistics as they are, and so does a single token, which has no variance:
    # to raise, as without a mask, would need the host to wait for the count.
    momentum = cast(float, norm.momentum)
    has_variance = num_tokens > 1
    unbiased = variance * (num_tokens / (num_tokens - 1).clamp(min=1))
    for running, batch in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        running = cast(Tensor, running)
        add_once(running, torch.where(has_variance, momentum * (batch - running), 0.0))
    add_once(cast(Tensor, norm.num_batches_tracked), has_variance.to(torch.int64))
