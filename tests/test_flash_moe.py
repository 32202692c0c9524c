"""The FlashMoE layer against the arithmetic of its documents, which ``documented_layer`` writes out by hand.

T tokens, H hidden size, I intermediate size, E = N * N experts, K experts a token.
"""

import copy
import dataclasses
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from flash_moe import FlashMoE, FlashMoEConfig
from flash_moe.modules.flash_moe import expert_up_std
from flash_moe.ops._reference.router import router_reference

ACTIVATIONS = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu_pytorch_tanh": lambda x: x * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
    "relu2": lambda x: x.clamp(min=0) ** 2,
    "identity": lambda x: x,
}
# Nothing a power of two, and the router's halves are not as wide as anything else.
SIZES = {"hidden_size": 12, "intermediate_size": 20, "num_experts": 25, "num_experts_per_tok": 3}
NORMS = ("batch", "rms", "none")
BACKENDS = ("torch", "triton", "reference")


def make_config(**changes):
    return FlashMoEConfig(**{**SIZES, **changes})


def make_layer(device="cpu", dtype=torch.float32, seed=0, **changes):
    torch.manual_seed(seed)
    return FlashMoE(make_config(**changes)).to(device, dtype)


def make_checkpoint(config, device="cpu", seed=0):
    """What a trained model of the field's earlier code saves: these names and no others. float64."""
    H, I, E, N = config.hidden_size, config.intermediate_size, config.num_experts, config.num_expert_keys
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "gate_proj.weight": (I, H),
        "up_proj.weight": (I, H),
        "down_proj.weight": (H, I),
        "router_gate.weight": (2 * N, H),
        "down_embed.weight": (E, H),
        "up_embed.weight": (E, H),
    }
    checkpoint = {}
    for name, shape in shapes.items():
        checkpoint[name] = torch.randn(shape, generator=generator, dtype=torch.float64) / shape[1] ** 0.5
    checkpoint["router_norm.running_mean"] = torch.randn(H, generator=generator, dtype=torch.float64)
    checkpoint["router_norm.running_var"] = torch.rand(H, generator=generator, dtype=torch.float64) + 0.5
    checkpoint["router_norm.num_batches_tracked"] = torch.tensor(7)
    return {name: value.to(device) for name, value in checkpoint.items()}


def load_layer(checkpoint, dtype, **changes):
    device = checkpoint["router_gate.weight"].device
    layer = FlashMoE(make_config(**changes)).to(device, dtype)
    layer.load_state_dict({name: cast(value, dtype) for name, value in checkpoint.items()}, strict=True)
    return layer


def cast(value, dtype):
    return value.to(dtype) if value.is_floating_point() else value


