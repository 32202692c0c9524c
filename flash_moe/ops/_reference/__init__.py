"""Plain PyTorch that says what each op computes. Differentiable, unbounded in memory, the oracle of the tests."""
