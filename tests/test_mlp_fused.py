"""The dense MLP's first products and its activation in one launch: values, edges, and where it stays away.

Without a GPU the kernel runs in Triton's interpreter, on tiles that are small; where there is one it has to be Hopper.
"""

import pytest
import torch
from torch import library

from flash_moe import FlashMoE, FlashMoEConfig
from flash_moe._activations import ACTIVATIONS
from flash_moe.ops._reference.mlp import gated_activation_reference, mlp_reference
from flash_moe.ops.flash_mlp import flash_mlp
from flash_moe.testing import (
    assert_no_worse_than,
    make_mlp_inputs,
    poison_memory,
    run_with_grads,
    surround_with_nan,
    to_float64,
)

mlp_fused = pytest.importorskip("flash_moe.ops._triton.mlp_fused")
launch = pytest.importorskip("flash_moe.ops._triton.launch")

HALVES = (torch.float16, torch.bfloat16)
every_half = pytest.mark.parametrize("dtype", HALVES, ids=str)
# One tile and less; edges in all three sizes; whole tiles, several a program.
every_size = pytest.mark.parametrize("T, H, I", [(1, 16, 24), (37, 40, 24), (64, 32, 48)], ids=str)


@pytest.fixture
def fused(device, monkeypatch):
    """Whatever it can take is taken; gives the calls of the kernel."""
    if device.type == "cuda":
        if not mlp_fused._is_made_for(device):
            pytest.skip("needs a Hopper GPU")
    else:
        monkeypatch.setattr(mlp_fused, "_is_made_for", lambda device: True)
        monkeypatch.setattr(mlp_fused, "TILE", launch.Tile(32, 16, 16, 4, 2))
    monkeypatch.setattr(mlp_fused, "MIN_TOKENS", 1)
    monkeypatch.setattr(mlp_fused, "takes_few", lambda *tensors: False)
    calls, real = [], mlp_fused.launch
    monkeypatch.setattr(mlp_fused, "launch", lambda *args, **named: calls.append(args) or real(*args, **named))
    return calls


def randn(*shape, dtype, device, seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device).to(dtype)


def first_products(T, H, I, dtype, device):
    (*tensors, _), _ = make_mlp_inputs(T, H, I, dtype, device)
    return tensors


def assert_rounded_once(T, H, I, dtype, device, hidden_act="silu"):
    """Each result against its float64 value, with the budget of one rounding of that."""
    x, gate_proj, up_proj = first_products(T, H, I, dtype, device)
    gate, up = x.double() @ gate_proj.double().t(), x.double() @ up_proj.double().t()
    exact = gated_activation_reference(gate, up, hidden_act)
    with poison_memory():
        out = mlp_fused.gated_product_forward(x, gate_proj, up_proj, hidden_act)
    assert_no_worse_than((exact.to(dtype),), (exact,), (out,), ("out",))


@every_half
@every_size
def test_results_round_once(T, H, I, dtype, fused, device):
    assert_rounded_once(T, H, I, dtype, device)
    assert len(fused) == 1


@pytest.mark.parametrize("hidden_act", list(ACTIVATIONS))
def test_every_activation(hidden_act, fused, device):
    assert_rounded_once(33, 24, 16, torch.float16, device, hidden_act)


def assert_values(inputs):
    exact, low = mlp_reference(*to_float64(inputs)), mlp_reference(*inputs)
    with torch.no_grad(), poison_memory():
        actual = flash_mlp(*inputs, backend="triton")
    assert_no_worse_than((low,), (exact,), (actual,), ("out",))


@every_half
@every_size
def test_values(T, H, I, dtype, fused, device):
    inputs, _ = make_mlp_inputs(T, H, I, dtype, device)
    assert_values(inputs)
    assert len(fused) == 1
    x, *weights = inputs
    with torch.no_grad():
        batched = flash_mlp(x[None], *weights, backend="triton")
        assert torch.equal(batched[0], flash_mlp(*inputs, backend="triton"))


def test_with_a_gradient_it_stays_away(fused, device):
    inputs, dout = make_mlp_inputs(9, 16, 24, torch.bfloat16, device)
    run_with_grads(flash_mlp, inputs, dout, backend="triton")
    assert not fused
    flash_mlp(*inputs, backend="triton")  # nothing requires one
    assert len(fused) == 1


def test_reads_nothing_outside(fused, device):
    tensors = first_products(37, 40, 24, torch.bfloat16, device)
    want = mlp_fused.gated_product_forward(*tensors, "silu")
    out = mlp_fused.gated_product_forward(*(surround_with_nan(y) for y in tensors), "silu")
    assert len(fused) == 2
    assert torch.equal(out, want)


def test_opcheck(fused, device):
    library.opcheck(
        torch.ops.flash_moe.gated_product.default, (*first_products(9, 16, 24, torch.bfloat16, device), "silu")
    )


def misaligned(y):
    return torch.cat((y.new_zeros(4), y.flatten()))[4:].view(y.shape)


@pytest.mark.parametrize("which", range(3), ids=["x", "gate_proj", "up_proj"])
@pytest.mark.parametrize("change", [misaligned, lambda y: y.repeat_interleave(2, dim=1)[:, ::2]], ids=["base", "rows"])
def test_layouts_without_a_descriptor_take_the_other_way(which, change, fused, device):
    inputs, _ = make_mlp_inputs(9, 16, 24, torch.bfloat16, device)
    changed = [change(y) if i == which else y for i, y in enumerate(inputs)]
    assert mlp_fused.takes(*inputs[:3])
    assert not mlp_fused.takes(*changed[:3])
    assert_values(changed)
    assert not fused