def documented_layer(state, x, config, training, experts=None):
    """The layer on ``x [T, H]``, step by step as its documents give it; ``experts [T, K]`` overrides the top K."""
    T, N, K = x.shape[0], config.num_expert_keys, config.num_experts_per_tok
    act = ACTIVATIONS[config.hidden_act]
    router_logits = (
        (documented_norm(state, x, config, training) @ state["router_gate.weight"].T).view(T, 2, N).transpose(0, 1)
    )
    row, col = router_logits - torch.log(torch.exp(router_logits).sum(-1, keepdim=True))
    if experts is None:
        experts = (row[:, :, None] + col[:, None, :]).reshape(T, N * N).topk(K).indices
    weights = torch.exp(row.gather(1, experts // N) + col.gather(1, experts % N))
    if config.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    pre_activations = (x[:, None, :] * state["down_embed.weight"][experts]).sum(-1)
    y = ((weights * act(pre_activations))[:, :, None] * state["up_embed.weight"][experts]).sum(1)
    if config.intermediate_size > 0:
        gate, up = x @ state["gate_proj.weight"].T, x @ state["up_proj.weight"].T
        y = y + (act(gate) * up) @ state["down_proj.weight"].T
    return y, router_logits


def documented_norm(state, x, config, training):
    if config.router_norm == "none":
        return x
    if config.router_norm == "rms":
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6)
    if training:
        centered = x - x.mean(0)
        return centered / torch.sqrt((centered**2).mean(0) + 1e-5)
    return (x - state["router_norm.running_mean"]) / torch.sqrt(state["router_norm.running_var"] + 1e-5)


def run_documented(checkpoint, x, upstream, config, training, experts=None):
    """Outputs and all gradients of ``documented_layer``, by name, in the dtype of ``x``."""
    x = x.detach().requires_grad_()
    state = {
        name: cast(value, x.dtype).detach().requires_grad_()
        for name, value in checkpoint.items()
        if "num_batches" not in name
    }
    outputs = documented_layer(state, x.flatten(0, -2), config, training, experts)
    outputs = (outputs[0].view(x.shape), outputs[1])
    names = [name for name in state if "running" not in name]
    grads = torch.autograd.grad(outputs, [x, *(state[name] for name in names)], upstream)
    return collect(outputs, ["hidden_states", *names], grads)


def run_layer(layer, x, upstream, call=None, **kwargs):
    """Outputs and all gradients of ``layer``, ``router_loss`` taking part; ``call`` is another way to run it."""
    x = x.detach().requires_grad_()
    outputs = (layer if call is None else call)(x, **kwargs)
    roots, upstream = list(outputs), list(upstream)
    if layer.router_loss is not None:
        roots.append(layer.router_loss)
        upstream.append(torch.ones_like(layer.router_loss))
    named = {"hidden_states": x, **dict(layer.named_parameters())}
    grads = torch.autograd.grad(roots, list(named.values()), upstream)
    return collect(outputs, named, grads)


def collect(outputs, names, grads):
    results = {"y": outputs[0].detach(), "router_logits": outputs[1].detach()}
    return {**results, **{f"grad of {name}": grad for name, grad in zip(names, grads, strict=True)}}


def make_data(layer_or_config, *shape, device="cpu", dtype=torch.float32, seed=1):
    """``hidden_states [*shape, H]`` and the upstream gradients of both outputs."""
    config = getattr(layer_or_config, "config", layer_or_config)
    generator = torch.Generator().manual_seed(seed)
    x = 1.5 * torch.randn(*shape, config.hidden_size, generator=generator) + 0.3
    dy = torch.randn(x.shape, generator=generator)
    T = x.numel() // config.hidden_size
    dlogits = torch.randn(2, T, config.num_expert_keys, generator=generator)
    return x.to(device, dtype), (dy.to(device, dtype), dlogits.to(device, dtype))


def relative_error(actual, expected):
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def assert_close(actual, expected, bound):
    """Every result within ``bound`` of the expected one, in norm; a NaN is not."""
    assert actual.keys() == expected.keys()
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert all(error <= bound for error in errors.values()), errors


def assert_rounds_as_well_as(low, exact, actual):
    """Every error at most twice that of ``low`` and half an eps (4 in float32, as ``flash_moe.testing`` has it).

    Twice, not the quarter more that an op is allowed: one logit rounded otherwise moves whole rows of the gradients.
    """
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        eps = torch.finfo(value.dtype).eps
        budget = 2 * relative_error(low[name], exact[name]) + (4 * eps if value.dtype == torch.float32 else eps / 2)
        error = relative_error(value, exact[name])
        assert error <= budget, f"{name}: error {error:.3e}, budget {budget:.3e}"


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different


# The documented arithmetic


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm_topk_prob", [False, True], ids=["weights as they are", "weights sum to one"])
def test_checkpoint_gives_documented_arithmetic_in_float64(norm_topk_prob, training, device):
    config = make_config(norm_topk_prob=norm_topk_prob, backend="reference")
    checkpoint = make_checkpoint(config, device)
    layer = load_layer(checkpoint, torch.float64, norm_topk_prob=norm_topk_prob, backend="reference").train(training)
    x, upstream = make_data(layer, 3, 11, device=device, dtype=torch.float64)
    expected = run_documented(checkpoint, x, upstream, config, training)
    assert_close(run_layer(layer, x, upstream), expected, 1e-12)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm_topk_prob", [False, True], ids=["weights as they are", "weights sum to one"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoint_gives_documented_arithmetic_in_float32(backend, norm_topk_prob, training, device):
    config = make_config(norm_topk_prob=norm_topk_prob)
    checkpoint = {
        name: cast(cast(value, torch.float32), torch.float64) for name, value in make_checkpoint(config, device).items()
    }
    layer = load_layer(checkpoint, torch.float32, norm_topk_prob=norm_topk_prob, backend=backend).train(training)
    x, upstream = make_data(layer, 2, 4, device=device)
    exact = run_documented(checkpoint, x.double(), [each.double() for each in upstream], config, training)
    low = run_documented(checkpoint, x, upstream, config, training)
    assert_rounds_as_well_as(low, exact, run_layer(layer, x, upstream))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("branch", ["dense", "routed"])
@pytest.mark.parametrize("hidden_act", ACTIVATIONS)
def test_hidden_act_is_obeyed_in_each_branch(hidden_act, branch, backend, device):
    config = make_config(hidden_act=hidden_act)
    checkpoint = make_checkpoint(config, device)
    checkpoint["up_embed.weight" if branch == "dense" else "down_proj.weight"].zero_()
    layer = load_layer(checkpoint, torch.float32, hidden_act=hidden_act, backend=backend).eval()
    x, upstream = make_data(layer, 4, device=device)
    exact = [each.double() for each in upstream]
    assert_close(run_layer(layer, x, upstream), run_documented(checkpoint, x.double(), exact, config, False), 1e-5)


def test_training_updates_running_statistics_as_batch_norm_does(device):
    checkpoint = make_checkpoint(make_config(), device)
    layer = load_layer(checkpoint, torch.float64, backend="reference")
    x, _ = make_data(layer, 3, 11, device=device, dtype=torch.float64)
    layer(x)
    tokens = x.flatten(0, 1)
    expected_mean = 0.9 * checkpoint["router_norm.running_mean"] + 0.1 * tokens.mean(0)
    expected_var = 0.9 * checkpoint["router_norm.running_var"] + 0.1 * tokens.var(0, unbiased=True)
    torch.testing.assert_close(layer.router_norm.running_mean, expected_mean)
    torch.testing.assert_close(layer.router_norm.running_var, expected_var)
    assert layer.router_norm.num_batches_tracked == 8
    before = copy.deepcopy(layer.state_dict())
    layer.eval()(x)
    assert_same_bits(layer.state_dict(), before)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("router_norm", NORMS)
def test_router_logits_are_the_gate_products(router_norm, training):
    layer = make_layer(router_norm=router_norm).train(training)
    x, _ = make_data(layer, 2, 4)
    tokens = x.flatten(0, 1)
    normed = {
        "batch": F.batch_norm(tokens, None, None, training=True) if training else tokens / (1 + 1e-5) ** 0.5,
        "rms": tokens / (tokens.square().mean(-1, keepdim=True) + 1e-6).sqrt(),
        "none": tokens,
    }[router_norm]
    _, router_logits = layer(x)
    products = normed @ layer.router_gate.weight.T
    expected = torch.stack([products[:, : layer.num_expert_keys], products[:, layer.num_expert_keys :]])
    assert router_logits.shape == (2, 8, 5)
    torch.testing.assert_close(router_logits, expected)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("router_norm", ["rms", "none"])
def test_other_router_norms_in_float64(router_norm, training):
    layer = make_layer(router_norm=router_norm, dtype=torch.float64, backend="reference").train(training)
    x, upstream = make_data(layer, 9, dtype=torch.float64)
    expected = run_documented(layer.state_dict(), x, upstream, layer.config, training)
    assert_close(run_layer(layer, x, upstream), expected, 1e-12)


# State


def test_state_dict_has_the_documented_keys_and_no_others():
    documented = set(make_checkpoint(make_config()))
    layer = make_layer(track_expert_usage=True, router_aux_loss_coef=0.1, router_z_loss_coef=0.1)
    layer(make_data(layer, 4)[0])
    assert set(layer.state_dict()) == documented
    parameters = {name for name in documented if "router_norm" not in name}
    assert {name for name, _ in layer.named_parameters()} == parameters
    dense = {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}
    assert set(make_layer(intermediate_size=0).state_dict()) == documented - dense
    for router_norm in ("rms", "none"):
        assert set(make_layer(router_norm=router_norm).state_dict()) == parameters


def test_submodules_are_of_the_documented_kinds_without_bias():
    layer = make_layer()
    for name in ("gate_proj", "up_proj", "down_proj", "router_gate"):
        linear = getattr(layer, name)
        assert type(linear) is nn.Linear
        assert linear.bias is None
    assert type(layer.down_embed) is type(layer.up_embed) is nn.Embedding
    assert type(layer.router_norm) is nn.BatchNorm1d
    assert layer.router_norm.weight is layer.router_norm.bias is None
    assert not any("bias" in name for name, _ in layer.named_parameters())
    assert layer.num_expert_keys == 5


def test_state_with_a_missing_or_further_key_or_another_shape_does_not_load():
    checkpoint = make_checkpoint(make_config())
    layer = make_layer()
    renamed = {name.replace("embed", "table"): value for name, value in checkpoint.items()}
    for state in (
        renamed,
        {**checkpoint, "gate_proj.bias": torch.zeros(20)},
        make_checkpoint(make_config(num_experts=36)),
    ):
        with pytest.raises(RuntimeError, match=r"state_dict"):
            layer.load_state_dict(state, strict=True)


def test_saved_state_gives_the_same_bits_when_loaded(tmp_path):
    layer = make_layer(seed=3)
    x, upstream = make_data(layer, 6)
    layer(x)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    loaded = make_layer(seed=4)
    loaded.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True), strict=True)
    for training in (False, True):
        assert_same_bits(run_layer(loaded.train(training), x, upstream), run_layer(layer.train(training), x, upstream))


