"""Arithmetic of sizes on the host. Triton's own takes microseconds a call, and a training step has fifty of them."""


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least that is not below n, which is at least 1."""
    return 1 << (n - 1).bit_length()
