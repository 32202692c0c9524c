"""What kernels are compiled for: in router and experts no number of tokens, and elsewhere few."""

from contextlib import ExitStack

import pytest
import torch

from flash_moe.ops._triton import launch
from flash_moe.ops._triton.launch import read_table, use_config
from flash_moe.testing import make_expert_inputs

pytest.importorskip("triton", reason="there is triton for Linux only")

from flash_moe.ops._triton import (
    expert,
    expert_dense,
    expert_fused,
    expert_plan,
    expert_sums,
    gate,
    grouping,
    mlp,
    router,
    router_lanes,
)

TOKENS = (1, 2, 3, 5, 16, 17, 100, 257, 1000, 1024, 4096, 16384, 65536, 70000)
MODULES = (expert, expert_dense, expert_fused, expert_sums, grouping, gate, mlp, router, router_lanes)


@pytest.fixture
def constants(monkeypatch):
    """Launches nothing; of each kernel, told apart by flags and names among its constants, the sets of its numbers."""
    found = {}

    def remember(kernel, grid, tensors, numbers, *constants, **named):
        numbers = [value for value in (*constants, *named.values()) if type(value) is int]
        others = [value for value in (*constants, *named.values()) if type(value) is not int]
        found.setdefault((kernel.fn.__module__.split(".")[-1], kernel.fn.__name__, *others), set()).add(tuple(numbers))

    for module in MODULES:
        if hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", remember)
    # A GPU's, not the CPU's: sums shared out among as many programs as their length gives.
    monkeypatch.setattr(expert_dense, "_num_splits", lambda length, *_: max(1, length // 256))
    monkeypatch.setattr(grouping, "sort_pairs", grouping.sort_by_torch)
    return found


@pytest.fixture
def one_entry():
    """Every kernel takes the first entry of its table, whatever the sizes."""
    with ExitStack() as stack:
        for kernel, entries in read_table(launch.FOLDER / "default.json").items():
            stack.enter_context(use_config(kernel, entries[0].config))
        yield


@pytest.mark.parametrize("variant", ["fused", "gather", "dense"])
@pytest.mark.parametrize("E, K", [(1024, 8), (16, 3)], ids=str)
def test_experts_are_compiled_for_no_number_of_tokens(E, K, variant, constants, one_entry):
    tables = torch.zeros(2, E, 32, dtype=torch.float16)
    for T in TOKENS:
        x, indices, weights = torch.zeros(T, 32).half(), torch.zeros(T, K, dtype=torch.int64), torch.zeros(T, K)
        with expert_plan.use_variant(variant):
            expert.expert_forward(x, *tables, indices, weights, "silu")
            expert.expert_backward_tokens(x, x, *tables, indices, weights, weights, "silu")
            expert.expert_backward_tables(x, x, indices, weights, weights, E)
    names = {name[1] for name in constants}
    assert (
        names
        >= {
            "fused": {"_fused_kernel"},
            "gather": {"_dots_kernel", "_token_sums_kernel", "_expert_sums_kernel", "_offsets_kernel"},
            "dense": {
                "_dots_kernel",
                "_compress_kernel",
                "_token_sums_kernel",
                "_expert_sums_kernel",
                "_add_splits_kernel",
            },
        }[variant]
    )
    assert not {name: found for name, found in constants.items() if len(found) > 1}


@pytest.mark.parametrize("N, K", [(64, 8), (128, 64), (320, 512)], ids=str)
def test_routers_are_compiled_for_no_number_of_tokens(N, K, constants):
    for T in TOKENS[:-2]:
        logits = torch.zeros(2, T, N)
        weights, indices, log_sums = router.routing_forward(logits, K, False)
        router.routing_backward(weights, weights, indices, logits, log_sums, False)
    assert len(constants) >= 2
    assert not {name: found for name, found in constants.items() if len(found) > 1}


def test_norm_gate_and_mlp_are_compiled_for_powers_of_two_of_few_tokens(constants, one_entry):
    weight, vector = torch.zeros(32, 64), torch.zeros(64)
    for T in (*TOKENS[1:], *range(2, 20000, 333)):
        x, logits = torch.zeros(T, 64), torch.zeros(T, 32)
        gate.batch_norm_statistics(x, vector, vector, torch.zeros((), dtype=torch.int64), 0.1, True)
        gate.gate_forward(x, weight, vector, vector, 1e-5)
        gate.gate_backward(logits, x, weight, vector, vector, 1e-5, True)
        mlp.gated_activation_forward(x, x, "silu", out=x)
    few = {"_statistics_kernel": 8 + 4, "_few_fwd_kernel": 4}  # up to 256 tokens, up to 16 chunks; up to 16 tokens
    assert set(few) < {name[1] for name in constants}
    assert not {name: found for name, found in constants.items() if len(found) > few.get(name[1], 1)}


@pytest.mark.gpu
def test_another_number_of_tokens_compiles_nothing(device, one_entry):
    """By Triton's own count. Of numbers, the tiles and the splits too, all are of one kind."""
    (x, down, up, indices, weights), dout = make_expert_inputs(4096, 64, 2048, 64, torch.bfloat16, device)
    kernels = (expert_sums._expert_sums_kernel, expert_dense._add_splits_kernel, expert_dense._compress_kernel)
    compiled = []
    for T in (4096, 2048, 3008, 1536):
        args = (x[:T].contiguous(), down, up, indices[:T].contiguous(), weights[:T].contiguous())
        _, s = expert.expert_forward(*args, "silu")
        for variant in ("gather", "dense"):
            with expert_plan.use_variant(variant):
                expert.expert_backward_tables(dout[:T].contiguous(), args[0], args[3], s, s, 2048)
        compiled.append([sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels])
    assert compiled == compiled[:1] * 4