def test_whole_layer_survives_pickling_after_a_training_step():
    layer = make_layer(router_aux_loss_coef=0.1, track_expert_usage=True)
    x, upstream = make_data(layer, 6)
    layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert_same_bits(run_layer(loaded, x, upstream), run_layer(layer, x, upstream))


@pytest.mark.parametrize("coefficient", [0.0, 0.1])
def test_deepcopy_after_a_training_step(coefficient):
    layer = make_layer(router_aux_loss_coef=coefficient, router_z_loss_coef=coefficient, track_expert_usage=True)
    x, upstream = make_data(layer, 6)
    layer(x)[0].sum().backward()
    twin = copy.deepcopy(layer)
    assert_same_bits(run_layer(twin, x, upstream), run_layer(layer, x, upstream))
    assert_same_bits(twin.state_dict(), layer.state_dict())
    with torch.no_grad():
        twin.router_gate.weight.zero_()
    assert layer.router_gate.weight.abs().sum() > 0


# Shapes and inputs


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(2, 12), (4, 3, 2), (1, 24), (24, 1)], ids=str)
def test_leading_dimensions_are_only_a_shape(shape, training):
    layer = make_layer().train(training)
    flat, (dy, dlogits) = make_data(layer, 24)
    expected = run_layer(layer, flat, (dy, dlogits))
    actual = run_layer(layer, flat.view(*shape, 12), (dy.view(*shape, 12), dlogits))
    for name in ("y", "grad of hidden_states"):
        assert actual[name].shape == (*shape, 12)
        actual[name] = actual[name].view(24, 12)
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("intermediate_size", [0, 20])
def test_output_may_be_changed_in_place(intermediate_size):
    layer = make_layer(intermediate_size=intermediate_size)
    x, (dy, _) = make_data(layer, 2, 3)
    y, _ = layer(x)
    assert not y._is_view()
    (expected,) = torch.autograd.grad(2 * y, layer.up_embed.weight, dy, retain_graph=True)
    y *= 2
    assert torch.equal(torch.autograd.grad(y, layer.up_embed.weight, dy)[0], expected)


def test_input_need_not_be_contiguous():
    layer = make_layer()
    x, (dy, dlogits) = make_data(layer, 4, 6)
    expected = run_layer(layer, x, (dy, dlogits))
    strided, strided_dy = (each.transpose(0, 1).contiguous().transpose(0, 1) for each in (x, dy))
    assert not strided.is_contiguous()
    assert_same_bits(run_layer(layer, strided, (strided_dy, dlogits)), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("router_norm", NORMS)
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 5)], ids=str)
def test_no_tokens(shape, router_norm, training, backend, device):
    losses = {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.1, "track_expert_usage": True}
    layer = make_layer(device, router_norm=router_norm, backend=backend, **losses).train(training)
    before = copy.deepcopy(layer.state_dict())
    x, upstream = make_data(layer, *shape, device=device)
    for kwargs in ({}, {"attention_mask": torch.ones(shape, device=device)}):
        results = run_layer(layer, x, upstream, **kwargs)
        assert results["y"].shape == results["grad of hidden_states"].shape == (*shape, 12)
        assert results["router_logits"].shape == (2, 0, 5)
        assert all(results[f"grad of {name}"].eq(0).all() for name, _ in layer.named_parameters())
        if training:
            assert layer.router_loss == 0
    assert_same_bits(layer.state_dict(), before)
    assert layer.expert_usage().counts.sum() == 0


@pytest.mark.parametrize("shape", [(1,), (1, 1)], ids=str)
def test_one_token_cannot_train_batch_norm(shape):
    layer = make_layer()
    before = copy.deepcopy(layer.state_dict())
    x, _ = make_data(layer, *shape)
    for kwargs in ({}, {"attention_mask": torch.ones(shape)}):
        with pytest.raises(ValueError, match=r'hidden_states: expected 2 or more tokens.*got 1.*eval\(\).*"rms"'):
            layer(x, **kwargs)
    assert_same_bits(layer.state_dict(), before)


