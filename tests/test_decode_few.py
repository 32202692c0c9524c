"""flash_decode's kernel for a few tokens: who gets it, values for every option, ties, NaN, waits, streams, graphs."""

from collections import OrderedDict
from functools import partial
from weakref import WeakValueDictionary

import pytest
import torch
from test_decode import DTYPES, ROUTINGS, assert_right, describe, every_dtype, run, with_bias

from flash_moe._moe_layer import MoELayer, NoRoomError, Routing
from flash_moe.ops import flash_decode as module
from flash_moe.schedule.policies import POLICIES
from flash_moe.testing import make_decode_inputs, poison_memory

pytest.importorskip("triton", reason="needs triton, which there is for Linux only")

from flash_moe.bench.timing import count_launches
from flash_moe.ops._triton import decode, decode_few
from flash_moe.ops._triton.decode_few import FLAG, LAUNCHES, LINE, ROUTED, Config, FewTokens, takes_few

ONE_GROUP = [routing for routing in ROUTINGS if routing.num_expert_groups == 1]


@pytest.fixture(autouse=True)
def prepared(device, monkeypatch):
    """What calls of this test alone have prepared. Nobody gave up."""
    if device.type == "cpu":
        monkeypatch.setattr(decode_few, "MAX_POLLS", 100)
    monkeypatch.setattr(decode, "_prepared", OrderedDict())
    monkeypatch.setattr(module, "_repeatable", WeakValueDictionary())
    yield decode._prepared
    for each in decode._prepared.values():
        if isinstance(each, FewTokens):
            for counters in each.scratch.of_stream.values():
                assert not counters[FLAG.value * LINE.value]


def run_few(x, layer):
    """What the op gives, by this kernel."""
    results = run(x, layer, backend="triton", return_router_logits=True)
    assert isinstance(decode._prepared[decode._key(x, layer, "auto", is_traced=False)], FewTokens)
    return results


def inputs(T, H, I, E, routing, dtype, device, seed=0):
    return make_decode_inputs(T, H, I, E, with_bias(routing, E, device), dtype, device, seed)


# Values


