"""Clipping by the norm of all gradients where some are row-sparse, as ``sparse_grad=True`` makes them."""

from collections.abc import Iterable

import torch
from torch import Tensor

from flash_moe.ops._torch.distinct import group_by_distinct_key
from flash_moe.ops._torch.grouping import sum_groups


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Scale all gradients in place so that their common norm is at most ``max_norm``; dense and row-sparse together.

    What ``torch.nn.utils.clip_grad_norm_`` does for the dense equivalents. Rows of a sparse gradient that repeat an id,
    as after two backward passes, count by their sum and stay as they are, scaled. Nothing waits for the device unless
    ``error_if_nonfinite``.

    Args:
        parameters: a tensor or several; those without a gradient are left out.
        max_norm: above 0 or 0.
        norm_type: above 0; infinity for the largest absolute value.
        error_if_nonfinite: raise where the norm is infinite or NaN.
    Returns:
        The norm before clipping, a tensor of one element.
    Raises:
        ValueError: ``max_norm`` or ``norm_type`` is out of range, or a gradient is sparse in more than its rows.
        RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm: expected 0 or more; got {max_norm!r}")
    if not norm_type > 0:
        raise ValueError(f"norm_type: expected a number above 0, or infinity; got {norm_type!r}")
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    with_dense = [x for x in parameters if x.grad is not None and not x.grad.is_sparse]
    dense = [x.grad for x in with_dense if x.grad is not None]
    sparse = [x.grad for x in parameters if x.grad is not None and x.grad.is_sparse]
    summed = [_sum_rows(grad) for grad in sparse if grad._nnz() > 0]
    norm = torch.nn.utils.get_total_norm(dense + summed, norm_type, error_if_nonfinite)
    if dense:
        torch.nn.utils.clip_grads_with_norm_(with_dense, max_norm, norm)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in sparse:
        grad._values().mul_(scale.to(grad.device))
    return norm


def _sum_rows(grad: Tensor) -> Tensor:
    """A row for every row of ``grad``: the sums by id first, then zeros; unlike ``coalesce``, no row is counted."""
    if grad.sparse_dim() != 1 or grad.dense_dim() != 1:
        raise ValueError(
            f"parameters: expected gradients that are dense, or sparse in the rows of a matrix; got one of "
            f"shape {tuple(grad.shape)} with {grad.sparse_dim()} sparse dimensions"
        )
    values = grad._values()
    if grad.is_coalesced():
        return values
    order, offsets, _ = group_by_distinct_key(grad._indices()[0], values.shape[0])
    return sum_groups(values.float(), order, offsets).to(values.dtype)
