"""The dense gated MLP on few tokens, in two launches: each weight is read once, and that is all the time it takes.

T tokens, H hidden size, I intermediate size. Sums and what lies between the products are float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_moe.ops._triton.launch import block_of
from flash_moe.ops._triton.math import activation, round_for
from flash_moe.ops._triton.relaunch import launch
from flash_moe.ops._triton.sizes import cdiv, next_power_of_2

# More go through tensor cores: on an H200 this way took the layer a third longer on 4 tokens. In 8 launches these take
# 25 us in a graph now, and 16 tokens 32 (benchmarks/results/h200.jsonl).
MAX_FEW_TOKENS = 2
# Every program's rows of weights are on their way at once: on an H200 all programs run together.
GATED = {"BLOCK_N": 2, "BLOCK_H": 512, "UNROLL": 2, "num_warps": 2}
PLAIN = {"BLOCK_N": 2, "BLOCK_H": 1024, "UNROLL": 4, "num_warps": 8}


@triton.jit
def _product_kernel(
    x_ptr,
    weight_ptr,
    up_ptr,
    out_ptr,
    T,
    H,
    N,
    HIDDEN_ACT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """out [T, N] = x weight^T; or act(x weight^T) * (x up^T), where there is an ``up``."""
    t = tl.arange(0, BLOCK_T)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_T, BLOCK_N, BLOCK_H], tl.float32)
    up_acc = tl.zeros([BLOCK_T, BLOCK_N, BLOCK_H], tl.float32)
    for start in tl.range(0, H, BLOCK_H, loop_unroll_factor=UNROLL):
        h = start + tl.arange(0, BLOCK_H)
        offs = n[:, None].to(tl.int64) * H + h[None, :]
        mask = (n < N)[:, None] & (h < H)[None, :]
        x = tl.load(x_ptr + t[:, None] * H + h[None, :], mask=(t < T)[:, None] & (h < H)[None, :], other=0.0)
        x = x.to(tl.float32)[:, None, :]
        acc += x * tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)[None, :, :]
        if up_ptr is not None:
            up_acc += x * tl.load(up_ptr + offs, mask=mask, other=0.0).to(tl.float32)[None, :, :]
    out = tl.sum(acc, 2)
    if up_ptr is not None:
        out = activation(out, HIDDEN_ACT) * tl.sum(up_acc, 2)
    mask = (t < T)[:, None] & (n < N)[None, :]
    tl.store(out_ptr + t[:, None] * N + n[None, :], round_for(out_ptr, out), mask=mask)


def few_tokens_mlp(x: Tensor, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor, hidden_act: str) -> Tensor:
    """``[T, H]``, float32, for up to MAX_FEW_TOKENS tokens."""
    (T, H), I = x.shape, gate_proj.shape[0]
    activated, out = x.new_empty(T, I, dtype=torch.float32), x.new_empty(T, H, dtype=torch.float32)
    _launch(x, gate_proj, up_proj, activated, hidden_act, GATED)
    _launch(activated, down_proj, None, out, None, PLAIN)
    return out


def _launch(
    x: Tensor, weight: Tensor, up: Tensor | None, out: Tensor, hidden_act: str | None, config: dict[str, int]
) -> None:
    (T, H), N = x.shape, weight.shape[0]
    block_t = next_power_of_2(max(1, T))
    block_h = min(config["BLOCK_H"] // block_t, block_of(H))
    constants = {**config, "HIDDEN_ACT": hidden_act, "BLOCK_T": block_t, "BLOCK_H": block_h}
    launch(_product_kernel, (cdiv(N, config["BLOCK_N"]),), (x, weight, up, out), (T, H, N), **constants)
