"""The one launch of flash_decode: values for every option, ties, refusals, waits that give up, graphs, a busy GPU."""

import gc
import warnings
import weakref
from collections import OrderedDict
from functools import partial
from itertools import count, pairwise
from types import SimpleNamespace

import pytest
import torch
from test_decode import (
    DTYPES,
    REFUSALS,
    ROUTINGS,
    arguments,
    assert_right,
    describe,
    every_dtype,
    op_arguments,
    run,
    with_bias,
)
from test_decode_few import run_few
from test_layer_inference import Seen
from torch import library
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from flash_moe import flash_decode
from flash_moe._activations import ACTIVATIONS
from flash_moe._moe_layer import NoRoomError, Routing
from flash_moe.ops import flash_decode as module
from flash_moe.ops._reference.decode import decode_routing_reference
from flash_moe.schedule.policies import POLICIES
from flash_moe.schedule.tasks import Kind
from flash_moe.schedule.trace import Trace
from flash_moe.testing import make_decode_inputs, poison_memory

pytest.importorskip("triton", reason="needs triton, which there is for Linux only")
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from flash_moe.bench.timing import count_launches
from flash_moe.ops._triton import decode as kernel
from flash_moe.ops._triton import decode_config, decode_few, decode_records, decode_trace, relaunch
from flash_moe.ops._triton import scratch as scratch_module
from flash_moe.ops._triton.decode_actor import in_turn
from flash_moe.ops._triton.decode_call import PreparedCall
from flash_moe.ops._triton.decode_kernel import ALL_SELECTED, LINE

every_policy = pytest.mark.parametrize("policy", POLICIES)
auto_and_every_policy = pytest.mark.parametrize("policy", ["auto", *POLICIES])
SHARED = [(0, False), (40, False), (12, True)]
FORMATS = [(dtype, scale) for scale in ("none", "row", "block") for dtype in DTYPES]


@pytest.fixture(autouse=True)
def scratch(device, monkeypatch):
    """New scratch for every test; afterwards every call has left its counters as it found them and nobody gave up.

    The interpreter's one program finds everything done whenever it waits; were it not so, 2^20 polls would take hours.
    """
    if device.type == "cpu":
        monkeypatch.setattr(kernel, "MAX_POLLS", 100)
        monkeypatch.setattr(decode_few, "MAX_POLLS", 100)
    monkeypatch.setattr(kernel, "_prepared", OrderedDict())
    monkeypatch.setattr(module, "_repeatable", weakref.WeakValueDictionary())
    yield
    if device.type == "cuda":
        torch.cuda.synchronize()
    for prepared in kernel._prepared.values():
        assert not any(flag.any() for flag in prepared.flags)
        if isinstance(prepared, kernel.Prepared):
            for state in prepared.scratch.of_stream.values():
                assert_unused(state)


def assert_unused(state):
    for name in ("counters", "flag", "takers", "ready", "doorbells", "busy"):
        assert not getattr(state, name).any(), name


def prepared_for(x, layer, policy="queue", is_traced=False):
    """What a call has left prepared for the next one like it."""
    return kernel._prepared[kernel._key(x, layer, policy, is_traced=is_traced)]


def scratch_of(x, layer, policy="queue"):
    """The state and the buffers of the only stream that has called."""
    prepared = prepared_for(x, layer, policy)
    (own,) = prepared._own_of_stream.values()
    return own.state, own.buffers


def configure(monkeypatch, **changes):
    """Programs of another ``Config`` from here on."""
    original = kernel.config_of
    monkeypatch.setattr(kernel, "config_of", lambda *sizes: original(*sizes)._replace(**changes))
    kernel._prepared.clear()
    module._repeatable.clear()


def run_kernel(x, layer, policy="queue", **options):
    """By a policy: "auto" has a kernel without for a few tokens."""
    return run(x, layer, backend="triton", policy=policy, return_router_logits=True, **options)


both_kernels = pytest.mark.parametrize("function", [run_kernel, run_few], ids=["schedule", "few tokens"])


# Values


@pytest.mark.parametrize("shared", range(3), ids=["alone", "shared", "gated"])
@pytest.mark.parametrize("number", range(len(ROUTINGS)), ids=[describe(routing) for routing in ROUTINGS])
def test_every_combination_of_options(number, shared, device):
    """Every routing with every kind of shared expert, and over all of these every dtype with every scale."""
    dtype, scale = FORMATS[(number + 4 * shared) % len(FORMATS)]
    Is, has_gate = SHARED[shared]
    x, layer = make_decode_inputs(
        2, 24, 20, 8, with_bias(ROUTINGS[number], 8, device), dtype, device, shared_intermediate_size=Is,
        has_shared_gate=has_gate, scale=scale,
    )  # fmt: skip
    assert_right(x, layer, run_kernel)


@every_dtype
@pytest.mark.parametrize(
    "T, H, I, E, K",
    [(1, 1, 1, 1, 1), (2, 37, 13, 9, 9), (5, 150, 136, 3, 2), (17, 24, 40, 5, 2), (33, 9, 5, 3, 3), (128, 8, 4, 2, 1)],
    ids=str,
)
def test_sizes(T, H, I, E, K, dtype, device):
    x, layer = make_decode_inputs(T, H, I, E, Routing(K), dtype, device)
    assert_right(x, layer, run_kernel)


@pytest.mark.parametrize("scale", ["row", "block"])
@pytest.mark.parametrize("T, dtype", [*zip((33, 17, 3), DTYPES, strict=True)], ids=str)
def test_scales_of_several_blocks(T, scale, dtype, device):
    x, layer = make_decode_inputs(T, 150, 136, 2, Routing(1), dtype, device, scale=scale)
    assert_right(x, layer, run_kernel)


