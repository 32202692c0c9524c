"""A whole gated-FFN MoE layer in plain PyTorch: router, K experts a token, an optional shared expert.

T tokens, H hidden size, I intermediate size, E experts, K experts a token. Three things are rounded to 16 bits in a
16-bit layer: the router's logits, the activated products, the output. All else is float32, or float64 if that came in.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_moe._activations import ACTIVATIONS
from flash_moe._moe_layer import SCALE_BLOCK, TINY, MoELayer, Routing, SharedExpert


def decode_reference(hidden_states: Tensor, layer: MoELayer) -> tuple[Tensor, Tensor]:
    """``out [T, H]`` and the router's logits ``[T, E]``."""
    logits = router_logits_reference(hidden_states, layer.router_weight)
    weights, indices = decode_routing_reference(logits, layer.routing)
    return decode_experts_reference(hidden_states, layer, weights, indices), logits


def router_logits_reference(hidden_states: Tensor, router_weight: Tensor) -> Tensor:
    """``[T, E]``: products in float32, rounded once to the dtype of ``router_weight``."""
    return F.linear(_widen(hidden_states), _widen(router_weight)).to(router_weight.dtype)


def decode_routing_reference(router_logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """``weights [T, K]`` and ``indices [T, K]``, best first, ties to the lowest id.

    Experts are ranked by score plus bias, where it makes no difference by the logits themselves. The weights leave the
    bias out.
    """
    logits = _widen(router_logits)
    scores = logits.softmax(dim=-1) if routing.scoring == "softmax" else logits.sigmoid()
    biased = scores if routing.correction_bias is None else scores + routing.correction_bias
    ranked = logits if routing.ranks_by_logits else biased
    if routing.num_expert_groups > 1:
        ranked = ranked.masked_fill(~_in_best_groups(biased, routing), -torch.inf)
    indices = ranked.sort(dim=-1, descending=True, stable=True).indices[:, : routing.num_experts_per_tok]
    return _weigh(logits, scores, indices, routing) * routing.routed_scaling_factor, indices


def _in_best_groups(biased: Tensor, routing: Routing) -> Tensor:
    """``[T, E]``: whether an expert's group is among those with the largest sums of their two best scores."""
    grouped = biased.unflatten(-1, (routing.num_expert_groups, -1))
    sums = grouped.sort(dim=-1, descending=True).values[..., :2].sum(dim=-1)
    best = sums.sort(dim=-1, descending=True, stable=True).indices[:, : routing.topk_groups]
    chosen = torch.zeros_like(sums, dtype=torch.bool).scatter(1, best, True)
    return chosen.repeat_interleave(grouped.shape[-1], dim=1)


def _weigh(logits: Tensor, scores: Tensor, indices: Tensor, routing: Routing) -> Tensor:
    if not routing.norm_topk_prob:
        return scores.gather(1, indices)
    if routing.scoring == "softmax":
        return logits.gather(1, indices).softmax(dim=-1)  # the softmax over all E, divided by the sum of the chosen
    chosen = scores.gather(1, indices)
    return chosen / (chosen.sum(dim=-1, keepdim=True) + TINY)


def decode_experts_reference(hidden_states: Tensor, layer: MoELayer, weights: Tensor, indices: Tensor) -> Tensor:
    """out[t] = sum_k weights[t, k] * expert[indices[t, k]](x[t]), plus the shared expert; ``[T, H]``."""
    x = _widen(hidden_states)
    gate_up, down = dequantize(layer.gate_up_proj, layer.gate_up_scale), dequantize(layer.down_proj, layer.down_scale)
    out = torch.zeros_like(x)
    for e in indices.unique().tolist():
        t, k = (indices == e).nonzero(as_tuple=True)
        gate, up = F.linear(x[t], _widen(gate_up[e])).chunk(2, dim=-1)
        activated = (ACTIVATIONS[layer.hidden_act](gate) * up).to(hidden_states.dtype)
        out = out.index_add(0, t, F.linear(_widen(activated), _widen(down[e])) * weights[t, k, None])
    if layer.shared is not None:
        out = out + _shared_expert(hidden_states, layer.shared, layer.hidden_act)
    return out.to(hidden_states.dtype)


def _shared_expert(hidden_states: Tensor, shared: SharedExpert, hidden_act: str) -> Tensor:
    x = _widen(hidden_states)
    gate, up = F.linear(x, _widen(shared.gate_proj)), F.linear(x, _widen(shared.up_proj))
    activated = (ACTIVATIONS[hidden_act](gate) * up).to(hidden_states.dtype)
    out = F.linear(_widen(activated), _widen(shared.down_proj))
    return out if shared.gate is None else out * F.linear(x, _widen(shared.gate)).sigmoid()


def dequantize(weights: Tensor, scale: Tensor | None) -> Tensor:
    """``weights [E, R, C]`` times their scale, in the dtype of the scale."""
    if scale is None:
        return weights
    if scale.dim() == 3:
        _, R, C = weights.shape
        blocks = scale.repeat_interleave(SCALE_BLOCK, dim=1).repeat_interleave(SCALE_BLOCK, dim=2)
        return weights.to(scale.dtype) * blocks[:, :R, :C]
    return weights.to(scale.dtype) * scale[..., None]


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
