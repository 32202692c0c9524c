"""BatchNorm over the tokens that are not padding, without a device synchronisation; its statistics move once a step.

Where nothing is padding and Triton runs, it goes into the gate's product that follows.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_moe.modules.rank_sums import sum_over_ranks
from flash_moe.modules.recomputation import add_once
from flash_moe.ops._register import is_recomputing
from flash_moe.ops.flash_gate import batch_norm_statistics, flash_gate


def token_batch_norm(
    x: Tensor, norm: nn.BatchNorm1d, token_mask: Tensor | None = None, *, across_ranks: bool = False
) -> Tensor:
    """``norm`` in training on the rows of ``x [T, H]`` with a True ``token_mask [T]``; the others become 0.

    Updates the running statistics as ``norm`` does, but not in a forward that activation checkpointing runs again.
    Statistics are at least float32, and with ``across_ranks`` those of the tokens of all ranks, of which some may have
    none.
    """
    if token_mask is None and not across_ranks and not torch.compiler.is_compiling():
        return _native_batch_norm(x, norm)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean, variance, num_tokens = _statistics(wide, token_mask)
    if across_ranks:
        mean, variance, num_tokens = _of_all_ranks(mean, variance, num_tokens)
    _update_running(norm, mean.detach(), variance.detach(), num_tokens)
    normed = (wide - mean) * torch.rsqrt(variance + norm.eps)
    if token_mask is not None:
        normed = normed * token_mask[:, None].to(wide.dtype)
    return normed.to(x.dtype)


def token_batch_norm_gate(x: Tensor, norm: nn.BatchNorm1d, gate_weight: Tensor) -> Tensor:
    """``linear(norm(x), gate_weight)`` without the normalised tokens in memory, by Triton alone.

    In training it updates the running statistics as ``norm`` does, but not in a recomputed forward.
    """
    eps = eps_of(norm)
    if not norm.training:
        statistics = (cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var))
        return flash_gate(x, gate_weight, *statistics, eps=eps)
    mean, variance = batch_norm_statistics(
        x,
        cast(Tensor, norm.running_mean),
        cast(Tensor, norm.running_var),
        cast(Tensor, norm.num_batches_tracked),
        momentum=0.1 if norm.momentum == 0.1 else cast(float, norm.momentum),  # as in eps_of
    )
    return flash_gate(x, gate_weight, mean, variance, eps=eps, is_batch=True)


def eps_of(norm: nn.BatchNorm1d) -> float:
    """Of a module's float that an op takes torch.compile makes a tensor at every call, but not of one compared.

    With ``dynamic=True``, and in 5 us. Of a global one, too, so PyTorch's own default stands here as a literal.
    """
    return 1e-5 if norm.eps == 1e-5 else norm.eps


def _native_batch_norm(x: Tensor, norm: nn.BatchNorm1d) -> Tensor:
    # A momentum of 0 leaves the running statistics as they are.
    momentum = 0.0 if is_recomputing() else cast(float, norm.momentum)
    add_once(cast(Tensor, norm.num_batches_tracked), 1)
    return F.batch_norm(x, norm.running_mean, norm.running_var, training=True, momentum=momentum, eps=norm.eps)


def _statistics(wide: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean ``[H]``, variance ``[H]`` (over the number of tokens) and the number of tokens."""
    if token_mask is None and wide.shape[0] > 0:
        variance, mean = torch.var_mean(wide, dim=0, correction=0)
        return mean, variance, wide.new_full((), wide.shape[0])
    if token_mask is None:
        return wide.sum(0), wide.sum(0), wide.new_zeros(())
    token_weights = token_mask[:, None].to(wide.dtype)
    num_tokens = token_weights.sum()
    mean = (wide * token_weights).sum(0) / num_tokens.clamp(min=1)
    variance = ((wide - mean) * token_weights).square().sum(0) / num_tokens.clamp(min=1)
    return mean, variance, num_tokens


def _of_all_ranks(mean: Tensor, variance: Tensor, num_tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of the tokens of all ranks, from one sum over ranks."""
    H, dtype = mean.shape[0], mean.dtype
    # float64, so that a variance survives as the difference of two large numbers; there are only 2 H + 1 of them.
    mean, variance, num_tokens = mean.double(), variance.double(), num_tokens.double()
    sums = torch.cat((mean * num_tokens, (variance + mean.square()) * num_tokens, num_tokens[None]))
    total, total_of_squares, num_tokens = sum_over_ranks(sums).split((H, H, 1))
    num_tokens = num_tokens[0].detach()
    mean = total / num_tokens.clamp(min=1)
    variance = total_of_squares / num_tokens.clamp(min=1) - mean.square()
    return mean.to(dtype), variance.to(dtype).clamp(min=0), num_tokens.to(dtype)


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
