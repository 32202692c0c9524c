"""The one-launch kernel of flash_decode: values for every option that it takes, ties, refusals, counters, graphs."""

import itertools

import pytest
import torch
from test_decode import DTYPES, describe, every_dtype, exact, op_arguments, run, with_bias
from torch.library import opcheck

from flash_moe._activations import ACTIVATIONS
from flash_moe._moe_layer import Routing
from flash_moe.testing import assert_no_worse_than, make_decode_inputs, poison_memory

pytest.importorskip("triton", reason="needs triton, which there is for Linux only")
from flash_moe.ops._triton import decode as kernel

ROUTINGS = [
    Routing(3, norm_topk_prob, scoring, "bias" if bias else None, routed_scaling_factor=factor)
    for (norm_topk_prob, factor), scoring, bias in itertools.product(
        ((True, 1.0), (False, 2.5)), ("softmax", "sigmoid"), (True, False)
    )
]


def run_kernel(x, layer):
    return run(x, layer, backend="triton", return_router_logits=True)


def assert_right(x, layer):
    """Logits no less exact than the reference's; given them, an output no less exact than the reference's."""
    low, low_logits = run(x, layer, backend="reference", return_router_logits=True)
    with poison_memory():
        out, logits = run_kernel(x, layer)
    assert logits.dtype == layer.router_weight.dtype
    exact_logits = x.double() @ layer.router_weight.double().t()
    assert_no_worse_than([low_logits], [exact_logits], [logits], ["logits"])
    assert_no_worse_than([low], [exact(x, layer, logits)], [out], ["out"])


@every_dtype
@pytest.mark.parametrize("routing", ROUTINGS, ids=describe)
def test_every_combination_of_options(routing, dtype, device):
    x, layer = make_decode_inputs(3, 40, 24, 12, with_bias(routing, 12, device), dtype, device)
    assert_right(x, layer)


@every_dtype
@pytest.mark.parametrize("T", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "H, I, E, K", [(1, 1, 1, 1), (37, 13, 9, 9), (600, 300, 5, 2), (64, 40, 33, 4), (9, 5, 300, 3)], ids=str
)
def test_sizes(H, I, E, K, T, dtype, device):
    x, layer = make_decode_inputs(T, H, I, E, Routing(K), dtype, device)
    assert_right(x, layer)


@pytest.mark.parametrize(
    "config", [kernel.Config(lead=0), kernel.Config(8, 2, 2, 8), kernel.Config(4, 1, 5, 4)], ids=str
)
def test_every_config_is_right(config, device, monkeypatch):
    monkeypatch.setattr(kernel, "config_of", lambda T: config)
    x, layer = make_decode_inputs(3, 300, 40, 12, Routing(3), torch.bfloat16, device)
    assert_right(x, layer)


@pytest.mark.parametrize("hidden_act", list(ACTIVATIONS))
def test_activations(hidden_act, device):
    x, layer = make_decode_inputs(2, 16, 8, 4, Routing(2), torch.float32, device)
    assert_right(x, layer._replace(hidden_act=hidden_act))


def test_a_router_in_float32(device):
    x, layer = make_decode_inputs(2, 48, 8, 6, Routing(2), torch.bfloat16, device)
    assert_right(x, layer._replace(router_weight=layer.router_weight.float()))


def test_no_tokens(device):
    x, layer = make_decode_inputs(0, 16, 8, 6, Routing(2), torch.float32, device)
    out, logits = run_kernel(x, layer)
    assert out.shape == (0, 16)
    assert logits.shape == (0, 6)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_ties_go_to_the_lowest_ids(scoring, device):
    """Logits of three values only; experts differ, so that the output tells which were chosen."""
    E, K = 24, 5
    _, layer = make_decode_inputs(4, 4, 1, E, Routing(K, scoring=scoring), torch.float32, device)
    generator = torch.Generator(device).manual_seed(1)
    router_weight = torch.randint(-1, 2, (E, 4), generator=generator, device=device).float()
    layer = layer._replace(router_weight=router_weight)
    out, logits = run_kernel(torch.eye(4, device=device), layer)
    assert torch.equal(logits, router_weight.t())
    torch.testing.assert_close(out, run(torch.eye(4, device=device), layer, backend="reference"), rtol=1e-5, atol=1e-6)


def test_a_nan_spoils_its_own_token_only(device):
    x, layer = make_decode_inputs(4, 16, 8, 6, Routing(2), torch.float32, device)
    want, _ = run_kernel(x, layer)
    x[1, 3] = torch.nan
    out, _ = run_kernel(x, layer)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2, 3]], want[[0, 2, 3]])


