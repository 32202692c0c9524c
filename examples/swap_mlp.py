"""Put FlashMoE in place of the MLP in every block of a model, and train with a learning rate of its own for the tables.

Run: python examples/swap_mlp.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_moe import FlashMoE, FlashMoEConfig


class Block(nn.Module):
    """A transformer block as many models write it, with its MLP in the attribute ``mlp``."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(hidden_size), nn.RMSNorm(hidden_size)
        self.attention = nn.MultiheadAttention(hidden_size, num_heads=4, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size), nn.GELU(), nn.Linear(4 * hidden_size, hidden_size)
        )

    def forward(self, x: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.mlp_norm(x))


class MoEMLP(nn.Module):
    """A FlashMoE that returns its output alone, as an MLP does."""

    def __init__(self, config: FlashMoEConfig) -> None:
        super().__init__()
        self.moe = FlashMoE(config)

    def forward(self, x: Tensor) -> Tensor:
        y, _router_logits = self.moe(x)
        return y


def swap_mlps(model: nn.Module, config: FlashMoEConfig) -> None:
    """Replace the ``mlp`` of every ``Block`` by a freshly initialised FlashMoE."""
    for block in model.modules():
        if isinstance(block, Block):
            block.mlp = MoEMLP(config)


def parameter_groups(model: nn.Module, learning_rate: float, table_learning_rate: float) -> list[dict[str, object]]:
    """A row of an expert table gets a gradient only from the tokens that chose it, and so wants larger steps."""
    names = ("down_embed.weight", "up_embed.weight")
    tables = [parameter for name, parameter in model.named_parameters() if name.endswith(names)]
    rest = [parameter for name, parameter in model.named_parameters() if not name.endswith(names)]
    return [{"params": rest, "lr": learning_rate}, {"params": tables, "lr": table_learning_rate, "weight_decay": 0.0}]


def main() -> None:
    torch.manual_seed(0)
    hidden_size = 64
    model = nn.Sequential(*(Block(hidden_size) for _ in range(2)))
    swap_mlps(
        model,
        FlashMoEConfig(
            hidden_size=hidden_size,
            intermediate_size=64,
            num_experts=1024,
            num_experts_per_tok=8,
            norm_topk_prob=True,
            router_aux_loss_coef=0.01,
        ),
    )
    optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=1e-3, table_learning_rate=4e-3))
    # A toy task: each token's target is a fixed nonlinear function of its input.
    x = torch.randn(8, 16, hidden_size)
    target = torch.sin(2 * x).roll(1, dims=-1)
    for step in range(31):
        loss = F.mse_loss(model(x), target)
        router_loss = sum(layer.router_loss for layer in model.modules() if isinstance(layer, FlashMoE))
        optimizer.zero_grad()
        (loss + router_loss).backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:2}  loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
