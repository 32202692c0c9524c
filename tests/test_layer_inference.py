"""The layer in one op: what it gives is what the layer gives that could be trained."""

import pytest
import torch
from torch import library
from torch.utils._python_dispatch import TorchDispatchMode

from flash_moe import FlashMoE, FlashMoEConfig
from flash_moe.testing import assert_no_worse_than, poison_memory, to_float64

SIZES = {"hidden_size": 24, "intermediate_size": 20, "num_experts": 25, "num_experts_per_tok": 3}


def make_layer(dtype, device, **changes):
    torch.manual_seed(0)
    layer = FlashMoE(FlashMoEConfig(**{**SIZES, "backend": "triton", **changes}))
    layer.router_norm.running_mean.normal_()
    layer.router_norm.running_var.uniform_(0.5, 2.0)
    return layer.to(device, dtype).eval()


def run(layer, x):
    with torch.no_grad(), poison_memory():
        return layer(x)


def is_called(layer, x, monkeypatch):
    called = []
    monkeypatch.setattr(type(layer), "_infer", lambda *arguments: called.append(1) or (x, x))
    with torch.no_grad():
        layer(x)
    return bool(called)


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("T", [1, 4, 7])
def test_same_numbers_as_with_gradients(T, dtype, norm_topk_prob, device):
    layer = make_layer(dtype, device, norm_topk_prob=norm_topk_prob, track_expert_usage=True)
    x = torch.randn(T, 24, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    low, low_logits = layer(x)
    counts = layer.expert_usage().counts
    layer.reset_expert_usage()
    y, router_logits = run(layer, x)
    # One or two tokens have a kernel of their own, which adds in another order.
    assert (router_logits - low_logits).abs().max() <= 2 * torch.finfo(dtype).eps * low_logits.abs().max()
    assert torch.equal(layer.expert_usage().counts, counts)
    exact_layer = FlashMoE(FlashMoEConfig(**SIZES, norm_topk_prob=norm_topk_prob, backend="reference")).double().eval()
    exact_layer.load_state_dict(layer.state_dict())
    exact, _ = exact_layer.to(device)(to_float64(x))
    if dtype == torch.float32:  # else rounded logits choose other experts
        assert_no_worse_than([low.detach()], [exact.detach()], [y], ["y"])
    eps = torch.finfo(dtype).eps
    assert (y - low).abs().max() <= 4 * eps * low.abs().max()
    assert torch.equal(run(layer, x)[0], y)


def test_no_tokens(device):
    y, router_logits = run(make_layer(torch.float32, device), torch.empty(0, 24, device=device))
    assert y.shape == (0, 24)
    assert router_logits.shape == (2, 0, 5)


@pytest.mark.parametrize("changes", [{"router_norm": "rms"}, {"router_norm": "none"}, {"intermediate_size": 0}, {}])
def test_only_the_plain_layer(changes, device, monkeypatch):
    torch.manual_seed(0)
    layer = FlashMoE(FlashMoEConfig(**{**SIZES, "backend": "triton", **changes})).to(device).eval()
    assert is_called(layer, torch.randn(3, 24, device=device), monkeypatch) == (not changes)


def test_not_while_training_nor_where_somebody_watches(device, monkeypatch):
    layer, x = make_layer(torch.float32, device), torch.randn(3, 24, device=device)
    layer.router_gate.register_forward_hook(lambda *_: None)
    assert not is_called(layer, x, monkeypatch)
    assert not is_called(make_layer(torch.float32, device).train(), x, monkeypatch)


@pytest.mark.parametrize("T", [1, 3])
def test_opcheck(T, device):
    layer, x = make_layer(torch.float32, device), torch.randn(T, 24, device=device)
    norm, weights = layer.router_norm, [parameter.detach() for parameter in layer._weights().values()]
    gate, down_embed, up_embed, *dense = weights
    arguments = (x, gate, norm.running_mean, norm.running_var, down_embed, up_embed, *dense, norm.eps, 3, False, "silu")
    op = torch.ops.flash_moe.layer_inference.default
    for wants_indices in (True, False):
        library.opcheck(op, (*arguments, wants_indices))
    *want, indices = op(*arguments, True)
    assert indices.shape == (T, 3)
    for result, expected in zip(op(*arguments, False), want, strict=True):
        assert torch.equal(result, expected)


def test_a_tensor_of_another_kind_goes_through_the_op(device, monkeypatch):
    class Other(torch.Tensor):
        pass

    layer, x = make_layer(torch.float32, device), torch.randn(3, 24, device=device)
    want, _ = run(layer, x)
    called = []
    op = torch.ops.flash_moe.layer_inference
    monkeypatch.setattr(torch.ops.flash_moe, "layer_inference", lambda *arguments: called.append(1) or op(*arguments))
    assert torch.equal(run(layer, x)[0], want)
    assert not called
    assert torch.equal(run(layer, x.as_subclass(Other))[0], want)
    assert called


class Seen(TorchDispatchMode):
    """Its ``ops`` are those that were called within it."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops.append(op)
        return op(*args, **(kwargs or {}))


def test_a_mode_sees_the_op(device):
    layer, x = make_layer(torch.float32, device), torch.randn(3, 24, device=device)
    with Seen() as seen:
        run(layer, x)
    assert torch.ops.flash_moe.layer_inference.default in seen.ops


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 2, 16, 300])
def test_replay_with_other_tokens(T, device):
    layer = make_layer(torch.bfloat16, device, hidden_size=1024, intermediate_size=2048, num_experts=4096)
    x = torch.randn(T, 1024, device=device, dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(2):
            layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y, _ = layer(x)
        for _ in range(3):
            x.normal_()
            want, _ = layer(x)
            graph.replay()
            assert torch.equal(y, want)
