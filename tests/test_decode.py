"""flash_decode: values for every combination of options, ties, what it refuses, and what it promises of an op."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from flash_moe import flash_decode
from flash_moe._activations import ACTIVATIONS
from flash_moe._moe_layer import Routing
from flash_moe.ops import flash_decode as module
from flash_moe.ops._reference.decode import decode_experts_reference, decode_routing_reference
from flash_moe.ops._torch import decode as torch_decode
from flash_moe.schedule.trace import Trace
from flash_moe.testing import assert_no_worse_than, decode_arguments, make_decode_inputs, poison_memory

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_backend = pytest.mark.parametrize("backend", ["torch", "reference"])
every_scale = pytest.mark.parametrize("scale", ["none", "row", "block"])

ROUTINGS = [
    Routing(3, norm_topk_prob, scoring, "bias" if bias else None, *groups, factor)
    for norm_topk_prob, scoring, bias, (groups, factor) in itertools.product(
        (True, False), ("softmax", "sigmoid"), (True, False), (((1, 1), 1.0), ((4, 2), 2.5))
    )
]


def describe(routing):
    words = (
        routing.scoring,
        "norm" if routing.norm_topk_prob else "raw",
        "bias" if routing.correction_bias else "",
        "groups" if routing.num_expert_groups > 1 else "",
    )
    return "-".join(filter(None, words))


def with_bias(routing, E, device, seed=0):
    if routing.correction_bias is None:
        return routing
    generator = torch.Generator(device).manual_seed(seed)
    return routing._replace(correction_bias=torch.randn(E, generator=generator, device=device) / 4)


def in_float64(value):
    """Tensors in float64, also those in a named tuple; float8 weights as they are, since their scales widen them."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() and value.dtype.itemsize > 1 else value
    return type(value)(*map(in_float64, value)) if hasattr(value, "_fields") else value


def exact(hidden_states, layer, router_logits):
    """The output in float64, from logits that were rounded as the layer rounds them."""
    layer = in_float64(layer)
    weights, indices = decode_routing_reference(router_logits.double(), layer.routing)
    return decode_experts_reference(hidden_states.double(), layer, weights, indices)


def run(hidden_states, layer, **options):
    return flash_decode(hidden_states, **decode_arguments(layer), **options)


def assert_right(hidden_states, layer, function=None):
    """``function`` gives the reference's logits, and an output no less exact than the reference's."""
    low, logits = run(hidden_states, layer, backend="reference", return_router_logits=True)
    function = function or (lambda x, layer: run(x, layer, backend="torch", return_router_logits=True))
    with poison_memory():
        out, actual_logits = function(hidden_states, layer)
    assert torch.equal(actual_logits, logits)
    assert_no_worse_than([low], [exact(hidden_states, layer, logits)], [out], ["out"])


@every_dtype
@pytest.mark.parametrize("shared", [(0, False), (24, False), (40, True)], ids=["alone", "shared", "gated"])
@pytest.mark.parametrize("routing", ROUTINGS, ids=describe)
def test_every_combination_of_options(routing, shared, dtype, device):
    routing = with_bias(routing, 12, device)
    Is, has_gate = shared
    x, layer = make_decode_inputs(
        7, 48, 24, 12, routing, dtype, device, shared_intermediate_size=Is, has_shared_gate=has_gate
    )
    assert_right(x, layer)
    assert_right(x, layer, torch_decode.decode_on_device)


@every_dtype
@every_scale
@pytest.mark.parametrize(
    "T, H, I, E, K",
    [(1, 1, 1, 1, 1), (1, 16, 24, 64, 3), (5, 37, 13, 9, 9), (3, 300, 200, 5, 2), (33, 64, 40, 16, 4)],
    ids=str,
)
def test_sizes(T, H, I, E, K, scale, dtype, device):
    x, layer = make_decode_inputs(T, H, I, E, Routing(K), dtype, device, scale=scale)
    assert_right(x, layer)
    assert_right(x, layer, torch_decode.decode_on_device)


@pytest.mark.parametrize("path", ["_grouped_products", "_gathered_products", "_dense_sum"])
def test_each_path_of_the_device_is_taken(path, device, monkeypatch):
    """Bfloat16 with whole vectors; few pairs; all else. In chunks, of which the last is smaller."""
    dtype, T, H = {
        "_grouped_products": (torch.bfloat16, 9, 16),
        "_gathered_products": (torch.float16, 1, 15),
        "_dense_sum": (torch.float32, 9, 15),
    }[path]
    monkeypatch.setattr(torch_decode, "CUDA_CHUNK", 2 * 2 * 8 * H)
    taken = []
    original = getattr(torch_decode, path)
    monkeypatch.setattr(torch_decode, path, lambda *arguments: taken.append(path) or original(*arguments))
    x, layer = make_decode_inputs(T, H, 8, 15, Routing(5), dtype, device)
    assert_right(x, layer, torch_decode.decode_on_device)
    assert taken == [path]


