"""Training losses on a Cartesian-product router. T tokens, N keys a half, E = N * N experts, K experts per token."""

import torch
from torch import Tensor


def load_balancing_loss(log_probs: Tensor, expert_counts: Tensor, token_weights: Tensor | None = None) -> Tensor:
    """The Switch loss over the E experts: E * sum_e f_e * p_e, which is K when routing is even.

    An expert's mean probability is ``(P_row^T P_col)[i, j] / T``, so nothing of size ``[T, E]`` is formed.

    Args:
        log_probs: ``[2, T, N]``, float32: log-softmax of the router logits.
        expert_counts: ``[E]``: how many pairs went to each expert.
        token_weights: ``[T]``, 1 for a token and 0 for padding; all ones when absent.
    Source: Switch Transformer, arXiv:2101.03961; scaled as transformers' ``load_balancing_loss_func`` is.
    """
    rows, cols = log_probs.exp()
    if token_weights is None:
        num_tokens = log_probs.new_full((), log_probs.shape[1])
    else:
        rows, num_tokens = rows * token_weights[:, None], token_weights.sum()
    num_tokens = num_tokens.clamp(min=1)
    with torch.autocast(log_probs.device.type, enabled=False):
        mean_probs = (rows.T @ cols).flatten() / num_tokens
    return expert_counts.numel() * torch.dot(expert_counts.to(mean_probs.dtype) / num_tokens, mean_probs)


def router_z_loss(router_logits: Tensor, token_weights: Tensor | None = None) -> Tensor:
    """Mean over tokens of the squared log-sum-exp of each half's logits, the two halves added.

    Args:
        router_logits: ``[2, T, N]``, before log-softmax.
        token_weights: ``[T]``, 1 for a token and 0 for padding; all ones when absent.
    Source: ST-MoE, arXiv:2202.08906.
    """
    squares = (
        router_logits.to(torch.promote_types(router_logits.dtype, torch.float32)).logsumexp(dim=-1).square().sum(dim=0)
    )
    if token_weights is None:
        return squares.sum() / max(squares.shape[0], 1)
    return (squares * token_weights).sum() / token_weights.sum().clamp(min=1)
