"""The operators. Import each from its own module: ``from flash_moe.ops.flash_expert import flash_expert``."""
