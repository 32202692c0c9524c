"""One-neuron experts in bounded memory. T tokens, H hidden size, E experts, K experts a token, P = T * K pairs.

out[t] = sum_k g[t,k] up[e],  g = w act(s),  s[t,k] = x[t] . down[e],  e = indices[t,k]
dG = dout[t] . up[e],  dw = dG act(s),  ds = dG w act'(s),  dx[t] = sum_k ds down[e]
ddown[e] = sum over the pairs of e of ds x[t],  dup[e] = sum over them of g dout[t]

Rows are gathered a tile of pairs at a time. Beyond inputs and outputs a call holds O(P) numbers, two tiles, and for
table gradients of 16-bit tensors one block of columns (``_table_gradient``).
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_moe._activations import ACTIVATIONS
from flash_moe.ops._torch.distinct import group_by_distinct_key
from flash_moe.ops._torch.grouping import group_by_key, sum_groups

# Elements of a tile of gathered rows. On a CPU 4 MB of float32: at T 4096, H 256, K 32 on one core of an EPYC 9004,
# forward takes 17.4 ms at 2^20, 20 at 2^18, 28 at 2^16 and 23 at 2^22. On a GPU enough to amortise the launches.
CPU_TILE = 2**20
CUDA_TILE = 2**24
# Elements of a float32 block of columns of a table gradient, unless that would be narrower than MIN_COLUMNS.
COLUMN_BLOCK = 2**24
MIN_COLUMNS = 64
# Above this many experts a token, embedding_bag's plain left-to-right float32 sum is measurably less exact than sum's.
MAX_BAG_EXPERTS = 256


# grad * act'(s); the names are those of ACTIVATIONS.
ACTIVATION_GRADS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_pytorch_tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    "relu": lambda grad, s: grad.masked_fill(s <= 0, 0.0),
    "relu2": lambda grad, s: grad * (2.0 * torch.relu(s)),
    "identity": lambda grad, s: grad,
}


def expert_forward(
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
    hidden_act: str,
) -> tuple[Tensor, Tensor]:
    """``out [T, H]`` in the dtype of ``hidden_states``, and the pre-activations ``s [T, K]`` in float32."""
    pre_activations = _pair_dots(hidden_states, down_weights, indices)
    coefficients = ACTIVATIONS[hidden_act](pre_activations) * routing_weights
    return _pair_sums(up_weights, indices, coefficients), pre_activations


def expert_forward_quantized(
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    down_scale: Tensor,
    up_scale: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
    hidden_act: str,
) -> Tensor:
    """``out [T, H]`` in the dtype of ``hidden_states``, of tables of 8 bits with a scale a row ``[E]``."""
    pre_activations = _pair_dots(hidden_states, down_weights, indices).mul_(down_scale[indices])
    coefficients = ACTIVATIONS[hidden_act](pre_activations) * routing_weights * up_scale[indices]
    return _pair_sums(up_weights, indices, coefficients, hidden_states.dtype)


def expert_backward_tokens(
    grad_out: Tensor,
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
    pre_activations: Tensor,
    hidden_act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``dx [T, H]``, ``dweights [T, K]`` in their inputs' dtypes, and float32 ``ds``, ``g [T, K]`` for the tables."""
    grad_coefficients = _pair_dots(grad_out, up_weights, indices)
    activations = ACTIVATIONS[hidden_act](pre_activations)
    dweights = (grad_coefficients * activations).to(routing_weights.dtype)
    ds = ACTIVATION_GRADS[hidden_act](grad_coefficients * routing_weights, pre_activations)
    return _pair_sums(down_weights, indices, ds), dweights, ds, activations * routing_weights


def expert_backward_tables(
    grad_out: Tensor, hidden_states: Tensor, indices: Tensor, ds: Tensor, g: Tensor, num_experts: int
) -> tuple[Tensor, Tensor]:
    """``ddown``, ``dup [E, H]`` in the dtype of ``hidden_states``; experts without a pair get zeros."""
    order, offsets = group_by_key(indices.long().flatten(), num_experts)
    return _both_gradients(grad_out, hidden_states, ds, g, order, offsets)


