"""A FlashMoE layer on its own: one training step, the router's losses, and how evenly the experts are used.

Run: python examples/layer.py
"""

import torch
import torch.nn.functional as F

from flash_moe import FlashMoE, FlashMoEConfig


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = FlashMoEConfig(
        hidden_size=128,
        intermediate_size=256,
        num_experts=4096,
        num_experts_per_tok=16,
        router_aux_loss_coef=0.01,
        router_z_loss_coef=0.001,
        track_expert_usage=True,
    )
    moe = FlashMoE(config).to(device)
    optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-3)

    x = torch.randn(4, 64, 128, device=device)
    y, _router_logits = moe(x)  # [4, 64, 128] and [2, 256, 64]
    loss = F.mse_loss(y, x) + moe.router_loss
    loss.backward()
    optimizer.step()

    usage = moe.expert_usage()
    print(f"{sum(p.numel() for p in moe.parameters()):,} parameters on {device}")
    print(f"loss {loss.item():.3f}, of it {moe.router_loss.item():.3f} from the router")
    print(
        f"{usage.counts.sum().item()} pairs of a token and an expert; {usage.dead_share.item():.0%} of experts unused"
    )


if __name__ == "__main__":
    main()
