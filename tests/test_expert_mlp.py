"""Experts and dense MLP in one op: its values and gradients are those of the two ops, summed and rounded once."""

import pytest
import torch
from torch import library

from flash_moe.ops._reference.expert import expert_reference
from flash_moe.ops._reference.mlp import mlp_reference
from flash_moe.ops.expert_mlp import expert_mlp
from flash_moe.testing import (
    assert_no_worse_than,
    make_expert_inputs,
    make_mlp_inputs,
    poison_memory,
    run_rounded_once,
    run_with_grads,
    to_float64,
)

NAMES = ("out", "dx", "ddown_embed", "dup_embed", "dweights", "dgate_proj", "dup_proj", "ddown_proj")
every_backend = pytest.mark.parametrize("backend", ["triton", "torch"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def make_inputs(T, H, I, E, K, dtype, device, seed=0):
    (x, *experts), dout = make_expert_inputs(T, H, E, K, dtype, device, seed)
    (_, *dense), _ = make_mlp_inputs(T, H, I, dtype, device, seed + 1)
    return [x, *experts, *dense], dout


def reference(x, down, up, indices, weights, *dense):
    return expert_reference(x, down, up, indices, weights) + mlp_reference(x, *dense)


def op(*tensors, **options):
    return expert_mlp(*tensors[:5], tensors[5:], **options)


@every_backend
@every_dtype
@pytest.mark.parametrize("T, H, I, E, K", [(5, 24, 16, 9, 3), (1, 17, 5, 4, 1), (0, 8, 8, 3, 2), (37, 40, 24, 7, 6)])
def test_values_and_gradients(T, H, I, E, K, dtype, backend, device):
    inputs, dout = make_inputs(T, H, I, E, K, dtype, device)
    exact = run_with_grads(reference, to_float64(inputs), to_float64(dout))
    low = run_rounded_once(reference, inputs, dout)
    if dtype != torch.float32:  # the dense weights' products round gate, up and their product on the way
        low = run_with_grads(reference, inputs, dout)
    with poison_memory():
        actual = run_with_grads(op, inputs, dout, backend=backend)
    assert_no_worse_than(low, exact, actual, NAMES)
    with poison_memory():
        again = run_with_grads(op, inputs, dout, backend=backend)
    for x, y in zip(actual, again, strict=True):
        assert torch.equal(x, y)


@every_backend
def test_sparse_gradients_are_the_dense_ones(backend, device):
    inputs, dout = make_inputs(6, 24, 16, 40, 3, torch.float32, device)
    want = run_with_grads(op, inputs, dout, backend=backend)
    actual = run_with_grads(op, inputs, dout, backend=backend, sparse_grad=True)
    for name, x, y in zip(NAMES, actual, want, strict=True):
        assert x.is_sparse == (name in ("ddown_embed", "dup_embed"))
        torch.testing.assert_close(x.to_dense() if x.is_sparse else x, y, rtol=0, atol=0)


@every_backend
@pytest.mark.parametrize("frozen", [(1, 2), (5, 6, 7), (1, 2, 5, 6, 7), (0,), (4,)], ids=str)
def test_frozen_weights_get_no_gradient(frozen, backend, device):
    inputs, dout = make_inputs(6, 24, 16, 9, 3, torch.float32, device)
    want = dict(zip(range(-1, 8), run_with_grads(op, inputs, dout, backend=backend), strict=False))
    grads = dict(zip([0, 1, 2, 4, 5, 6, 7], list(want.values())[1:], strict=True))
    leaves = [x.clone().requires_grad_(i != 3 and i not in frozen) for i, x in enumerate(inputs)]
    op(*leaves, backend=backend).backward(dout)
    for i, leaf in enumerate(leaves):
        if i == 3 or i in frozen:
            assert leaf.grad is None
        else:
            assert torch.equal(leaf.grad, grads[i]), i


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_opcheck(sparse_grad, device):
    inputs, dout = make_inputs(6, 24, 16, 9, 3, torch.float32, device)
    leaves = [x.requires_grad_(x.is_floating_point()) for x in inputs]
    # Autograd's own check compiles the backward pass, which sparse gradients do not go through.
    checks = ("test_schema", "test_faketensor") if sparse_grad else ("test_schema", "test_faketensor",
        "test_autograd_registration", "test_aot_dispatch_dynamic")  # fmt: skip
    library.opcheck(torch.ops.flash_moe.expert_mlp.default, (*leaves, "silu", sparse_grad), test_utils=checks)
    constants = [x.detach() for x in inputs]
    _, *saved = torch.ops.flash_moe.expert_mlp(*constants, "silu", sparse_grad)
    for wants_tables, wants_dense in ((True, True), (False, True), (True, False)):
        options = ("silu", sparse_grad, wants_tables, wants_dense)
        library.opcheck(torch.ops.flash_moe.expert_mlp_backward.default, (dout, *constants, *saved, *options))


@every_backend
def test_autocast_casts_as_the_two_ops_do(backend, device):
    inputs, _ = make_inputs(6, 24, 16, 9, 3, torch.float32, device)
    inputs[4] = inputs[4].float()
    cast = [x.to(torch.bfloat16) if i not in (3, 4) else x for i, x in enumerate(inputs)]
    want = op(*cast, backend=backend)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = op(*inputs, backend=backend)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, want)


@every_backend
def test_compiles_whole(backend, compiler, device):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: op(*args, backend=backend), fullgraph=True, backend=compiler, dynamic=True)
    for T, stance in ((4, "default"), (7, "fail_on_recompile")):
        inputs, dout = make_inputs(T, 24, 16, 9, 3, torch.float32, device)
        want = run_with_grads(op, inputs, dout, backend=backend)
        with torch.compiler.set_stance(stance):
            actual = run_with_grads(compiled, inputs, dout)
        for x, y in zip(actual, want, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_realistic_size(dtype, device):
    inputs, dout = make_inputs(1024, 1024, 2048, 16384, 64, dtype, device)
    exact = run_with_grads(reference, to_float64(inputs), to_float64(dout))
    low = run_with_grads(reference, inputs, dout)
    with poison_memory():
        actual = run_with_grads(op, inputs, dout, backend="triton")
    assert_no_worse_than(low, exact, actual, NAMES)


@pytest.mark.gpu
def test_both_branches_at_once_give_the_same_bits_in_a_graph_and_on_another_stream(device, monkeypatch):
    monkeypatch.setattr("flash_moe.ops._triton.expert_mlp.MIN_EAGER_TOKENS", 0)
    inputs, dout = make_inputs(512, 1024, 2048, 4096, 32, torch.bfloat16, device)
    want = run_with_grads(op, inputs, dout, backend="triton")
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    floating = [x for x in leaves if x.requires_grad]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())

    def step():
        out = op(*leaves, backend="triton")
        return (out.detach(), *torch.autograd.grad(out, floating, dout))

    with torch.cuda.stream(stream):
        for _ in range(20):  # memory that was freed too early would by now be in other hands
            for x, y in zip(step(), want, strict=True):
                assert torch.equal(x, y)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = step()
    for _ in range(3):
        for x in results:
            x.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        for x, y in zip(results, want, strict=True):
            assert torch.equal(x, y)
