"""Expert tables in 8 bits: exact in the dequantized numbers, close to the tables they came from, and for inference.

T tokens, H hidden size, E experts, K experts a token.
"""

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from flash_moe import FlashMoE, FlashMoEConfig
from flash_moe._activations import ACTIVATIONS
from flash_moe.modules import quantization
from flash_moe.modules.quantization import DTYPES, QuantizedTable, quantize_table, row_scales
from flash_moe.ops._reference.expert import expert_reference
from flash_moe.ops.flash_expert import flash_expert
from flash_moe.testing import (
    assert_no_worse_than,
    make_expert_inputs,
    peak_nbytes,
    poison_memory,
    surround_with_nan,
    to_float64,
)

both_formats = pytest.mark.parametrize("quantized", list(DTYPES))
both_backends = pytest.mark.parametrize("backend", ["triton", "torch"])
every_backend = pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
# Ones; more choices than experts; nothing a power of two; even; more experts than pairs; rows longer than any tile.
SHAPES = [
    (1, 1, 1, 1),
    (4, 33, 3, 8),
    (13, 37, 9, 3),
    (8, 64, 16, 4),
    (3, 48, 150, 7),
    (2, 1030, 5, 3),
    (2, 24, 20, 65),
]
# Relative errors of the routed output that rounding the tables makes, of standard normal rows: measured on 10,000
# experts of 256 columns 3.7 % and 1.0 %.
ERROR_BOUNDS = {"fp8": 0.045, "int8": 0.013}


def quantize(table, quantized):
    dtype = DTYPES[quantized]
    module = quantize_table(table, row_scales("table", table, dtype), dtype)
    return module.weight, module.scale


def make_quantized(T, H, E, K, dtype, device, quantized, **changes):
    """Positional and keyword arguments of ``flash_expert``, and the same experts in float64."""
    (x, down, up, indices, weights), _ = make_expert_inputs(T, H, E, K, dtype, device, **changes)
    (down, down_scale), (up, up_scale) = (quantize(table, quantized) for table in (down, up))
    dequantized = (table.double() * scale.double()[:, None] for table, scale in ((down, down_scale), (up, up_scale)))
    exact = (x.double(), *dequantized, indices, weights.double())
    return (x, down, up, indices, weights), {"down_scale": down_scale, "up_scale": up_scale}, exact


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_exact(inputs, scales, exact, backend, hidden_act="silu"):
    """The error of the unquantized op: the dequantized experts in float32, rounded once."""
    low = expert_reference(*(x.float() if x.is_floating_point() else x for x in exact), hidden_act).to(inputs[0])
    out = flash_expert(*inputs, **scales, hidden_act=hidden_act, backend=backend)
    assert_no_worse_than([low], [expert_reference(*exact, hidden_act)], [out], ["out"])


# The tables


@both_formats
@every_dtype
def test_rows_are_rounded_to_nearest(quantized, dtype, device):
    """No other number of the format, by the same scale, is nearer."""
    table = torch.randn(40, 33, device=device).mul_(torch.logspace(-6, 4, 40, device=device)[:, None]).to(dtype)
    weight, scale = quantize(table, quantized)
    assert (weight.dtype, scale.dtype) == (DTYPES[quantized], torch.float32)
    largest = {"fp8": 448.0, "int8": 127.0}[quantized]
    torch.testing.assert_close(scale, table.float().abs().amax(1) / largest, rtol=0, atol=0)
    numbers = torch.arange(-128, 128, device=device).to(torch.int8).view(DTYPES[quantized]).double()
    numbers = numbers[numbers.abs() <= largest]
    quotients = table.double() / scale.double()[:, None]
    nearest = (quotients[..., None] - numbers).abs().amin(-1)
    # The quotient that was rounded was itself one of float32.
    assert ((quotients - weight.double()).abs() <= nearest + 1e-4).all()


def test_halves_are_rounded_to_even(device):
    table = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]], device=device)
    assert quantize(table, "int8")[0].tolist() == [[127, 0, 2, 2, 0, -2]]