@pytest.mark.parametrize("router_norm, training", [("batch", False), ("rms", True), ("none", True), ("rms", False)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_token_equals_itself_among_others(backend, router_norm, training, device):
    layer = make_layer(device, router_norm=router_norm, backend=backend).train(training)
    x, (dy, dlogits) = make_data(layer, 3, device=device)
    among = run_layer(layer, x, (dy, dlogits))
    alone = run_layer(layer, x[2:3], (dy[2:3], dlogits[:, 2:3]))
    for name in ("y", "grad of hidden_states"):
        assert relative_error(alone[name], among[name][2:3]) < 1e-6
    assert relative_error(alone["router_logits"], among["router_logits"][:, 2:3]) < 1e-6


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_dense_branch(backend, device):
    config = make_config(intermediate_size=0)
    checkpoint = {name: value for name, value in make_checkpoint(make_config(), device).items() if "_proj" not in name}
    layer = load_layer(checkpoint, torch.float32, intermediate_size=0, backend=backend)
    assert not any(hasattr(layer, name) for name in ("gate_proj", "up_proj", "down_proj"))
    x, upstream = make_data(layer, 4, device=device)
    exact = [each.double() for each in upstream]
    assert_close(run_layer(layer, x, upstream), run_documented(checkpoint, x.double(), exact, config, True), 1e-5)


@pytest.mark.parametrize(
    "changes", [{"num_experts": 1, "num_experts_per_tok": 1}, {"num_experts_per_tok": 25}], ids=str
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_every_expert_chosen(changes, backend, device):
    config = make_config(**changes)
    checkpoint = make_checkpoint(config, device)
    layer = load_layer(checkpoint, torch.float32, backend=backend, **changes)
    x, upstream = make_data(layer, 3, device=device)
    exact = run_documented(checkpoint, x.double(), [each.double() for each in upstream], config, True)
    actual = run_layer(layer, x, upstream)
    if config.num_experts == 1:  # one expert has probability 1, whatever the router
        assert (actual["grad of router_gate.weight"] - exact["grad of router_gate.weight"]).abs().max() < 1e-5
        del actual["grad of router_gate.weight"], exact["grad of router_gate.weight"]
    assert_close(actual, exact, 1e-5)


@pytest.mark.parametrize(
    "x, error, message",
    [
        (torch.zeros(12), ValueError, r"hidden_states: expected shape \[\.\.\., 12\], 2 or more dim.*got \(12,\)"),
        (torch.zeros(()), ValueError, r"hidden_states: expected shape \[\.\.\., 12\].*got \(\)"),
        (torch.zeros(4, 13), ValueError, r"hidden_states: expected shape \[\.\.\., 12\].*got \(4, 13\)"),
        (torch.zeros(12, 4), ValueError, r"hidden_states: expected shape \[\.\.\., 12\].*got \(12, 4\)"),
        (torch.zeros(4, 12, dtype=torch.bfloat16), TypeError, r"hidden_states: expected dtype torch.float32; got .*bf"),
        (torch.zeros(4, 12, dtype=torch.float64), TypeError, r"hidden_states: expected dtype torch.float32; got .*64"),
        (torch.zeros(4, 12, dtype=torch.int64), TypeError, r"hidden_states: expected dtype torch.float32; got .*int64"),
        (torch.zeros(4, 12, device="meta"), ValueError, r"expected device meta, as hidden_states has; got cpu"),
    ],
    ids=lambda value: f"{tuple(value.shape)} {value.dtype} {value.device}" if isinstance(value, torch.Tensor) else "",
)
def test_bad_hidden_states(x, error, message):
    layer = make_layer()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(error, match=message.replace("bf", "bfloat16")):
        layer(x)
    assert_same_bits(layer.state_dict(), before)


@pytest.mark.parametrize("intermediate_size", [0, 20])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool], ids=str)
def test_integers_are_no_hidden_states_under_autocast_either(dtype, intermediate_size):
    layer = make_layer(intermediate_size=intermediate_size)
    before = copy.deepcopy(layer.state_dict())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=rf"hidden_states: .*got {dtype}"):
        layer(torch.zeros(4, 12, dtype=dtype))
    assert_same_bits(layer.state_dict(), before)


def test_float64_is_for_the_reference_backend_and_refused_before_anything_is_written():
    layer = make_layer(dtype=torch.float64, backend="torch")
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(
        TypeError, match=r"expected dtype torch.float32, torch.float16, torch.bfloat16; got torch.float64"
    ):
        layer(torch.zeros(4, 12, dtype=torch.float64))
    assert_same_bits(layer.state_dict(), before)


@pytest.mark.parametrize("name", ["gate_proj", "down_proj", "router_gate", "down_embed", "up_embed"])
@pytest.mark.parametrize("change", [torch.Tensor.bfloat16, lambda x: x.to("meta")], ids=["dtype", "device"])
def test_a_parameter_out_of_line_is_refused_before_anything_is_written(name, change):
    layer = make_layer(track_expert_usage=True)
    module = layer.get_submodule(name)
    module.weight = torch.nn.Parameter(change(module.weight.detach()))
    statistics = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    with pytest.raises((TypeError, ValueError), match=f"{name}(.weight)?: expected|expected dtype torch.bfloat16"):
        layer(torch.zeros(4, 12))
    assert_same_bits(dict(layer.named_buffers()), statistics)


def test_a_parameter_put_in_for_one_call_is_checked_and_used():
    layer = make_layer()
    x, _ = make_data(layer, 4)
    twin = make_layer(seed=7)
    state = {**dict(twin.named_parameters()), **{name: value.clone() for name, value in twin.named_buffers()}}
    assert torch.equal(torch.func.functional_call(layer, state, x)[0], twin(x)[0])
    before = copy.deepcopy(layer.state_dict())
    for name in dict(layer.named_parameters()):
        with pytest.raises(TypeError, match=f"{name}: expected|expected dtype torch.bfloat16"):
            torch.func.functional_call(layer, {name: state[name].bfloat16()}, x)
    assert_same_bits(layer.state_dict(), before)


@pytest.mark.parametrize("name", ["gate_proj", "down_embed", "router_gate"])
def test_a_weight_may_be_computed(name):
    layer = make_layer()
    x, _ = make_data(layer, 4)
    doubled = copy.deepcopy(layer)
    with torch.no_grad():
        doubled.get_submodule(name).weight.mul_(2)

    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(layer.get_submodule(name), "weight", Double())
    assert torch.equal(layer(x)[0], doubled(x)[0])
    layer(x)[0].sum().backward()
    assert layer.get_submodule(name).parametrizations.weight.original.grad.ne(0).any()


def test_one_token_amid_padding_has_no_variance():
    """Without a mask it raises; with one, only a device could tell, and the statistics stay as they are."""
    layer = make_layer()
    before = copy.deepcopy(layer.state_dict())
    y, _ = layer(torch.randn(1, 4, 12), torch.tensor([[1, 0, 0, 0]]))
    assert y.isfinite().all()
    assert_same_bits(layer.state_dict(), before)


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.ones(2, 4), r"attention_mask: expected shape .*\(2, 3\); got \(2, 4\)"),
        (torch.ones(3, 2), r"attention_mask: expected shape .*\(2, 3\); got \(3, 2\)"),
        (torch.ones(6), r"attention_mask: expected 2 dimensions.*got shape \(6,\)"),
        (torch.ones(2, 1, 1, 3), r"attention_mask: expected 2 dimensions.*got shape \(2, 1, 1, 3\)"),
        (torch.ones(2, 3, device="meta"), r"attention_mask: expected device cpu, as hidden_states has; got meta"),
    ],
    ids=["wide", "transposed", "flat", "4-D", "device"],
)
def test_bad_attention_mask(mask, message):
    layer = make_layer()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(2, 3, 12), attention_mask=mask)
    assert_same_bits(layer.state_dict(), before)