@pytest.mark.parametrize("T", [0, 1, 2, 17, 64, 128])
def test_any_number_of_tokens(T, device):
    x, layer = make_decode_inputs(T, 32, 24, 16, Routing(4), torch.bfloat16, device, shared_intermediate_size=8)
    assert_right(x, layer)
    assert_right(x, layer, torch_decode.decode_on_device)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_fuzz(data):
    draw = data.draw
    groups = draw(st.integers(1, 4))
    E = groups * draw(st.integers(1, 6))
    topk_groups = draw(st.integers(1, groups))
    K = draw(st.integers(1, E // groups * topk_groups))
    T, H, I, Is = (draw(st.integers(low, high)) for low, high in ((0, 20), (1, 40), (1, 40), (0, 20)))
    routing = Routing(
        K, draw(st.booleans()), draw(st.sampled_from(["softmax", "sigmoid"])), None, groups, topk_groups, 1.5
    )
    routing = with_bias(routing._replace(correction_bias=draw(st.sampled_from([None, "bias"]))), E, "cpu")
    dtype, scale = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(["none", "row", "block"]))
    x, layer = make_decode_inputs(
        T, H, I, E, routing, dtype, "cpu", draw(st.integers(0, 99)), shared_intermediate_size=Is, scale=scale
    )
    assert_right(x, layer)


@every_backend
@pytest.mark.parametrize("hidden_act", list(ACTIVATIONS))
def test_activations(hidden_act, backend, device):
    """By hand: one expert a token, and the shared one."""
    x, layer = make_decode_inputs(3, 16, 8, 4, Routing(1), torch.float32, device, shared_intermediate_size=8)
    out, logits = run(x, layer._replace(hidden_act=hidden_act), backend=backend, return_router_logits=True)
    act, shared = ACTIVATIONS[hidden_act], layer.shared
    for t, e in enumerate(logits.argmax(dim=-1).tolist()):
        gate, up = (layer.gate_up_proj[e] @ x[t]).chunk(2)
        routed = layer.down_proj[e] @ (act(gate) * up)
        by_all = shared.down_proj @ (act(shared.gate_proj @ x[t]) * (shared.up_proj @ x[t]))
        torch.testing.assert_close(out[t], routed + by_all, rtol=1e-4, atol=1e-5)


# Routing


def route(logits, routing, backend):
    """``weights`` and ``indices``, in ascending order of ids, of the specification or of the interpreter."""
    if backend == "torch":
        return torch_decode.select_experts(logits, routing)
    weights, indices = decode_routing_reference(logits, routing)
    indices, order = indices.sort(dim=-1)
    return weights.gather(1, order), indices


def chosen_by_hand(logits, routing):
    """One token's experts, one at a time, in plain Python."""
    scores = F.softmax(logits, dim=-1) if routing.scoring == "softmax" else logits.sigmoid()
    biased = (scores if routing.correction_bias is None else scores + routing.correction_bias).tolist()
    size = len(biased) // routing.num_expert_groups
    groups = [biased[begin : begin + size] for begin in range(0, len(biased), size)]
    sums = [sum(sorted(group)[-2:]) for group in groups]
    best = sorted(range(len(groups)), key=lambda g: (-sums[g], g))[: routing.topk_groups]
    allowed = [g * size + i for g in best for i in range(size)]
    ids = sorted(sorted(allowed, key=lambda e: (-biased[e], e))[: routing.num_experts_per_tok])
    weights = scores[ids]
    return ids, (weights / weights.sum() if routing.norm_topk_prob else weights) * routing.routed_scaling_factor


@every_backend
@pytest.mark.parametrize("routing", ROUTINGS, ids=describe)
def test_routing_by_hand(routing, backend, device):
    routing = with_bias(routing, 12, device)
    logits = torch.randn(20, 12, generator=torch.Generator(device).manual_seed(0), device=device)
    weights, indices = route(logits, routing, backend)
    for t in range(20):
        ids, want = chosen_by_hand(logits[t], routing)
        assert indices[t].tolist() == ids
        torch.testing.assert_close(weights[t], want)


@every_backend
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_ties_go_to_the_lowest_ids(scoring, backend, device):
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0, 1.0], [0.0, -0.0, 0.0, -0.0, 0.0, 0.0]], device=device)
    _, indices = route(logits, Routing(4, scoring=scoring), backend)
    assert indices.tolist() == [[0, 1, 2, 4], [0, 1, 2, 3]]
    _, indices = route(logits[1:], Routing(2, True, scoring, None, 3, 1), backend)
    assert indices.tolist() == [[0, 1]]


