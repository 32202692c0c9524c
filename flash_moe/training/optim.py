"""AdamW with a learning rate of its own for the expert tables, and the learning rate's course: warm-up, then cosine."""

import math

import torch
from torch import nn

from flash_moe.modules.parameter_groups import parameter_groups


def build_optimizer(
    model: nn.Module, *, learning_rate: float, expert_learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over ``parameter_groups``; ``set_learning_rate`` scales each group's ``peak_lr``."""
    groups = parameter_groups(model, learning_rate, table_lr=expert_learning_rate, weight_decay=weight_decay)
    return torch.optim.AdamW(
        [{**group, "peak_lr": group["lr"]} for group in groups],
        betas=(0.9, 0.95),
        fused=next(model.parameters()).is_cuda or None,
    )


def learning_rate_factor(step: int, num_steps: int, warmup_steps: int, final_factor: float = 0.05) -> float:
    """The share of the peak learning rate that step ``step`` of 0..num_steps-1 uses."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
    return final_factor + (1 - final_factor) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]
