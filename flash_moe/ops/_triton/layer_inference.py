"""The layer without gradients: the dense MLP beside router and experts, which one or two tokens take in one launch."""

from torch import Tensor

from flash_moe.ops._triton.expert import expert_forward
from flash_moe.ops._triton.expert_mlp import Dense, SideStream
from flash_moe.ops._triton.gate import gate_forward
from flash_moe.ops._triton.layer_few import FewTokens, Weights, few_tokens_like, layer_few, takes
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


def one_launch(
    x: Tensor, gate: Gate, dense: Weights, num_experts_per_tok: int, norm_topk_prob: bool, hidden_act: str
) -> FewTokens | None:
    """What ``layer_inference`` of tensors like these consists in, if it is one launch."""
    if not takes(x.shape[0], gate[0].shape[0] // 2, num_experts_per_tok):
        return None
    return few_tokens_like(x, gate, dense, num_experts_per_tok, norm_topk_prob, hidden_act)