def test_many_tokens_of_a_layer_with_everything(device):
    routing = with_bias(Routing(2, True, "sigmoid", "bias", 4, 2, 2.5), 8, device)
    x, layer = make_decode_inputs(
        33, 24, 8, 8, routing, torch.bfloat16, device, shared_intermediate_size=12, has_shared_gate=True, scale="row"
    )
    assert_right(x, layer, run_kernel)


@pytest.mark.parametrize(
    "routing", [Routing(5), Routing(5, False, "sigmoid", "bias", 6, 3, 2.5)], ids=["softmax", "sigmoid-bias-groups"]
)
def test_experts_too_many_to_rank_at_once(routing, device, monkeypatch):
    monkeypatch.setattr(decode_config, "RANK_COMPARISONS", 2**8)
    x, layer = make_decode_inputs(2, 9, 5, 24, with_bias(routing, 24, device), torch.bfloat16, device)
    assert_right(x, layer, run_kernel)
    prepared = prepared_for(x, layer)
    constants = decode_config.kernel_constants(prepared.sizes, prepared.config, layer, "static", 1, is_traced=False)
    assert constants["RANK_BLOCK"] == 8


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups", [(1, 1), (8, 3)], ids=str)
def test_many_biased_choices(groups, scoring, device):
    """Scores are computed, and may differ in their last bit wherever they are computed twice."""
    T = 128 if device.type == "cuda" else 3
    routing = with_bias(Routing(6, False, scoring, "bias", *groups), 64, device)
    x, layer = make_decode_inputs(T, 16, 4, 64, routing, torch.bfloat16, device)
    assert_right(x, layer, run_kernel)


@pytest.mark.parametrize("T", [3, 20])
def test_every_token_on_the_same_experts(T, device):
    x, layer = make_decode_inputs(1, 24, 8, 6, Routing(2), torch.bfloat16, device)
    assert_right(x.expand(T, -1).contiguous(), layer, run_kernel)


@both_kernels
@pytest.mark.parametrize("hidden_act", list(ACTIVATIONS))
def test_activations(hidden_act, function, device):
    x, layer = make_decode_inputs(2, 16, 8, 4, Routing(2), torch.float32, device)
    assert_right(x, layer._replace(hidden_act=hidden_act), function)


@both_kernels
def test_a_router_in_float32(function, device):
    x, layer = make_decode_inputs(2, 48, 8, 6, Routing(2), torch.bfloat16, device)
    assert_right(x, layer._replace(router_weight=layer.router_weight.float()), function)


@every_policy
def test_no_tokens(policy, device):
    x, layer = make_decode_inputs(0, 16, 8, 6, Routing(2), torch.float32, device)
    out, logits = run_kernel(x, layer, policy)
    assert out.shape == (0, 16)
    assert logits.shape == (0, 6)


@pytest.mark.parametrize(
    "routing", [Routing(5), Routing(5, scoring="sigmoid"), Routing(5, True, "sigmoid", None, 6, 3)]
)
def test_ties_go_to_the_lowest_ids(routing, device):
    """Logits of three values only; experts differ, so that the output tells which were chosen."""
    E = 24
    _, layer = make_decode_inputs(4, 4, 1, E, routing, torch.float32, device)
    generator = torch.Generator(device).manual_seed(1)
    layer = layer._replace(router_weight=torch.randint(-1, 2, (E, 4), generator=generator, device=device).float())
    assert_right(torch.eye(4, device=device), layer, run_kernel)


@pytest.mark.parametrize("T", [4, 20])
def test_a_nan_spoils_its_own_token_only(T, device):
    x, layer = make_decode_inputs(T, 16, 8, 6, Routing(2), torch.float32, device, shared_intermediate_size=8)
    want, _ = run_kernel(x, layer)
    x[1, 3] = torch.nan
    out, _ = run_kernel(x, layer)
    assert out[1].isnan().all()
    others = [t for t in range(T) if t != 1]
    assert torch.equal(out[others], want[others])


# What a call leaves to the next


@pytest.mark.parametrize("T", [2, 17])
def test_a_call_takes_nothing_from_the_one_before(T, device):
    """Other experts each time, and what the last call left in memory, but for the numbers of pairs, is NaN or -1."""
    _, layer = make_decode_inputs(T, 24, 8, 12, Routing(3), torch.bfloat16, device, shared_intermediate_size=8)
    for seed in range(3):
        x, _ = make_decode_inputs(T, 24, 8, 12, Routing(3), torch.bfloat16, device, seed)
        assert_right(x, layer, run_kernel)
        state, buffers = scratch_of(x, layer)
        assert_unused(state)
        for each in (*buffers, state.weights):
            each.fill_(torch.nan if each.is_floating_point() else -1)


@every_policy
def test_giving_up_is_told(policy, device, monkeypatch):
    """By NaN, and under debug by an error. A counter that starts too low is never reached; the next call is right."""
    monkeypatch.setattr(kernel, "MAX_POLLS", 3 if device.type == "cpu" else 2000)
    x, layer = make_decode_inputs(2, 16, 8, 6, Routing(2), torch.bfloat16, device)
    want, _ = run_kernel(x, layer, policy)
    state, _ = scratch_of(x, layer, policy)

    def give_up():
        state.counters[ALL_SELECTED.value * LINE.value] = -5
        return run_kernel(x, layer, policy)[0]

    assert give_up().isnan().all()
    assert torch.equal(run_kernel(x, layer, policy)[0], want)  # though nobody has taken the flag down
    monkeypatch.setenv("FLASH_MOE_DEBUG", "1")
    with pytest.raises(RuntimeError, match=r"one gave up, so the output of this call, .* is wrong"):
        give_up()
    assert_unused(state)
    assert torch.equal(run_kernel(x, layer, policy)[0], want)


