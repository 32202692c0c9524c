"""The whole FlashMoE layer without gradients as one op, for serving: nothing is kept, few tokens take few launches.

T tokens, H hidden size, I intermediate size, E = N * N experts, K experts per token.
"""

from typing import Any

import torch
from torch import Tensor

from flash_moe.ops._register import PLAIN_TYPES, is_watched, register_op
from flash_moe.ops.expert_mlp import DenseWeights


def layer_inference(
    hidden_states: Tensor,
    router_gate: Tensor,
    statistics: tuple[Tensor, Tensor, float],
    down_weights: Tensor,
    up_weights: Tensor,
    dense_weights: DenseWeights,
    num_experts_per_tok: int,
    *,
    norm_topk_prob: bool = False,
    hidden_act: str = "silu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Through Triton, for a caller that has checked the arguments: ``flash_gate``, ``flash_routing``, ``expert_mlp``.

    Args:
        hidden_states: ``[T, H]``; every weight has its dtype.
        router_gate: ``[2 * N, H]``.
        statistics: BatchNorm's running mean and variance ``[H]``, and its eps.
        down_weights, up_weights, dense_weights: as ``expert_mlp`` takes them.
        num_experts_per_tok, norm_topk_prob, hidden_act: as ``flash_routing`` and ``flash_expert`` take them.
    Returns:
        ``y [T, H]``, ``router_logits [2, T, N]`` and ``indices [T, K]``, int64; without gradients.
    """
    mean, variance, eps = statistics
    tensors = (hidden_states, router_gate, mean, variance, down_weights, up_weights, *dense_weights)
    # An op costs the host 6 us.
    is_plain = not is_watched() and all(type(x) in PLAIN_TYPES for x in tensors)
    out, logits, indices = (_forward if is_plain else torch.ops.flash_moe.layer_inference)(
        *[x.contiguous() for x in tensors], eps, num_experts_per_tok, norm_topk_prob, hidden_act
    )
    T, C = logits.shape
    return out, logits.as_strided((2, T, C // 2), (C // 2, C, 1)), indices


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from flash_moe.ops._triton import layer_inference as kernels

    x, router_gate, mean, variance, down, up, *dense_weights = arguments[:9]
    eps, *options = arguments[9:]
    out, logits, indices = kernels.layer_inference(
        x, (router_gate, mean, variance, eps), (down, up), tuple(dense_weights), *options
    )
    return out, logits, indices


def _fake(hidden_states: Tensor, router_gate: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    num_experts_per_tok = arguments[-3]
    T = hidden_states.shape[0]
    indices = hidden_states.new_empty(T, num_experts_per_tok, dtype=torch.int64)
    return torch.empty_like(hidden_states), hidden_states.new_empty(T, router_gate.shape[0]), indices


register_op(
    "layer_inference(Tensor hidden_states, Tensor router_gate, Tensor mean, Tensor variance, Tensor down_weights, "
    "Tensor up_weights, Tensor gate_proj, Tensor up_proj, Tensor down_proj, float eps, int num_experts_per_tok, "
    "bool norm_topk_prob, str hidden_act) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
)