@pytest.mark.parametrize(
    "T, H, I, dtype",
    [(0, 16, 24, HALVES[1]), (9, 12, 24, HALVES[1]), (9, 16, 20, HALVES[0]), (9, 16, 24, torch.float32)],
    ids=str,
)
def test_sizes_and_dtypes_without_a_descriptor_take_the_other_way(T, H, I, dtype, fused, device):
    assert_values(make_mlp_inputs(T, H, I, dtype, device)[0])
    assert not fused


def test_few_tokens_take_the_other_way(fused, device, monkeypatch):
    monkeypatch.setattr(mlp_fused, "MIN_TOKENS", 10)
    for T in (9, 10):
        mlp_fused.gated_product_forward(*first_products(T, 16, 24, torch.bfloat16, device), "silu")
    assert len(fused) == 1


def test_tuning_what_runs_elsewhere_takes_the_other_way(fused, device):
    """On any GPU: the backward pass needs those kernels on all of them."""
    tensors = first_products(9, 16, 24, torch.bfloat16, device)
    with launch.use_config("gated_forward", None) as asked:
        mlp_fused.gated_product_forward(*tensors, "silu")
    assert asked == {(9 * 24,)}
    assert not fused


def test_autocast(fused, device):
    inputs, _ = make_mlp_inputs(9, 16, 24, torch.float32, device)
    want = flash_mlp(*(y.bfloat16() for y in inputs), backend="triton")
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(flash_mlp(*inputs, backend="triton"), want)
    assert len(fused) == 2


def test_compiles_whole_for_any_number_of_tokens(fused, compiler, device):
    """The way is chosen within the op: what the compiler sees is one and the same."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *args: flash_mlp(*args, backend="triton"), fullgraph=True, backend=compiler, dynamic=True
    )
    for T, stance in ((9, "default"), (35, "fail_on_recompile")):
        inputs, _ = make_mlp_inputs(T, 16, 24, torch.bfloat16, device)
        with torch.no_grad():
            want = flash_mlp(*inputs, backend="triton")
            with torch.compiler.set_stance(stance):
                torch.testing.assert_close(compiled(*inputs), want, rtol=0.02, atol=0.02)
    assert len(fused) == 4


def test_the_layer_takes_it_for_inference(fused, device, monkeypatch):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 16, "num_experts": 25, "num_experts_per_tok": 3}
    layer = FlashMoE(FlashMoEConfig(**sizes, backend="triton")).to(device, torch.bfloat16).eval()
    x = randn(9, 24, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        taken = layer(x)[0]
        assert len(fused) == 1
        monkeypatch.setattr(mlp_fused, "MIN_TOKENS", 10)
        torch.testing.assert_close(taken, layer(x)[0], rtol=0.02, atol=0.02)
    assert len(fused) == 1


@pytest.mark.gpu
@every_half
@pytest.mark.parametrize("T, H, I", [(1000, 520, 1160), (4096, 1024, 4096), (2047, 64, 8)], ids=str)
def test_realistic_sizes(T, H, I, dtype, fused, device):
    """Many tiles a program, tiles that end within a block; again and again the same bits."""
    assert_rounded_once(T, H, I, dtype, device)
    tensors = first_products(T, H, I, dtype, device)
    want = mlp_fused.gated_product_forward(*tensors, "silu")
    for _ in range(10):
        assert torch.equal(mlp_fused.gated_product_forward(*tensors, "silu"), want)


@pytest.mark.gpu
def test_graph_replay_and_another_stream(fused, device):
    x, gate_proj, up_proj = first_products(1024, 512, 1024, torch.bfloat16, device)
    want = mlp_fused.gated_product_forward(x, gate_proj, up_proj, "silu")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # clocks; on another stream the kernel would read what is not there yet
        later = mlp_fused.gated_product_forward(x + 0, gate_proj, up_proj, "silu")
    stream.synchronize()
    assert torch.equal(later, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = mlp_fused.gated_product_forward(x, gate_proj, up_proj, "silu")
    for fresh in (x.flip(0), x * 0.5):
        x.copy_(fresh)
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, mlp_fused.gated_product_forward(x, gate_proj, up_proj, "silu"))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(fused, device):
    """The last rows lie where 32 bits do not reach."""
    T, I = 2**18 + 3, 2**13
    x = torch.zeros(T, 16, dtype=torch.bfloat16, device=device)
    x[-5:] = 1.0
    ones = torch.ones(I, 16, dtype=torch.bfloat16, device=device)
    out = mlp_fused.gated_product_forward(x, ones, ones, "relu")
    assert (out[-5:] == 256.0).all()
    assert not out[:-5].any()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_that_is_not_the_current_one(fused):
    want = None
    for index in (0, 1, 0, 1):
        actual = mlp_fused.gated_product_forward(
            *(y.to(f"cuda:{index}") for y in first_products(600, 64, 128, torch.bfloat16, "cpu")), "silu"
        ).cpu()
        want = actual if want is None else want
        assert torch.equal(actual, want)
    assert torch.cuda.current_device() == 0