@triton.jit
def _ring(is_free_ptr, order_ptr, last, num_free_ptr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    num_free, nth = in_turn(tl.load(is_free_ptr + lane) != 0, lane, last)
    tl.store(order_ptr + lane, nth)
    tl.store(num_free_ptr, num_free)


@pytest.mark.parametrize("last", [-1, 0, 2, 4, 6, 7])
def test_free_workers_are_rung_in_turn(last, device):
    """Round from the one after whom was rung last, who comes last himself."""
    is_free = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0], dtype=torch.int32, device=device)
    found, num_free = torch.empty_like(is_free), torch.empty_like(is_free[:1])
    _ring[(1,)](is_free, found, last, num_free, 8)
    workers = [1, 3, 4, 6]
    assert num_free.item() == len(workers)
    in_order = sorted(workers, key=lambda worker: found[worker].item())
    assert in_order == [w for w in workers if w > last] + [w for w in workers if w <= last]
    assert sorted(found[workers].tolist()) == [0, 1, 2, 3]


@pytest.fixture
def timer(device, monkeypatch):
    """For the interpreter, which has no GPU's timer: one that counts how often it is read, in steps of 32 ns."""
    reads = count(1)
    if device.type == "cpu":
        monkeypatch.setattr(decode_records, "globaltimer", lambda: tl.full([1], 32 * next(reads), tl.int64).sum())


def test_records_that_do_not_fit_are_counted(timer, device, monkeypatch):
    x, layer = small(device=device)
    whole, part = Trace(), Trace()
    want, logits = kernel.decode_traced(x, layer, "static", whole)
    schedule = prepared_for(x, layer, "static", is_traced=True).schedule
    hits = len(decode_routing_reference(logits, layer.routing)[1].unique())
    live = [schedule.nth_live(n, hits) for n in range(schedule.num_live(hits))]
    assert sorted(span.index for span in whole.tasks) == sorted(live)
    assert whole.num_lost == 0
    per_program = [0] * whole.num_programs
    for span in (*whole.tasks, *whole.waits):
        per_program[span.program] += 1
    room = max(per_program) // 2
    for limit_of in (kernel, decode_trace):
        monkeypatch.setattr(limit_of, "MAX_RECORDS", room + 1)
    kernel._prepared.clear()
    out, _ = kernel.decode_traced(x, layer, "static", part)
    assert torch.equal(out, want)
    assert len(part.tasks) + len(part.waits) == sum(min(found, room) for found in per_program)
    assert part.num_lost == sum(max(0, found - room) for found in per_program) > 0
    assert f"\n{part.num_lost} tasks and waits are missing: programs had no room" in part.summary()


# A call like an earlier one goes past the checks and the dispatcher


@pytest.fixture
def again(monkeypatch):
    """A list that grows with every call that goes straight to its prepared launch."""
    calls, original = [], PreparedCall.again
    monkeypatch.setattr(PreparedCall, "again", lambda *arguments: calls.append(1) or original(*arguments))
    return calls


def small(T=2, dtype=torch.float32, device="cpu", seed=0):
    return make_decode_inputs(T, 16, 8, 6, Routing(2), dtype, device, seed)


@pytest.mark.parametrize("has_everything", [False, True])
def test_a_repeated_call_gives_what_a_first_one_gives(has_everything, again, device):
    routing, options = Routing(2), {}
    if has_everything:
        routing = with_bias(Routing(2, True, "sigmoid", "bias", 4, 2, 2.5), 8, device)
        options = {"shared_intermediate_size": 8, "has_shared_gate": True, "scale": "row"}
    inputs = [make_decode_inputs(2, 24, 8, 8, routing, torch.bfloat16, device, seed, **options) for seed in range(3)]
    firsts = [run_kernel(*inputs[0])]
    for each in inputs[1:]:
        module._repeatable.clear()
        firsts.append(run_kernel(*each))
    assert not again
    alone = [run(x, layer, backend="triton", policy="queue") for x, layer in inputs for _ in range(2)]
    assert len(again) == 5
    with torch.no_grad(), poison_memory():
        both = [run_kernel(*each) for each in inputs]
    assert len(again) == 8
    for number, (out, logits) in enumerate(firsts):
        assert torch.equal(both[number][0], out)
        assert torch.equal(both[number][1], logits)
        assert torch.equal(alone[2 * number], out)
        assert torch.equal(alone[2 * number + 1], out)
    memory = [x.untyped_storage().data_ptr() for x in (*alone, *sum(both, ()))]
    assert len(set(memory)) == len(memory)


FURTHER_REFUSALS = [
    ({"num_experts_per_tok": True}, TypeError, "num_experts_per_tok: expected an integer; got bool"),
    ({"num_expert_groups": 1.0}, TypeError, "num_expert_groups: expected an integer; got float"),
    ({"routed_scaling_factor": True}, TypeError, "routed_scaling_factor: expected a number; got bool"),
    ({"return_router_logits": 0}, TypeError, "return_router_logits: expected True or False; got 0"),
    ({"scoring": ["softmax"]}, ValueError, r"scoring: expected one of softmax, sigmoid; got \['softmax'\]"),
    ({"down_proj": lambda x: x.clone().requires_grad_()}, ValueError, "down_proj: expected no gradient"),
    ({"hidden_states": lambda x: x.clone().requires_grad_()}, ValueError, "hidden_states: expected no gradient"),
]


