"""The layer without gradients: the dense MLP beside router and experts, which one or two tokens take in one launch."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from flash_moe.ops._triton.expert import expert_forward
from flash_moe.ops._triton.expert_mlp import Dense, SideStream
from flash_moe.ops._triton.gate import gate_forward
from flash_moe.ops._triton.layer_few import MAX_TOKENS, few_tokens_like, layer_few, takes
from flash_moe.ops._triton.mlp_few import down_product_in_parts, takes_few
from flash_moe.ops._triton.mlp_fused import gated_product_forward
from flash_moe.ops._triton.router import routing_forward

Gate = tuple[Tensor, Tensor, Tensor, float]
"""The gate's weight, BatchNorm's running mean and variance, and its eps."""


def layer_inference(
    x: Tensor,
    gate: Gate,
    tables: tuple[Tensor, Tensor],
    dense: Dense,
    num_experts_per_tok: int,
    norm_topk_prob: bool,
    hidden_act: str,
    wants_indices: bool = True,
) -> list[Tensor]:
    """``y [T, H]``, the gate's product ``[2, T, N]`` and, if wanted, ``indices [T, K]``."""
    options = (num_experts_per_tok, norm_topk_prob, hidden_act)
    if takes(x.shape[0], gate[0].shape[0] // 2, num_experts_per_tok):
        if wants_indices:
            return [*layer_few(x, gate, tables, dense, *options)]
        return [*few_tokens_like(x, gate, dense, *options)(x, *gate[:3], *tables, *dense)]
    parts, beside = None, SideStream(x)
    with beside:
        activated = gated_product_forward(x, *dense[:2], hidden_act)
        if takes_few(x):
            parts = down_product_in_parts(activated, dense[2])
    logits = gate_forward(x, *gate)
    by_half = logits.view(len(x), 2, -1).transpose(0, 1)
    weights, indices, _ = routing_forward(by_half, num_experts_per_tok, norm_topk_prob)
    if parts is not None:
        beside.join()
    out, _ = expert_forward(x, *tables, indices, weights, hidden_act, parts)
    if parts is None:
        beside.join()
        out.addmm_(activated, dense[2].t())
    return [out, by_half, indices][: 2 + wants_indices]


def repeated(
    hidden_states: Tensor, *weights: Tensor, options: tuple[float, int, bool, str]
) -> tuple[Callable[..., tuple[Tensor, Tensor]], int] | None:
    """What gives ``y`` and the gate's product for tensors like these, and for how many tokens.

    Args:
        hidden_states, weights: contiguous, in the order of the layer's op.
        options: the norm's eps, K, whether routing weights are normalised, and the activation.
    Returns:
        A function of such tensors, and the number of tokens from which on it takes any; 0 if it takes as many as these
        alone. ``None`` in float32, of which more tokens than a few do not go this way.
    """
    x = hidden_states.view(-1, hidden_states.shape[-1])
    router_gate, mean, variance, _, _, *dense = weights
    eps, K, norm_topk_prob, hidden_act = options
    if takes(x.shape[0], router_gate.shape[0] // 2, K):
        gate = (router_gate, mean, variance, eps)
        return few_tokens_like(x, gate, tuple(dense), K, norm_topk_prob, hidden_act), 0
    if x.dtype == torch.float32:
        return None
    return partial(_of_any_tokens, options), min(x.shape[0], MAX_TOKENS + 1)


def _of_any_tokens(
    options: tuple[float, int, bool, str], hidden_states: Tensor, *weights: Tensor
) -> tuple[Tensor, Tensor]:
    router_gate, mean, variance, down_embed, up_embed, gate_proj, up_proj, down_proj = weights
    eps, K, norm_topk_prob, hidden_act = options
    gate, tables, dense = (router_gate, mean, variance, eps), (down_embed, up_embed), (gate_proj, up_proj, down_proj)
    x = hidden_states.reshape(-1, hidden_states.shape[-1]).contiguous()
    y, router_logits = layer_inference(x, gate, tables, dense, K, norm_topk_prob, hidden_act, False)
    return y.view(hidden_states.shape), router_logits