@both_formats
def test_rows_of_zeros_and_of_the_smallest_numbers(quantized, device):
    table = torch.zeros(4, 5, device=device)
    table[1, 2], table[2], table[3, 0] = 1e-45, 1e-41, -3.0
    weight, scale = quantize(table, quantized)
    assert scale[0] == scale[1] == 1.0
    assert scale[2] > 0
    assert not weight[:2].float().any()
    largest = weight[2:].float().abs().amax(1)
    assert (largest == {"fp8": 448.0, "int8": 127.0}[quantized]).all()


@both_formats
def test_chunks_do_not_show(quantized, device, monkeypatch):
    table = torch.randn(50, 12, device=device)
    want = quantize(table, quantized)
    monkeypatch.setattr(quantization, "CHUNK", 84)  # 7 rows at a time
    for x, want_x in zip(quantize(table, quantized), want, strict=True):
        assert torch.equal(x.float(), want_x.float())


@both_formats
def test_no_float32_copy_of_a_table(quantized, device, monkeypatch):
    monkeypatch.setattr(quantization, "CHUNK", 2**12)
    table = torch.randn(4096, 64, device=device).bfloat16()
    assert peak_nbytes(lambda: quantize(table, quantized), device) < table.numel() + 8 * len(table) + 5 * 4 * 2**12


# The op


@both_backends
@both_formats
@every_dtype
@pytest.mark.parametrize("T, H, E, K", SHAPES, ids=str)
def test_exact_in_the_dequantized_numbers(T, H, E, K, dtype, quantized, backend, device):
    assert_exact(*make_quantized(T, H, E, K, dtype, device, quantized), backend)


@both_formats
def test_the_reference_is_the_formula(quantized, device):
    inputs, scales, exact = make_quantized(5, 7, 4, 6, torch.float64, device, quantized)
    out = flash_expert(*inputs, **scales, backend="reference")
    torch.testing.assert_close(out, expert_reference(*exact), rtol=1e-12, atol=1e-12)


@every_backend
@both_formats
@pytest.mark.parametrize("hidden_act", list(ACTIVATIONS))
def test_every_activation(hidden_act, quantized, backend, device):
    assert_exact(*make_quantized(9, 40, 6, 5, torch.float32, device, quantized), backend, hidden_act)


@pytest.mark.parametrize("variant", ["fused", "gather"])
@both_formats
def test_every_variant_of_the_kernels(quantized, variant, device):
    plan = pytest.importorskip("flash_moe.ops._triton.expert_plan", reason="needs triton")
    for T, H, E, K in SHAPES:
        with plan.use_variant(variant):
            assert_exact(*make_quantized(T, H, E, K, torch.bfloat16, device, quantized), "triton")


@both_formats
def test_slices_of_columns(quantized, device, monkeypatch):
    """Where the table passes the L2 cache, the dots come in slices, whose sums are scaled."""
    kernels = pytest.importorskip("flash_moe.ops._triton.expert", reason="needs triton")
    plan = pytest.importorskip("flash_moe.ops._triton.expert_plan", reason="needs triton")
    monkeypatch.setattr(kernels, "_slice_width", lambda table, num_pairs: 256)
    with plan.use_variant("gather"):
        assert_exact(*make_quantized(3, 600, 5, 4, torch.bfloat16, device, quantized), "triton")


def test_dense_products_are_never_chosen_for_8_bits():
    plan = pytest.importorskip("flash_moe.ops._triton.expert_plan", reason="needs triton")
    sizes = (4096, 1024, 1024, 64)
    assert plan.choose(plan.FORWARD, sizes, 2, plan.H200) == plan.DENSE
    assert plan.choose(plan.FORWARD, sizes, 1, plan.H200) != plan.DENSE