# Padding

MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 1, 1], [1, 0, 1, 1, 0]]).bool()


def make_padded_data(layer, fill, device="cpu", dtype=torch.float32):
    """Data for ``MASK``, ``fill`` in turn at the padding; the loss looks at all of y, where padding is a constant."""
    x, (dy, dlogits) = make_data(layer, *MASK.shape, device=device, dtype=dtype)
    num_padded = (~MASK).sum()
    padding = torch.tensor(fill).repeat(num_padded)[:num_padded, None]
    x[~MASK] = padding.expand(-1, x.shape[-1]).to(x)
    dlogits[:, ~MASK.flatten()] = 0
    return x, (dy, dlogits)


def run_padded(layer, x, upstream, attention_mask):
    """``run_layer`` with what belongs to padding taken out of the results."""
    mask = MASK.to(x.device)
    results = run_layer(layer, x, upstream, attention_mask=attention_mask)
    for name in ("y", "grad of hidden_states"):
        results[name] = results[name][mask]
    results["router_logits"] = results["router_logits"][:, mask.flatten()]
    return results


def run_unpadded(layer, x, upstream):
    mask = MASK.to(x.device)
    return run_layer(layer, x[mask], (upstream[0][mask], upstream[1][:, mask.flatten()]))


NON_FINITE = (float("nan"), float("inf"), float("-inf"))


