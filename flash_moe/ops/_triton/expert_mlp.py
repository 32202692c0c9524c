"""The experts and the dense MLP beside them: products by torch, and both branches at the same time on a GPU.

T tokens, H hidden size, I intermediate size, E experts, K experts per token. The MLP is bound by tensor cores and the
experts by the bandwidth of the L2 cache, so each has what the other leaves idle.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flash_moe.ops._triton.expert import (
    expert_backward_rows,
    expert_backward_tables,
    expert_backward_tokens,
    expert_forward,
    group_for_tables,
)
from flash_moe.ops._triton.grouping import group_by_distinct_expert
from flash_moe.ops._triton.mlp import gated_activation_backward, gated_activation_forward

Experts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Tokens, down and up table, indices and routing weights."""
Dense = tuple[Tensor, Tensor, Tensor]
"""``gate_proj``, ``up_proj`` and ``down_proj``."""
Saved = tuple[Tensor, Tensor, Tensor]
"""The experts' pre-activations ``[T, K]``; gate and up, ``[T, I]``. Their gated product is cheaper to make again."""


# Eager calls on fewer tokens wait for the host, to which another stream costs some 50 us, and a graph nothing.
MIN_EAGER_TOKENS = 8192


class SideStream:
    """Within it, work for a stream beside the current one, which waits for it at ``join``; or in line, where that pays.

    It serves the current stream alone, and each time starts behind what that one has been given. So nothing needs to be
    recorded: what it allocated may be used behind the join, and when that is freed only its own later work gets it.
    """

    def __init__(self, like: Tensor) -> None:
        is_beside = like.is_cuda and (like.shape[0] >= MIN_EAGER_TOKENS or torch.cuda.is_current_stream_capturing())
        self._current = torch.cuda.current_stream(like.device) if is_beside else None
        if self._current is not None:
            self._side = _side_stream(like.device.index, self._current.cuda_stream)
            self._side.wait_stream(self._current)

    def __enter__(self) -> None:
        if self._current is not None:
            self._within = torch.cuda.stream(self._side)
            self._within.__enter__()

    def __exit__(self, *error: object) -> None:
        if self._current is not None:
            self._within.__exit__(*error)

    def mark(self) -> torch.cuda.Event | None:
        """A point for ``join`` to wait for, in place of all that the stream has been given."""
        return None if self._current is None else self._side.record_event()

    def current_mark(self) -> torch.cuda.Event | None:
        """The same of the current stream, for ``follow``."""
        return None if self._current is None else self._current.record_event()

    def follow(self, mark: torch.cuda.Event | None) -> None:
        """What comes now waits for the current stream at that point."""
        if mark is not None:
            self._side.wait_event(mark)

    def join(self, mark: torch.cuda.Event | None = None) -> None:
        if self._current is not None:
            self._current.wait_event(mark or self._side.record_event())


@lru_cache
def _side_stream(device_index: int, current: int) -> torch.cuda.Stream:
    """One for each stream, since a capture of one must not catch the work of another."""
    return torch.cuda.Stream(device_index)


def expert_mlp_forward(experts: Experts, dense: Dense, hidden_act: str) -> tuple[Tensor, Saved]:
    """``out [T, H]`` and what the backward pass needs."""
    x, (gate_proj, up_proj, down_proj) = experts[0], dense
    gate, up, activated = (x.new_empty(x.shape[0], gate_proj.shape[0]) for _ in range(3))
    beside = SideStream(x)
    with beside:
        torch.mm(x, gate_proj.t(), out=gate)
        torch.mm(x, up_proj.t(), out=up)
        gated_activation_forward(gate, up, hidden_act, out=activated)
    out, pre_activations = expert_forward(*experts, hidden_act)
    beside.join()
    out.addmm_(activated, down_proj.t())
    return out, (pre_activations, gate, up)


def expert_mlp_backward(
    grad_out: Tensor,
    experts: Experts,
    dense: Dense,
    saved: Saved,
    hidden_act: str,
    sparse_grad: bool,
    wants_tables: bool,
    wants_dense: bool,
) -> tuple[Tensor, ...]:
    """``dx``, ``dweights``, the rows' ids, both tables' and the three dense gradients; what is not wanted is empty.

    Ids are those of ``expert_backward_rows`` with ``sparse_grad``, else empty.
    """
    x, down_weights, _, indices, _ = experts
    pre_activations, *dense_saved = saved
    num_experts = down_weights.shape[0]
    beside = SideStream(x)
    with beside:
        groups: Any = None
        if wants_tables:  # first: a chain of short launches that leave the GPU nearly idle
            if sparse_grad:
                groups = group_by_distinct_expert(indices, num_experts)
            else:
                groups = group_for_tables(x, indices, num_experts)
        grouped = beside.mark()
    dx, dweights, ds, coefficients = expert_backward_tokens(grad_out, *experts, pre_activations, hidden_act)
    has_dx = beside.current_mark()
    ids = indices.new_empty(0, dtype=torch.int64)
    beside.join(grouped)
    pairs = (grad_out, x, indices, ds, coefficients, num_experts, groups)
    if not wants_tables:
        tables = [x.new_empty(0), x.new_empty(0)]
    elif sparse_grad:
        ids, *tables = expert_backward_rows(*pairs)
    else:
        tables = [*expert_backward_tables(*pairs)]
    del pairs, ds, coefficients  # not the groups: they are the other stream's, which would use their memory at once
    with beside:  # asked for last, so that what the experts needed is free again where all is in line
        dgate, dup, ddown_proj = _gated_backward(grad_out, dense[2], dense_saved, hidden_act, wants_dense)
        beside.follow(has_dx)
        dgate_proj = _product_backward(dgate, x, dense[0], wants_dense, dx)
        del dgate
        dup_proj = _product_backward(dup, x, dense[1], wants_dense, dx)
    beside.join()
    return dx, dweights, ids, *tables, dgate_proj, dup_proj, ddown_proj


def _gated_backward(
    grad_out: Tensor, down_proj: Tensor, saved: Sequence[Tensor], hidden_act: str, wants_dense: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``dgate`` and ``dup [T, I]``, and the gradient of ``down_proj``, empty unless wanted."""
    gate, up = saved
    # Two buffers of ``[T, I]`` in all: one for the gated product, then what comes back to it, then dgate; one for dup.
    buffer = torch.empty_like(gate)
    if wants_dense:
        ddown_proj = torch.mm(grad_out.t(), gated_activation_forward(gate, up, hidden_act, out=buffer))
    else:
        ddown_proj = down_proj.new_empty(0)
    torch.mm(grad_out, down_proj, out=buffer)
    dgate, dup = gated_activation_backward(buffer, gate, up, hidden_act, out=(buffer, torch.empty_like(up)))
    return dgate, dup, ddown_proj


def _product_backward(grad: Tensor, x: Tensor, weight: Tensor, wants_dense: bool, dx: Tensor) -> Tensor:
    """The weight's gradient, empty unless wanted; that of x is added to ``dx``."""
    dx.addmm_(grad, weight)
    return torch.mm(grad.t(), x) if wants_dense else weight.new_empty(0)
