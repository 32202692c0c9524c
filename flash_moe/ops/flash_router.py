"""Cartesian-product router: the exact top K of N * N sums of a row and a column score, without forming them."""

from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flash_moe._backend import Backend, resolve_backend
from flash_moe._checks import check_bool, check_dtype, check_int, check_pairs, check_shape, float_dtypes
from flash_moe.ops._reference.router import router_reference, routing_reference
from flash_moe.ops._register import register_op

# The Triton kernel holds a token's K best in registers; beyond this, or where an id needs more than 32 bits, the
# sort-based PyTorch path serves the GPU too.
MAX_TRITON_EXPERTS_PER_TOK = 4096
MAX_TRITON_EXPERT_KEYS = 65535


def flash_router(
    router_logits: Tensor, num_expert_keys: int, num_experts_per_tok: int, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Pick each token's K best experts among the N * N pairs of a row key and a column key.

    Expert i * N + j scores ``router_logits[0, t, i] + router_logits[1, t, j]``, summed in float32. Best first. The
    order is fixed: each half ranked by (value descending, id ascending); candidates are the pairs of ranks with
    (i + 1) * (j + 1) <= K; among them (float32 sum descending, id ascending). That is what brute force with ties to the
    lowest id gives, except where rounding makes two different sums equal; the scores always agree. -0.0 counts as 0.0
    and -inf comes last; a NaN spoils its own token's row only, and ids stay in range.

    Args:
        router_logits: ``[2, T, N]``, float32, float16 or bfloat16; row scores, then column scores.
        num_expert_keys: N, at least 1.
        num_experts_per_tok: K, from 1 to N * N. With K above 4,096, or N above 65,535, Triton gives way to a sort-based
            path on the same device.
        backend: "auto" (triton for CUDA tensors, else torch), "triton", "torch" or "reference".
    Returns:
        ``scores [T, K]`` in ``router_logits.dtype``, differentiable, and ``indices [T, K]``, int64, i * N + j.
        The gradient of every logit is summed in float32 in a fixed order: the same bits on every run.
    Raises:
        ValueError: a shape disagrees, or an argument is out of range; the message names it.
        TypeError: a dtype is not supported.
    Source: product keys, arXiv:1907.05242; PEER, arXiv:2407.04153.
    """
    chosen = _check(router_logits, num_expert_keys, num_experts_per_tok, backend)
    if chosen is Backend.REFERENCE:
        return router_reference(router_logits, num_expert_keys, num_experts_per_tok)
    scores, indices = torch.ops.flash_moe.flash_router(router_logits.contiguous(), num_experts_per_tok, chosen.value)
    return scores, indices


def flash_routing(
    router_logits: Tensor,
    num_expert_keys: int,
    num_experts_per_tok: int,
    *,
    norm_topk_prob: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The whole routing step from raw logits: pick the experts as ``flash_router`` does, and weigh them.

    An expert's weight is its row key's softmax times its column key's, exp(score - both halves' log-sum-exp); or, with
    ``norm_topk_prob``, that over the sum of the K chosen, which needs no softmax over the keys. One launch on a GPU,
    and one for the gradient.

    Args:
        router_logits: ``[2, T, N]``, float32, float16 or bfloat16. Taken as they lie in memory if each row of N is
            contiguous: a gate product ``[T, 2 * N]`` seen as ``[2, T, N]`` is not copied.
        num_expert_keys, num_experts_per_tok: N and K, as ``flash_router`` takes them.
        norm_topk_prob: let a token's weights sum to 1.
        backend: "auto" (triton for CUDA tensors, else torch), "triton", "torch" or "reference".
    Returns:
        ``weights [T, K]``, float32, largest first, differentiable, and ``indices [T, K]``, int64, i * N + j.
    Raises:
        ValueError: a shape disagrees, or an argument is out of range; the message names it.
        TypeError: a dtype is not supported.
    """
    check_bool("norm_topk_prob", norm_topk_prob)
    chosen = _check(router_logits, num_expert_keys, num_experts_per_tok, backend)
    if chosen is Backend.REFERENCE:
        return routing_reference(router_logits, num_expert_keys, num_experts_per_tok, norm_topk_prob)
    weights, indices, _ = torch.ops.flash_moe.flash_routing(
        with_dense_rows(router_logits), num_experts_per_tok, norm_topk_prob, chosen.value
    )
    return weights, indices


def triton_flash_router_func(
    router_logits: Tensor, num_expert_keys: int, num_experts_per_tok: int
) -> tuple[Tensor, Tensor]:
    """``flash_router`` through the Triton kernels; raises where they cannot run."""
    return flash_router(router_logits, num_expert_keys, num_experts_per_tok, backend="triton")


def _check(router_logits: Tensor, num_expert_keys: int, num_experts_per_tok: int, backend: str) -> Backend:
    check_int("num_expert_keys", num_expert_keys, 1, 2**31 - 1)
    check_int("num_experts_per_tok", num_experts_per_tok, 1, num_expert_keys**2)
    check_shape("router_logits", router_logits, (2, None, num_expert_keys), "[2, T, N]")
    check_dtype("router_logits", router_logits, float_dtypes(backend))
    check_pairs("router_logits", router_logits.shape[1], num_experts_per_tok)
    return resolve_backend(backend, router_logits)


def with_dense_rows(router_logits: Tensor) -> Tensor:
    """As it is where it is ``[2, T, N]`` or ``[T, 2, N]`` in memory, else a copy."""
    if router_logits.transpose(0, 1).is_contiguous():
        return router_logits
    return router_logits.contiguous()


@lru_cache
def _implementation(backend: str, num_expert_keys: int, num_experts_per_tok: int) -> ModuleType:
    small = num_experts_per_tok <= MAX_TRITON_EXPERTS_PER_TOK and num_expert_keys <= MAX_TRITON_EXPERT_KEYS
    name = "_triton" if backend == Backend.TRITON.value and small else "_torch"
    return import_module(f"flash_moe.ops.{name}.router")


def _forward(router_logits: Tensor, num_experts_per_tok: int, backend: str) -> tuple[Tensor, Tensor]:
    router = _implementation(backend, router_logits.shape[2], num_experts_per_tok)
    return router.router_forward(router_logits, num_experts_per_tok)


def _forward_fake(router_logits: Tensor, num_experts_per_tok: int, backend: str) -> tuple[Tensor, Tensor]:
    scores = router_logits.new_empty(router_logits.shape[1], num_experts_per_tok)
    return scores, torch.empty_like(scores, dtype=torch.int64)


def _backward(grad_scores: Tensor, indices: Tensor, num_expert_keys: int, backend: str) -> Tensor:
    router = _implementation(backend, num_expert_keys, indices.shape[1])
    return router.router_backward(grad_scores.contiguous(), indices, num_expert_keys)


def _backward_fake(grad_scores: Tensor, indices: Tensor, num_expert_keys: int, backend: str) -> Tensor:
    return grad_scores.new_empty(2, grad_scores.shape[0], num_expert_keys)


def _setup_context(ctx: Any, inputs: tuple[Tensor, int, str], output: tuple[Tensor, Tensor]) -> None:
    router_logits, _, backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.num_expert_keys, ctx.backend = router_logits.shape[2], backend


def _backward_formula(ctx: Any, grad_scores: Tensor, _: Tensor | None) -> tuple[Tensor, None, None]:
    (indices,) = ctx.saved_tensors
    grad = torch.ops.flash_moe.flash_router_backward(grad_scores, indices, ctx.num_expert_keys, ctx.backend)
    return grad, None, None


register_op(
    "flash_router(Tensor router_logits, int num_experts_per_tok, str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    backward=_backward_formula,
    setup_context=_setup_context,
)
register_op(
    "flash_router_backward(Tensor grad_scores, Tensor indices, int num_expert_keys, str backend) -> Tensor",
    _backward,
    _backward_fake,
)


def _routing_forward(
    router_logits: Tensor, num_experts_per_tok: int, norm_topk_prob: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    router = _implementation(backend, router_logits.shape[2], num_experts_per_tok)
    return router.routing_forward(router_logits, num_experts_per_tok, norm_topk_prob)


def _routing_forward_fake(
    router_logits: Tensor, num_experts_per_tok: int, norm_topk_prob: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    T = router_logits.shape[1]
    weights = router_logits.new_empty(T, num_experts_per_tok, dtype=torch.float32)
    return weights, torch.empty_like(weights, dtype=torch.int64), weights.new_empty(2, 0 if norm_topk_prob else T)


def _routing_backward(
    grad_weights: Tensor,
    weights: Tensor,
    indices: Tensor,
    router_logits: Tensor,
    log_sums: Tensor,
    norm_topk_prob: bool,
    backend: str,
) -> Tensor:
    router = _implementation(backend, router_logits.shape[2], indices.shape[1])
    return router.routing_backward(grad_weights.contiguous(), weights, indices, router_logits, log_sums, norm_topk_prob)


def _routing_backward_fake(
    grad_weights: Tensor, weights: Tensor, indices: Tensor, router_logits: Tensor, *_: Any
) -> Tensor:
    return torch.empty_like(router_logits)


def _setup_routing_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    router_logits, _, ctx.norm_topk_prob, ctx.backend = inputs
    weights, indices, log_sums = output
    ctx.mark_non_differentiable(indices, log_sums)
    ctx.save_for_backward(weights, indices, router_logits, log_sums)


def _routing_backward_formula(ctx: Any, grad_weights: Tensor, *_: Any) -> tuple[Tensor, None, None, None]:
    grad = torch.ops.flash_moe.flash_routing_backward(grad_weights, *ctx.saved_tensors, ctx.norm_topk_prob, ctx.backend)
    return grad, None, None, None


register_op(
    "flash_routing(Tensor router_logits, int num_experts_per_tok, bool norm_topk_prob, str backend) -> "
    "(Tensor, Tensor, Tensor)",
    _routing_forward,
    _routing_forward_fake,
    backward=_routing_backward_formula,
    setup_context=_setup_routing_context,
)
register_op(
    "flash_routing_backward(Tensor grad_weights, Tensor weights, Tensor indices, Tensor router_logits, Tensor "
    "log_sums, bool norm_topk_prob, str backend) -> Tensor",
    _routing_backward,
    _routing_backward_fake,
)