@pytest.mark.parametrize("intermediate_size", [0, 20], ids=["routed branch alone", "both branches"])
@pytest.mark.parametrize("fill", [(3.0, -7.0), NON_FINITE], ids=["finite", "not finite"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("router_norm", NORMS)
def test_padding_is_as_if_it_were_not_there(router_norm, training, fill, intermediate_size, device):
    losses = {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.2, "track_expert_usage": True}
    changes = {"router_norm": router_norm, "backend": "torch", "intermediate_size": intermediate_size, **losses}
    check_padding(make_layer(device, **changes).train(training), fill, device)


def test_padding_through_triton(device):
    check_padding(make_layer(device, backend="triton"), NON_FINITE, device)


def check_padding(layer, fill, device):
    twin = copy.deepcopy(layer)
    x, upstream = make_padded_data(layer, fill, device)
    actual = run_padded(layer, x, upstream, MASK.to(device))
    expected = run_unpadded(twin, x, upstream)
    assert_close(actual, expected, 1e-5)
    assert_close(layer.state_dict(), twin.state_dict(), 1e-6)
    if layer.config.track_expert_usage:
        assert torch.equal(layer.expert_counts, twin.expert_counts)
        torch.testing.assert_close(layer.router_loss, twin.router_loss)


def test_padding_in_float64():
    layer = make_layer(dtype=torch.float64, backend="reference")
    twin = copy.deepcopy(layer)
    x, upstream = make_padded_data(layer, (3.0, -7.0), dtype=torch.float64)
    assert_close(run_padded(layer, x, upstream, MASK), run_unpadded(twin, x, upstream), 1e-12)
    assert_close(layer.state_dict(), twin.state_dict(), 1e-12)


@pytest.mark.parametrize("intermediate_size", [0, 20], ids=["routed branch alone", "both branches"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("router_norm", NORMS)
def test_outputs_and_gradients_of_padding_are_zero(router_norm, training, intermediate_size):
    layer = make_layer(router_norm=router_norm, intermediate_size=intermediate_size).train(training)
    x, upstream = make_padded_data(layer, NON_FINITE)
    results = run_layer(layer, x, upstream, attention_mask=MASK)
    for name in ("y", "grad of hidden_states"):
        assert results[name][~MASK].eq(0).all()
        assert results[name][MASK].ne(0).any(-1).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32], ids=str)
def test_masks_of_every_dtype_mean_the_same(dtype):
    layer = make_layer()
    x, upstream = make_padded_data(layer, (3.0, -7.0))
    expected = run_layer(layer, x, upstream, attention_mask=MASK)
    for yes in (1, 3):
        assert_same_bits(run_layer(layer, x, upstream, attention_mask=yes * MASK.to(dtype)), expected)


def test_mask_of_ones_is_no_mask():
    layer = make_layer()
    twin = copy.deepcopy(layer)
    x, upstream = make_data(layer, 3, 5)
    expected = run_layer(twin, x, upstream)
    assert_close(run_layer(layer, x, upstream, attention_mask=torch.ones(3, 5)), expected, 1e-6)
    assert_close(layer.state_dict(), twin.state_dict(), 1e-6)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("router_norm", NORMS)
def test_all_padding_is_computed_with_the_same_experts(router_norm, training, monkeypatch):
    """As documented; it counts for none of them."""
    layer = make_layer(router_norm=router_norm, track_expert_usage=True).train(training)
    seen = []
    choose = layer._choose
    monkeypatch.setattr(layer, "_choose", lambda router_logits: seen.append(choose(router_logits)) or seen[-1])
    x, _ = make_padded_data(layer, NON_FINITE)
    y, _ = layer(x, MASK)
    (weights, experts), padded = seen[0], ~MASK.flatten()
    assert (experts[padded] == experts[padded][0]).all()
    assert weights.isfinite().all()
    assert y[~MASK].eq(0).all()
    assert layer.expert_counts.sum() == MASK.sum() * layer.config.num_experts_per_tok


@pytest.mark.parametrize("router_norm", NORMS)
def test_batch_of_nothing_but_padding(router_norm):
    losses = {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.2, "track_expert_usage": True}
    layer = make_layer(router_norm=router_norm, intermediate_size=0, **losses)
    before = copy.deepcopy(layer.state_dict())
    x, (dy, dlogits) = make_data(layer, 2, 3)
    results = run_layer(layer, x, (dy, torch.zeros_like(dlogits)), attention_mask=torch.zeros(2, 3, dtype=torch.bool))
    assert layer.router_loss == 0
    assert layer.expert_counts.sum() == 0
    assert all(value.eq(0).all() for name, value in results.items() if name != "router_logits")
    assert_same_bits(layer.state_dict(), before)


# Initialisation


def routed_over_dense(**changes):
    """The routed branch's RMS over the dense one's, of three fresh layers: with few keys one alone varies by 20 %."""
    routed, dense = [], []
    for seed in range(3):
        layer = make_layer(seed=seed, hidden_size=96, intermediate_size=384, **changes)
        x = torch.randn(256, 96, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            both = layer(x)[0]
            layer.down_proj.weight.zero_()
            routed.append(layer(x)[0])
            dense.append(both - routed[-1])
    return rms(torch.stack(routed)) / rms(torch.stack(dense))


def rms(x):
    return x.square().mean().sqrt().item()


@pytest.mark.parametrize("norm_topk_prob", [False, True], ids=["weights as they are", "weights sum to one"])
@pytest.mark.parametrize("E, K", [(16, 2), (64, 8), (256, 256), (1024, 1), (1024, 16), (16384, 64)], ids=str)
def test_both_branches_start_at_the_same_size(E, K, norm_topk_prob):
    ratio = routed_over_dense(num_experts=E, num_experts_per_tok=K, norm_topk_prob=norm_topk_prob)
    assert 0.75 < ratio < 1.25


@pytest.mark.parametrize("hidden_act", ACTIVATIONS)
def test_both_branches_start_at_the_same_size_with_every_activation(hidden_act):
    ratio = routed_over_dense(num_experts=1024, num_experts_per_tok=16, hidden_act=hidden_act)
    assert 0.75 < ratio < 1.25


@pytest.mark.parametrize("norm_topk_prob", [False, True], ids=["weights as they are", "weights sum to one"])
def test_parameters_start_with_the_documented_deviations(norm_topk_prob):
    config = make_config(
        hidden_size=64, intermediate_size=256, num_experts=4096, num_experts_per_tok=8, norm_topk_prob=norm_topk_prob
    )
    torch.manual_seed(0)
    layer = FlashMoE(config)
    expected = {
        "gate_proj": 1 / 8,
        "up_proj": 1 / 8,
        "down_proj": 1 / 16,
        "router_gate": 1 / 8,
        "down_embed": 1 / 8,
        "up_embed": expert_up_std(config),
    }
    for name, std in expected.items():
        weight = getattr(layer, name).weight
        # Six standard deviations of an estimate from this many samples.
        assert weight.std().item() == pytest.approx(std, rel=6 / (2 * weight.numel()) ** 0.5), name
        assert abs(weight.mean().item()) < 6 * std / weight.numel() ** 0.5, name


def test_reset_parameters_draws_anew_and_forgets_statistics():
    layer = make_layer(track_expert_usage=True)
    before = copy.deepcopy(layer.state_dict())
    layer(make_data(layer, 6)[0])
    layer.reset_parameters()
    for name, parameter in layer.named_parameters():
        assert (parameter != before[name]).all(), name
    for name, buffer in layer.router_norm.named_buffers():
        assert torch.equal(buffer, before[f"router_norm.{name}"]), name


def test_layer_made_on_meta_starts_like_any_other(device):
    with torch.device("meta"):
        layer = FlashMoE(make_config(track_expert_usage=True))
    assert {tensor.device.type for tensor in (*layer.parameters(), *layer.buffers())} == {"meta"}
    layer.to_empty(device=device)
    with torch.no_grad():  # to_empty promises nothing about what is in the memory
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.fill_(-77)
    torch.manual_seed(5)
    layer.reset_parameters()
    expected = make_layer(device, track_expert_usage=True)
    torch.manual_seed(5)
    expected.reset_parameters()
    for (name, tensor), (_, other) in zip(
        (*layer.named_parameters(), *layer.named_buffers()),
        (*expected.named_parameters(), *expected.named_buffers()),
        strict=True,
    ):
        assert torch.equal(tensor, other), name
    x, upstream = make_data(layer, 6, device=device)
    assert all(value.isfinite().all() for value in run_layer(layer, x, upstream).values())


# Number formats


def chosen_experts(router_logits, config):
    """The experts a layer chose, from its own rounded logits: near-ties must not be judged by other roundings."""
    return router_reference(router_logits.float(), config.num_expert_keys, config.num_experts_per_tok)[1]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.01), (torch.float16, 0.0015)], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_16_bit_layer_is_close_to_float64(backend, dtype, bound, training, device):
    changes = {"hidden_size": 48, "intermediate_size": 80, "num_experts": 36, "num_experts_per_tok": 6}
    layer = make_layer(device, dtype, backend=backend, **changes).train(training)
    x, upstream = make_data(layer, 9, device=device, dtype=dtype)
    actual = run_layer(layer, x, upstream)
    assert all(value.dtype == dtype for value in actual.values())
    experts = chosen_experts(actual["router_logits"], layer.config)
    exact = [each.double() for each in upstream]
    expected = run_documented(initial_state(layer), x.double(), exact, layer.config, training, experts)
    assert_close(actual, expected, bound)


def initial_state(layer):
    """The state before any training step, in float64: running statistics of 0 and 1."""
    state = {name: cast(value, torch.float64) for name, value in layer.state_dict().items()}
    state["router_norm.running_mean"] = torch.zeros_like(state["router_norm.running_mean"])
    state["router_norm.running_var"] = torch.ones_like(state["router_norm.running_var"])
    return state


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.01), (torch.float16, 0.0015)], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_autocast_keeps_the_router_in_float32(backend, dtype, bound, device):
    changes = {"hidden_size": 48, "intermediate_size": 80, "num_experts": 36, "num_experts_per_tok": 6}
    layer = make_layer(device, backend=backend, **changes)
    x, (dy, dlogits) = make_data(layer, 2, 4, device=device)
    with torch.autocast(device.type, dtype):
        y, router_logits = layer(x.requires_grad_())
    assert y.dtype == dtype
    assert router_logits.dtype == torch.float32
    named = {"hidden_states": x, **dict(layer.named_parameters())}
    grads = torch.autograd.grad((y, router_logits), list(named.values()), (dy.to(dtype), dlogits))
    assert all(grad.dtype == torch.float32 for grad in grads)
    expected = run_documented(initial_state(layer), x.double(), (dy.double(), dlogits.double()), layer.config, True)
    assert_close(collect((y, router_logits), named, grads), expected, bound)
    assert relative_error(router_logits, expected["router_logits"]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_takes_input_that_is_rounded_already(dtype, device):
    layer = make_layer(device, dtype)
    x, _ = make_data(layer, 2, 4, device=device, dtype=torch.bfloat16)
    with torch.autocast(device.type, torch.bfloat16):
        y, router_logits = layer(x)
    assert y.dtype == torch.bfloat16
    assert router_logits.dtype == dtype
    expected = run_layer(layer, x.to(dtype), (torch.zeros_like(x, dtype=dtype), torch.zeros_like(router_logits)))
    assert relative_error(y, expected["y"]) < 0.01


# What PyTorch does with layers


# Inductor imports torch.utils.mkldnn, which is written in TorchScript.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
# Inductor's advice on a GPU; float32 is to be float32 here.
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores for float32 matrix multiplication:UserWarning")
@pytest.mark.parametrize("losses", [False, True], ids=["plain", "masked with losses"])
def test_compiled_layer_gives_the_same(losses, compiler, device):
    changes = {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.2, "track_expert_usage": True} if losses else {}
    layer = make_layer(device, **changes)
    twin = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend=compiler, dynamic=True)
    for S in (5, 8):
        x, upstream = make_data(layer, 3, S, device=device)
        kwargs = {}
        if losses:
            kwargs["attention_mask"] = torch.rand(3, S, generator=torch.Generator().manual_seed(S)).to(device) > 0.3
        expected = run_layer(layer, x, upstream, **kwargs)
        assert_close(run_layer(twin, x, upstream, call=compiled, **kwargs), expected, 1e-5)
        assert_close(twin.state_dict(), layer.state_dict(), 1e-6)
        if losses:
            torch.testing.assert_close(twin.router_loss, layer.router_loss)
            assert torch.equal(twin.expert_counts, layer.expert_counts)


