"""The whole FlashMoE layer without gradients as one op, for serving: nothing is kept, few tokens take few launches.

T tokens, H hidden size, I intermediate size, E = N * N experts, K experts per token.
"""

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flash_moe.ops._register import PLAIN_TYPES, is_watched, register_op
from flash_moe.ops.expert_mlp import DenseWeights

# What torch.compile itself guards with. A PyTorch without it, since it is nobody's promise, only makes calls slower.
_TensorGuards = getattr(torch._C._dynamo.guards, "TensorGuards", None)


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
    wants_indices: bool = True,
) -> list[Tensor]:
    """Through Triton, for a caller that has checked the arguments: ``flash_gate``, ``flash_routing``, ``expert_mlp``.

    Args:
        hidden_states: ``[T, H]``; every weight has its dtype.
        router_gate: ``[2 * N, H]``.
        statistics: BatchNorm's running mean and variance ``[H]``, and its eps.
        down_weights, up_weights, dense_weights: as ``expert_mlp`` takes them.
        num_experts_per_tok, norm_topk_prob, hidden_act: as ``flash_routing`` and ``flash_expert`` take them.
        wants_indices: False leaves out the last result, which one or two tokens need no memory for then.
    Returns:
        ``y [T, H]``, ``router_logits [2, T, N]`` and ``indices [T, K]``, int64; without gradients.
    """
    mean, variance, eps = statistics
    tensors = (hidden_states, router_gate, mean, variance, down_weights, up_weights, *dense_weights)
    # An op costs the host 6 us.
    is_plain = not is_watched() and all(type(x) in PLAIN_TYPES for x in tensors)
    forward: Callable[..., list[Tensor]] = _forward if is_plain else torch.ops.flash_moe.layer_inference
    options = (num_experts_per_tok, norm_topk_prob, hidden_act, wants_indices)
    return forward(*[x.contiguous() for x in tensors], eps, *options)


class RepeatedInference:
    """``layer_inference`` of an eps and tensors that are like those of a call that was checked.

    The tensors stand in the order of the op's. ``hidden_states`` may be ``[..., H]``, and ``y`` is then, too. What
    ``launch`` gives are ``y`` and ``router_logits``.
    """

    def __init__(
        self, tensors: tuple[Tensor, ...], eps: float, launch: Callable[..., tuple[Tensor, Tensor]], min_tokens: int
    ) -> None:
        """``min_tokens``: so many and more are like those; with 0 only as many as those."""
        x, weights = tensors[0], tensors[1:]
        self.launch, self._eps, self._min_numel = launch, eps, min_tokens * x.shape[-1]
        any_dims = (None,) * (x.dim() - 1) if min_tokens else x.shape[:-1]
        any_strides = any_dims if min_tokens else x.stride()[:-1]
        assert _TensorGuards is not None
        self._guards: Any = _TensorGuards(
            *tensors,
            dynamic_dims_sizes=[[*any_dims, x.shape[-1]], *(list(weight.shape) for weight in weights)],
            dynamic_dims_strides=[[*any_strides, 1], *(list(weight.stride()) for weight in weights)],
        )

    def takes(self, tensors: tuple[Any, ...], eps: float) -> bool:
        """Whether they are like those, and no tensor is there twice.

        Tensors are compared in one call, in 0.7 us: types, dtypes, devices, shapes, strides, who requires gradients,
        and dispatch keys, which autocast, inference mode, function transforms and dispatch modes change.
        """
        return eps == self._eps and self._guards.check(*tensors) and tensors[0].numel() >= self._min_numel


def repeated_inference(
    tensors: tuple[Tensor, ...], eps: float, num_experts_per_tok: int, norm_topk_prob: bool, hidden_act: str
) -> RepeatedInference | None:
    """For calls like one of ``layer_inference`` that was checked, which nobody watches; ``None`` if each is checked."""
    if _TensorGuards is None or not all(type(x) in PLAIN_TYPES and x.is_contiguous() for x in tensors):
        return None
    options = (eps, num_experts_per_tok, norm_topk_prob, hidden_act)
    repeated = _kernels().repeated(*tensors, options=options)
    return None if repeated is None else RepeatedInference(tensors, eps, *repeated)


@lru_cache
def _kernels() -> ModuleType:
    return import_module("flash_moe.ops._triton.layer_inference")


def _forward(*arguments: Any) -> list[Tensor]:
    x, router_gate, mean, variance, down, up, *dense_weights = arguments[:9]
    eps, *options = arguments[9:]
    gate = (router_gate, mean, variance, eps)
    results: list[Tensor] = _kernels().layer_inference(x, gate, (down, up), tuple(dense_weights), *options)
    return results


def _fake(hidden_states: Tensor, router_gate: Tensor, *arguments: Any) -> list[Tensor]:
    num_experts_per_tok, *_, wants_indices = arguments[-4:]
    T, N = hidden_states.shape[0], router_gate.shape[0] // 2
    results = [torch.empty_like(hidden_states), hidden_states.new_empty_strided((2, T, N), (N, 2 * N, 1))]
    if wants_indices:
        results.append(hidden_states.new_empty(T, num_experts_per_tok, dtype=torch.int64))
    return results


register_op(
    "layer_inference(Tensor hidden_states, Tensor router_gate, Tensor mean, Tensor variance, Tensor down_weights, "
    "Tensor up_weights, Tensor gate_proj, Tensor up_proj, Tensor down_proj, float eps, int num_experts_per_tok, "
    "bool norm_topk_prob, str hidden_act, bool wants_indices) -> Tensor[]",
    _forward,
    _fake,
)
