"""The product router in plain PyTorch. T tokens, N keys a half, K experts a token."""

import torch
from torch import Tensor


def router_reference(router_logits: Tensor, num_expert_keys: int, num_experts_per_tok: int) -> tuple[Tensor, Tensor]:
    """``router_logits [2, T, N]`` -> ``scores [T, K]``, best first, and ``indices [T, K]`` = i * N + j.

    Sums are taken in float32, or in float64 when that came in. Each half is ranked by (value descending, id ascending);
    the candidates are the pairs of ranks with (i + 1) * (j + 1) <= K: any other pair has K pairs that beat it.
    """
    N, K = num_expert_keys, num_experts_per_tok
    logits = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32)) + 0.0  # -0.0 becomes 0.0
    rows, row_ids = logits[0].sort(dim=-1, descending=True, stable=True)
    cols, col_ids = logits[1].sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(1, N + 1, device=logits.device)
    i, j = (rank[:, None] * rank[None, :] <= K).nonzero(as_tuple=True)
    sums = rows[:, i] + cols[:, j]
    ids, by_id = (row_ids[:, i] * N + col_ids[:, j]).sort(dim=-1)
    scores, best = sums.gather(1, by_id).sort(dim=-1, descending=True, stable=True)
    return scores[:, :K].to(router_logits.dtype), ids.gather(1, best)[:, :K].contiguous()


def routing_reference(
    router_logits: Tensor, num_expert_keys: int, num_experts_per_tok: int, norm_topk_prob: bool
) -> tuple[Tensor, Tensor]:
    """``weights [T, K]``, products of both halves' softmax or those over their sum, and ``indices [T, K]``."""
    logits = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    scores, indices = router_reference(logits, num_expert_keys, num_experts_per_tok)
    return weigh_scores(scores, logits, norm_topk_prob)[0], indices


def weigh_scores(scores: Tensor, logits: Tensor, norm_topk_prob: bool) -> tuple[Tensor, Tensor]:
    """The ``weights [T, K]`` of experts that score ``scores [T, K]``, and ``log_sums [2, T]`` (empty if normed)."""
    if norm_topk_prob:
        return scores.softmax(dim=-1), scores.new_empty(2, 0)
    log_sums = logits.logsumexp(dim=-1)
    return (scores - log_sums.sum(0)[:, None]).exp(), log_sums