def test_sizes_may_change_without_compiling_again(device):
    layer = make_layer(device, router_aux_loss_coef=0.1, router_z_loss_coef=0.2, track_expert_usage=True)
    from torch._dynamo.testing import CompileCounterWithBackend  # seconds to import

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for S in (5, 9, 12, 17, 30, 64):
        x, upstream = make_data(layer, 2, S, device=device)
        run_layer(layer, x, upstream, call=compiled)
    assert counter.frame_count <= 2  # one for the first size, one for every other
    for S in (5, 9, 12):
        x, upstream = make_data(layer, 2, S, device=device)
        run_layer(layer, x, upstream, call=compiled, attention_mask=torch.ones(2, S, device=device))
    assert counter.frame_count <= 4


@pytest.mark.parametrize("S", [0, 1])
def test_compiled_layer_takes_few_tokens(S, device):
    layer = make_layer(device, router_norm="rms")
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for length in (6, S):
        x, upstream = make_data(layer, 1, length, device=device)
        expected = run_layer(layer, x, upstream)
        assert_close(run_layer(layer, x, upstream, call=compiled), expected, 1e-6)


@pytest.mark.parametrize("router_norm", NORMS)
def test_activation_checkpointing_gives_the_same_bits(router_norm, device):
    layer = make_layer(device, router_norm=router_norm, router_aux_loss_coef=0.1, router_z_loss_coef=0.2)
    x, upstream = make_data(layer, 2, 5, device=device)
    expected = run_layer(layer, x, upstream)
    actual = run_layer(layer, x, upstream, call=lambda x: checkpoint(layer, x, use_reentrant=False))
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits(backend, dtype, device):
    if backend == "reference" and device.type == "cuda":
        pytest.skip("the reference promises no order of summation on a GPU")
    layer = make_layer(device, dtype, backend=backend, router_aux_loss_coef=0.1, router_z_loss_coef=0.2)
    T = 2000 if device.type == "cuda" else 6
    x, upstream = make_data(layer, T, device=device, dtype=dtype)
    assert_same_bits(run_layer(layer, x, upstream), run_layer(layer, x, upstream))


def test_gradients_add_up_over_micro_batches():
    layer = make_layer(router_norm="rms")
    x, (dy, dlogits) = make_data(layer, 10)
    together = run_layer(layer, x, (dy, dlogits))
    layer.zero_grad()
    for part in (slice(0, 4), slice(4, 10)):
        torch.autograd.backward(layer(x[part]), (dy[part], dlogits[:, part]))
    expected = {name: together[f"grad of {name}"] for name, _ in layer.named_parameters()}
    assert_close({name: parameter.grad for name, parameter in layer.named_parameters()}, expected, 1e-6)


# Configuration


def test_configuration_defaults():
    config = FlashMoEConfig(**SIZES)
    assert dataclasses.asdict(config) == {
        **SIZES,
        "hidden_act": "silu",
        "norm_topk_prob": False,
        "router_norm": "batch",
        "router_sync": False,
        "router_aux_loss_coef": 0.0,
        "router_z_loss_coef": 0.0,
        "router_bias_update_rate": 0.0,
        "track_expert_usage": False,
        "sparse_grad": False,
        "backend": "auto",
    }
    assert config.num_expert_keys == 5
    assert config == FlashMoEConfig(**SIZES)


def test_configuration_is_frozen_and_keyword_only():
    config = make_config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_experts = 36
    with pytest.raises(TypeError):
        FlashMoEConfig(12, 20, 25, 3)
    with pytest.raises(TypeError, match="num_experts_per_tok"):
        FlashMoEConfig(hidden_size=12, intermediate_size=20, num_experts=25)
    with pytest.raises(ValueError, match="num_experts: expected a perfect square"):
        dataclasses.replace(config, num_experts=26)