def test_counters_serve_call_after_call(device):
    _, layer = make_decode_inputs(2, 32, 24, 12, Routing(3), torch.bfloat16, device)
    for seed in range(4):
        x, _ = make_decode_inputs(2, 32, 24, 12, Routing(3), torch.bfloat16, device, seed)
        assert_right(x, layer)
    for scratch in kernel._scratches._of_stream.values():
        assert not scratch.counters.any()
        assert not scratch.flag.any()


def test_giving_up_is_told_under_debug(device, monkeypatch):
    """A counter that starts too low is never reached, and the call ends all the same."""
    x, layer = make_decode_inputs(1, 16, 8, 6, Routing(2), torch.float32, device)
    want, _ = run_kernel(x, layer)
    (scratch,) = (s for (_, shape), s in kernel._scratches._of_stream.items() if shape[1:5] == (torch.float32, 1, 2, 8))
    monkeypatch.setattr(kernel, "MAX_POLLS", 3)
    monkeypatch.setenv("FLASH_MOE_DEBUG", "1")
    scratch.counters[kernel.ROUTED.value * kernel.LINE.value] = -5
    with pytest.raises(RuntimeError, match=r"one gave up, so the output of this call, .* is wrong"):
        run_kernel(x, layer)
    monkeypatch.setattr(kernel, "MAX_POLLS", 2**20)
    out, _ = run_kernel(x, layer)
    assert torch.equal(out, want)


def test_opcheck(device):
    x, layer = make_decode_inputs(3, 16, 8, 6, Routing(2), torch.float32, device)
    *given, _ = op_arguments(x, layer)
    opcheck(torch.ops.flash_moe.flash_decode.default, (*given, "triton"))


def test_auto_does_not_choose_it(device, monkeypatch):
    monkeypatch.setattr(kernel, "decode_forward", None)
    x, layer = make_decode_inputs(1, 16, 8, 6, Routing(2), torch.float32, device)
    run(x, layer)


@pytest.mark.parametrize(
    "T, E, routing, options, message",
    [
        (5, 6, Routing(2), {}, "hidden_states: expected at most 4 tokens .*; got 5"),
        (1, 1025, Routing(2), {}, "router_weight: expected at most 1024 experts .*; got 1025"),
        (1, 6, Routing(2, num_expert_groups=3, topk_groups=2), {}, "num_expert_groups: expected 1 .*; got 3"),
        (1, 6, Routing(2), {"shared_intermediate_size": 8}, "shared_gate_proj: expected no shared expert .*; got one"),
        (1, 6, Routing(2), {"scale": "row"}, "gate_up_scale: expected no float8 weights .*; got their scale"),
    ],
)
def test_refusals_name_the_argument(T, E, routing, options, message, device):
    x, layer = make_decode_inputs(T, 4, 2, E, routing, torch.float32, device, **options)
    with pytest.raises(ValueError, match=message):
        run_kernel(x, layer)


def test_there_is_one_policy(device):
    x, layer = make_decode_inputs(1, 16, 8, 6, Routing(2), torch.float32, device)
    with pytest.raises(ValueError, match=r'policy: expected .auto. with backend="triton"'):
        run(x, layer, backend="triton", policy="queue")


# At full size


def qwen3(T, dtype, device, seed=0):
    return make_decode_inputs(T, 2048, 768, 128, Routing(8), dtype, device, seed)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_full_size(T, dtype, device):
    x, layer = qwen3(T, dtype, device)
    assert_right(x, layer)
    first, _ = run_kernel(x, layer)
    for _ in range(100):
        assert torch.equal(run_kernel(x, layer)[0], first)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 4])
def test_graph_replay_sees_changed_data_beside_eager_calls(T, device):
    x, layer = qwen3(T, torch.bfloat16, device)
    run_kernel(x, layer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [run_kernel(x, layer)[0] for _ in range(3)]
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    for seed in range(20):
        fresh, _ = qwen3(T, torch.bfloat16, device, seed)
        x.copy_(fresh)
        graph.replay()
        with torch.cuda.stream(other):
            beside, _ = run_kernel(fresh, layer)
        torch.cuda.synchronize()
        assert all(torch.equal(out, beside) for out in outs)


@pytest.mark.gpu
def test_two_streams_at_once(device):
    inputs = [qwen3(2, torch.bfloat16, device, seed) for seed in range(2)]
    want = [run_kernel(*each)[0] for each in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    outs = [[], []]
    for _ in range(50):
        for stream, each, out in zip(streams, inputs, outs, strict=True):
            with torch.cuda.stream(stream):
                out.append(run_kernel(*each)[0])
    torch.cuda.synchronize()
    for out, right in zip(outs, want, strict=True):
        assert all(torch.equal(each, right) for each in out)
