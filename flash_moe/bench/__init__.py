"""What ``flash-moe bench`` and ``flash-moe plot`` are made of: measure what was checked, draw what was measured."""
