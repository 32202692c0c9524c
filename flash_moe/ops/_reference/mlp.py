"""The dense gated MLP in plain PyTorch. T tokens, H hidden size, I intermediate size."""

import torch.nn.functional as F
from torch import Tensor

from flash_moe._activations import ACTIVATIONS


def gated_activation_reference(gate: Tensor, up: Tensor, hidden_act: str = "silu") -> Tensor:
    """act(gate) * up, elementwise."""
    return ACTIVATIONS[hidden_act](gate) * up


def mlp_reference(
    hidden_states: Tensor, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor, hidden_act: str = "silu"
) -> Tensor:
    """down_proj(act(gate_proj x) * up_proj x); weights as ``nn.Linear`` lays them out."""
    gate, up = F.linear(hidden_states, gate_proj), F.linear(hidden_states, up_proj)
    return F.linear(gated_activation_reference(gate, up, hidden_act), down_proj)