@every_backend
def test_ties_at_every_size(backend, device):
    """Three values only, so that nearly every choice is a tie."""
    generator = torch.Generator(device).manual_seed(1)
    logits = torch.randint(3, (50, 24), generator=generator, device=device).float()
    for routing in (Routing(5), Routing(5, scoring="sigmoid"), Routing(5, True, "sigmoid", None, 6, 3)):
        _, indices = route(logits, routing, backend)
        assert indices.tolist() == [chosen_by_hand(row, routing)[0] for row in logits]


@every_backend
def test_logits_that_differ_do_not_tie_where_probabilities_underflow(backend, device):
    logits = torch.tensor([[0.0, -300.0, 200.0, -200.0]], device=device)
    weights, indices = route(logits, Routing(3), backend)
    assert indices.tolist() == [[0, 2, 3]]
    assert weights.tolist() == [[0.0, 1.0, 0.0]]


@every_backend
def test_bias_moves_the_choice_and_not_the_weights(backend, device):
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]], device=device)
    bias = torch.tensor([-9.0, 0.0, 0.0, 9.0], device=device)
    weights, indices = route(logits, Routing(2, False, "sigmoid", bias), backend)
    assert indices.tolist() == [[1, 3]]
    torch.testing.assert_close(weights, logits.sigmoid()[:, [1, 3]])


@every_backend
def test_scores_that_all_underflow_give_no_nan(backend, device):
    weights, _ = route(torch.full((1, 4), -200.0, device=device), Routing(2, scoring="sigmoid"), backend)
    assert weights.tolist() == [[0.0, 0.0]]


@every_backend
def test_a_nan_spoils_its_own_token_only(backend, device):
    x, layer = make_decode_inputs(4, 16, 8, 6, Routing(2), torch.float32, device)
    want = run(x, layer, backend=backend)
    x[1, 3] = torch.nan
    out = run(x, layer, backend=backend)
    assert out[1].isnan().all()
    torch.testing.assert_close(out[[0, 2, 3]], want[[0, 2, 3]])


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_logits_are_rounded_to_the_dtype_of_the_router_weight(dtype, backend, device):
    x, layer = make_decode_inputs(5, 64, 8, 6, Routing(2), dtype, device)
    layer = layer._replace(router_weight=layer.router_weight * 1.3)
    exact_logits = x.double() @ layer.router_weight.double().t()
    _, logits = run(x, layer, backend=backend, return_router_logits=True)
    assert logits.dtype == dtype
    torch.testing.assert_close(logits, exact_logits.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0)
    layer = layer._replace(router_weight=layer.router_weight.float())
    _, logits = run(x, layer, backend=backend, return_router_logits=True)
    torch.testing.assert_close(logits, exact_logits.float())


# What every op promises


def test_contiguity_does_not_matter(device):
    x, layer = make_decode_inputs(6, 16, 8, 6, Routing(2), torch.float32, device)
    strided = layer._replace(
        gate_up_proj=layer.gate_up_proj.transpose(1, 2).contiguous().transpose(1, 2),
        router_weight=layer.router_weight.repeat_interleave(2, dim=1)[:, ::2],
    )
    torch.testing.assert_close(run(x.t().contiguous().t(), strided), run(x, layer))
    if device.type == "cpu":
        torch.testing.assert_close(run(x.t().contiguous().t(), strided, trace=Trace()), run(x, layer))


def test_auto_on_a_cpu_is_torch():
    """On a GPU see test_decode_kernel.py."""
    x, layer = make_decode_inputs(6, 16, 8, 6, Routing(2), torch.float32, "cpu")
    assert torch.equal(run(x, layer), run(x, layer, backend="torch"))


def test_same_bits_on_every_run(device):
    x, layer = make_decode_inputs(6, 16, 8, 6, Routing(2), torch.float32, device)
    assert torch.equal(run(x, layer), run(x, layer))


def test_return_router_logits(device):
    x, layer = make_decode_inputs(6, 16, 8, 6, Routing(2), torch.float32, device)
    out, logits = run(x, layer, return_router_logits=True)
    assert torch.equal(out, run(x, layer))
    torch.testing.assert_close(logits, x @ layer.router_weight.t())


def op_arguments(x, layer):
    return (x, *layer.tensors, *module._options(layer), "auto", "torch")