@both_backends
@both_formats
def test_every_number_of_the_format(quantized, backend, device):
    """One expert a number, whose row holds it alone: the output is the number times its scales, to the bit."""
    numbers = torch.arange(-128, 128, device=device).to(torch.int8).view(DTYPES[quantized])
    numbers = numbers[numbers.float().isfinite()]
    E = len(numbers)
    table, scale = numbers[:, None].contiguous(), torch.logspace(-3, 3, E, device=device)
    ones, indices = torch.ones(E, 1, device=device), torch.arange(E, device=device)[:, None]
    unit = torch.ones_like(scale)
    one = torch.ones(E, 1, device=device).to(table.dtype)
    down = flash_expert(ones, table, one, indices, ones, hidden_act="identity", backend=backend,
                        down_scale=scale, up_scale=unit)  # fmt: skip
    up = flash_expert(ones, one, table, indices, ones, hidden_act="identity", backend=backend,
                      down_scale=unit, up_scale=scale)  # fmt: skip
    want = numbers.float() * scale
    assert torch.equal(down.flatten(), want)
    assert torch.equal(up.flatten(), want)


@both_backends
@both_formats
def test_inputs_of_any_kind(quantized, backend, device):
    """Int32 ids, float32 routing weights, tensors that are not contiguous, tables and scales amid NaN."""
    inputs, scales, exact = make_quantized(
        6, 37, 9, 5, torch.bfloat16, device, quantized, indices_dtype=torch.int32, weights_dtype=torch.float32
    )
    assert_exact(inputs, scales, exact, backend)
    want = flash_expert(*inputs, **scales, backend=backend)
    strided = [x.t().contiguous().t() for x in inputs]
    twice = {name: scale.repeat_interleave(2)[::2] for name, scale in scales.items()}
    assert torch.equal(flash_expert(*strided, **twice, backend=backend), want)
    x, down, up, indices, weights = inputs
    amid = [surround_with_nan(each) for each in (x, down, up)]
    amid_scales = {name: surround_with_nan(scale) for name, scale in scales.items()}
    assert torch.equal(flash_expert(*amid, indices, surround_with_nan(weights), **amid_scales, backend=backend), want)


@both_backends
@both_formats
@pytest.mark.parametrize("variant", ["fused", "gather"])
def test_everything_is_written_and_repeats_bit_for_bit(quantized, backend, variant, device):
    inputs, scales, _ = make_quantized(5, 37, 9, 3, torch.bfloat16, device, quantized)
    plan = pytest.importorskip("flash_moe.ops._triton.expert_plan", reason="needs triton")
    with plan.use_variant(variant):
        want = flash_expert(*inputs, **scales, backend=backend)
        with poison_memory():
            assert torch.equal(flash_expert(*inputs, **scales, backend=backend), want)


@every_backend
@both_formats
@pytest.mark.parametrize("T, K", [(0, 3), (4, 0), (0, 0)])
def test_nothing_to_sum(T, K, quantized, backend, device):
    inputs, scales, _ = make_quantized(T, 20, 5, K, torch.bfloat16, device, quantized)
    out = flash_expert(*inputs, **scales, backend=backend)
    assert torch.equal(out, torch.zeros_like(inputs[0]))


@both_formats
def test_no_worse_than_the_formats_allow(quantized, device):
    (x, down, up, indices, weights), _ = make_expert_inputs(64, 256, 10_000, 16, torch.float32, device)
    (down_8, down_scale), (up_8, up_scale) = quantize(down, quantized), quantize(up, quantized)
    out = flash_expert(x, down_8, up_8, indices, weights, down_scale=down_scale, up_scale=up_scale)
    error = relative_error(out, flash_expert(x, down, up, indices, weights))
    assert ERROR_BOUNDS[quantized] / 2 < error < ERROR_BOUNDS[quantized]


@both_backends
@both_formats
def test_autocast_leaves_the_tables_alone(quantized, backend, device):
    inputs, scales, _ = make_quantized(5, 37, 9, 3, torch.float32, device, quantized)
    want = flash_expert(inputs[0].bfloat16(), *inputs[1:], **scales, backend=backend)
    with torch.autocast(device.type, torch.bfloat16):
        out = flash_expert(*inputs, **scales, backend=backend)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, want)


