"""Small cases of every kernel, at odd sizes, for NVIDIA's compute-sanitizer.

Run: PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/sanitize.py NAME
     ... --tool racecheck ...                  likewise, for what warps do in shared memory
     python benchmarks/sanitize.py --list      the names; each takes less than a minute under the tool on an H200
     TRITON_INTERPRET=1 python benchmarks/sanitize.py NAME     the same without a GPU, in Triton's interpreter

Without PyTorch's cache every tensor is an allocation of its own, so that what is read or written beside it is found.
What the kernels compute is checked by the tests; here a call fails if a program has given up waiting, if an id is out
of range or if a repeated call of flash_decode gives other bits. The last line is "done NAME".
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from unittest.mock import patch

import torch
from torch import Tensor

from flash_moe import FlashMoE, FlashMoEConfig, flash_decode, flash_mlp
from flash_moe._moe_layer import Routing
from flash_moe.ops._triton import layer_few, mlp_few, mlp_fused, router_lanes
from flash_moe.ops._triton.expert_plan import DENSE, FUSED, GATHER, use_variant
from flash_moe.ops.flash_expert import flash_expert
from flash_moe.ops.flash_gate import batch_norm_statistics, flash_gate
from flash_moe.ops.flash_router import flash_router, flash_routing
from flash_moe.testing import decode_arguments, make_decode_inputs, make_expert_inputs, make_mlp_inputs, run_with_grads

# 16 bits take other paths than float32 nearly everywhere.
DTYPES = (torch.float32, torch.bfloat16)


def router(T: int, N: int, K: int, device: torch.device) -> None:
    """Forward and backward of scores and of weights; equal logits, which are put in order by their ids; NaN."""
    for dtype in DTYPES:
        logits = torch.randn(2, T, N, device=device).to(dtype).requires_grad_()
        for function in (flash_router, flash_routing):
            scores, _ = function(logits, N, K, backend="triton")
            scores.float().sum().backward()
        equal = torch.randint(2, (2, T, N), device=device).to(dtype)
        flash_router(equal, N, K, backend="triton")
        equal[:, 0] = torch.nan
        flash_router(equal, N, K, backend="triton")


def lanes(device: torch.device) -> None:
    """A lane a token; logits that differ in bits for which its keys have no room are looked up again."""
    with patch.dict(router_lanes.MIN_TOKENS, {2: 1, 4: 1}):
        for dtype in DTYPES:
            T, N, K = 40, 33, 12
            logits = torch.randn(2, T, N, device=device).to(dtype)
            for each in (logits, (1 + 1e-6 * logits.float()).to(dtype)):
                flash_router(each, N, K, backend="triton")
            flash_routing(logits, N, K, norm_topk_prob=True, backend="triton")


def experts(variant: str, sizes: Sequence[tuple[int, int, int, int]], device: torch.device) -> None:
    for T, H, E, K in sizes:
        for dtype in DTYPES:
            if variant == DENSE and dtype == torch.float32:
                continue
            inputs, dout = make_expert_inputs(T, H, E, K, dtype, device)
            with use_variant(variant):
                run_with_grads(flash_expert, inputs, dout, backend="triton")


def sums(device: torch.device) -> None:
    """A hot expert, whose run is split among programs; dense and row-sparse gradients."""
    inputs, dout = make_expert_inputs(150, 48, 400, 2, torch.bfloat16, device)
    inputs[3][:, 0] = 7
    for sparse_grad in (False, True):
        tensors = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
        with use_variant(GATHER):
            flash_expert(*tensors, sparse_grad=sparse_grad, backend="triton").backward(dout)


def quantized(device: torch.device) -> None:
    (x, down, up, indices, weights), _ = make_expert_inputs(5, 40, 30, 6, torch.bfloat16, device)
    for dtype, largest in ((torch.float8_e4m3fn, 448.0), (torch.int8, 127.0)):
        scales = [table.float().abs().amax(dim=1) / largest for table in (down, up)]
        tables = [
            (table / scale[:, None]).clamp(-largest, largest).to(dtype)
            for table, scale in zip((down, up), scales, strict=True)
        ]
        for T in (1, 5):  # few tokens are one launch
            flash_expert(
                x[:T], *tables, indices[:T], weights[:T], down_scale=scales[0], up_scale=scales[1], backend="triton"
            )


def gate(device: torch.device) -> None:
    for dtype in DTYPES:
        for T, H, C in ((5, 24, 10), (37, 40, 34), (6, 800, 10)):
            x, weight = torch.randn(T, H, device=device).to(dtype), torch.randn(C, H, device=device).to(dtype)
            mean, variance = torch.zeros(H, device=device), torch.ones(H, device=device)
            moments = batch_norm_statistics(x, mean, variance, torch.zeros((), dtype=torch.int64, device=device))
            for is_batch, statistics in ((True, moments), (False, (mean, variance))):
                tensors = (x.clone().requires_grad_(), weight.clone().requires_grad_())
                logits = flash_gate(*tensors, *statistics, is_batch=is_batch)
                logits.float().square().sum().backward()


def mlp(device: torch.device) -> None:
    """Products by torch, and the gated activation."""
    for dtype in DTYPES:
        inputs, dout = make_mlp_inputs(5, 40, 72, dtype, device)
        run_with_grads(flash_mlp, inputs, dout, backend="triton")


def mlp_in_one(device: torch.device) -> None:
    """The first products and the activation in one launch, which is made for Hopper GPUs."""
    for T, H, I in ((5, 64, 72), (130, 128, 136)):
        (x, gate_proj, up_proj, _), _ = make_mlp_inputs(T, H, I, torch.bfloat16, device)
        mlp_fused.gated_product_forward(x, gate_proj, up_proj, "silu")


def mlp_of_few(device: torch.device) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        for T, H, I in ((1, 37, 17), (20, 40, 1100)):
            (x, gate_proj, up_proj, down_proj), _ = make_mlp_inputs(T, H, I, dtype, device)
            activated = mlp_few.gated_product_of_few(x, gate_proj, up_proj, "silu")
            mlp_few.down_product_in_parts(activated, down_proj)


def layer_of_few(device: torch.device) -> None:
    for dtype in DTYPES:
        for T in (1, 2):
            H, I, N, K = 40, 37, 6, 5
            (x, *dense), _ = make_mlp_inputs(T, H, I, dtype, device)
            tables = [torch.randn(N * N, H, device=device).to(dtype) for _ in range(2)]
            weight, mean = torch.randn(2 * N, H, device=device).to(dtype), torch.zeros(H, device=device, dtype=dtype)
            norm = (weight, mean, torch.ones_like(mean), 1e-5)
            for _ in range(2):  # counters are left as the next launch needs them
                y, *_ = layer_few.layer_few(x, norm, tuple(tables), tuple(dense), K, True, "silu")
                if y.isnan().any():
                    raise ValueError(f"layer_few of {T} tokens: expected no program to give up waiting; one did")


def layer(device: torch.device) -> None:
    """``FlashMoE`` as a whole: experts on a stream of their own beside the MLP, training and evaluation."""
    torch.manual_seed(0)
    config = FlashMoEConfig(
        hidden_size=48, intermediate_size=40, num_experts=36, num_experts_per_tok=6, backend="triton"
    )
    for dtype in DTYPES:
        moe, x = FlashMoE(config).to(device, dtype), torch.randn(9, 48, device=device).to(dtype)
        y, logits = moe(x.requires_grad_())
        (y.float().sum() + logits.float().square().sum()).backward()
        with torch.no_grad():
            moe.eval()(x)


def decode(policy: str, device: torch.device) -> None:
    """The schedule: few and many tokens of an expert, every kind of routing, a shared expert."""
    bias = torch.randn(8, device=device) / 4
    many = Routing(2, True, "sigmoid", bias, 4, 2, 2.5)
    _decode(policy, 2, (24, 20, 8), Routing(3, norm_topk_prob=False), torch.float32, device)
    _decode(policy, 17, (24, 20, 8), Routing(3), torch.bfloat16, device, shared_intermediate_size=8)
    _decode(policy, 33, (24, 8, 8), many, torch.float16, device, shared_intermediate_size=12, has_shared_gate=True)


def decode_few(device: torch.device) -> None:
    """What auto takes for a few tokens."""
    biased = Routing(3, scoring="sigmoid", correction_bias=torch.randn(8, device=device))
    for T in (1, 2, 4, 6):
        for dtype in DTYPES:
            for routing in (Routing(3), biased):
                _decode("auto", T, (72, 40, 8), routing, dtype, device)


def decode_float8(device: torch.device) -> None:
    """By the schedule, and as auto takes a few tokens."""
    for scale in ("row", "block"):
        for policy, T in (("static", 3), ("static", 17), ("auto", 1), ("auto", 3)):
            _decode(policy, T, (150, 136, 4), Routing(2), torch.bfloat16, device, scale=scale)


def _decode(
    policy: str, T: int, sizes: tuple[int, int, int], routing: Routing, dtype: torch.dtype, device: torch.device,
    **options: object,
) -> None:  # fmt: skip
    x, moe = make_decode_inputs(T, *sizes, routing, dtype, device, **options)  # type: ignore[arg-type]
    first, second = (flash_decode(x, **decode_arguments(moe), backend="triton", policy=policy) for _ in range(2))
    assert isinstance(first, Tensor)
    assert isinstance(second, Tensor)
    if not torch.equal(first, second):
        raise ValueError(f"flash_decode of {T} tokens: expected the same bits in every call; got others")


FAMILIES: dict[str, Callable[[torch.device], None]] = {
    "router": lambda device: router(5, 5, 7, device),
    "router-pairs": lambda device: router(3, 33, 32, device),
    "router-large": lambda device: router(3, 100, 17, device),
    "router-many": lambda device: router(2, 40, 64, device),
    "lanes": lanes,
    "gather": lambda device: experts(GATHER, [(7, 1030, 16, 5), (9, 48, 90, 33)], device),
    "fused": lambda device: experts(FUSED, [(2, 300, 20, 17), (1, 16, 4, 1)], device),
    "dense": lambda device: experts(DENSE, [(7, 48, 16, 5), (37, 272, 90, 3)], device),
    "sums": sums,
    "quantized": quantized,
    "gate": gate,
    "mlp": mlp,
    "mlp-fused": mlp_in_one,
    "mlp-few": mlp_of_few,
    "layer-few": layer_of_few,
    "layer": layer,
    "decode-static": lambda device: decode("static", device),
    "decode-queue": lambda device: decode("queue", device),
    "decode-actor": lambda device: decode("actor", device),
    "decode-few": decode_few,
    "decode-float8": decode_float8,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=FAMILIES)
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args(arguments)
    if args.list or args.name is None:
        print("\n".join(FAMILIES))
        return 0
    with patch.dict(os.environ, {"FLASH_MOE_DEBUG": "1"}):
        FAMILIES[args.name](torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    print(f"done {args.name}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
