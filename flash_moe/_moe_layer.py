"""A gated-FFN MoE layer as every implementation of ``flash_decode`` is given it: weights, routing, shared expert.

H hidden size, I intermediate size, Is that of the shared expert, E experts, K experts a token.
"""

from typing import NamedTuple

from torch import Tensor

SCORINGS = ("softmax", "sigmoid")
# Rows and columns of a matrix that share a scale, where scales come per block.
SCALE_BLOCK = 128
# Keeps K sigmoid scores that have all underflowed from being divided by zero.
TINY = 1e-20


class NoRoomError(RuntimeError):
    """The programs of one launch, which wait for one another, cannot all be on the device at once."""


class Routing(NamedTuple):
    """How logits become experts and weights; the fields are arguments of ``flash_decode``."""

    num_experts_per_tok: int
    norm_topk_prob: bool = True
    scoring: str = "softmax"
    correction_bias: Tensor | None = None
    num_expert_groups: int = 1
    topk_groups: int = 1
    routed_scaling_factor: float = 1.0

    @property
    def ranks_by_logits(self) -> bool:
        """Without a bias a softmax keeps the order of the logits, and logits that differ never underflow to a tie."""
        return self.scoring == "softmax" and self.correction_bias is None


class SharedExpert(NamedTuple):
    """An expert that every token takes; ``gate [1, H]`` weighs it by sigmoid(gate . x)."""

    gate_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor
    gate: Tensor | None = None


class MoELayer(NamedTuple):
    """``router_weight [E, H]``, ``gate_up_proj [E, 2I, H]`` (gate rows, then up rows), ``down_proj [E, H, I]``.

    A scale goes with 8-bit weights ``[E, R, C]``: ``[E, R]``, one a row, or ``[E, ceil(R / 128), ceil(C / 128)]``.
    """

    router_weight: Tensor
    gate_up_proj: Tensor
    down_proj: Tensor
    routing: Routing
    hidden_act: str = "silu"
    shared: SharedExpert | None = None
    gate_up_scale: Tensor | None = None
    down_scale: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the order of the op's schema and of the kernel's arguments."""
        return (
            self.router_weight, self.gate_up_proj, self.down_proj, self.routing.correction_bias,
            *(self.shared or (None, None, None, None)), self.gate_up_scale, self.down_scale,
        )  # fmt: skip