@pytest.mark.parametrize("changes, error, message", REFUSALS + FURTHER_REFUSALS)
def test_whatever_a_check_looks_at_is_looked_at_again(changes, error, message, again, device):
    """The errors of test_decode.py, and others, after a good call and its repetition."""
    on_device = {name: x.to(device) if torch.is_tensor(x) else x for name, x in arguments().items()}
    good = on_device | {"num_experts_per_tok": 1 if changes.get("num_experts_per_tok") is True else 2}
    for _ in range(2):
        flash_decode(**good, backend="triton")
    assert len(again) == 1
    if device.type == "cuda":
        message = message.replace("device cpu", f"device {good['hidden_states'].device}")
    changed = {name: change(good[name]) if callable(change) else change for name, change in changes.items()}
    moved = {name: x.to(device) if torch.is_tensor(x) and x.device.type == "cpu" else x for name, x in changed.items()}
    with pytest.raises(error, match=message):
        flash_decode(**{**good, "backend": "triton", **moved})
    assert len(again) == 1


def test_gradients_are_refused_only_where_they_are_enabled(again, device):
    x, layer = small(device=device)
    x.requires_grad_()
    for _ in range(2):
        with torch.no_grad():
            run_kernel(x, layer)
    assert len(again) == 1
    with pytest.raises(ValueError, match="hidden_states: expected no gradient"):
        run_kernel(x, layer)


class Tagged(torch.Tensor):
    """A subclass of which ``__torch_function__`` sees every op."""


def test_what_has_to_be_seen_as_an_op_is_one(again, device):
    x, layer = small(device=device)
    want, _ = run_kernel(x, layer)
    op = torch.ops.flash_moe.flash_decode.default
    with Seen() as seen:
        assert torch.equal(run_kernel(x, layer)[0], want)
    assert op in seen.ops
    assert type(run_kernel(x.as_subclass(Tagged), layer)[0]) is Tagged
    traced = make_fx(lambda x: run_kernel(x, layer)[0])(x)
    assert op in [node.target for node in traced.graph.nodes]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing, that a later version drops it and that sizes are constants
        traced = torch.jit.trace(lambda x: run_kernel(x, layer)[0], x, check_trace=False)
    assert "flash_moe::flash_decode" in str(traced.graph)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert run_kernel(mode.from_tensor(x), layer)[0].shape == x.shape
    assert torch.equal(torch.vmap(lambda x: run_kernel(x, layer)[0])(torch.stack([x, x])), torch.stack([want, want]))
    assert not again


def test_tensors_that_kernels_do_not_read_as_they_are(again, device):
    x, layer = small(device=device)
    want, _ = run_kernel(x, layer)
    strided = x.t().contiguous().t()
    negated = torch._neg_view(-x)
    assert negated.is_contiguous()
    for each in (strided, negated):
        assert torch.equal(run_kernel(each, layer)[0], want)
    assert not again
    parameter = torch.nn.Parameter(layer.down_proj, requires_grad=False)
    assert torch.equal(run_kernel(x, layer._replace(down_proj=parameter))[0], want)
    assert len(again) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU launches for real")
def test_what_is_launched_past_triton(again, device):
    """A compiled kernel gets every address in its order; a tensor off a multiple of 16 bytes goes through Triton."""
    x, layer = small(device=device)
    want, _ = run_kernel(x, layer)
    prepared = prepared_for(x, layer)
    launches = []
    launched = SimpleNamespace(run=lambda *arguments: launches.append(arguments), function=3, packed_metadata=4)
    prepared._launch._compiled = relaunch._Compiled.of(kernel.decode_kernel, launched, (), prepared._launch._named)
    out, logits = run_kernel(x, layer)
    own = prepared._own_of_stream[0]
    tensors = (x, *layer.tensors, logits, out, *prepared._arrays, *own.state, *own.buffers[:-1], own.state.flag)
    launch, arguments = launches[-1][:9], launches[-1][9:]
    assert launch == (1, 1, 1, 0, 3, 4, None, None, None)
    assert arguments[: len(tensors)] == tuple(None if each is None else each.data_ptr() for each in tensors)
    assert len(arguments) == len(kernel.decode_kernel.arg_names)
    for _ in range(2):
        run(x, layer, backend="triton", policy="queue")
    assert launches[-1][9 + 11] == own.buffers.logits.data_ptr()

    off = torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    assert off.data_ptr() % 16
    assert torch.equal(run_kernel(off, layer)[0], want)
    assert len(launches) == 3
    assert len(again) == 3


def test_what_is_forgotten_is_prepared_again(again, device, monkeypatch):
    monkeypatch.setattr(kernel, "MAX_PREPARED", 1)
    x, layer = small(device=device)
    want, _ = run_kernel(x, layer)
    prepared = weakref.ref(prepared_for(x, layer))
    run_kernel(x[:1], layer)
    assert prepared() is None
    assert len(module._repeatable) == 1
    assert torch.equal(run_kernel(x, layer)[0], want)
    assert not again


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_no_room_for_a_repeated_call(backend, again, device, monkeypatch):
    """As for a first one: fewer programs, then another backend, or an error that says so."""
    x, layer = small(device=device)
    monkeypatch.setattr(module, "_backend_of", lambda x, layer, backend: "triton" if backend == "auto" else backend)
    want = run(x, layer, backend=backend, policy="queue")

    def refuse(*_):
        raise RuntimeError("too many blocks in cooperative launch")

    monkeypatch.setattr(kernel.Relaunch, "__call__", refuse)
    if backend == "triton":
        with pytest.raises(NoRoomError, match="expected room for a program a multiprocessor"):
            run(x, layer, backend=backend, policy="queue")
    else:
        torch.testing.assert_close(run(x, layer, policy="queue"), want)
    assert len(again) == 1


def test_other_errors_of_a_repeated_launch_are_not_swallowed(again, device, monkeypatch):
    def fail(*_):
        raise RuntimeError("an illegal memory access")

    x, layer = small(device=device)
    run_kernel(x, layer)
    monkeypatch.setattr(kernel.Relaunch, "__call__", fail)
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        run_kernel(x, layer)
    assert len(again) == 1


