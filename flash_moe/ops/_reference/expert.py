"""One-neuron experts in plain PyTorch. T tokens, H hidden size, E experts, K experts a token."""

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
