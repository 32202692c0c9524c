"""A small byte-level language model with FlashMoE layers: data, model, training, checkpoints, generation, plots."""
