"""flash_mlp: values and every gradient, and the fused activation alone."""

import pytest
import torch

from flash_moe._activations import ACTIVATIONS
from flash_moe.ops._reference.mlp import gated_activation_reference, mlp_reference
from flash_moe.ops.flash_mlp import flash_mlp, triton_flash_mlp_func
from flash_moe.testing import (
    assert_no_worse_than,
    make_mlp_inputs,
    poison_memory,
    run_rounded_once,
    run_with_grads,
    surround_with_nan,
    to_float64,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ARGUMENTS = ("hidden_states", "gate_proj", "up_proj", "down_proj")
NAMES = ("out", "dx", "dgate_proj", "dup_proj", "ddown_proj")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_backend = pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
every_activation = pytest.mark.parametrize("hidden_act", list(ACTIVATIONS))


@every_dtype
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("T, H, I", [(1, 1, 1), (1, 16, 24), (13, 37, 51), (8, 64, 96)], ids=str)
def test_mlp_matches_reference(T, H, I, dtype, backend, device):
    inputs, dout = make_mlp_inputs(T, H, I, dtype, device)
    exact = run_with_grads(mlp_reference, to_float64(inputs), to_float64(dout))
    low = run_with_grads(mlp_reference, inputs, dout)
    actual = run_with_grads(flash_mlp, inputs, dout, backend=backend)
    assert_no_worse_than(low, exact, actual, NAMES)


def fused_activation(gate, up, dout, hidden_act="silu"):
    kernels = pytest.importorskip("flash_moe.ops._triton.mlp", reason="needs triton, which there is for Linux only")
    out = kernels.gated_activation_forward(gate, up, hidden_act)
    return out, *kernels.gated_activation_backward(dout, gate, up, hidden_act)


@every_dtype
@every_activation
def test_fused_activation_rounds_once(hidden_act, dtype, device):
    """The kernel alone, at a size that ends within a block: its only rounding is that of the result."""
    gate, up, dout = torch.randn(3, 7, 431, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)
    exact = run_with_grads(gated_activation_reference, to_float64((gate, up)), dout.double(), hidden_act=hidden_act)
    low = run_rounded_once(gated_activation_reference, (gate, up), dout, hidden_act=hidden_act)
    with poison_memory():
        actual = fused_activation(gate, up, dout, hidden_act)
    assert_no_worse_than(low, exact, actual, ("out", "dgate", "dup"))


def test_activations_differ(device):
    inputs, _ = make_mlp_inputs(4, 16, 24, torch.float32, device)
    outputs = [triton_flash_mlp_func(*inputs, hidden_act=hidden_act) for hidden_act in ACTIVATIONS]
    for i, out in enumerate(outputs):
        assert not any(torch.allclose(out, other, atol=1e-4) for other in outputs[:i])


@every_backend
@pytest.mark.parametrize("shape", [(0,), (2, 3), (2, 0, 3), ()], ids=str)
def test_leading_dimensions(shape, backend, device):
    """None at all, several, and an empty one: the same rows as the flat call."""
    (_, *projections), _ = make_mlp_inputs(1, 16, 24, torch.float32, device)
    x = torch.randn(*shape, 16, device=device, requires_grad=True)
    out = flash_mlp(x, *projections, backend=backend)
    assert out.shape == x.shape
    torch.testing.assert_close(out.reshape(-1, 16), flash_mlp(x.reshape(-1, 16), *projections, backend=backend))
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert dx.shape == x.shape


@every_backend
def test_non_contiguous_inputs(backend, device):
    inputs, dout = make_mlp_inputs(6, 16, 24, torch.float32, device)
    strided = tuple(x.repeat_interleave(2, dim=1)[:, ::2] for x in inputs)
    want = run_with_grads(flash_mlp, inputs, dout, backend=backend)
    actual = run_with_grads(flash_mlp, strided, dout.expand(6, 16), backend=backend)
    for name, x, want_x in zip(NAMES, actual, want, strict=True):
        torch.testing.assert_close(x, want_x, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("wanted", range(4), ids=ARGUMENTS)
def test_only_one_input_requires_a_gradient(wanted, backend, device):
    inputs, dout = make_mlp_inputs(6, 16, 24, torch.float32, device)
    want = run_with_grads(flash_mlp, inputs, dout, backend=backend)[1 + wanted]
    leaves = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(inputs)]
    flash_mlp(*leaves, backend=backend).backward(dout)
    assert torch.equal(leaves[wanted].grad, want)
    assert all(x.grad is None for i, x in enumerate(leaves) if i != wanted)


def test_fused_activation_reads_nothing_outside_its_inputs(device):
    gate, up, dout = torch.randn(3, 7, 431, generator=torch.Generator(device).manual_seed(0), device=device)

    actual = fused_activation(*(surround_with_nan(x) for x in (gate, up, dout)))
    assert all(map(torch.equal, actual, fused_activation(gate, up, dout)))


def spoiled(argument, change):
    inputs, _ = make_mlp_inputs(6, 16, 24, torch.float32, "cpu")
    return [change(x) if name == argument else x for name, x in zip(ARGUMENTS, inputs, strict=True)]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(
    "argument, change, error, message",
    [
        ("hidden_states", lambda x: x[0, 0], ValueError, "hidden_states: expected at least 1 dimension"),
        ("hidden_states", torch.Tensor.long, TypeError, "hidden_states: expected dtype"),
        ("gate_proj", lambda x: x[:, :-1], ValueError, r"gate_proj: expected shape .*16.*; got \(24, 15\)"),
        ("gate_proj", lambda x: x[0], ValueError, "gate_proj: expected 2 dimensions"),
        ("up_proj", lambda x: x[:-1], ValueError, r"up_proj: expected shape .*\(24, 16\); got \(23, 16\)"),
        ("down_proj", torch.t, ValueError, r"down_proj: expected shape .*\(16, 24\); got \(24, 16\)"),
        ("up_proj", torch.Tensor.double, TypeError, "up_proj: expected dtype torch.float32; got torch.float64"),
        ("down_proj", lambda x: x.to("meta"), ValueError, "down_proj: expected device cpu, as hidden_states has"),
    ],
)
def test_errors_name_the_argument(argument, change, error, message, backend):
    with pytest.raises(error, match=message):
        flash_mlp(*spoiled(argument, change), backend=backend)


def test_unknown_names():
    inputs, _ = make_mlp_inputs(2, 4, 8, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"hidden_act: expected one of silu, .*; got 'swish'"):
        flash_mlp(*inputs, hidden_act="swish")
    with pytest.raises(ValueError, match="backend: expected one of auto, triton, torch, reference; got 'cuda'"):
        flash_mlp(*inputs, backend="cuda")
    with pytest.raises(TypeError, match=r"hidden_states: expected dtype .*; got torch.float64"):
        flash_mlp(*to_float64(inputs), backend="torch")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_realistic_sizes(dtype, device):
    inputs, dout = make_mlp_inputs(4096, 1024, 4096, dtype, device)
    exact = run_with_grads(mlp_reference, to_float64(inputs), to_float64(dout))
    low = run_with_grads(mlp_reference, inputs, dout)
    assert_no_worse_than(low, exact, run_with_grads(triton_flash_mlp_func, inputs, dout), NAMES)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(device):
    gate = torch.full((2**16 + 1, 2**15), 3.0, dtype=torch.bfloat16, device=device)
    gate[-1] = 1.0
    out, *_ = fused_activation(gate, gate, gate, "relu2")
    assert (out[-1] == 1.0).all()
    assert (out[:-1] == 27.0).all()