# What every op promises


def test_opcheck(device):
    x, layer = make_decode_inputs(3, 16, 8, 6, Routing(2), torch.float32, device)
    *given, _, _ = op_arguments(x, layer)
    library.opcheck(torch.ops.flash_moe.flash_decode.default, (*given, "queue", "triton"))


@pytest.mark.parametrize(
    "T, E, message",
    [
        (129, 6, "hidden_states: expected at most 128 tokens .*; got 129; use backend"),
        (1, 1025, "router_weight: expected at most 1024 experts .*; got 1025; use backend"),
    ],
)
def test_refusals_name_the_argument(T, E, message, device):
    x, layer = make_decode_inputs(T, 4, 2, E, Routing(2), torch.float32, device)
    with pytest.raises(ValueError, match=message):
        run_kernel(x, layer)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has a clock")
def test_no_trace_in_the_interpreter(device):
    x, layer = make_decode_inputs(1, 16, 8, 6, Routing(2), torch.float32, device)
    with pytest.raises(ValueError, match=r'trace: expected None with backend="triton" in Triton.s interpreter'):
        run_kernel(x, layer, trace=Trace())


@every_policy
def test_every_policy_is_right(policy, device):
    """The interpreter's one program is static whatever is asked for; ``test_decode_schedule.py`` has several."""
    for T in (1, 17) if device.type == "cuda" else (1,):
        x, layer = make_decode_inputs(T, 24, 20, 8, Routing(3), torch.bfloat16, device, shared_intermediate_size=8)
        assert_right(x, layer, lambda x, layer, policy=policy: run_kernel(x, layer, policy))
        assert prepared_for(x, layer, policy).policy == (policy if device.type == "cuda" else "static")


@pytest.mark.gpu
@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "static"])
@pytest.mark.parametrize("T", [1, 17])
def test_every_policy_gives_the_same_bits(T, policy, device):
    x, layer = make_decode_inputs(T, 24, 20, 8, Routing(3), torch.bfloat16, device, shared_intermediate_size=8)
    static, _ = run_kernel(x, layer, "static")
    assert all(torch.equal(run_kernel(x, layer, policy)[0], static) for _ in range(20))


@every_dtype
@pytest.mark.parametrize("T", [1, 3])
def test_auto_is_within_a_rounding_of_the_policies(T, dtype, device):
    """For few tokens it takes a kernel of its own, whose sums have an order of their own."""
    x, layer = make_decode_inputs(T, 72, 40, 8, Routing(3), dtype, device)
    auto, logits = run_kernel(x, layer, "auto")
    static, static_logits = run_kernel(x, layer, "static")
    assert not isinstance(prepared_for(x, layer, "auto"), kernel.Prepared)
    assert torch.equal(logits, static_logits)
    # 16-bit outputs are roundings of float32 sums that differ in their last bits.
    bound = torch.finfo(dtype).eps * (16 if dtype is torch.float32 else 0.5)
    assert (auto.double() - static.double()).norm() <= bound * static.double().norm()


# On a GPU, at the size of Qwen3-30B-A3B


def qwen3(T, dtype, device, seed=0, **options):
    return make_decode_inputs(T, 2048, 768, 128, Routing(8), dtype, device, seed, **options)


@pytest.mark.gpu
@every_policy
@pytest.mark.parametrize(
    "dtype, scale", [*((dtype, "none") for dtype in DTYPES), (torch.bfloat16, "row"), (torch.bfloat16, "block")],
    ids=str,
)  # fmt: skip
def test_full_size(dtype, scale, policy, device):
    """Right at every number of tokens; the same bits in a hundred calls, and as another policy's."""
    many, layer = qwen3(128, dtype, device, scale=scale)
    is_plain = dtype is torch.bfloat16 and scale == "none"
    for T in (1, 2, 4, 8, 16, 17, 32, 64, 100, 128) if is_plain else (1, 5, 17, 128):
        x = many[:T].contiguous()
        assert_right(x, layer, lambda x, layer: run_kernel(x, layer, policy))
        first, _ = run_kernel(x, layer, "static" if policy != "static" else "queue")
        different = sum((run_kernel(x, layer, policy)[0] != first).any() for _ in range(100))
        assert not different, f"T {T}"


@pytest.mark.gpu
@pytest.mark.parametrize(
    "H, I, E, routing, Is",
    [
        (4096, 14336, 8, Routing(2), 0),
        (2048, 1024, 64, Routing(8, norm_topk_prob=False), 0),
        (2560, 2048, 256, Routing(8, True, "sigmoid", "bias", 8, 4, 2.5), 2048),
        (640, 512, 256, Routing(8, True, "sigmoid", "bias"), 512),
    ],
    ids=["mixtral", "olmoe", "deepseek-style", "deepseek-style, no groups"],
)
def test_other_models(H, I, E, routing, Is, device):
    """Few experts, which tokens share, and many, of which few do. The third has over 2^31 numbers in gate and up."""
    routing = with_bias(routing, E, device)
    many, layer = make_decode_inputs(128, H, I, E, routing, torch.bfloat16, device, shared_intermediate_size=Is)
    for T in (8, 17, 128):
        x = many[:T].contiguous()
        assert_right(x, layer, run_kernel)
        want, _ = run_kernel(x, layer)
        assert all(torch.equal(run_kernel(x, layer, policy)[0], want) for policy in POLICIES), f"T {T}"
    if (H, E) == (4096, 8):  # experts too large for tokens to share in the kernel for few
        x = many[:2].contiguous()
        assert_right(x, layer, partial(run_kernel, policy="auto"))
        assert isinstance(prepared_for(x, layer, "auto"), kernel.Prepared)
    del many, layer, x, want
    torch.cuda.empty_cache()  # some 40 GB that tests in other processes may need