def expert_backward_rows(
    grad_out: Tensor, hidden_states: Tensor, indices: Tensor, ds: Tensor, g: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``ids``, int64, and ``ddown``, ``dup`` of each distinct expert, in min(P, E) rows; the rows left are zeros."""
    order, offsets, ids = group_by_distinct_key(indices.long().flatten(), min(indices.numel(), num_experts))
    return ids, *_both_gradients(grad_out, hidden_states, ds, g, order, offsets)


def _both_gradients(
    grad_out: Tensor, hidden_states: Tensor, ds: Tensor, g: Tensor, order: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    tokens = order // max(1, ds.shape[1])
    ddown = _table_gradient(hidden_states, tokens, offsets, ds.flatten()[order])
    dup = _table_gradient(grad_out, tokens, offsets, g.flatten()[order])
    return ddown, dup


def _table_gradient(rows: Tensor, tokens: Tensor, offsets: Tensor, coefficients: Tensor) -> Tensor:
    """out[e] = sum over the pairs p of e of coefficients[p] * rows[tokens[p]], summed in float32.

    16-bit rows are converted, and their sums held, a block of columns at a time: (E + T) * max(MIN_COLUMNS,
    COLUMN_BLOCK / E) float32 numbers at most, never a float32 copy of a large table.
    """
    (_, H), E = rows.shape, offsets.shape[0] - 1
    if rows.dtype == torch.float32:
        return sum_groups(rows, tokens, offsets, coefficients)
    out = rows.new_empty(E, H)
    width = max(MIN_COLUMNS, COLUMN_BLOCK // max(1, E))
    for h in range(0, H, width):
        out[:, h : h + width] = sum_groups(rows[:, h : h + width].float(), tokens, offsets, coefficients)
    return out


def _pair_dots(rows: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    """``[T, K]`` float32: rows[t] . table[indices[t,k]].

    A product and a sum, not bmm: bmm is no faster on rows just gathered, and may round float32 to tf32 or bfloat16
    where the user has allowed that.
    """
    out = rows.new_empty(indices.shape, dtype=torch.float32)
    for t, k, gathered in _gathered_tiles(table, indices):
        out[t, k] = gathered.mul_(rows[t].float()[:, None, :]).sum(-1)
    return out


def _pair_sums(table: Tensor, indices: Tensor, coefficients: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``[T, H]`` in ``dtype``, by default the table's: sum_k coefficients[t,k] * table[indices[t,k]] in float32."""
    # In 16 bits embedding_bag would round the coefficients.
    if table.dtype == torch.float32 and indices.numel() > 0 and indices.shape[1] <= MAX_BAG_EXPERTS:
        return F.embedding_bag(indices, table, mode="sum", per_sample_weights=coefficients)
    out = table.new_zeros(indices.shape[0], table.shape[1], dtype=dtype)
    total = coefficients.new_zeros(())
    for t, k, gathered in _gathered_tiles(table, indices):
        part = gathered.mul_(coefficients[t, k, None]).sum(1)
        total = part if k.start == 0 else total.add_(part)
        if k.stop == indices.shape[1]:
            out[t] = total
    return out


def _gathered_tiles(table: Tensor, indices: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Token range, k range and a float32 copy ``[tokens, ks, H]`` of their rows; a token's k ranges come in order.

    The caller may overwrite the copy, and the next step does.
    """
    (T, K), H = indices.shape, table.shape[1]
    rows_per_tile = max(1, (CUDA_TILE if table.is_cuda else CPU_TILE) // max(1, H))
    ks = max(1, min(K, rows_per_tile))
    tokens = max(1, min(T, rows_per_tile // ks))
    gathered = table.new_empty(tokens * ks, H)
    converted = gathered.float()  # the same storage for float32
    for t0 in range(0, T, tokens):
        for k0 in range(0, K, ks):
            t, k = slice(t0, min(T, t0 + tokens)), slice(k0, min(K, k0 + ks))
            shape = indices[t, k].shape
            tile = slice(0, shape.numel())
            torch.index_select(table, 0, indices[t, k].reshape(-1), out=gathered[tile])
            if converted is not gathered:
                converted[tile] = gathered[tile]
            yield t, k, converted[tile].view(*shape, H)
