"""One-neuron experts in plain PyTorch. T tokens, H hidden size, E experts, K experts a token."""

import torch
from torch import Tensor, einsum

from flash_moe._activations import ACTIVATIONS


def expert_reference(
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
    hidden_act: str = "silu",
) -> Tensor:
    """out[t] = sum_k w[t, k] * act(x[t] . down[e]) * up[e], e = indices[t, k]; gathers ``[T, K, H]`` twice."""
    pre_activations = einsum("th,tkh->tk", hidden_states, down_weights[indices])
    coefficients = ACTIVATIONS[hidden_act](pre_activations) * routing_weights.to(hidden_states.dtype)
    return einsum("tk,tkh->th", coefficients, up_weights[indices])


def expert_reference_quantized(
    hidden_states: Tensor,
    down_weights: Tensor,
    up_weights: Tensor,
    down_scale: Tensor,
    up_scale: Tensor,
    indices: Tensor,
    routing_weights: Tensor,
    hidden_act: str = "silu",
) -> Tensor:
    """The experts of tables ``down_weights * down_scale[:, None]`` and ``up_weights * up_scale[:, None]``, in float32.

    Float64 tokens are computed in float64. Only the chosen rows are dequantized.
    """
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    down, up = (
        (table[indices].to(dtype) * scale[indices].to(dtype)[..., None]).flatten(0, 1)
        for table, scale in ((down_weights, down_scale), (up_weights, up_scale))
    )
    rows = torch.arange(indices.numel(), device=indices.device).view(indices.shape)
    out = expert_reference(hidden_states.to(dtype), down, up, rows, routing_weights, hidden_act)
    return out.to(hidden_states.dtype)