@pytest.mark.gpu
@pytest.mark.parametrize("schedulers, batch", [(1, 1), (2, 1), (4, 1), (4, 2**20)])
@pytest.mark.parametrize("T", [1, 17])
def test_schedulers_and_how_much_they_hand_out_at_once(T, schedulers, batch, device, monkeypatch):
    """The same bits, and nothing left of a call: one of them finds less to do than another."""
    x, layer = make_decode_inputs(T, 264, 136, 40, Routing(3), torch.bfloat16, device, shared_intermediate_size=72)
    want, _ = run_kernel(x, layer, "static")
    configure(monkeypatch, schedulers=schedulers, batch=batch)
    different = sum((run_kernel(x, layer, "actor")[0] != want).any() for _ in range(50))
    assert not different
    torch.cuda.synchronize()
    assert prepared_for(x, layer, "actor").config[-2:] == (schedulers, batch)
    state, _ = scratch_of(x, layer, "actor")
    assert_unused(state)
    graph, (out,) = capture(x, layer, "actor", 1)
    for _ in range(5):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, want)


@pytest.mark.gpu
def test_auto_takes_the_kernel_where_it_can(device):
    for T, E, backend in ((1, 6, "triton"), (128, 6, "triton"), (129, 6, "torch"), (1, 1025, "torch")):
        x, layer = make_decode_inputs(T, 64, 48, E, Routing(2), torch.bfloat16, device)
        assert torch.equal(run(x, layer), run(x, layer, backend=backend))
        launches = {name: count_launches(partial(run, x, layer, backend=name)) for name in ("auto", backend)}
        assert launches["auto"] == launches[backend]
    x, layer = make_decode_inputs(3, 64, 48, 6, Routing(2), torch.bfloat16, device)
    trace = Trace()
    assert torch.equal(run(x, layer, policy="queue", trace=trace), run(x, layer, policy="queue"))
    assert trace.policy == "queue"


def test_more_tokens_than_one_launch_takes_go_in_pieces(device, monkeypatch):
    x, layer = make_decode_inputs(8, 16, 8, 6, Routing(2), torch.float32, device)
    monkeypatch.setattr(kernel, "MAX_TOKENS", 3)
    if device.type == "cpu":
        monkeypatch.setattr(module, "_goes_in_pieces", lambda x, layer: len(x) > 3)
    out, logits = run(x, layer, return_router_logits=True)
    pieces = [run(piece, layer, backend="triton", return_router_logits=True) for piece in x.split(3)]
    assert torch.equal(out, torch.cat([out for out, _ in pieces]))
    assert torch.equal(logits, torch.cat([logits for _, logits in pieces]))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype, scale, in_pieces",
    [
        (torch.bfloat16, "none", False), (torch.float16, "none", True), (torch.float32, "none", True),
        (torch.bfloat16, "row", True),
    ],
)  # fmt: skip
def test_pieces_where_pytorch_has_no_grouped_product(dtype, scale, in_pieces, device):
    x, layer = make_decode_inputs(300, 64, 48, 6, Routing(2), dtype, device, scale=scale)
    assert_right(x, layer, lambda x, layer: run(x, layer, return_router_logits=True))
    out = run(x, layer)
    pieces = torch.cat([run(piece, layer, backend="triton") for piece in x.split(128)])
    assert torch.equal(out, pieces if in_pieces else run(x, layer, backend="torch"))


@pytest.mark.gpu
@every_policy
@pytest.mark.parametrize("T", [1, 64])
def test_one_launch_that_allocates_nothing_but_its_results_and_waits_for_nothing(T, policy, device):
    x, layer = make_decode_inputs(T, 256, 128, 32, Routing(4), torch.bfloat16, device)
    run_kernel(x, layer, policy)
    assert count_launches(lambda: run_kernel(x, layer, policy)) == 1
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_kernel(x, layer, policy)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before == 2


@pytest.mark.gpu
def test_a_repeated_call_allocates_its_output_alone(again, device):
    x, layer = make_decode_inputs(3, 256, 128, 32, Routing(4), torch.bfloat16, device)
    want = run(x, layer, policy="queue")
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    outs = [run(x, layer, policy="queue") for _ in range(3)]
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before == 3
    assert len(again) == 3
    assert all(torch.equal(out, want) for out in outs)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("policy", ["auto", "queue"])
def test_a_repeated_call_on_another_device_than_the_current_one(policy, again):
    module._repeatable.clear()
    for index in (1, 0, 1):
        x, layer = make_decode_inputs(3, 256, 128, 32, Routing(4), torch.bfloat16, torch.device("cuda", index))
        want = run(x, layer, backend="reference")
        for _ in range(2):
            out = run(x, layer, policy=policy)
            torch.testing.assert_close(out, want, rtol=0.02, atol=0.02 * want.abs().max().item())
        assert torch.cuda.current_device() == 0
    assert len(again) == 7  # four repeated calls, of which the three on the other GPU go there and begin again


