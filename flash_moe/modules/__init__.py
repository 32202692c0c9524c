"""Layers built on the ops. Import each from its own module: ``from flash_moe.modules.flash_moe import FlashMoE``."""
