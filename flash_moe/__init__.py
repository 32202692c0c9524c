"""Mixture-of-Experts layers for PyTorch: fast on NVIDIA GPUs, correct everywhere."""

from flash_moe.modules.flash_moe import FlashMoE, FlashMoEConfig
from flash_moe.ops.flash_decode import flash_decode
from flash_moe.ops.flash_expert import flash_expert
from flash_moe.ops.flash_mlp import flash_mlp
from flash_moe.ops.flash_router import flash_router, flash_routing

__version__ = "0.1.0"

__all__ = [
    "FlashMoE",
    "FlashMoEConfig",
    "__version__",
    "flash_decode",
    "flash_expert",
    "flash_mlp",
    "flash_router",
    "flash_routing",
]