@both_backends
def test_memory_is_bounded(backend, device):
    """No row is held for each pair: all of them in 8 bits alone would be 128 MiB."""
    if backend == "triton" and device.type == "cpu":
        pytest.skip("the interpreter's own memory is not the kernels'")
    inputs, scales, _ = make_quantized(512, 1024, 300, 256, torch.bfloat16, device, "int8")
    nbytes = peak_nbytes(lambda: flash_expert(*inputs, **scales, backend=backend), device)
    assert nbytes < 2 * inputs[0].nbytes + 32 * inputs[3].numel() + (100 * 2**20 if device.type == "cuda" else 2**24)


def arguments(**changes):
    (x, down, up, indices, weights), scales, _ = make_quantized(4, 6, 5, 3, torch.float32, "cpu", "int8")
    names = ("hidden_states", "down_weights", "up_weights", "indices", "routing_weights")
    given = {**dict(zip(names, (x, down, up, indices, weights), strict=True)), **scales}
    return {**given, **{name: change(given[name]) for name, change in changes.items()}}


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"down_scale": lambda x: None}, ValueError, r"down_scale: expected a tensor \[E\].*got None"),
        ({"up_scale": lambda x: None}, ValueError, r"up_scale: expected a tensor \[E\].*got None"),
        (dict.fromkeys(("down_scale", "up_scale"), lambda x: None), ValueError, "down_scale: .*8 bits.*got None"),
        ({"up_scale": lambda x: 1.0}, TypeError, "up_scale: expected a tensor; got float"),
        ({"up_scale": lambda x: x[:-1]}, ValueError, r"up_scale: expected shape \[E\] = \(5\); got \(4,\)"),
        ({"down_scale": lambda x: x[:, None]}, ValueError, r"down_scale: expected 1 dimensions \[E\]"),
        ({"down_scale": lambda x: x.bfloat16()}, TypeError, "down_scale: expected dtype torch.float32; got"),
        ({"down_scale": lambda x: x.to("meta")}, ValueError, "down_scale: expected device cpu"),
        ({"down_weights": lambda x: x.float()}, TypeError, "down_weights: expected dtype torch.float8_e4m3fn, .*int8"),
        ({"up_weights": lambda x: x.to(torch.float8_e4m3fn)}, TypeError, "up_weights: expected dtype torch.int8; got"),
        ({"hidden_states": lambda x: x.double()}, TypeError, "hidden_states: expected dtype torch.float32"),
        ({"routing_weights": lambda x: x.half()}, TypeError, "routing_weights: expected dtype torch.float32"),
        ({"indices": lambda x: x + 5}, ValueError, "indices: expected ids from 0 to 4"),
        ({"hidden_states": lambda x: x.requires_grad_()}, ValueError, "hidden_states: expected no gradient"),
        ({"routing_weights": lambda x: x.requires_grad_()}, ValueError, "routing_weights: .*for inference"),
        ({"up_scale": lambda x: x.requires_grad_()}, ValueError, "up_scale: .*under torch.no_grad"),
    ],
)
def test_wrong_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        flash_expert(**arguments(**changes))


def test_without_gradients_they_may_require_them():
    given = arguments(hidden_states=lambda x: x.requires_grad_(), routing_weights=lambda x: x.requires_grad_())
    with torch.no_grad():
        assert not flash_expert(**given).requires_grad


# The layer


def make_layer(device="cpu", dtype=torch.float32, **changes):
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_experts": 25, "num_experts_per_tok": 3}
    torch.manual_seed(0)
    return FlashMoE(FlashMoEConfig(**{**sizes, **changes})).to(device, dtype).eval()


