"""A call like the one before passes by the checks; whatever changes in between, it does what a first call does."""

import copy
import dataclasses
import gc
import io
import weakref

import pytest
import torch
from test_layer_inference import SIZES, Seen
from test_layer_inference import make_layer as make_layer_in
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from flash_moe import FlashMoE
from flash_moe.testing import poison_memory

layer_few = pytest.importorskip("flash_moe.ops._triton.layer_few")
H = SIZES["hidden_size"]


def make_layer(device, **changes):
    return make_layer_in(torch.bfloat16, device, **changes)


def make_x(device, *shape, seed=1):
    return torch.randn(*shape, H, generator=torch.Generator().manual_seed(seed)).to(device, torch.bfloat16)


def infer(layer, *arguments):
    with torch.no_grad(), poison_memory():
        return layer(*arguments)


@pytest.fixture
def repeats(monkeypatch):
    """A truth value for each call: whether it passed by the checks."""
    found, infer_again = [], FlashMoE._infer_again

    def spy(*arguments):
        result = infer_again(*arguments)
        found.append(result is not None)
        return result

    monkeypatch.setattr(FlashMoE, "_infer_again", spy)
    return found


def result_or_error(call, layer):
    try:
        return call(layer)
    except (TypeError, ValueError) as error:
        return type(error), str(error)


def assert_as_a_first_call(layer, call):
    """A copy of the layer has no call before it."""
    actual, want = (result_or_error(call, each) for each in (layer, copy.deepcopy(layer)))
    assert len(actual) == len(want)
    for result, expected in zip(actual, want, strict=True):
        if isinstance(expected, torch.Tensor):
            assert torch.equal(result, expected)
            assert result.dtype == expected.dtype
            assert result.stride() == expected.stride()
            assert result.requires_grad == expected.requires_grad
            assert result.is_inference() == expected.is_inference()
        else:
            assert result == expected
    return actual