@pytest.mark.parametrize("shared", [0, 8])
def test_opcheck(shared, device):
    x, layer = make_decode_inputs(3, 16, 8, 6, Routing(2), torch.float32, device, shared_intermediate_size=shared)
    library.opcheck(torch.ops.flash_moe.flash_decode.default, op_arguments(x, layer))


def test_compiles_whole_for_any_number_of_tokens(compiler, device):
    torch._dynamo.reset()
    _, layer = make_decode_inputs(2, 16, 8, 6, Routing(2), torch.float32, device, scale="row")
    compiled = torch.compile(lambda x: run(x, layer), fullgraph=True, backend=compiler, dynamic=True)
    for T, stance in ((4, "default"), (7, "fail_on_recompile")):
        x, _ = make_decode_inputs(T, 16, 8, 6, Routing(2), torch.float32, device)
        with torch.compiler.set_stance(stance):
            torch.testing.assert_close(compiled(x), run(x, layer))


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 64])
@pytest.mark.parametrize("dtype, scale", [(torch.bfloat16, "none"), (torch.float16, "none"), (torch.bfloat16, "block")])
def test_graph_replay_without_a_schedule_sees_changed_data_and_nothing_waits(T, dtype, scale, device):
    x, layer = make_decode_inputs(T, 256, 128, 32, Routing(4), dtype, device, scale=scale)
    run(x, layer, backend="torch")
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(x, layer, backend="torch")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(x, layer, backend="torch")
    for seed in (1, 2):
        fresh, _ = make_decode_inputs(T, 256, 128, 32, Routing(4), dtype, device, seed)
        x.copy_(fresh)
        graph.replay()
        torch.testing.assert_close(out, run(fresh, layer, backend="torch"))


# What it refuses


def arguments(**changes):
    x, layer = make_decode_inputs(4, 16, 8, 6, Routing(2), torch.float32, "cpu", shared_intermediate_size=8)
    given = {"hidden_states": x, **decode_arguments(layer)}
    for name, change in changes.items():
        given[name] = change(given[name]) if callable(change) else change
    return given


EIGHT_BIT = torch.zeros(6, 16, 16).to(torch.float8_e4m3fn)