def make_tokens(*shape, device="cpu", dtype=torch.float32, seed=1):
    return torch.randn(*shape, 12, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def dequantized(layer):
    """The same layer in float64 with ordinary tables, which hold what the quantized ones stand for."""
    other = FlashMoE(replace(layer.config, backend="reference")).double().to(layer.router_gate.weight.device).eval()
    state = {name: x for name, x in layer.state_dict().items() if not name.endswith("scale")}
    for name in ("down_embed", "up_embed"):
        table = layer.get_submodule(name)
        state[f"{name}.weight"] = table.weight.double() * table.scale.double()[:, None]
    other.load_state_dict(state)
    return other


@every_backend
@both_formats
def test_layer_is_exact_in_the_dequantized_numbers(quantized, backend, device):
    layer = make_layer(device, backend=backend)
    x = make_tokens(7, device=device)
    assert layer.quantize_tables(quantized) is layer
    y, router_logits = layer(x)
    want, want_logits = dequantized(layer)(x.double())
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(router_logits.double(), want_logits, rtol=1e-5, atol=1e-5)


@both_formats
@every_dtype
def test_layer_is_close_to_what_it_was(quantized, dtype, device):
    sizes = {"hidden_size": 96, "num_experts": 1024, "num_experts_per_tok": 16, "intermediate_size": 0}
    layer = make_layer(device, dtype, **sizes)
    x = torch.randn(200, 96, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    with torch.no_grad():
        want, want_logits = layer(x)
    y, router_logits = layer.quantize_tables(quantized)(x)
    assert torch.equal(router_logits, want_logits)
    assert relative_error(y, want) < ERROR_BOUNDS[quantized]


@both_formats
def test_what_a_quantized_layer_holds(quantized):
    layer = make_layer()
    before = set(layer.state_dict())
    layer.quantize_tables(quantized)
    for name in ("down_embed", "up_embed"):
        table = layer.get_submodule(name)
        assert (table.weight.dtype, table.weight.shape) == (DTYPES[quantized], (25, 12))
        assert (table.scale.dtype, table.scale.shape) == (torch.float32, (25,))
        assert not table.training
    assert set(layer.state_dict()) == before | {"down_embed.scale", "up_embed.scale"}
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert f"(down_embed): QuantizedTable(25, 12, dtype={DTYPES[quantized]})" in repr(layer)


@both_formats
def test_output_needs_no_gradient_and_no_guard(quantized):
    y, router_logits = make_layer().quantize_tables(quantized)(make_tokens(5))
    assert not y.requires_grad
    assert not router_logits.requires_grad


def test_training_is_refused_before_anything_is_written():
    layer = make_layer(track_expert_usage=True).quantize_tables("int8")
    before = {name: x.clone() for name, x in (*layer.named_buffers(), *layer.named_parameters())}
    with pytest.raises(ValueError, match=r"quantized ones, which are for inference: call eval\(\)"):
        layer.train()(make_tokens(5))
    with pytest.raises(ValueError, match=r"hidden_states: expected no gradient.*for inference"):
        layer.eval()(make_tokens(5).requires_grad_())
    with pytest.raises(ValueError, match="down_embed: expected a table to draw anew"):
        layer.reset_parameters()
    for name, x in (*layer.named_buffers(), *layer.named_parameters()):
        assert torch.equal(x, before[name]), name


def test_without_gradients_statistics_may_still_be_taken():
    layer = make_layer().quantize_tables("fp8").train()
    with torch.no_grad():
        layer(make_tokens(5).requires_grad_())
    assert layer.router_norm.num_batches_tracked == 1


def test_a_parameter_that_asks_for_a_gradient_again_gets_none_in_silence():
    layer = make_layer().quantize_tables("fp8")
    layer.router_gate.requires_grad_()
    with pytest.raises(ValueError, match="routing_weights: expected no gradient"):
        layer(make_tokens(5))


@pytest.mark.parametrize("dtype", ["fp4", torch.int8, None], ids=str)
def test_unknown_format(dtype):
    with pytest.raises(ValueError, match="dtype: expected one of fp8, int8; got "):
        make_layer().quantize_tables(dtype)


def test_quantizing_twice():
    layer = make_layer().quantize_tables("int8")
    with pytest.raises(ValueError, match=r"down_embed: .*not quantized yet; got one of torch.int8"):
        layer.quantize_tables("fp8")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["down_embed", "up_embed"])
def test_weights_that_are_not_finite(name, value):
    layer = make_layer()
    with torch.no_grad():
        layer.get_submodule(name).weight[3, 4] = value
    with pytest.raises(ValueError, match=rf"{name}\.weight: expected finite weights"):
        layer.quantize_tables("fp8")
    assert not any(isinstance(module, QuantizedTable) for module in layer.modules())
    assert all(parameter.requires_grad for parameter in layer.parameters())


@both_formats
@pytest.mark.parametrize(
    "convert",
    [
        lambda layer: layer.to(torch.bfloat16),
        lambda layer: layer.half(),
        lambda layer: layer.bfloat16().double(),
        lambda layer: layer.type(torch.bfloat16),
    ],
    ids=["to", "half", "double", "type"],
)
def test_conversions_leave_the_tables_alone(convert, quantized):
    layer = make_layer().quantize_tables(quantized)
    before = copy.deepcopy(layer)
    convert(layer)
    assert layer.router_gate.weight.dtype != torch.float32
    assert_same_tables(layer, before)


def assert_same_tables(layer, other):
    for name in ("down_embed", "up_embed"):
        table, want = layer.get_submodule(name), other.get_submodule(name)
        assert torch.equal(table.scale, want.scale)
        assert table.weight.dtype == want.weight.dtype
        assert torch.equal(table.weight.float(), want.weight.float())


@both_formats
def test_a_converted_layer_computes_in_its_dtype(quantized, device):
    layer = make_layer(device).quantize_tables(quantized)
    exact = dequantized(layer)
    x = make_tokens(9, device=device)
    y, _ = layer.to(torch.bfloat16)(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert relative_error(y, exact(x.double())[0]) < 0.02


@both_formats
def test_autocast(quantized, device):
    layer = make_layer(device).quantize_tables(quantized)
    x = make_tokens(9, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        y, _ = layer(x)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, layer(x)[0]) < 0.02


@pytest.mark.gpu
@both_formats
def test_to_a_device_and_back(quantized):
    layer = make_layer().quantize_tables(quantized)
    before = copy.deepcopy(layer)
    layer.cuda()
    assert {x.device.type for x in layer.state_dict().values()} == {"cuda"}
    assert_same_tables(layer.cpu(), before)


@both_formats
def test_a_layer_without_memory(quantized):
    """Made and quantized on the meta device, then filled from a file: no unquantized table is ever there."""
    saved = make_layer().quantize_tables(quantized)
    with torch.device("meta"):
        layer = FlashMoE(saved.config).eval().quantize_tables(quantized)
    assert {x.device.type for x in layer.state_dict().values()} == {"meta"}
    other = copy.deepcopy(layer).to_empty(device="cpu")
    other.load_state_dict(saved.state_dict())
    layer.load_state_dict(saved.state_dict(), assign=True)
    for filled in (layer, other):
        assert_same_tables(filled, saved)
        assert torch.equal(filled(make_tokens(5))[0], saved(make_tokens(5))[0])


@both_formats
def test_saved_state_loads_into_a_layer_quantized_alike(quantized, tmp_path):
    saved = make_layer().quantize_tables(quantized)
    torch.save(saved.state_dict(), tmp_path / "state.pt")
    save_file(saved.state_dict(), tmp_path / "state.safetensors")
    for state in (torch.load(tmp_path / "state.pt"), load_file(tmp_path / "state.safetensors")):
        torch.manual_seed(1)
        layer = FlashMoE(saved.config).eval().quantize_tables(quantized)
        layer.load_state_dict(state)
        assert_same_tables(layer, saved)
        assert torch.equal(layer(make_tokens(5))[0], saved(make_tokens(5))[0])


@both_formats
def test_state_of_another_kind_does_not_load(quantized):
    plain = make_layer().state_dict()
    layer = make_layer().quantize_tables(quantized)
    before = copy.deepcopy(layer)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=rf"down_embed.weight: expected dtype {DTYPES[quantized]}; got"):
            layer.load_state_dict(plain, strict=strict)
    (other,) = set(DTYPES) - {quantized}
    with pytest.raises(RuntimeError, match=r"down_embed.weight: expected dtype"):
        layer.load_state_dict(make_layer().quantize_tables(other).state_dict())
    assert_same_tables(layer, before)
    with pytest.raises(RuntimeError, match=r'Unexpected key.* "down_embed.scale"'):
        make_layer().load_state_dict(layer.state_dict())


@both_formats
def test_copies(quantized, tmp_path):
    layer = make_layer().quantize_tables(quantized)
    want = layer(make_tokens(5))[0]
    # Python's own pickle does not restore float8 tensors (torch 2.13).
    torch.save(layer, tmp_path / "layer.pt")
    for other in (copy.deepcopy(layer), torch.load(tmp_path / "layer.pt", weights_only=False)):
        assert_same_tables(other, layer)
        assert torch.equal(other(make_tokens(5))[0], want)
        assert other.down_embed.weight.data_ptr() != layer.down_embed.weight.data_ptr()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["auto", "torch"])