@pytest.mark.parametrize("shape", [(1,), (2,), (1, 1), (2, 1), (1, 2, 1), (3,), (2, 4)], ids=str)
def test_other_numbers(shape, device, repeats):
    layer = make_layer(device)
    for seed in range(3):
        assert_as_a_first_call(layer, lambda each, seed=seed: infer(each, make_x(device, *shape, seed=seed)))
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1.5)
    for name in ("router_gate", "gate_proj", "down_embed"):  # other memory
        weight = layer.get_submodule(name).weight
        weight.data = weight.data.flip(0)
    y, router_logits = assert_as_a_first_call(layer, lambda each: infer(each, make_x(device, *shape)))
    assert repeats == [False, False, True, False, True, False, True, False]
    assert y.shape == (*shape, H)
    assert router_logits.shape == (2, y.numel() // H, 5)


def swap(name, change):
    def apply(layer):
        tensor = layer.get_parameter(name)
        tensor.data = change(tensor.data)

    return apply


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


WAYS_TO_CHANGE = {
    "nothing": lambda layer: None,
    "eps": lambda layer: setattr(layer.router_norm, "eps", 0.5),
    "config": lambda layer: setattr(layer, "config", dataclasses.replace(layer.config, norm_topk_prob=True)),
    "backend": lambda layer: setattr(layer, "config", dataclasses.replace(layer.config, backend="reference")),
    "gate's dtype": swap("router_gate.weight", torch.Tensor.float),
    "a weight's dtype": swap("up_proj.weight", torch.Tensor.half),
    "a weight's strides": swap("up_proj.weight", lambda weight: weight.t().contiguous().t()),
    "intermediate size": lambda layer: [
        swap(f"{name}.weight", lambda weight: weight[:, :16] if len(weight) == H else weight[:16])(layer)
        for name in ("gate_proj", "up_proj", "down_proj")
    ],
    "one weight for two": lambda layer: setattr(layer.up_proj, "weight", layer.gate_proj.weight),
    "the layer's dtype": torch.nn.Module.float,
    "statistics' dtype": lambda layer: layer.router_norm.float(),
    "a table": lambda layer: setattr(layer, "down_embed", nn.Embedding(25, H).to(layer.down_embed.weight)),
    "quantized tables": lambda layer: layer.quantize_tables("int8"),
    "parametrized weight": lambda layer: parametrize.register_parametrization(layer.router_gate, "weight", Half()),
    "computed weight": lambda layer: parametrize.register_parametrization(layer.gate_proj, "weight", Half()),
    "norm that trains": lambda layer: layer.router_norm.train(),
    "gate of another class": lambda layer: setattr(layer.router_gate, "__class__", type("Gate", (nn.Linear,), {})),
    "layer that trains": torch.nn.Module.train,
}


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("change", WAYS_TO_CHANGE, ids=str)
def test_changed_layer(change, T, device, repeats):
    layer, x = make_layer(device), make_x(device, T)
    before = [infer(layer, x) for _ in range(2)][1]
    WAYS_TO_CHANGE[change](layer)
    after = assert_as_a_first_call(layer, lambda each: infer(each, x))
    is_same = isinstance(after[0], torch.Tensor) and torch.equal(before[0], after[0])
    assert is_same == (change in ("nothing", "a weight's strides", "statistics' dtype"))
    # A table in place of one of the same shape is other numbers, at another address.
    assert repeats[:3] == [False, True, change in ("nothing", "a table")][: len(repeats)]


def in_autocast(layer, x):
    with torch.no_grad(), torch.autocast(x.device.type, dtype=torch.float16):
        return layer(x)


def in_inference_mode(layer, x):
    with torch.inference_mode():
        return layer(x)


def with_other_weights(layer, x):
    weights = {name: weight * 2 for name, weight in layer.state_dict().items() if name != "down_embed.weight"}
    with torch.no_grad():
        return functional_call(layer, weights, (x,))


WAYS_TO_CALL = {
    "more tokens": lambda layer, x: infer(layer, x.repeat(2, 1)),
    "many tokens": lambda layer, x: infer(layer, x.repeat(7, 1)),
    "no tokens": lambda layer, x: infer(layer, x[:0]),
    "more dimensions": lambda layer, x: infer(layer, x[None]),
    "one dimension": lambda layer, x: infer(layer, x[0]),
    "another hidden size": lambda layer, x: infer(layer, x[:, 1:]),
    "another dtype": lambda layer, x: infer(layer, x.float()),
    "an integer": lambda layer, x: infer(layer, x.int()),
    "another device": lambda layer, x: infer(layer, x.to("meta")),
    "no tensor": lambda layer, x: infer(layer, x.tolist()),
    "nothing": lambda layer, x: infer(layer, None),
    "rows apart": lambda layer, x: infer(layer, x.repeat(1, 2)[:, : x.shape[1]]),
    "strides": lambda layer, x: infer(layer, x.repeat_interleave(2, dim=1)[:, ::2]),
    "requires grad": lambda layer, x: infer(layer, x.clone().requires_grad_()),
    "grad mode": lambda layer, x: layer(x),
    "a mask": lambda layer, x: infer(layer, x, torch.zeros(1, device=x.device)),
    "autocast": in_autocast,
    "inference mode": in_inference_mode,
    "functional_call": with_other_weights,
}


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("way", WAYS_TO_CALL, ids=str)
def test_another_call(way, T, device, repeats):
    layer, x = make_layer(device), make_x(device, T)
    want = [infer(layer, x) for _ in range(2)][1]
    assert repeats == [False, True]
    del repeats[:]
    assert_as_a_first_call(layer, lambda each: WAYS_TO_CALL[way](each, x))
    # From three tokens on more of them are nothing else.
    assert any(repeats) == (T > 1 and way in ("more tokens", "many tokens", "rows apart"))
    for result, expected in zip(infer(layer, x), want, strict=True):
        assert torch.equal(result, expected)


def test_any_number_of_tokens_from_three_on(device, repeats):
    layer = make_layer(device)
    for T in (5, 3, 18, 4, 2, 1):
        assert_as_a_first_call(layer, lambda each, T=T: infer(each, make_x(device, T)))
    assert repeats[::2] == [False, True, True, True, False, False]


def test_few_tokens_that_no_one_launch_takes_are_as_any(device, repeats, monkeypatch):
    monkeypatch.setattr(layer_few, "MAX_KEYS", 4)
    layer = make_layer(device)
    for T in (2, 1, 4):
        assert_as_a_first_call(layer, lambda each, T=T: infer(each, make_x(device, T)))
    assert repeats[::2] == [False, False, True]


def test_float32_repeats_one_launch_alone(device, repeats):
    """Of more tokens those are few enough for the fused gate, and others not."""
    layer = make_layer_in(torch.float32, device)
    for T in (1, 1, 5, 5):
        assert_as_a_first_call(layer, lambda each, T=T: infer(each, make_x(device, T).float()))
    assert repeats[::2] == [False, True, False, False]


@pytest.mark.parametrize("name", ["router_norm", "router_gate"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks_registered_later(kind, name, device, repeats):
    layer, x = make_layer(device), make_x(device, 1)
    infer(layer, x)
    calls = []
    handle = getattr(layer.get_submodule(name), kind)(lambda *_: calls.append(1))
    infer(layer, x)
    assert bool(calls) == ("forward" in kind)
    handle.remove()
    infer(layer, x)
    assert repeats == [False, True]  # not even asked where somebody watches


def test_modes_that_come_later_see_everything(device, repeats):
    layer, x = make_layer(device), make_x(device, 1)
    want, _ = [infer(layer, x) for _ in range(2)][1]
    with Seen() as seen, torch.no_grad():
        y, _ = layer(x)
    assert torch.equal(y, want)
    assert torch.ops.flash_moe.layer_inference.default in seen.ops
    with torch.overrides.BaseTorchFunctionMode(), torch.no_grad():
        layer(x)
    with torch.device(device):  # a mode for functions that watches nothing
        infer(layer, x)
    assert repeats == [False, True, False, False, True]


def test_layer_pickled_before_calls_could_repeat(device, repeats):
    layer, x = make_layer(device), make_x(device, 1)
    assert "_last_inference" not in vars(layer)
    want = infer(layer, x)[0]
    del layer._last_inference
    assert torch.equal(infer(layer, x)[0], want)


def test_usage_is_counted_in_every_call(device):
    layer = make_layer(device, track_expert_usage=True)
    for calls in (1, 2, 3):
        infer(layer, make_x(device, 1))
        assert layer.expert_usage().counts.sum() == 3 * calls


def test_router_loss_of_training_is_forgotten(device):
    layer = make_layer(device, router_z_loss_coef=0.1)
    infer(layer, make_x(device, 1))
    layer.train()(make_x(device, 4))
    assert layer.router_loss is not None
    layer.eval()
    infer(layer, make_x(device, 1))
    assert layer.router_loss is None


def test_other_kinds_of_layers_never_repeat(device, repeats):
    layer = make_layer(device, intermediate_size=0)
    for _ in range(3):
        infer(layer, make_x(device, 1))
    assert not any(repeats)


def test_nothing_is_kept_alive_nor_saved(device, repeats):
    layer, x = make_layer(device), make_x(device, 1)
    want, _ = [infer(layer, x) for _ in range(2)][1]
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(infer(other, x)[0], want)
    assert repeats == [False, True, False, False]
    dead = [weakref.ref(tensor) for tensor in (x, layer.up_proj.weight)]
    layer.up_proj.weight = nn.Parameter(layer.up_proj.weight.detach().clone())
    del x
    gc.collect()
    assert [reference() for reference in dead] == [None, None]


def test_compiled_after_eager_calls(device):
    layer, x = make_layer(device), make_x(device, 2)
    want = [infer(layer, x) for _ in range(2)][1]
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        compiled(x)
        infer(layer, make_x(device, 1))  # what is remembered is nothing that a compiler looks at
        with torch.compiler.set_stance("fail_on_recompile"):
            for result, expected in zip(compiled(x), want, strict=True):
                assert torch.equal(result, expected)


@pytest.mark.gpu
def test_streams_do_not_share_memory(device):
    layer = make_layer(device, hidden_size=H, num_experts=4096, num_experts_per_tok=16, intermediate_size=2048)
    inputs = [make_x(device, 1, seed=seed) for seed in range(4)]
    want = [infer(layer, x)[0] for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    actual = []
    with torch.no_grad():
        for _ in range(50):
            for x, stream in zip(inputs, streams, strict=True):
                with torch.cuda.stream(stream):
                    actual.append(layer(x)[0])
    torch.cuda.synchronize()
    for i, y in enumerate(actual):
        assert torch.equal(y, want[i % len(want)])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_that_is_not_the_current_one(repeats):
    layer, x = make_layer("cuda:1"), make_x("cuda:1", 1)
    first, *others = [infer(layer, x)[0] for _ in range(3)]
    assert repeats == [False, True, True]
    assert all(torch.equal(y, first) for y in others)
    assert torch.cuda.current_device() == 0
