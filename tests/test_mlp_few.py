"""The MLP of few tokens against float64: the gated product, which is rounded once, and the last product in parts."""

import pytest
import torch

from flash_moe._activations import ACTIVATIONS
from flash_moe.ops._reference.mlp import gated_activation_reference
from flash_moe.ops.flash_mlp import flash_mlp
from flash_moe.testing import assert_no_worse_than, make_mlp_inputs, poison_memory, surround_with_nan

mlp_few = pytest.importorskip("flash_moe.ops._triton.mlp_few")

HALVES = (torch.float16, torch.bfloat16)
every_half = pytest.mark.parametrize("dtype", HALVES, ids=str)
# One token; nothing a multiple of a tile; as many tokens as there may be, and whole tiles.
every_size = pytest.mark.parametrize("T, H, I", [(1, 24, 5), (3, 37, 17), (17, 40, 33), (64, 32, 256)], ids=str)


@pytest.fixture
def three_parts(monkeypatch):
    """Of 128 columns, or as many as a step takes."""
    monkeypatch.setattr(mlp_few, "MIN_PART", 1)
    monkeypatch.setattr(mlp_few, "NUM_PROGRAMS", 3)


def assert_gated(T, H, I, dtype, device, hidden_act="silu"):
    (x, gate_proj, up_proj, _), _ = make_mlp_inputs(T, H, I, dtype, device)
    gate, up = x.double() @ gate_proj.double().t(), x.double() @ up_proj.double().t()
    exact = gated_activation_reference(gate, up, hidden_act)
    with poison_memory():
        actual = mlp_few.gated_product_of_few(x, gate_proj, up_proj, hidden_act)
        again = mlp_few.gated_product_of_few(x, gate_proj, up_proj, hidden_act)
    assert_no_worse_than([exact.to(dtype)], [exact], [actual], ["activated"])
    assert torch.equal(again, actual)


def assert_parts(T, H, I, dtype, device):
    """Products of 16-bit numbers are exact in float32; tensor cores cut a sum off after each 8 of them or more."""
    (*_, down_proj), _ = make_mlp_inputs(T, H, I, dtype, device)
    activated = torch.randn(T, I, generator=torch.Generator(device).manual_seed(1), device=device).to(dtype)
    exact = activated.double() @ down_proj.double().t()
    with poison_memory():
        parts = mlp_few.down_product_in_parts(activated, down_proj)
        again = mlp_few.down_product_in_parts(activated, down_proj)
    budget = (I // 8 + 1) * torch.finfo(torch.float32).eps * (activated.double().abs() @ down_proj.double().abs().t())
    assert parts.dtype == torch.float32
    assert ((parts.sum(0) - exact).abs() <= budget).all()
    assert torch.equal(again, parts)
    return len(parts)


@every_half
@every_size
def test_gated_product(T, H, I, dtype, device):
    assert_gated(T, H, I, dtype, device)


@pytest.mark.parametrize("hidden_act", list(ACTIVATIONS))
def test_every_activation(hidden_act, device):
    assert_gated(5, 40, 16, torch.float16, device, hidden_act)


@every_half
@every_size
def test_one_part(T, H, I, dtype, device):
    assert assert_parts(T, H, I, dtype, device) == 1


@every_half
@pytest.mark.parametrize("T, H, I, count", [(3, 24, 257, 3), (20, 31, 384, 3), (1, 8, 129, 2)], ids=str)
def test_several_parts(T, H, I, count, dtype, three_parts, device):
    assert assert_parts(T, H, I, dtype, device) == count


def test_reads_nothing_outside(three_parts, device):
    (x, gate_proj, up_proj, down_proj), _ = make_mlp_inputs(5, 37, 300, torch.bfloat16, device)
    activated = mlp_few.gated_product_of_few(x, gate_proj, up_proj, "silu")
    around = [surround_with_nan(y) for y in (x, gate_proj, up_proj)]
    assert torch.equal(mlp_few.gated_product_of_few(*around, "silu"), activated)
    want = mlp_few.down_product_in_parts(activated, down_proj)
    around = [surround_with_nan(y) for y in (activated, down_proj)]
    assert torch.equal(mlp_few.down_product_in_parts(*around), want)


def test_what_it_takes(device):
    def takes(T, dtype=torch.bfloat16, strided=False):
        x = torch.zeros(16, T, device=device, dtype=dtype).t() if strided else torch.zeros(T, 16, dtype=dtype)
        return mlp_few.takes_few(x, torch.zeros(8, 16, device=device, dtype=dtype))

    assert takes(1)
    assert takes(mlp_few.MAX_FEW_TOKENS, torch.float16)
    assert not takes(0)
    assert not takes(mlp_few.MAX_FEW_TOKENS + 1)
    assert not takes(4, torch.float32)
    assert not takes(4, strided=True)


@every_half
@pytest.mark.parametrize("strided", [False, True])
def test_flash_mlp_takes_it_for_inference(strided, dtype, device, monkeypatch):
    inputs, _ = make_mlp_inputs(7, 24, 40, dtype, device)
    if strided:
        inputs = [inputs[0], inputs[1].t().contiguous().t(), *inputs[2:]]
    calls, real = [], mlp_few.launch
    monkeypatch.setattr(mlp_few, "launch", lambda *args, **named: calls.append(args) or real(*args, **named))
    x, gate_proj, up_proj, down_proj = (y.double() for y in inputs)
    exact = (torch.nn.functional.silu(x @ gate_proj.t()) * (x @ up_proj.t())) @ down_proj.t()
    low = flash_mlp(*inputs, backend="reference")
    with poison_memory():
        assert_no_worse_than([low], [exact], [flash_mlp(*inputs, backend="triton")], ["out"])
    assert len(calls) == (not strided)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 2, 16, 17, 64])
@pytest.mark.parametrize("H, I", [(1024, 4096), (2048, 768), (1000, 3001)])
def test_realistic_sizes(T, H, I, device):
    assert_gated(T, H, I, torch.bfloat16, device)
    assert_parts(T, H, I, torch.bfloat16, device)


@pytest.mark.gpu
def test_weights_past_two_to_the_31(device):
    """The last rows lie where 32 bits do not reach."""
    I, H = 2**20 + 5, 2**11
    x = torch.ones(3, H, dtype=torch.bfloat16, device=device)
    weight = torch.zeros(I, H, dtype=torch.bfloat16, device=device)
    weight[-5:] = 1.0 / 1024
    out = mlp_few.gated_product_of_few(x, weight, weight, "relu")
    assert (out[:, -5:] == 4.0).all()
    assert not out[:, :-5].any()
    parts = mlp_few.down_product_in_parts(x, weight)
    assert (parts.sum(0)[:, -5:] == 2.0).all()
    assert not parts.sum(0)[:, :-5].any()