REFUSALS = [
    ({"hidden_states": lambda x: x[0]}, ValueError, r"hidden_states: expected 2 dimensions .*; got .*\(16,\)"),
    ({"hidden_states": torch.Tensor.long}, TypeError, "hidden_states: expected dtype .*; got torch.int64"),
    ({"hidden_states": torch.Tensor.double}, TypeError, "hidden_states: expected dtype .*; got torch.float64"),
    ({"hidden_states": None}, TypeError, "hidden_states: expected a tensor; got NoneType"),
    ({"router_weight": lambda x: x[:, 1:]}, ValueError, r"router_weight: expected shape .*any, 16.*\(6, 15\)"),
    ({"router_weight": torch.Tensor.half}, TypeError, "router_weight: expected dtype torch.float32; got .*float16"),
    ({"gate_up_proj": lambda x: x[:, :-1]}, ValueError, r"gate_up_proj: .*\[E, 2I, H\] = \(6, 16, 16\); .*15"),
    ({"gate_up_proj": torch.Tensor.half}, TypeError, "gate_up_proj: expected dtype torch.float32; got"),
    ({"down_proj": lambda x: x[1:]}, ValueError, r"down_proj: .*\(6, 16, any\); got \(5, 16, 8\)"),
    ({"down_proj": lambda x: x.to("meta")}, ValueError, "down_proj: expected device cpu, as hidden_states has"),
    ({"down_proj": lambda x: x[..., :0]}, ValueError, "down_proj: .*; got H 16, E 6, I 0|gate_up_proj: "),
    ({"num_experts_per_tok": 7}, ValueError, "num_experts_per_tok: expected an integer from 1 to 6; got 7"),
    ({"num_experts_per_tok": 0}, ValueError, "num_experts_per_tok: expected an integer from 1 to 6; got 0"),
    ({"num_experts_per_tok": 2.0}, TypeError, "num_experts_per_tok: expected an integer; got float"),
    ({"num_expert_groups": 4}, ValueError, "num_expert_groups: expected a divisor of 6 experts; got 4"),
    ({"num_expert_groups": 3, "topk_groups": 4}, ValueError, "topk_groups: expected an integer from 1 to 3; got 4"),
    ({"num_expert_groups": 6}, ValueError, "num_experts_per_tok: expected an integer from 1 to 1; got 2"),
    ({"norm_topk_prob": 1}, TypeError, "norm_topk_prob: expected True or False; got 1"),
    ({"return_router_logits": None}, TypeError, "return_router_logits: expected True or False; got None"),
    ({"scoring": "relu"}, ValueError, "scoring: expected one of softmax, sigmoid; got 'relu'"),
    ({"routed_scaling_factor": -1.0}, ValueError, "routed_scaling_factor: expected a finite number"),
    ({"correction_bias": torch.zeros(5)}, ValueError, r"correction_bias: expected shape .*\(6\); got \(5,\)"),
    ({"correction_bias": torch.zeros(6).long()}, TypeError, "correction_bias: expected dtype"),
    ({"hidden_act": "swish"}, ValueError, "hidden_act: expected one of silu, .*; got 'swish'"),
    ({"shared_up_proj": None}, ValueError, "shared_up_proj: expected all three .*; got only .*'shared_gate_proj'"),
    ({"shared_up_proj": lambda x: x[1:]}, ValueError, r"shared_up_proj: expected shape .*\(8, 16\); got \(7, 16\)"),
    ({"shared_down_proj": torch.t}, ValueError, r"shared_down_proj: expected shape .*\(16, 8\); got \(8, 16\)"),
    ({"shared_gate_proj": torch.Tensor.half}, TypeError, "shared_gate_proj: expected dtype torch.float32"),
    ({"shared_expert_gate": torch.zeros(16, 1)}, ValueError, r"shared_expert_gate: .*\(1, 16\); got \(16, 1\)"),
    ({"gate_up_scale": torch.ones(6, 16)}, TypeError, "gate_up_proj: expected dtype torch.float8_e4m3fn; got"),
    ({"gate_up_proj": EIGHT_BIT}, TypeError, "gate_up_proj: expected dtype torch.float32; got torch.float8"),
    (
        {"gate_up_proj": EIGHT_BIT, "gate_up_scale": torch.ones(6, 15)},
        ValueError,
        r"gate_up_scale: expected shape \[E, rows\] = \(6, 16\); got \(6, 15\)",
    ),
    (
        {"gate_up_proj": EIGHT_BIT, "gate_up_scale": torch.ones(6, 2, 1)},
        ValueError,
        r"gate_up_scale: expected shape \[E, blocks of rows, blocks of columns\] = \(6, 1, 1\); got \(6, 2, 1\)",
    ),
    (
        {"gate_up_proj": EIGHT_BIT, "gate_up_scale": torch.ones(6, 16).half()},
        TypeError,
        "gate_up_scale: expected dtype torch.float32; got torch.float16",
    ),
    ({"backend": "cuda"}, ValueError, "backend: expected one of auto, triton, torch, reference; got 'cuda'"),
    ({"policy": "fifo"}, ValueError, "policy: expected one of auto, static, queue, actor; got 'fifo'"),
    ({"policy": "queue", "backend": "reference"}, ValueError, "policy: expected 'auto' with backend=.reference"),
    ({"trace": Trace(), "backend": "reference"}, ValueError, "trace: expected None with backend=.reference"),
    ({"trace": []}, TypeError, "trace: expected a Trace or None; got list"),
]  # fmt: skip


@pytest.mark.parametrize("changes, error, message", REFUSALS)
def test_errors_name_the_argument(changes, error, message):
    with pytest.raises(error, match=message):
        flash_decode(**arguments(**changes))


def test_triton_asked_for_where_it_cannot_run():
    given = {name: x.to("meta") if torch.is_tensor(x) else x for name, x in arguments().items()}
    with pytest.raises(ValueError, match=r"^backend: expected torch or reference, since .*; got 'triton': the tensors"):
        flash_decode(**given, backend="triton")


@pytest.mark.parametrize("name", ["hidden_states", "router_weight", "gate_up_proj", "down_proj", "shared_up_proj"])
@every_backend
def test_gradients_are_refused(name, backend):
    given = arguments(backend=backend, **{name: lambda x: x.requires_grad_()})
    with pytest.raises(ValueError, match=rf"{name}: .*inference only; .*torch\.no_grad\(\)"):
        flash_decode(**given)
    with torch.no_grad():
        flash_decode(**given)
    with torch.inference_mode():
        flash_decode(**given)


@pytest.mark.gpu
def test_pytorch_runs_no_schedule_on_a_gpu(device):
    x, layer = make_decode_inputs(2, 16, 8, 6, Routing(2), torch.float32, device)
    with pytest.raises(ValueError, match=r"policy: expected 'auto' with .*, which runs no schedule; got 'static'"):
        run(x, layer, backend="torch", policy="static")
    with pytest.raises(ValueError, match=r"trace: expected None with .*, which runs no schedule; got a Trace"):
        run(x, layer, backend="torch", trace=Trace())