@both_formats
def test_compiled_whole(quantized, backend, compiler, device):
    torch._dynamo.reset()
    layer = make_layer(device, backend=backend).quantize_tables(quantized)
    compiled = torch.compile(layer, fullgraph=True, backend=compiler, dynamic=True)
    for T, stance in ((4, "default"), (7, "fail_on_recompile")):
        x = make_tokens(T, device=device)
        with torch.compiler.set_stance(stance):
            torch.testing.assert_close(compiled(x)[0], layer(x)[0])


@both_formats
def test_exported(quantized, device):
    layer = make_layer(device).quantize_tables(quantized)
    exported = torch.export.export(
        layer, (make_tokens(4, device=device),), dynamic_shapes=({0: torch.export.Dim("T", max=2**20)},)
    )
    for T in (1, 9):
        x = make_tokens(T, device=device)
        torch.testing.assert_close(exported.module()(x)[0], layer(x)[0])


@both_formats
def test_functional_call_uses_what_it_is_given(quantized):
    layer, x = make_layer().quantize_tables(quantized), make_tokens(5)
    state = {**layer.state_dict(), "up_embed.scale": 2 * layer.up_embed.scale}
    more = torch.func.functional_call(layer, state, (x,))[0] - layer(x)[0]
    layer.down_proj.weight.zero_()  # the routed experts alone
    torch.testing.assert_close(more, layer(x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@both_formats
@pytest.mark.parametrize("T", [1, 300])
def test_graph_replay_sees_changed_data(T, quantized, device):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_experts": 4096, "num_experts_per_tok": 32}
    layer = make_layer(device, torch.bfloat16, **sizes).quantize_tables(quantized)
    x = torch.randn(T, 256, device=device, dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(x)[0]
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(captured, layer(x)[0], rtol=0.02, atol=0.02)


@pytest.mark.gpu
@both_formats
@pytest.mark.parametrize(
    "T, H, E, K", [(4096, 1024, 16384, 64), (1, 1024, 16384, 64), (1024, 1024, 65536, 32)], ids=str
)
def test_exact_at_realistic_sizes(T, H, E, K, quantized, device):
    (x, down, up, indices, weights), scales, _ = make_quantized(T, H, E, K, torch.bfloat16, device, quantized)
    out = flash_expert(x, down, up, indices, weights, **scales)
    some = slice(0, 64)
    want = flash_expert(
        *to_float64((x[some],)), down, up, indices[some], *to_float64((weights[some],)), **scales, backend="reference"
    )
    assert relative_error(out[some], want) < 0.0025