@pytest.mark.parametrize(
    "name, value, error, message",
    [
        ("hidden_size", 0, ValueError, "expected an integer from 1 to 2147483647; got 0"),
        ("hidden_size", 2**31, ValueError, "expected an integer from 1 to 2147483647; got 2147483648"),
        ("hidden_size", 8.0, TypeError, "expected an integer; got float 8.0"),
        ("hidden_size", True, TypeError, "expected an integer; got bool True"),
        ("hidden_size", "8", TypeError, "expected an integer; got str '8'"),
        ("intermediate_size", -1, ValueError, "expected an integer from 0 to 2147483647; got -1"),
        ("intermediate_size", False, TypeError, "expected an integer; got bool False"),
        ("intermediate_size", None, TypeError, "expected an integer; got NoneType None"),
        ("num_experts", 0, ValueError, "expected an integer from 1 to 2147483647; got 0"),
        ("num_experts", 24, ValueError, "expected a perfect square .*; got 24, between 16 and 25"),
        ("num_experts", 26, ValueError, "expected a perfect square .*; got 26, between 25 and 36"),
        ("num_experts", 25.0, TypeError, "expected an integer; got float 25.0"),
        ("num_experts", True, TypeError, "expected an integer; got bool True"),
        ("num_experts_per_tok", 0, ValueError, "expected an integer from 1 to 25; got 0"),
        ("num_experts_per_tok", 26, ValueError, "expected an integer from 1 to 25; got 26"),
        ("num_experts_per_tok", 2.0, TypeError, "expected an integer; got float 2.0"),
        ("num_experts_per_tok", True, TypeError, "expected an integer; got bool True"),
        (
            "hidden_act",
            "swish",
            ValueError,
            "expected one of silu, gelu, gelu_pytorch_tanh, relu, relu2, .*got 'swish'",
        ),
        ("hidden_act", None, ValueError, "expected one of silu, .*; got None"),
        ("hidden_act", ["silu"], (TypeError, ValueError), r"expected .*; got .*\['silu'\]"),
        ("norm_topk_prob", "false", TypeError, "expected .*; got .*'false'"),
        ("norm_topk_prob", 0.5, TypeError, "expected .*; got .*0.5"),
        ("router_norm", "layer", ValueError, "expected one of batch, rms, none; got 'layer'"),
        ("router_norm", None, ValueError, "expected one of batch, rms, none; got None"),
        ("router_sync", 1, TypeError, "expected True or False; got 1"),
        ("router_aux_loss_coef", -0.1, ValueError, "expected a finite number, 0 or more; got -0.1"),
        ("router_aux_loss_coef", float("inf"), ValueError, "expected a finite number, 0 or more; got inf"),
        ("router_aux_loss_coef", "0.1", (TypeError, ValueError), "expected .*; got .*'0.1'"),
        ("router_aux_loss_coef", None, (TypeError, ValueError), "expected .*; got .*None"),
        ("router_z_loss_coef", -1, ValueError, "expected a finite number, 0 or more; got -1"),
        ("router_z_loss_coef", float("nan"), ValueError, "expected a finite number, 0 or more; got nan"),
        ("router_bias_update_rate", -0.001, ValueError, "expected a finite number, 0 or more; got -0.001"),
        ("router_bias_update_rate", None, TypeError, "expected a number; got NoneType None"),
        ("track_expert_usage", "no", TypeError, "expected .*; got .*'no'"),
        ("backend", "cuda", ValueError, "expected one of auto, triton, torch, reference; got 'cuda'"),
        ("backend", None, ValueError, "expected one of auto, triton, torch, reference; got None"),
    ],
)
def test_bad_configuration(name, value, error, message):
    with pytest.raises(error, match=f"^{name}: {message}"):
        make_config(**{name: value})


# On a GPU


QUICK_START = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "hidden_act": "silu",
    "num_experts": 16384,
    "num_experts_per_tok": 64,
    "norm_topk_prob": False,
}


def make_quick_start(T, dtype, device, backend="auto"):
    torch.manual_seed(0)
    layer = FlashMoE(FlashMoEConfig(**QUICK_START, backend=backend)).to(device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, T, 1024, generator=generator).to(device, dtype)
    dy = torch.randn(1, T, 1024, generator=generator).to(device, dtype)
    return layer, x, (dy, torch.zeros(2, T, 128, device=device, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("T", [256, 4096])
def test_quick_start_agrees_with_float64(T, device):
    layer, x, upstream = make_quick_start(T, torch.bfloat16, device)
    actual = run_layer(layer, x, upstream)
    experts = chosen_experts(actual["router_logits"], layer.config)
    exact = [each.double() for each in upstream]
    # 4,096 tokens take some 20 GiB: [T, K, H] in float64 is 2 GiB.
    expected = run_documented(initial_state(layer), x.double(), exact, layer.config, True, experts)
    # bfloat16 itself costs 0.7 % here: the rounding of the router logits, mostly.
    assert_close(actual, expected, 0.015)


@pytest.mark.gpu
def test_quick_start_in_float32_agrees_with_the_reference_backend(device):
    layer, x, upstream = make_quick_start(4096, torch.float32, device)
    reference = make_quick_start(4096, torch.float32, device, backend="reference")[0]
    reference.load_state_dict(layer.state_dict())
    assert_close(run_layer(layer, x, upstream), run_layer(reference, x, upstream), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graph_replay_sees_changed_data(dtype, device):
    layer = make_layer(
        device,
        dtype,
        hidden_size=64,
        intermediate_size=96,
        num_experts=256,
        num_experts_per_tok=8,
        router_aux_loss_coef=0.1,
        router_z_loss_coef=0.2,
        track_expert_usage=True,
    )
    eager = copy.deepcopy(layer)
    x, upstream = make_data(layer, 4, 33, device=device, dtype=dtype)
    mask = torch.ones(4, 33, device=device, dtype=torch.bool)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run_layer(layer, x, upstream, attention_mask=mask)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # On the warm-up's stream: router_loss keeps that pass's graph alive, and autograd wants one stream for both.
    with torch.cuda.graph(graph, stream=stream):
        captured = run_layer(layer, x, upstream, attention_mask=mask)
    layer.load_state_dict(eager.state_dict())
    layer.reset_expert_usage()
    for seed in (2, 3):
        fresh, fresh_upstream = make_data(layer, 4, 33, device=device, dtype=dtype, seed=seed)
        for static, new in zip((x, *upstream), (fresh, *fresh_upstream), strict=True):
            static.copy_(new)
        mask.copy_(torch.rand(4, 33, generator=torch.Generator().manual_seed(seed)) > 0.3)
        graph.replay()
        expected = run_layer(eager, fresh, fresh_upstream, attention_mask=mask)
        # A graph may get other matrix product kernels than eager mode; data left over would be off by all of it.
        assert_close(captured, expected, 1e-5 if dtype == torch.float32 else 0.01)
        assert relative_error(layer.router_loss, eager.router_loss) < 0.01
        assert_close(layer.state_dict(), eager.state_dict(), 1e-5 if dtype == torch.float32 else 0.01)
        assert (layer.expert_counts - eager.expert_counts).abs().sum() <= 0.01 * eager.expert_counts.sum()