def capture(x, layer, policy, count):
    """A graph of ``count`` calls, and their outputs."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        outs = [run_kernel(x, layer, policy)[0] for _ in range(count)]
    return graph, outs


@pytest.mark.gpu
@every_policy
@pytest.mark.parametrize("T", [1, 8, 64])
def test_graph_replay_sees_changed_data_beside_eager_calls(T, policy, device):
    x, layer = qwen3(T, torch.bfloat16, device)
    inputs = [qwen3(T, torch.bfloat16, device, seed)[0] for seed in range(4)]
    want = [run_kernel(each, layer, policy)[0].clone() for each in inputs]
    graph, outs = capture(x, layer, policy, 3)
    other = torch.cuda.Stream()
    for number in range(20):
        x.copy_(inputs[number % 4])
        torch.cuda.synchronize()
        graph.replay()
        with torch.cuda.stream(other):
            beside = [run_kernel(each, layer, policy)[0] for each in inputs]
        torch.cuda.synchronize()
        assert all(torch.equal(out, want[number % 4]) for out in outs)
        assert all(map(torch.equal, beside, want))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # one that PyTorch captures to keep its memory
@pytest.mark.parametrize("T", [1, 20])
def test_compiled_into_cuda_graphs(T, device):
    """By torch.compile itself, which lets nothing stay in a graph's memory that is no result."""
    x, layer = make_decode_inputs(T, 64, 48, 6, Routing(2), torch.bfloat16, device)
    compiled = torch.compile(partial(run, layer=layer), mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(5):
            x = torch.randn_like(x)
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.equal(compiled(x).clone(), run(x, layer))


@pytest.mark.gpu
def test_graphs_beyond_the_states_set_aside_for_them(device, monkeypatch):
    monkeypatch.setattr(scratch_module, "GRAPH_CALLS", 1)
    x, layer = make_decode_inputs(3, 136, 72, 10, Routing(3), torch.bfloat16, device)
    want, _ = run_kernel(x, layer)
    graph, outs = capture(x, layer, "queue", 3)
    for _ in range(5):
        for out in outs:
            out.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(out, want) for out in outs)


@pytest.mark.gpu
def test_what_a_graph_reads_is_kept_when_its_shape_is_forgotten(device, monkeypatch):
    """References are counted, since a replay that read freed memory might pass, or take the process with it."""
    monkeypatch.setattr(kernel, "MAX_PREPARED", 1)
    x, layer = make_decode_inputs(3, 64, 48, 6, Routing(2), torch.bfloat16, device)
    want, _ = run_kernel(x, layer)
    graph, (out,) = capture(x, layer, "queue", 1)
    prepared = prepared_for(x, layer)
    kept = [weakref.ref(each) for each in (*prepared._arrays, *prepared.scratch.of_graphs[-1])]
    del prepared
    run_kernel(x[:1], layer)  # another shape
    gc.collect()
    assert all(each() is not None for each in kept)
    graph.replay()
    assert torch.equal(out, want)