@pytest.mark.parametrize("T, dtype", [(2, torch.float32), (1, torch.float16), (3, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("routing", ONE_GROUP, ids=describe)
def test_every_routing(routing, T, dtype, device):
    x, layer = inputs(T, 24, 20, 8, routing._replace(routed_scaling_factor=2.5), dtype, device)
    assert_right(x, layer, run_few)


@every_dtype
@pytest.mark.parametrize(
    "T, H, I, E, K",
    [
        (1, 1, 1, 1, 1),
        (2, 37, 13, 9, 9),
        (5, 150, 36, 3, 2),
        (4, 9, 5, 33, 16),
        (2, 24, 600, 2, 1),
        (6, 16, 12, 70, 8),
    ],
    ids=str,
)
def test_sizes(T, H, I, E, K, dtype, device):
    """Nothing a power of two; more experts than tokens take, all of them, the same ones; rows of several chunks."""
    x, layer = inputs(T, H, I, E, Routing(K), dtype, device)
    assert_right(x, layer, run_few)


@every_dtype
@pytest.mark.parametrize("scale", ["row", "block"])
@pytest.mark.parametrize("T, H, I, E, K", [(1, 24, 20, 8, 3), (3, 150, 136, 2, 1), (2, 9, 5, 3, 3)], ids=str)
def test_float8(T, H, I, E, K, scale, dtype, device):
    """Of one block and of several, the last ones not whole."""
    x, layer = make_decode_inputs(T, H, I, E, Routing(K), dtype, device, scale=scale)
    assert_right(x, layer, run_few)
    assert_right(x, layer._replace(down_proj=layer.down_proj.to(dtype), down_scale=None), run_few)


@every_dtype
@pytest.mark.parametrize("routing", [Routing(5), Routing(5, scoring="sigmoid"), Routing(5, False)], ids=describe)
def test_ties_go_to_the_lowest_ids(routing, dtype, device):
    """Logits of three values only; experts differ, so that the output tells which were chosen."""
    E = 24
    _, layer = inputs(1, 4, 2, E, routing, dtype, device)
    generator = torch.Generator(device).manual_seed(1)
    values = torch.randint(-1, 2, (E, 4), generator=generator, device=device).to(dtype)
    layer = layer._replace(router_weight=values)
    x = torch.eye(4, device=device, dtype=dtype)
    for tokens in (x, *x.split(1)):
        assert_right(tokens.contiguous(), layer, run_few)


def test_equal_biased_scores_go_to_the_lowest_ids(device):
    routing = Routing(3, scoring="sigmoid", correction_bias=torch.ones(8, device=device))
    x, layer = make_decode_inputs(3, 4, 2, 8, routing, torch.float32, device)
    assert_right(x, layer._replace(router_weight=torch.zeros_like(layer.router_weight)), run_few)


@every_dtype
@pytest.mark.parametrize("routing", ONE_GROUP, ids=describe)
def test_a_nan_is_its_tokens_alone(routing, dtype, device):
    """Also where others take the same experts."""
    x, layer = inputs(4, 16, 8, 6, routing, dtype, device)
    want, _ = run_few(x, layer)
    x[2, 3] = torch.nan
    out, logits = run_few(x, layer)
    assert out[2].isnan().all()
    assert logits[2].isnan().all()
    others = [0, 1, 3]
    torch.testing.assert_close(out[others], want[others])  # no bits: what shares an expert is added in another order


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T, I", [(1, 300), (2, 20), (2, 19)], ids=str)
def test_down_rows_that_begin_off_a_word(T, I, dtype, device, monkeypatch):
    """They are read in words of two elements elsewhere, and added in the same order. Rows of two chunks, and of one."""
    monkeypatch.setattr(decode_few, "config_of", lambda T, layer: Config(4, 1, 16, 8))
    x, layer = inputs(T, 24, I, 6, Routing(2), dtype, device)
    assert_right(x, begin_off_a_word(layer), run_few)
    # Products that cancel, so that another order of the others between them is another result.
    down, large = layer.down_proj.clone(), 2.0 ** (15 if dtype is torch.float16 else 20)
    down[..., : I // 8 * 8 : 8], down[..., 4 : I // 8 * 8 : 8] = large, -large
    layer = layer._replace(down_proj=down, gate_up_proj=layer.gate_up_proj[:, :1].expand(-1, 2 * I, -1).contiguous())
    want, _ = run_few(x, layer)
    out, _ = run_few(x, begin_off_a_word(layer))
    if device.type == "cpu":
        assert torch.equal(out, want)
    else:  # compiled for such an address, whose lanes have other columns: the lanes' sums come in another order
        largest_sum = 8 * large * I  # activated products are below 8
        assert (out.float() - want.float()).abs().max() <= largest_sum * torch.finfo(torch.float32).eps


def begin_off_a_word(layer):
    down = layer.down_proj
    off = torch.empty(down.numel() + 1, dtype=down.dtype, device=down.device)[1:].view_as(down).copy_(down)
    assert off.data_ptr() % 4
    return layer._replace(down_proj=off)


def test_tensors_that_are_not_contiguous(device):
    x, layer = inputs(2, 24, 20, 6, Routing(2), torch.bfloat16, device)
    want, _ = run_few(x, layer)
    strided = layer._replace(down_proj=layer.down_proj.transpose(1, 2).contiguous().transpose(1, 2))
    wide = torch.cat([x, x], 1)[:, ::2]
    assert not strided.down_proj.is_contiguous()
    assert torch.equal(run_few(x, strided)[0], want)
    assert torch.equal(run_few(wide, layer)[0], run_few(wide.contiguous(), layer)[0])


@pytest.mark.parametrize(
    "config", [Config(4, 2, 2, 1, 2, 1), Config(2, 8, 16, 4, 8, 3), Config(1, 1, 4, 8, 1, 10)], ids=str
)
def test_every_config_is_right(config, device, monkeypatch):
    """More than one step of everything; fewer chunks ahead than there are, and more."""
    monkeypatch.setattr(decode_few, "config_of", lambda T, layer: config)
    x, layer = inputs(2, 280, 20, 5, Routing(2), torch.bfloat16, device)
    assert_right(x, layer, run_few)


# Who gets it


def test_what_it_takes(device):
    _, layer = inputs(1, 16, 8, 6, Routing(2), torch.bfloat16, device)
    x = torch.randn(9, 16, device=device)
    assert [takes_few(x[:T].bfloat16(), layer) for T in range(9)] == [False] + 6 * [True] + 2 * [False]
    assert [takes_few(x[:T], layer) for T in range(7, 10)] == [True, True, False]
    x = x[:1].bfloat16()
    assert not takes_few(x, layer._replace(routing=Routing(2, num_expert_groups=3, topk_groups=2)))
    shared = make_decode_inputs(1, 16, 8, 6, Routing(2), torch.bfloat16, device, shared_intermediate_size=8)
    assert not takes_few(*shared)
    for T, H, I, E, K in ((1, 4, 2, 1025, 2), (1, 4, 2, 20, 17), (5, 4, 2, 20, 16), (1, 20000, 4, 8, 8)):
        assert not takes_few(*make_decode_inputs(T, H, I, E, Routing(K), torch.bfloat16, device))


@pytest.mark.parametrize(
    "H, I, E, K, dtype, taken",
    [
        (2048, 768, 128, 8, torch.bfloat16, (1, 2, 6)),
        (2048, 768, 128, 8, torch.float32, (1, 2, 6)),
        (2048, 1024, 64, 8, torch.bfloat16, (1, 2, 6)),
        (2048, 1024, 64, 8, torch.float32, (1, 2, 6)),
        (4096, 14336, 8, 2, torch.bfloat16, (1,)),
        (7168, 2048, 256, 8, torch.bfloat16, (1,)),
    ],
    ids=["qwen3", "qwen3-float32", "olmoe", "olmoe-float32", "mixtral", "deepseek-experts"],
)
def test_experts_that_tokens_share_are_read_once(H, I, E, K, dtype, taken, monkeypatch):
    """Where one expert's gate and up rows are too large for L2, several tokens are the schedule's."""

    def empty(*shape):
        return torch.empty(shape, dtype=dtype, device="meta")

    layer = MoELayer(empty(E, H), empty(E, 2 * I, H), empty(E, H, I), Routing(K))
    monkeypatch.setattr(decode, "FewTokens", lambda *_: "few tokens")
    monkeypatch.setattr(decode, "_prepare_scheduled", lambda *_: "schedule")
    for T in (1, 2, 6):
        found = decode._prepare(empty(T, H), layer, "auto", False)
        assert found == ("few tokens" if T in taken else "schedule"), f"T {T}"


def test_how_large_a_shared_expert_may_be(monkeypatch):
    monkeypatch.setattr(decode_few, "MAX_SHARED_NBYTES", 2 * 8 * 16 * 2)
    for I, takes in ((8, True), (9, False)):
        x, layer = make_decode_inputs(2, 16, I, 6, Routing(2), torch.bfloat16, "cpu")
        assert takes_few(x, layer) == takes
        assert takes_few(x[:1], layer)
    of_float8 = make_decode_inputs(2, 16, 16, 6, Routing(2), torch.bfloat16, "cpu", scale="row")
    assert takes_few(*of_float8)


def test_a_policy_that_is_asked_for_is_the_schedules(prepared, device):
    x, layer = inputs(2, 24, 20, 8, Routing(3), torch.bfloat16, device)
    outs = [run(x, layer, backend="triton", policy=policy) for policy in POLICIES]
    assert not any(isinstance(each, FewTokens) for each in prepared.values())
    assert all(torch.equal(outs[0], out) for out in outs)
    torch.testing.assert_close(run_few(x, layer)[0], outs[0], rtol=0.02, atol=0.02)


def test_no_room(prepared, device, monkeypatch):
    """The schedule's kernel is launched, then and whenever the call is repeated."""
    x, layer = inputs(2, 24, 20, 8, Routing(3), torch.bfloat16, device)

    def refuse(*_):
        raise RuntimeError("too many blocks in cooperative launch")

    monkeypatch.setattr(FewTokens, "__call__", refuse)
    want = run(x, layer, backend="triton", policy="static")
    for _ in range(2):
        assert torch.equal(run(x, layer, backend="triton"), want)
    assert not any(isinstance(each, FewTokens) for each in prepared.values())


class Crowded(Config):
    """As many registers a program as ever, for ten times the programs that this leaves room for."""

    @property
    def max_registers(self):
        return Config().max_registers


@pytest.mark.gpu
def test_a_gpu_without_room(prepared, device, monkeypatch):
    """It refuses the launch: the schedule's kernel is launched; where that has no room either it is told, or auto's."""
    x, layer = inputs(2, 256, 128, 8, Routing(3), torch.bfloat16, device)
    monkeypatch.setattr(decode_few, "config_of", lambda T, layer: Crowded(programs=40))
    with pytest.raises(RuntimeError, match="cooperative"):
        FewTokens(x, layer)((x, *layer.tensors), None, torch.empty_like(x))
    want = run(x, layer, backend="triton", policy="static")
    for _ in range(2):
        assert torch.equal(run(x, layer, backend="triton"), want)
    assert not any(isinstance(each, FewTokens) for each in prepared.values())
    prepared.clear()
    module._repeatable.clear()
    monkeypatch.setattr(decode, "_num_programs", lambda device, config: 5000)
    with pytest.raises(NoRoomError, match="expected room for a program a multiprocessor"):
        run(x, layer, backend="triton")
    assert torch.equal(run(x, layer), run(x, layer, backend="torch"))


def test_other_errors_are_not_swallowed(device, monkeypatch):
    def fail(*_):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(FewTokens, "__call__", fail)
    x, layer = inputs(2, 24, 20, 8, Routing(3), torch.bfloat16, device)
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        run(x, layer, backend="triton")


# What a call leaves to the next


def test_repeated_calls_take_nothing_from_each_other(prepared, device, monkeypatch):
    """Other experts each time, straight to the launch, with and without logits, and scratch full of NaN before each."""
    again, calls = FewTokens.again, []
    monkeypatch.setattr(FewTokens, "again", lambda *arguments: calls.append(1) or again(*arguments))
    _, layer = inputs(3, 24, 8, 12, Routing(3), torch.bfloat16, device)
    for seed in range(4):
        x, _ = inputs(3, 24, 8, 12, Routing(3), torch.bfloat16, device, seed)
        assert_right(x, layer, run_few)
        (own,) = next(iter(prepared.values()))._own_of_stream.values()
        own.logits.fill_(torch.nan)
        _, activated, lists = own.kept.tensors
        activated.fill_(torch.nan)
        lists.fill_(2**31 - 1)
        with poison_memory():
            assert torch.equal(run(x, layer, backend="triton"), run_few(x, layer)[0])
    assert len(calls) == 3 + 2 * 4 - 1
    assert len(prepared) == 1


def counters_of(prepared):
    (each,) = prepared.values()
    (counters,) = each.scratch.of_stream.values()
    return counters


def test_counters_wrap_around(prepared, device):
    x, layer = inputs(2, 16, 8, 6, Routing(2), torch.float32, device)
    want, _ = run_few(x, layer)
    counters = counters_of(prepared)
    arrivals = counters // int(counters[LAUNCHES.value])  # each launch's
    for start in (2**31 - 2, 2**31 // int(arrivals.max()) - 1):
        moved = arrivals.long() * start
        moved[LAUNCHES.value] = start
        counters.copy_(((moved + 2**31) % 2**32 - 2**31).int())
        for _ in range(4):
            assert torch.equal(run_few(x, layer)[0], want)


def test_giving_up_is_told(prepared, device, monkeypatch):
    """By NaN, and under debug by an error; the next call is right."""
    monkeypatch.setattr(decode_few, "MAX_POLLS", 3 if device.type == "cpu" else 2000)
    x, layer = inputs(2, 16, 8, 6, Routing(2), torch.float32, device)
    want, _ = run_few(x, layer)
    counters = counters_of(prepared)
    routed = ROUTED.value * LINE.value
    counters[routed] -= 1000  # as if those of earlier launches had never arrived
    assert run_few(x, layer)[0].isnan().all()
    monkeypatch.setenv("FLASH_MOE_DEBUG", "1")
    with pytest.raises(RuntimeError, match=r"one gave up, so the output of this call, .* is wrong"):
        run_few(x, layer)
    counters[routed] += 1000
    assert torch.equal(run_few(x, layer)[0], want)


# On a GPU, at the size of Qwen3-30B-A3B


def qwen3(dtype, device, seed=0, T=1, scale="none"):
    return make_decode_inputs(T, 2048, 768, 128, Routing(8), dtype, device, seed, scale=scale)


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("scale", ["none", "row", "block"])
@pytest.mark.parametrize("T", [1, 2, 6])
def test_full_size(T, scale, dtype, device):
    for seed in range(2):
        x, layer = qwen3(dtype, device, seed, T, scale)
        assert_right(x, layer, run_few)
        first, _ = run_few(x, layer)
        assert not sum((run_few(x, layer)[0] != first).any() for _ in range(100))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "H, I, E, K", [(4096, 14336, 8, 2), (2048, 1024, 64, 8), (1000, 3001, 90, 3), (7168, 2048, 96, 8)], ids=str
)
def test_other_models(H, I, E, K, device, monkeypatch):
    """The last one's weights are more than 2^31 numbers. Right also where sharing tokens are the schedule's."""
    monkeypatch.setattr(decode_few, "MAX_SHARED_NBYTES", 2**31)
    x, layer = inputs(3, H, I, E, Routing(K), torch.bfloat16, device)
    assert_right(x[:1], layer, run_few)
    assert_right(x, layer, run_few)
    del x, layer
    torch.cuda.empty_cache()  # some 40 GB that tests in other processes may need


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 4])
def test_one_launch_that_allocates_nothing_but_its_results_and_waits_for_nothing(T, dtype, device):
    x, layer = inputs(T, 256, 128, 32, Routing(4), dtype, device)
    run_few(x, layer)
    run(x, layer, backend="triton")
    assert count_launches(partial(run_few, x, layer)) == 1
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_few(x, layer)
        run(x, layer, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before == 3


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 3])
def test_graph_replay_sees_changed_data_beside_eager_calls(T, device):
    x, layer = qwen3(torch.bfloat16, device, T=T)
    others = [qwen3(torch.bfloat16, device, seed, T)[0] for seed in range(4)]
    want = [run_few(each, layer)[0].clone() for each in others]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        outs = [run_few(x, layer)[0] for _ in range(3)]
    stream = torch.cuda.Stream()
    for number in range(20):
        x.copy_(others[number % 4])
        torch.cuda.synchronize()
        graph.replay()
        with torch.cuda.stream(stream):
            beside = [run_few(each, layer)[0] for each in others]
        torch.cuda.synchronize()
        assert all(torch.equal(out, want[number % 4]) for out in outs)
        assert all(map(torch.equal, beside, want))
