"""Loss-free balancing: a bias a key that decides which experts are chosen, and not with what weight.

T tokens, N keys a half, K experts a token, E = N * N. A bias an expert, as other routers have it, would break the
search: the best sum of a row key and a column key is no longer made of good row keys and good column keys.
"""

from typing import Any

import torch
from torch import Tensor

from flash_moe._backend import Backend, resolve_backend
from flash_moe.modules.rank_sums import sum_over_ranks
from flash_moe.modules.recomputation import add_once, has_own_activations, value_in_forward
from flash_moe.ops._reference.router import weigh_scores
from flash_moe.ops._register import is_recomputing, register_op
from flash_moe.ops.flash_router import flash_router, with_dense_rows


def biased_routing(
    router_logits: Tensor,
    router_bias: Tensor,
    num_expert_keys: int,
    num_experts_per_tok: int,
    *,
    norm_topk_prob: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``flash_routing`` with the experts chosen by ``router_logits [2, T, N]`` plus ``router_bias [2, N]``.

    Returns:
        ``weights [T, K]`` of the logits without the bias, so not in descending order, and ``indices [T, K]``. The bias
        gets no gradient.
    """
    logits = router_logits.detach()
    biased = logits.to(torch.promote_types(logits.dtype, torch.float32)) + router_bias[:, None, :]
    _, indices = flash_router(biased, num_expert_keys, num_experts_per_tok, backend=backend)
    chosen = resolve_backend(backend, router_logits)
    if chosen is Backend.REFERENCE:
        return _weigh(router_logits, indices, norm_topk_prob)[0], indices
    logits = with_dense_rows(router_logits)
    weights, _ = torch.ops.flash_moe.weigh_experts(logits, indices, norm_topk_prob, chosen.value)
    return weights, indices


def update_bias(router_bias: Tensor, expert_counts: Tensor, rate: float, *, across_ranks: bool = False) -> None:
    """Raise the bias of every key with less than the mean load of its half by ``rate``, and lower it where it is more.

    ``expert_counts [E]``: pairs by expert, which with ``across_ranks`` are first summed over all ranks. A forward that
    activation checkpointing runs again changes nothing.
    Source: arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437, section 2.1.2.
    """
    if not torch.compiler.is_compiling() and is_recomputing():
        return
    N = router_bias.shape[1]
    by_pair = expert_counts.view(N, N)
    loads = torch.stack((by_pair.sum(1), by_pair.sum(0)))
    if across_ranks:
        loads = sum_over_ranks(loads)
    below_mean = (loads.sum(1, keepdim=True) - N * loads).sign()  # in integers, so that an even load is exactly even
    add_once(router_bias, rate * below_mean.to(router_bias.dtype))


def bias_in_forward(memory: Tensor, router_logits: Tensor, router_bias: Tensor) -> Tensor:
    """``router_bias [2, N]``; in a recomputed forward, as it was when that forward ran first.

    ``memory [MAX_WAITING, 2, 2, N]`` is ``value_in_forward``'s. A forward is known by a sum of its logits over the
    tokens, each with a weight of its own: a plain sum is zero after BatchNorm, and the same for tokens in any order.
    """
    if has_own_activations():
        return router_bias
    logits = router_logits.detach().float()
    weights = torch.arange(logits.shape[1], device=logits.device, dtype=logits.dtype).cos()
    return value_in_forward(memory, torch.einsum("t,htn->hn", weights, logits).float(), router_bias)


def _weigh(router_logits: Tensor, indices: Tensor, norm_topk_prob: bool) -> tuple[Tensor, Tensor]:
    """``weights [T, K]`` and the logits' ``log_sums [2, T]`` (empty if normed)."""
    N = router_logits.shape[2]
    logits = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    scores = logits[0].gather(1, indices // N) + logits[1].gather(1, indices % N)
    return weigh_scores(scores, logits, norm_topk_prob)


def _weigh_forward(router_logits: Tensor, indices: Tensor, norm_topk_prob: bool, backend: str) -> tuple[Tensor, Tensor]:
    return _weigh(router_logits, indices, norm_topk_prob)


def _weigh_fake(router_logits: Tensor, indices: Tensor, norm_topk_prob: bool, backend: str) -> tuple[Tensor, Tensor]:
    weights = torch.empty_like(indices, dtype=torch.float32)
    return weights, weights.new_empty(2, 0 if norm_topk_prob else indices.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    router_logits, indices, ctx.norm_topk_prob, ctx.backend = inputs
    weights, log_sums = output
    ctx.mark_non_differentiable(log_sums)
    ctx.save_for_backward(weights, indices, router_logits, log_sums)


def _backward_formula(ctx: Any, grad_weights: Tensor, _: Tensor | None) -> tuple[Tensor, None, None, None]:
    # The router's own kernel: the backward pass of `gather` adds atomically on a GPU, in any order.
    grad = torch.ops.flash_moe.flash_routing_backward(grad_weights, *ctx.saved_tensors, ctx.norm_topk_prob, ctx.backend)
    return grad, None, None, None


register_op(
    "weigh_experts(Tensor router_logits, Tensor indices, bool norm_topk_prob, str backend) -> (Tensor, Tensor)",
    _weigh_forward,
    _weigh_fake,
    backward=_backward_formula,
    setup_context=_setup_context,
)
