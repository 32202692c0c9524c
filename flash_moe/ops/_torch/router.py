"""Product router in bounded memory. T tokens, N keys a half, K experts a token, R = min(K, N) ranks, C candidates.

A float and an id are packed into one int64 whose order is (value descending, id ascending), so every key is unique and
one ``topk`` settles ties too. Tokens go in chunks: beyond inputs and outputs a call holds at most 32 bytes (a GPU's
sort wants its own besides) for each of max(workspace, one token's 2 N + C) elements, and C <= K (1 + ln R).
"""

from functools import lru_cache

import torch
from torch import Tensor

from flash_moe.ops._torch.grouping import group_by_key, sum_groups

# Elements of a chunk's widest arrays: on a CPU at most 8 MB, and within 5 % of the time without chunks (T 4096, N 128,
# K 32); on a GPU enough to amortise the launches.
CPU_WORKSPACE = 2**18
CUDA_WORKSPACE = 2**23

ID_MASK = 2**32 - 1


def router_forward(router_logits: Tensor, num_experts_per_tok: int) -> tuple[Tensor, Tensor]:
    """``router_logits [2, T, N]`` -> ``scores [T, K]`` in their dtype, best first, and int64 ``indices [T, K]``."""
    _, T, N = router_logits.shape
    K = num_experts_per_tok
    num_candidates = _num_candidates(min(K, N), K)
    i, j = _candidate_ranks(min(K, N), K, num_candidates, router_logits.device)
    scores = router_logits.new_empty(T, K)
    indices = torch.empty(T, K, dtype=torch.int64, device=router_logits.device)
    step = _tokens_per_chunk(router_logits, 2 * N + num_candidates)
    for t in range(0, T, step):
        values, ids = _rank_halves(router_logits[:, t : t + step], min(K, N))
        sums = values[0].index_select(1, i) + values[1].index_select(1, j)
        pairs = ids[0].index_select(1, i).mul_(N).add_(ids[1].index_select(1, j))
        best, chosen = _select(sums, pairs, K, N)
        scores[t : t + step], indices[t : t + step] = best, chosen
    return scores, indices


def router_backward(grad_scores: Tensor, indices: Tensor, num_expert_keys: int) -> Tensor:
    """``grad_logits [2, T, N]`` in the dtype of ``grad_scores [T, K]``: each key sums the scores it was part of."""
    (T, K), N = indices.shape, num_expert_keys
    grad_logits = grad_scores.new_empty(2, T, N)
    step = _tokens_per_chunk(grad_scores, N + K)
    for t in range(0, T, step):
        grad, pairs = grad_scores[t : t + step].float().flatten(), indices[t : t + step]
        row_start = torch.arange(pairs.shape[0], device=pairs.device).mul_(N)[:, None]
        for half, ids in zip(grad_logits, (pairs // N, pairs % N), strict=True):
            half[t : t + step] = _sum_by_key(grad, (ids + row_start).flatten(), pairs.shape[0] * N).view(-1, N)
    return grad_logits


def routing_forward(
    router_logits: Tensor, num_experts_per_tok: int, norm_topk_prob: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``weights [T, K]``, float32, ``indices [T, K]``, int64, and the logits' ``log_sums [2, T]`` (empty if normed)."""
    logits = router_logits.float()
    scores, indices = router_forward(logits, num_experts_per_tok)
    if norm_topk_prob:
        return scores.softmax(dim=-1), indices, scores.new_empty(2, 0)
    log_sums = logits.logsumexp(dim=-1)
    return scores.sub_(log_sums.sum(0)[:, None]).exp_(), indices, log_sums


def routing_backward(
    grad_weights: Tensor,
    weights: Tensor,
    indices: Tensor,
    router_logits: Tensor,
    log_sums: Tensor,
    norm_topk_prob: bool,
) -> Tensor:
    """``grad_logits [2, T, N]`` in the dtype and memory order of the logits."""
    inner = (grad_weights * weights).sum(-1)
    grad_scores = weights * (grad_weights - inner[:, None]) if norm_topk_prob else weights * grad_weights
    grad_logits = router_backward(grad_scores, indices, router_logits.shape[2])
    if not norm_topk_prob:
        probabilities = (router_logits.float() - log_sums[:, :, None]).exp_()
        grad_logits -= probabilities.mul_(inner[:, None])
    return torch.empty_like(router_logits).copy_(grad_logits)


def _tokens_per_chunk(tensor: Tensor, elements_per_token: int) -> int:
    return max(1, (CUDA_WORKSPACE if tensor.is_cuda else CPU_WORKSPACE) // elements_per_token)


@lru_cache(maxsize=64)
def _num_candidates(R: int, K: int) -> int:
    """How many rank pairs (i, j), both below R, have (i + 1) * (j + 1) <= K: any other has K pairs that beat it."""
    return sum(min(R, K // i) for i in range(1, R + 1))


def _candidate_ranks(R: int, K: int, num_candidates: int, device: torch.device) -> tuple[Tensor, Tensor]:
    # Built on the device from sizes the host knows: a copy from the host would forbid graph capture.
    per_row = (K // torch.arange(1, R + 1, device=device)).clamp_(max=R)
    i = torch.repeat_interleave(per_row, output_size=num_candidates)
    j = torch.arange(num_candidates, device=device) - (per_row.cumsum(0) - per_row)[i]
    return i, j


def _rank_halves(logits: Tensor, R: int) -> tuple[Tensor, Tensor]:
    """The R best of each half ``[2, c, N]``: float32 values and ids, both ``[2, c, R]``."""
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return _unpack(_largest(_pack(logits.float(), ids), R))


def _select(sums: Tensor, pairs: Tensor, K: int, N: int) -> tuple[Tensor, Tensor]:
    """The K best of the candidates ``[c, C]`` by (sum descending, id ascending)."""
    if N * N <= ID_MASK + 1:
        return _unpack(_largest(_pack(sums, pairs), K))
    # The id no longer fits beside the value: sort by id, then stably by value.
    pairs, order = pairs.sort(dim=-1)
    ranks, order = _ordered_int(sums).gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return _float_of(ranks[:, :K]), pairs.gather(-1, order[:, :K])


def _largest(keys: Tensor, count: int) -> Tensor:
    if count == keys.shape[-1]:
        return keys.sort(dim=-1, descending=True).values
    return keys.topk(count, dim=-1).values


def _pack(values: Tensor, ids: Tensor) -> Tensor:
    return _ordered_int(values).long().bitwise_left_shift_(32) | (ID_MASK - ids)


def _unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    return _float_of((keys >> 32).int()), ID_MASK - (keys & ID_MASK)


def _ordered_int(values: Tensor) -> Tensor:
    """int32 in the order of the floats: -0.0 equals 0.0, and any NaN is the greatest."""
    bits = (values + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0
    return _flip_negatives(bits).masked_fill_(values.isnan(), 2**31 - 1)


def _float_of(ordered: Tensor) -> Tensor:
    return _flip_negatives(ordered).view(torch.float32)


def _flip_negatives(bits: Tensor) -> Tensor:
    """Reverses the order of the negative numbers, which as bits ascend with their magnitude. Its own inverse."""
    return bits ^ ((bits >> 31) & (2**31 - 1))


def _sum_by_key(values: Tensor, keys: Tensor, num_keys: int) -> Tensor:
    if values.is_cuda:  # scatter_add_ is atomic there: a different rounding on every run
        order, offsets = group_by_key(keys, num_keys)
        return sum_groups(values[:, None], order, offsets)
    # On a CPU it adds one element after another.
    return values.new_zeros(num_keys).scatter_add_(0, keys, values)
