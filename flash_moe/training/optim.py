"""AdamW with a learning rate of its own for the expert tables, and the learning rate's course: warm-up, then cosine."""

import math

import torch
from torch import nn

from flash_moe.modules.flash_moe import FlashMoE


def build_optimizer(
    model: nn.Module, *, learning_rate: float, expert_learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over three groups, in ``group["name"]``: experts, matrices, and the rest without weight decay.

    A row of an expert table gets a gradient only from the tokens that chose it: far fewer than a dense weight gets, and
    so the tables want a larger step.
    """
    tables = {
        id(table.weight)
        for moe in model.modules()
        if isinstance(moe, FlashMoE)
        for table in (moe.down_embed, moe.up_embed)
    }
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)} - tables
    groups: dict[str, list[nn.Parameter]] = {"experts": [], "matrices": [], "rest": []}
    for parameter in model.parameters():
        if id(parameter) in tables:
            groups["experts"].append(parameter)
        elif parameter.ndim >= 2 and id(parameter) not in embeddings:
            groups["matrices"].append(parameter)
        else:
            groups["rest"].append(parameter)
    settings = {
        "experts": {"peak_lr": expert_learning_rate, "weight_decay": 0.0},
        "matrices": {"peak_lr": learning_rate, "weight_decay": weight_decay},
        "rest": {"peak_lr": learning_rate, "weight_decay": 0.0},
    }
    return torch.optim.AdamW(
        [{"params": groups[name], "name": name, **settings[name]} for name in groups if groups[name]],
        lr=learning_rate,
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