@pytest.mark.gpu
@auto_and_every_policy
@pytest.mark.parametrize("tokens", [(2, 32), (1, 1)], ids=str)
def test_two_streams_at_once(tokens, policy, device):
    inputs = [qwen3(T, torch.bfloat16, device, seed) for seed, T in enumerate(tokens)]
    want = [run_kernel(*each, policy)[0] for each in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    outs = [[], []]
    for _ in range(50):
        for stream, each, out in zip(streams, inputs, outs, strict=True):
            with torch.cuda.stream(stream):
                out.append(run_kernel(*each, policy)[0])
    torch.cuda.synchronize()
    for out, right in zip(outs, want, strict=True):
        assert all(torch.equal(each, right) for each in out)


@triton.jit
def _occupy(done_ptr, ns):
    start = globaltimer()
    while globaltimer() - start < ns:
        pass
    tl.store(done_ptr + tl.program_id(0), 1)


def occupy(sms_left, ms, device):
    """For some milliseconds leave room for other programs on only a few multiprocessors; by threads, not by memory."""
    properties = torch.cuda.get_device_properties(device)
    each = properties.max_threads_per_multi_processor // 1024
    programs = each * properties.multi_processor_count - sms_left
    done = torch.zeros(programs, dtype=torch.int32, device=device)
    _occupy[(programs,)](done, int(ms * 1e6), num_warps=32)
    return done


@pytest.mark.gpu
@auto_and_every_policy
@pytest.mark.parametrize("tokens", [(1, 17), (1, 1)], ids=str)
@pytest.mark.parametrize("sms_left", [0, 1, 20])
def test_a_partly_filled_gpu(sms_left, tokens, policy, device):
    """The launch waits until there is room for all of its programs, and so do two of them."""
    inputs = [qwen3(T, torch.bfloat16, device, seed) for seed, T in enumerate(tokens)]
    want = [run_kernel(*each, policy)[0] for each in inputs]
    streams = [torch.cuda.Stream() for _ in range(3)]
    occupy(sms_left, 0.1, device)  # compiled before it matters
    torch.cuda.synchronize()
    for _ in range(10):
        with torch.cuda.stream(streams[2]):
            done = occupy(sms_left, 4, device)
        outs = []
        for stream, each in zip(streams, inputs, strict=False):
            with torch.cuda.stream(stream):
                outs.append(run_kernel(*each, policy)[0])
        torch.cuda.synchronize()
        assert done.all()
        assert all(map(torch.equal, outs, want))


@pytest.mark.gpu
@auto_and_every_policy
@pytest.mark.parametrize("sms_left", [0, 1, 20])
def test_graphs_on_a_partly_filled_gpu(sms_left, policy, device):
    """Two at once, which wait as calls do. One token and 17: with auto a graph of each kernel."""
    inputs = [qwen3(T, torch.bfloat16, device, seed) for seed, T in enumerate((1, 17))]
    want = [run_kernel(*each, policy)[0] for each in inputs]
    captured = [capture(*each, policy, 2) for each in inputs]
    streams = [torch.cuda.Stream() for _ in range(3)]
    occupy(sms_left, 0.1, device)  # compiled before it matters
    for _ in range(10):
        for _, outs in captured:
            for out in outs:
                out.fill_(torch.nan)
        torch.cuda.synchronize()
        with torch.cuda.stream(streams[2]):
            done = occupy(sms_left, 4, device)
        for stream, (graph, _) in zip(streams, captured, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        assert done.all()
        for (_, outs), right in zip(captured, want, strict=True):
            assert all(torch.equal(out, right) for out in outs)


@pytest.mark.gpu
@every_policy
def test_fewer_programs_where_there_is_no_room_for_all(policy, device, monkeypatch):
    x, layer = make_decode_inputs(5, 64, 48, 6, Routing(2), torch.bfloat16, device)
    want, _ = run_kernel(x, layer, policy)
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    monkeypatch.setattr(kernel, "_num_programs", lambda device, config: num_sms * 20 ** (config.programs - 1))
    kernel._prepared.clear()
    assert torch.equal(run_kernel(x, layer, policy)[0], want)
    assert num_sms == prepared_for(x, layer, policy).num_programs
    graph, (out,) = capture(x, layer, policy, 1)
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, want)


@pytest.mark.gpu
def test_no_room_at_all(device, monkeypatch):
    """An explicit choice is refused; auto goes another way."""
    monkeypatch.setattr(kernel, "_num_programs", lambda device, config: 5000)
    x, layer = make_decode_inputs(7, 64, 48, 6, Routing(2), torch.bfloat16, device)
    with pytest.raises(NoRoomError, match="expected room for a program a multiprocessor"):
        run_kernel(x, layer)
    assert torch.equal(run(x, layer), run(x, layer, backend="torch"))


@pytest.mark.gpu
@every_policy
@pytest.mark.parametrize("T", [1, 17])
def test_trace(T, policy, device):
    x, layer = qwen3(T, torch.bfloat16, device)
    want, logits = run_kernel(x, layer, policy)
    trace, start, end = Trace(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    run_kernel(x, layer, policy, trace=trace)
    with poison_memory():
        start.record()
        out, _ = run_kernel(x, layer, policy, trace=trace)
        end.record()
    torch.cuda.synchronize()
    assert torch.equal(out, want)
    assert (trace.policy, trace.clock) == (policy, "GPU")
    assert trace.sizes == {"T": T, "H": 2048, "I": 768, "E": 128, "K": 8}
    assert 0 < trace.end_ns < start.elapsed_time(end) * 1e6

    schedule = prepared_for(x, layer, policy, is_traced=True).schedule
    experts = logits.topk(8).indices.unique().tolist()
    assert trace.num_programs == schedule.num_programs
    live = [schedule.nth_live(n, len(experts)) for n in range(schedule.num_live(len(experts)))]
    tasks = [span for span in trace.tasks if span.kind != "dispatch"]
    assert sorted(span.index for span in tasks) == sorted(live)
    assert {span.expert for span in tasks} == {None, *experts}
    for span in tasks:
        task = schedule.tasks[span.index]
        assert (span.kind, span.tile) == (task.kind.name.lower(), (task.begin, task.end))
        assert span.expert == (experts[task.slot] if task.slot >= 0 else None)
    assert any(span.kind == "dispatch" for span in trace.tasks) == (policy == "actor")

    by_program = [[] for _ in range(trace.num_programs)]
    for span in (*trace.tasks, *trace.waits):
        assert 0 <= span.start_ns <= span.end_ns
        by_program[span.program].append((span.start_ns, span.end_ns))
    for spans in map(sorted, by_program):
        assert all(before[1] <= after[0] for before, after in pairwise(spans))


@pytest.mark.gpu
@pytest.mark.parametrize("schedulers", [1, 4])
def test_orders_go_round(schedulers, device, monkeypatch):
    """One at a time: none of the tasks that come first goes to a worker who has had one, however free he is again."""
    configure(monkeypatch, schedulers=schedulers, batch=1)
    x, layer = qwen3(1, torch.bfloat16, device)
    trace = Trace()
    for _ in range(2):
        run_kernel(x, layer, "actor", trace=trace)
    routes = [span.program for span in trace.tasks if span.kind == "route"]
    num_tasks = sum(task.kind is Kind.ROUTE for task in prepared_for(x, layer, "actor", is_traced=True).schedule.tasks)
    assert len(routes) == num_tasks < trace.num_programs - schedulers
    assert len(set(routes)) == num_tasks
    assert min(routes) >= schedulers


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 3])
def test_a_trace_shows_the_schedule_and_gives_its_bits(T, device):
    """Where an untraced call takes the kernel without one, too."""
    x, layer = qwen3(T, torch.bfloat16, device)
    trace = Trace()
    out, _ = run_kernel(x, layer, trace=trace)
    assert trace.policy in POLICIES
    assert all(torch.equal(out, run_kernel(x, layer, policy)[0]) for policy in POLICIES)


@pytest.mark.gpu
@every_policy
def test_without_a_trace_there_is_no_code_of_it(policy, device):
    x, layer = make_decode_inputs(3, 64, 48, 6, Routing(2), torch.bfloat16, device)
    reads_clock = []
    for trace in (None, Trace()):
        run_kernel(x, layer, policy, trace=trace)
        compiled = prepared_for(x, layer, policy, is_traced=trace is not None)._launch._compiled
        reads_clock.append("globaltimer" in compiled.launched.asm["ptx"])
    assert reads_clock == [False, True]


@pytest.mark.gpu
@every_policy
def test_a_task_starts_after_what_it_waits_for(policy, device):
    """On the GPU's own clock, which all of its programs share."""
    x, layer = qwen3(4, torch.bfloat16, device)
    trace = Trace()
    for _ in range(2):
        run_kernel(x, layer, policy, trace=trace)
    schedule = prepared_for(x, layer, policy, is_traced=True).schedule
    spans = {span.index: span for span in trace.tasks if span.kind != "dispatch"}
    last = {}
    for index, span in spans.items():
        counter = schedule.tasks[index].signals
        last[counter] = max(last.get(counter, 0), span.start_ns)
    for index, span in spans.items():
        assert span.start_ns >= last.get(schedule.tasks[index].need.counter, 0)
