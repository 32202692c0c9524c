"""flash-moe bench and plot: what they refuse, what they count, what they write, what they draw. No time is asserted."""

import importlib.util
import json
import math
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import flash_moe
from flash_moe import cli
from flash_moe.bench import competitors, machine, plot, run
from flash_moe.bench.cases import ANCHORS, LETTERS, SETS, SMALL, Case, dense_case, find_cases, make_ids, make_inputs
from flash_moe.bench.checks import MismatchError, check, check_replay
from flash_moe.bench.roofs import Roofs
from flash_moe.bench.rows import Bench, Refusal, Request, clock_moved, result_nbytes
from flash_moe.bench.run import run_bench
from flash_moe.bench.timing import CpuTimer, CudaTimer, percentiles
from flash_moe.bench.work import BACKWARD, BOTH, FORWARD, count_work, gradient_rows, passes_of
from flash_moe.ops.flash_expert import flash_expert
from flash_moe.ops.flash_mlp import flash_mlp
from flash_moe.ops.flash_router import flash_router

ROOT = Path(flash_moe.__file__).parent.parent
CPU = torch.device("cpu")
ODD = {"router": (13, 5, 11), "expert": (13, 24, 9, 3), "mlp": (13, 24, 17), "layer": (13, 24, 17, 9, 3)}
OPS = {"router": flash_router, "expert": flash_expert, "mlp": flash_mlp}


def odd(op, dtype=torch.float32, routing=None):
    return Case(op, ODD[op], dtype, routing or ("uniform" if op == "expert" else None))


def bind(case, function, which=BACKWARD, seed=0):
    inputs = make_inputs(case, CPU, seed)
    return inputs, competitors._bind_op(case, function, inputs, which)


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["flash-moe", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code or 0


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# Cases


def test_default_cases_are_the_anchors_on_a_gpu_and_small_on_a_cpu():
    for op in LETTERS:
        assert {case.sizes for case in find_cases(op, None, None, "cuda")} == set(ANCHORS[op])
        assert {case.sizes for case in find_cases(op, None, None, "cpu")} == set(SMALL[op])
        assert {case.dtype for case in find_cases(op, None, None, "cpu")} == {torch.float32}
    assert {case.dtype for case in find_cases("router", None, None, "cuda")} == {torch.float32, torch.bfloat16}
    assert {case.T for case in find_cases("layer", None, None, "cuda")} >= {1, 2, 4, 8, 16, 32, 64, 4096, 65536}


def test_main_expert_case_comes_with_every_routing():
    cases = find_cases("expert", None, None, "cuda")
    assert [case.routing for case in cases if case.sizes == ANCHORS["expert"][0]] == ["uniform", "zipf", "hot"]
    assert {case.routing for case in cases if case.sizes != ANCHORS["expert"][0]} == {"uniform"}
    assert {case.routing for case in find_cases("expert", None, "hot", "cuda")} == {"hot"}


def test_sizes_have_as_many_parts_as_their_op():
    for sets in SETS.values():
        for op, letters in LETTERS.items():
            assert all(len(sizes) == len(letters) for sizes in sets[op])
            assert len(set(sets[op])) == len(sets[op])
    (case,) = find_cases("router", "7x3x2", None, "cpu")
    assert (case.name, case.by_letter, case.describe()) == ("7x3x2", {"T": 7, "N": 3, "K": 2}, "T 7, N 3, K 2")


@pytest.mark.parametrize("routing", ["uniform", "zipf", "hot"])
def test_ids_are_in_range_and_repeat_from_their_seed(routing):
    T, E, K = 300, 1000, 16
    ids, again, other = (make_ids(T, E, K, routing, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert ids.shape == (T, K)
    assert ids.dtype == torch.int64
    assert 0 <= ids.min() <= ids.max() < E
    assert torch.equal(ids, again)
    assert not torch.equal(ids, other)
    counts = torch.bincount(ids.flatten(), minlength=E)
    if routing == "uniform":
        assert counts.max() < T / 10
    if routing == "zipf":  # the hottest is in almost every row, about once; the tail is thin
        assert T / 2 < counts.max() < 1.5 * T
        assert (counts == 0).sum() > E / 10
    if routing == "hot":
        assert (counts >= T).sum() == K // 8
        assert counts.sort().values[-K // 8 - 1] < T / 10


def test_one_expert_is_hot_even_at_one_expert_a_token():
    assert make_ids(9, 5, 1, "hot", torch.Generator().manual_seed(0)).unique().numel() == 1


# Work


def test_work_counts_bytes_and_operations():
    T, H, E, K = ODD["expert"]
    case = odd("expert", torch.bfloat16)
    inputs = make_inputs(case, CPU)
    distinct = len(set(inputs.args[3].flatten().tolist()))
    forward, backward = (count_work(case, which, inputs) for which in (FORWARD, BACKWARD))
    assert forward.nbytes == 2 * (2 * T * H + 2 * distinct * H) + T * K * (8 + 2)
    assert (forward.row_nbytes, forward.flops) == (2 * T * K * H * 2, 4 * T * K * H)
    assert backward.nbytes == 2 * (3 * T * H + 2 * distinct * H + 2 * E * H) + T * K * (8 + 2 + 2 + 4)
    assert (backward.row_nbytes, backward.flops) == (2 * forward.row_nbytes, 2 * forward.flops)

    T, N, K = ODD["router"]
    assert count_work(odd("router"), FORWARD, inputs).nbytes == 2 * T * N * 4 + T * K * 12
    T, H, I = ODD["mlp"]
    assert count_work(odd("mlp"), FORWARD, inputs).flops == 6 * T * H * I
    layer = count_work(odd("layer"), FORWARD, inputs)
    assert layer.flops > 6 * T * H * I
    assert count_work(odd("layer"), BOTH, inputs).flops == 3 * layer.flops
    assert count_work(odd("mlp"), BOTH, inputs).flops == 18 * T * H * I
    assert count_work(odd("mlp"), BOTH, inputs).nbytes == 4 * (4 * T * H + 6 * H * I)


def test_dense_mlp_has_as_many_multiplications_a_token_as_the_layer():
    layer = Case("layer", (4096, 1024, 4096, 16384, 64), torch.bfloat16)
    dense = dense_case(layer)
    assert dense.sizes == (4096, 1024, 4224)
    assert dense.sizes in ANCHORS["mlp"]
    inputs = make_inputs(Case("mlp", (1, 1, 1), torch.bfloat16), CPU)
    for which in (FORWARD, BOTH):
        assert count_work(dense, which, inputs).flops == count_work(layer, which, inputs).flops


def test_two_tokens_are_not_trained_on():
    assert passes_of(Case("layer", (2, 8, 8, 4, 2), torch.bfloat16)) == (FORWARD,)
    assert passes_of(Case("layer", (3, 8, 8, 4, 2), torch.bfloat16)) == (FORWARD, BOTH)


def test_roofs_take_the_slowest_part_and_measure_it_once():
    roofs = Roofs(CpuTimer(0.001), CPU)
    case = odd("expert")
    inputs = make_inputs(case, CPU)
    work = count_work(case, BACKWARD, inputs)
    roof = roofs.roof(case, BACKWARD, inputs, work)
    assert roof.time_us == roof.parts_us[roof.bound] == max(roof.parts_us.values()) > 0
    assert set(roof.parts_us) in ({"stream", "gather"}, {"stream", "matmul"})
    assert roofs.roof(case, BACKWARD, inputs, work) == roof
    assert roofs.copy_gb_per_s() > 0
    assert set(roofs.roof(odd("router"), FORWARD, inputs, work).parts_us) == {"stream"}
    assert roofs.roof(odd("router"), FORWARD, inputs, work).gather_us is None
    layer = odd("layer")
    assert set(roofs.roof(layer, BOTH, make_inputs(layer, CPU), work).parts_us) >= {"stream", "matmul"}


def test_row_sparse_gradients_count_the_rows_there_can_be():
    few, many = (Case("expert", (4, 24, E, 3), torch.bfloat16, "uniform", sparse_grad=True) for E in (9, 5000))
    inputs = make_inputs(few, CPU)
    dense = count_work(replace(many, sparse_grad=False), BACKWARD, inputs)
    assert (gradient_rows(few), gradient_rows(many)) == (9, 12)
    work = count_work(many, BACKWARD, inputs)
    assert dense.nbytes - work.nbytes == 2 * 2 * (5000 - 12) * 24 - 8 * 12


def test_row_sparse_gradients_are_checked_like_dense_ones():
    case = odd("expert")
    for factor in (1.0, 1.02):
        inputs, bound = bind(case, partial(flash_expert, backend="torch", sparse_grad=True))
        bound.leaves[2].register_hook(lambda grad, factor=factor: grad * factor)
        if factor == 1.0:
            check(case, inputs, bound, BACKWARD, True)
            results = bound.prepare(BACKWARD)()
            assert [x.is_sparse for x in results] == [False, True, True, False]
            check_replay(case, bound, BACKWARD, results)
            with pytest.raises(MismatchError, match="replayed result 1"):
                check_replay(case, bound, BACKWARD, (results[0], results[1] * 1.01, *results[2:]))
        else:
            with pytest.raises(MismatchError, match="dup"):
                check(case, inputs, bound, BACKWARD, True)


def test_row_sparse_gradients_are_measured_beside_dense_ones(no_gpu, monkeypatch):
    find = lambda sizes, names=(): {  # noqa: E731
        each.name: each for each in competitors.find_competitors(Case("expert", sizes, torch.float32), CPU, names)
    }
    monkeypatch.setattr(competitors, "why_not", lambda name, device: None)
    main, other = ANCHORS["expert"][0], ODD["expert"]
    assert "triton_sparse_grad" in find(main)
    assert "triton_sparse_grad" not in find(other)
    sparse = find(other, ("triton_sparse_grad",))["triton_sparse_grad"]
    assert (sparse.passes, sparse.is_ours, sparse.computes.sparse_grad) == ((BACKWARD,), True, True)
    assert {case.name for case in find_cases("expert", None, None, "cuda")} >= set(competitors.ROW_SPARSE)


def test_what_dense_products_would_win_still_says_what_gathering_takes(monkeypatch):
    roofs = Roofs(CpuTimer(0.001), CPU)
    case = odd("expert")
    inputs = make_inputs(case, CPU)
    monkeypatch.setattr(roofs, "_matmul_us", lambda flops, dtype: 0.5)
    monkeypatch.setattr(roofs, "stream_us", lambda nbytes: 0.25)
    monkeypatch.setattr(roofs, "gather_us", lambda table, ids, label: 100.0)
    roof = roofs.roof(case, FORWARD, inputs, count_work(case, FORWARD, inputs))
    assert (roof.bound, roof.time_us, roof.gather_us) == ("matmul", 0.5, 200.0)
    monkeypatch.setattr(roofs, "fill_us", lambda nbytes: 7.0)
    roof = roofs.roof(case, BACKWARD, inputs, count_work(case, BACKWARD, inputs))
    assert roof.gather_us == 400.0  # the fill is behind the gathers


def test_the_fastest_way_is_the_roof():
    class Timer(CpuTimer):
        def time_eager(self, call, idle_start=False):
            return [float(call())] * 3

    roofs = Roofs(Timer(0.001), CPU)
    assert roofs._best([[lambda: 3], [lambda: 2], [lambda: 4]]) == 2


def test_kernels_of_the_roofs_read_everything(device):
    if reason := competitors.why_not("triton", device):
        pytest.skip(reason)
    from flash_moe.ops._triton import memory

    generator = torch.Generator(device).manual_seed(0)
    for numel in (1, 5000):
        data = torch.randint(1, 9, (numel,), device=device, generator=generator).float()  # sums are exact
        for config in memory.READ_CONFIGS:
            assert memory.read_once(data, config).sum() == data.sum()
    table = torch.randn(7, 300, device=device, generator=generator)
    ids = torch.randint(7, (2, 5), device=device, generator=generator)
    for config in memory.SUM_CONFIGS:
        torch.testing.assert_close(memory.sum_rows(table, ids, config), table[ids].sum(1))


# Checks: what is right passes, what is wrong has no row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", LETTERS)
def test_right_numbers_pass(op, dtype):
    for routing in ("uniform", "zipf", "hot") if op == "expert" else (None,):
        case = odd(op, dtype, routing)
        inputs = make_inputs(case, CPU)
        names = tuple(name for name in ("torch", "reference", "pytorch_smart"))
        found = competitors.find_competitors(case, CPU, names)
        assert len(found) == {"router": 3, "expert": 3, "mlp": 1, "layer": 2}[op]
        for competitor in found:
            for which in passes_of(case):
                error = check(case, inputs, competitor.bind(inputs, which), which, competitor.is_ours)
                assert error <= (0.05 if dtype == torch.bfloat16 else 1e-5)


class _Faulty(torch.autograd.Function):
    """Passes tensors through; gradient ``which`` is 2 % too large."""

    @staticmethod
    def forward(ctx, which, *tensors):
        ctx.which = which
        return tensors

    @staticmethod
    def backward(ctx, *grads):
        return None, *(grad * 1.02 if i == ctx.which else grad for i, grad in enumerate(grads))


def with_faulty_gradient(function, which, *args):
    tensors = [x for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()]
    passed = iter(_Faulty.apply(which, *tensors))
    return function(*(next(passed) if any(x is each for each in tensors) else x for x in args))


@pytest.mark.parametrize(
    "op, which", [("router", 0), *(("expert", i) for i in range(4)), *(("mlp", i) for i in range(4))]
)
def test_two_percent_in_any_gradient_is_refused(op, which):
    case = odd(op, torch.bfloat16)
    inputs, right = bind(case, partial(OPS[op], backend="torch"))
    check(case, inputs, right, BACKWARD, True)
    inputs, wrong = bind(case, partial(with_faulty_gradient, partial(OPS[op], backend="torch"), which))
    with pytest.raises(MismatchError, match=r"d\w+: .*error"):
        check(case, inputs, wrong, BACKWARD, True)


@pytest.mark.parametrize("parameter", range(7))
def test_a_wrong_gradient_of_the_layer_is_refused(parameter):
    case = odd("layer")
    inputs = make_inputs(case, CPU)
    (competitor,) = competitors.find_competitors(case, CPU, ("torch",))
    bound = competitor.bind(inputs, BOTH)
    bound.leaves[parameter].register_hook(lambda grad: grad * 1.02)
    with pytest.raises(MismatchError):
        check(case, inputs, bound, BOTH, True)


def wrong_router(change, logits, N, K):
    return change(*flash_router(logits, N, K, backend="torch"))


@pytest.mark.parametrize(
    "change, ours, message",
    [
        (lambda scores, ids: (scores + 1e-6, ids), True, "scores differ"),
        (lambda scores, ids: (scores, ids.roll(1, 1)), True, "ids differ"),
        (lambda scores, ids: (scores, ids.roll(1, 1)), False, "do not have the scores"),
        (lambda scores, ids: (scores, ids + 100), False, "out of range"),
        (lambda scores, ids: (scores, ids - 100), False, "out of range"),
    ],
)
def test_wrong_router_outputs_are_refused(change, ours, message):
    case = odd("router")
    inputs, bound = bind(case, partial(wrong_router, change))
    with pytest.raises(MismatchError, match=message):
        check(case, inputs, bound, FORWARD, ours)


def test_an_expert_taken_twice_is_refused():
    case = Case("router", (3, 4, 2), torch.float32)
    inputs = make_inputs(case, CPU)
    inputs.args[0][:] = 0.0  # all scores are equal, so that only the ids can tell
    double = partial(wrong_router, lambda scores, ids: (scores, ids[:, :1].expand(-1, 2)))
    with pytest.raises(MismatchError, match="twice"):
        check(case, inputs, competitors._bind_op(case, double, inputs, FORWARD), FORWARD, False)


@pytest.mark.parametrize("change", [lambda x: x * math.nan, lambda x: x * 1.2, lambda x: x[:, :-1]])
def test_a_competitor_that_computes_something_else_is_refused(change):
    case = odd("expert", torch.bfloat16)
    inputs, bound = bind(case, lambda *args: change(flash_expert(*args, backend="reference")))
    with pytest.raises(MismatchError, match=r"^out: "):
        check(case, inputs, bound, FORWARD, False)


def test_a_replay_must_leave_what_the_call_gives():
    case = odd("expert")
    _, bound = bind(case, partial(flash_expert, backend="torch"))
    right = bound.prepare(BACKWARD)()
    check_replay(case, bound, BACKWARD, right)
    with pytest.raises(MismatchError, match="replayed result 2"):
        check_replay(case, bound, BACKWARD, (*right[:2], right[2] * 1.01, right[3]))


# Competitors


# The layer's reference looks for its candidates by value, where a graph ends in the middle.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("op", ["router", "expert", "layer"])
def test_compiled_competitor_is_right(op, monkeypatch):
    monkeypatch.setattr(competitors, "COMPILER", "aot_eager")
    case = odd(op)
    inputs = make_inputs(case, CPU)
    (competitor,) = competitors.find_competitors(case, CPU, ("torch_compile",))
    which = passes_of(case)[1]
    bound = competitor.bind(inputs, which)
    check(case, inputs, bound, which, False)
    timed = bound.prepare(which)
    assert all(torch.equal(a, b) for a, b in zip(timed(), timed(), strict=True))
    competitors.free_competitor("torch_compile")


def test_peers_are_optional_and_compiling_is_rare():
    names = {competitor.name for competitor in competitors.find_competitors(odd("mlp"), CPU, ())}
    assert "reference" in names
    assert not names & {"liger", "torch_compile"}
    for op, compiled in competitors.COMPILED.items():
        assert set(compiled) <= {"x".join(map(str, sizes)) for sizes in ANCHORS[op]}


def install_liger(monkeypatch, change):
    """A module with the name of the peer's, which is right but for the ``change`` of the gate.

    As if there were a GPU, since without one the bench does not look for it.
    """
    package, swiglu = ModuleType("liger_kernel"), ModuleType("liger_kernel.ops.swiglu")
    package.__spec__ = ModuleSpec("liger_kernel", None)
    swiglu.LigerSiLUMulFunction = SimpleNamespace(apply=lambda gate, up: F.silu(change(gate)) * up)
    for module in (package, swiglu):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    why_not = competitors.why_not
    monkeypatch.setattr(
        competitors, "why_not", lambda name, device: why_not(name, torch.device("cuda") if name == "liger" else device)
    )


def test_an_installed_peer_is_measured(monkeypatch, no_gpu):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert competitors.why_not("liger", torch.device("cuda")) == "liger_kernel is not installed"
    install_liger(monkeypatch, lambda gate: gate)
    assert competitors.why_not("liger", torch.device("cuda")) is None
    rows = list(run_bench(Request(["mlp"], "2x8x4", seconds=1e-4, commit="abc")))
    assert not [row for row in rows if isinstance(row, Refusal)]
    assert [row["pass"] for row in rows if row["backend"] == "liger"] == [FORWARD, BACKWARD]


@pytest.mark.parametrize(
    "change, refused",
    [(lambda gate: 1.02 * gate, {FORWARD: "out: ", BACKWARD: "out: "}),
     (lambda gate: _Faulty.apply(0, gate)[0], {BACKWARD: "dx: "})],
    ids=["values", "gradients"],
)  # fmt: skip
def test_a_peer_with_other_numbers_gets_no_row(change, refused, monkeypatch, no_gpu):
    install_liger(monkeypatch, change)
    found = list(run_bench(Request(["mlp"], "2x8x4", ("liger",), seconds=1e-4, commit="abc")))
    assert len(found) == 2
    failures = [each for each in found if isinstance(each, Refusal)]
    assert [each.which for each in failures] == list(refused)
    for each in failures:
        assert each.is_failure
        assert each.reason.startswith(f"MismatchError: {refused[each.which]}")


@pytest.mark.parametrize("op", LETTERS)
def test_triton_kernels_are_measured_in_the_interpreter(op, no_gpu):
    if competitors.why_not("triton", CPU) is not None:
        pytest.skip("the kernels run on the GPU here")
    sizes = {"router": "2x3x2", "expert": "2x8x4x2", "mlp": "2x8x4", "layer": "2x8x4x4x2"}[op]
    rows = list(run_bench(Request([op], sizes, ("triton",), ("fwd",), seconds=1e-4, commit="abc")))
    assert [row["backend"] for row in rows] == ["triton"], rows


# Rows


def load_tables():
    spec = importlib.util.spec_from_file_location("tables_of_rows", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_of_every_op_are_complete(no_gpu):
    rows = list(run_bench(Request(["all"], backends=("reference",), seconds=1e-3, commit="abc")))
    assert not [row for row in rows if isinstance(row, Refusal)]
    assert {(row["op"], row["pass"]) for row in rows} == {
        *((op, which) for op in ("flash_router", "flash_expert", "flash_mlp") for which in (FORWARD, BACKWARD)),
        ("FlashMoE", FORWARD), ("FlashMoE", BOTH), ("flash_decode", FORWARD),
    }  # fmt: skip
    tables = load_tables()
    for row in rows:
        row = json.loads(json.dumps(row))
        tables.check_row(row)
        assert tables.table_of(row) == f"cpu {row['op']}"
        assert row["calls"] >= 5
        assert 1 <= row["warm_up_calls"] <= 50
        assert row["roof_pct"] == pytest.approx(100 * row["roof_us"] / row["time_us"][1], rel=0.01)
        assert row["gb_per_s"] > 0
        assert row["peak_mib"] >= 0
        assert row["error"] < 1e-5
        assert (row["launches"], row["launch"], row["is_cold"], row["sm_mhz"]) == (None, "eager", False, [None, None])
        assert (row["commit"], row["threads"], row["torch"]) == ("abc", torch.get_num_threads(), torch.__version__)
    texts = [(row["op"], row["case"], row["pass"]) for row in rows]
    assert len(set(texts)) == len(texts)


def test_results_take_what_they_hold():
    table = torch.sparse_coo_tensor(torch.tensor([[5, 2, 5]]), torch.ones(3, 4), (1000, 4), check_invariants=True)
    assert result_nbytes((torch.ones(7), None, table)) == 7 * 4 + 3 * 8 + 3 * 4 * 4


def test_peak_memory_is_without_the_results(no_gpu):
    request = Request(["expert"], "64x64x100x32", ("reference",), ("fwd",), seconds=1e-3, commit="abc")
    (row,) = run_bench(request)
    assert 0.5 <= row["peak_mib"] <= 1.5  # one gather of [64, 32, 64] float32 is 0.5 MiB


@pytest.mark.parametrize("passes, expected", [(("fwd",), FORWARD), (("bwd",), BACKWARD)])
def test_one_pass_alone(no_gpu, passes, expected):
    rows = run_bench(Request(["mlp"], "4x8x8", ("reference",), passes, seconds=1e-3, commit="abc"))
    assert [row["pass"] for row in rows] == [expected]


@pytest.mark.parametrize("seconds, call_seconds, expected", [(1.0, 0.0, 50), (0.004, 0.03, (4, 10)), (1e-9, 0.0, 1)])
def test_warm_up_is_50_calls_unless_they_are_very_slow(seconds, call_seconds, expected):
    calls = []
    count = CpuTimer(seconds).warm_up(lambda: calls.append(time.sleep(call_seconds)))
    assert count == len(calls)
    if isinstance(expected, int):
        assert count == expected
    else:
        assert expected[0] <= count <= expected[1]


def test_short_calls_are_measured_in_a_graph_too(monkeypatch):
    timer = object.__new__(CudaTimer)
    bench = Bench(CPU, timer, Roofs(CpuTimer(0.001), CPU), {})
    ours, other = competitors.Competitor("triton", None, (FORWARD,)), competitors.Competitor("reference", None)
    large, small = (Case("expert", (T, 24, 9, 3), torch.bfloat16, "uniform") for T in (4096, 1))
    assert run._is_graphed(bench, large, ours, FORWARD, [999.0] * 3)
    assert not run._is_graphed(bench, large, ours, FORWARD, [1001.0] * 3)
    assert run._is_graphed(bench, small, ours, FORWARD, [1001.0] * 3)
    assert not run._is_graphed(bench, small, ours, BACKWARD, [1.0] * 3)
    assert not run._is_graphed(bench, small, other, FORWARD, [1.0] * 3)
    bench.timer = CpuTimer(0.001)
    assert not run._is_graphed(bench, small, ours, FORWARD, [1.0] * 3)


def test_dense_mlp_beside_the_layer_has_rows_and_a_check_of_its_own(no_gpu, monkeypatch):
    request = Request(["layer"], "4x16x24x9x3", ("reference", "dense_mlp"), seconds=1e-3, commit="abc")
    rows = list(run_bench(request))
    assert [(row["backend"], row["pass"]) for row in rows] == [
        (backend, which) for backend in ("reference", "dense_mlp") for which in (FORWARD, BOTH)
    ]
    layer, dense = rows[0], rows[2]
    assert {row["case"] for row in rows} == {layer["case"]}
    assert dense["flops"] == 6 * 4 * 16 * 28  # I 24 and (2 * 3 + 2 * 3) / 3 more
    assert dense["nbytes"] < layer["nbytes"]
    assert set(dense["roof_parts_us"]) == {"stream", "matmul"}
    wrong = lambda *args: flash_mlp(*args) * 1.02  # noqa: E731
    monkeypatch.setitem(competitors.PUBLIC_OPS, "mlp", wrong)
    (_, _, *refused) = run_bench(request)
    assert [(each.backend, each.is_failure) for each in refused] == 2 * [("dense_mlp", True)]


def test_row_sparse_gradients_have_rows_in_the_interpreter(no_gpu):
    if competitors.why_not("triton", CPU) is not None:
        pytest.skip("the kernels run on the GPU here")
    request = Request(["expert"], "2x8x5x2", ("triton", "triton_sparse_grad"), seconds=1e-4, commit="abc")
    rows = list(run_bench(request))
    assert [(row["backend"], row["pass"]) for row in rows] == [
        ("triton", FORWARD), ("triton", BACKWARD), ("triton_sparse_grad", BACKWARD)
    ]  # fmt: skip
    dense, sparse = rows[1:]
    assert sparse["case"] == dense["case"]
    assert dense["nbytes"] - sparse["nbytes"] == 2 * 4 * 8 - 8 * 4


def test_every_competitor_has_its_own_inputs(no_gpu, monkeypatch):
    request = Request(["mlp"], "4x8x8", ("reference",), ("fwd",), seconds=1e-3, commit="abc")
    seen = []
    make = run.make_inputs
    monkeypatch.setattr(run, "make_inputs", lambda *args: seen.append(make(*args)) or seen[-1])
    list(run_bench(request))
    assert len(seen) == 2
    assert seen[0].args[0].data_ptr() != seen[1].args[0].data_ptr()
    assert torch.equal(seen[0].args[0], seen[1].args[0])


class FreeingTimer(CpuTimer):
    free = CudaTimer.free


def test_what_a_competitor_leaves_is_gone_before_the_next(no_gpu, monkeypatch):
    """The cache is emptied after its inputs are dropped, or the cache would still hold them."""
    request = Request(["expert"], "4x16x8x2", ("pytorch_smart", "reference"), ("fwd",), seconds=1e-3, commit="abc")
    timers = [FreeingTimer(request.seconds), CpuTimer(request.seconds)]  # of the rows, and of the roofs
    make, made, events = run.make_inputs, [], []

    def make_inputs(*arguments):
        inputs = make(*arguments)
        made.append(weakref.ref(inputs.args[0]))
        events.append("inputs")
        return inputs

    def empty_cache():
        events.append(f"emptied, {sum(each() is not None for each in made)} inputs are left")

    monkeypatch.setattr(run, "make_timer", lambda *_: timers.pop(0))
    monkeypatch.setattr(run, "make_inputs", make_inputs)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    assert not [row for row in run_bench(request) if isinstance(row, Refusal)]
    of_competitor = ["inputs", "emptied, 1 inputs are left", "emptied, 0 inputs are left"]
    assert events == ["inputs", "emptied, 0 inputs are left", *of_competitor, *of_competitor]


def test_percentiles_and_clock():
    assert percentiles([float(i) for i in range(101)]) == [20, 50, 80]
    assert clock_moved({"sm_mhz": [1000, 960]})
    assert clock_moved({"sm_mhz": [1000, 1040]})
    assert not clock_moved({"sm_mhz": [1000, 975]})
    assert not clock_moved({"sm_mhz": [None, None]})


def test_commit_of_this_checkout():
    commit = machine.find_commit()
    if subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True).returncode == 0:
        assert len(commit.removesuffix("-dirty")) == 40
    else:
        assert commit is None


# Commands


def test_bench_appends_rows_and_prints_them(monkeypatch, capsys, tmp_path, no_gpu):
    out = tmp_path / "new" / "rows.jsonl"
    options = ["--backend", "torch", "--backend", "reference", "--case", "4x16x8x2", "--routing", "zipf"]
    for times in (1, 2):
        assert call(monkeypatch, "bench", "expert", *options, "--seconds", 0.001, "--commit", "abc", "--out", out) == 0
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [(row["backend"], row["pass"]) for row in rows] == times * [
            ("torch", FORWARD), ("torch", BACKWARD), ("reference", FORWARD), ("reference", BACKWARD)
        ]  # fmt: skip
        assert rows[0]["case"] == "T 4, H 16, E 8, K 2, zipf"
        printed = capsys.readouterr().out
        assert "p50 us" in printed
        assert printed.count("4x16x8x2 zipf") == 4
        assert f"4 rows appended to {out}" in printed


def test_default_file_is_not_among_those_the_documents_show(monkeypatch, tmp_path, no_gpu):
    monkeypatch.chdir(tmp_path)
    options = ["--case", "4x8x8", "--backend", "reference", "--seconds", 0.001, "--commit", "abc"]
    assert call(monkeypatch, "bench", "mlp", *options) == 0
    assert [path.name for path in (tmp_path / "benchmarks" / "results" / "bench").iterdir()] == ["cpu.jsonl"]
    assert not list((tmp_path / "benchmarks" / "results").glob("*.jsonl"))
    assert call(monkeypatch, "plot") == 0
    assert list((tmp_path / "benchmarks" / "results" / "plots").glob("flash_mlp_*_roof.png"))


def test_wrong_numbers_get_no_row_and_exit_code_1(monkeypatch, capsys, tmp_path, no_gpu):
    out = tmp_path / "rows.jsonl"
    wrong = lambda *args, backend: flash_expert(*args, backend="torch") * (1.02 if backend == "torch" else 1.0)  # noqa: E731
    monkeypatch.setitem(competitors.PUBLIC_OPS, "expert", wrong)
    options = ["--backend", "torch", "--backend", "reference", "--case", "4x16x8x2", "--pass", "fwd"]
    assert call(monkeypatch, "bench", "expert", *options, "--seconds", 0.001, "--commit", "abc", "--out", out) == 1
    (line,) = out.read_text().splitlines()
    assert json.loads(line)["backend"] == "reference"
    printed = capsys.readouterr().out
    assert "FAILED: expert T 4, H 16, E 8, K 2" in printed
    assert "budget" in printed
    assert "1 rows refused" in printed


@pytest.mark.parametrize("backend, code", [("torch", 1), ("reference", 0)])
def test_only_ours_must_fit_into_memory(monkeypatch, capsys, tmp_path, no_gpu, backend, code):
    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setitem(competitors.PUBLIC_OPS, "mlp" if backend == "reference" else "expert", no_memory)
    op, case = ("mlp", "4x8x8") if backend == "reference" else ("expert", "4x16x8x2")
    options = ["--backend", backend, "--case", case, "--seconds", 0.001, "--commit", "abc"]
    assert call(monkeypatch, "bench", op, *options, "--out", tmp_path / "rows.jsonl") == code
    assert "out of memory" in capsys.readouterr().out


def test_a_moved_clock_is_told(monkeypatch, capsys, tmp_path, no_gpu):
    clocks = iter([1000, 900])
    monkeypatch.setattr(run, "read_clock", lambda bench: next(clocks))
    options = ["--backend", "reference", "--case", "4x8x8", "--pass", "fwd", "--seconds", 0.001, "--commit", "abc"]
    assert call(monkeypatch, "bench", "mlp", *options, "--out", tmp_path / "rows.jsonl") == 0
    assert "moved from 1000 to 900 MHz" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["bench", "coffee"], "op: expected one of router, expert, mlp, layer, decode, all; got 'coffee'"),
        (["bench"], "{ops}..."),
        (["bench", "router", "--case", "4096x128"], "case: expected one of anchors, sweep, small, or sizes TxNxK"),
        (["bench", "router", "--case", "4x0x1"], "case: expected"),
        (["bench", "router", "--pass", "sideways"], "pass: expected one of fwd, bwd"),
        (["bench", "expert", "--routing", "cold"], "routing: expected one of uniform, zipf, hot"),
        (["bench", "router", "--routing", "hot"], "routing: expected only with expert"),
        (["bench", "router", "--backend", "magic"], "backend: expected one of triton, torch,"),
        (["bench", "router", "--backend", "liger"], "backend: liger cannot run here"),
        (["bench", "mlp", "--backend", "torch"], "backend: expected one that mlp has; got torch"),
        (["bench", "router", "--seconds", "0"], "seconds: expected"),
        (["plot"], "files: expected rows of flash-moe bench"),
        (["plot", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
    ids=" ".join,
)
def test_mistakes_are_said_before_anything_is_measured(monkeypatch, capsys, tmp_path, no_gpu, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


# Anchors


def anchored_row(anchor, time_us, launch="eager", **more):
    return {
        "case": "any", "backend": "triton", "launch": launch, "time_us": [time_us] * 3, "roof_us": 4.0,
        "gpu": "NVIDIA H200", "torch": "2", "commit": "0123456789", "date": "2026-01-02", "roof_gather_us": 30.0,
        **{name: anchor.get(name) for name in ("op", "sizes", "dtype", "pass", "routing")}, **more,
    }  # fmt: skip


def anchor_lines(tmp_path, op, rows, language="en"):
    """The generated table, without its header and captions: a list of cells for each line."""
    tables = load_tables()
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True, exist_ok=True)
    (tmp_path / "benchmarks" / "anchors.json").write_text((ROOT / "benchmarks" / "anchors.json").read_text())
    (results / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = "README.md" if language == "en" else "README_zh.md"
    shown = "".join(f"<!-- table: {table} -->\n<!-- /table -->\n" for table in {tables.table_of(row) for row in rows})
    (tmp_path / name).write_text(f"<!-- table: anchors {op} -->\n<!-- /table -->\n{shown}")
    assert tables.main(["--root", str(tmp_path)]) == 0
    text = (tmp_path / name).read_text().partition("<!-- /table -->")[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| T ")]


def anchors_of(op):
    return json.loads((ROOT / "benchmarks" / "anchors.json").read_text())[op]


@pytest.mark.parametrize("op", LETTERS)
def test_every_anchor_is_a_case_that_the_bench_measures(op):
    for anchor in anchors_of(op):
        assert tuple(anchor["sizes"].values()) in ANCHORS[op]
        assert "".join(anchor["sizes"]) == LETTERS[op]
        assert ("goal_ms" in anchor) != ("goal" in anchor)
        cases = {(str(case.dtype).removeprefix("torch."), case.routing) for case in find_cases(op, None, None, "cuda")}
        assert (anchor["dtype"], anchor.get("routing")) in cases


@pytest.mark.parametrize("op", LETTERS)
def test_anchors_stand_without_rows(op, tmp_path):
    lines = anchor_lines(tmp_path, op, [])
    assert len(lines) == len(anchors_of(op))
    assert all(line[4:8] == [""] * 4 and line[9] == "" for line in lines)


def test_times_stand_beside_goals(tmp_path):
    first = anchors_of("router")[0]
    assert (first["goal_ms"], first["published_ms"]) == (0.008, 0.084)
    eager, slow = anchored_row(first, 8.5), anchored_row(first, 8.0, gpu="Another GPU")
    (line, *others) = anchor_lines(tmp_path, "router", [slow, eager])
    case = "T 4096, N 64, K 8, float32"
    assert line == [case, "forward", "0.084", "0.104", "0.0085", "", "0.004", "", "0.008", "no"]
    assert not any(other[4] for other in others)
    # The time in a graph decides, and the last row of a case counts.
    graph = anchored_row(first, 8.0, "graph")
    (line, *_) = anchor_lines(tmp_path, "router", [anchored_row(first, 9.0, "graph"), graph, eager])
    assert line[4:] == ["0.0085", "0.008", "0.004", "", "0.008", "yes"]
    (line, *_) = anchor_lines(tmp_path, "router", [graph], "zh")
    assert line[1::8] == ["前向", "是"]


@pytest.mark.parametrize("time_us, share", [(9.9, ""), (10.0, "40 %")])
def test_a_call_that_latency_bounds_has_no_share_of_the_roof(time_us, share, tmp_path):
    (line, *_) = anchor_lines(tmp_path, "router", [anchored_row(anchors_of("router")[0], time_us)])
    assert line[7] == share
    text = (tmp_path / "README.md").read_text()
    assert ("A time under 10 us is bound by latency and has no share of the roof.\n" in text) == (not share)


@pytest.mark.parametrize("after, mark", [(1900, ""), (1800, "†"), (None, "")])
def test_times_of_a_moved_clock_are_marked(after, mark, tmp_path):
    row = anchored_row(anchors_of("router")[0], 20.0, sm_mhz=[1950, after])
    (line, *_) = anchor_lines(tmp_path, "router", [row])
    assert line[4] == f"0.02{mark}"
    anchors, timings = (tmp_path / "README.md").read_text().split("<!-- /table -->")[:2]
    assert f"| triton | 0.020{mark} (0.020 – 0.020) |" in timings
    note = "† the SM clock moved by more than 3 %"
    assert (note in anchors, note in timings) == (bool(mark), bool(mark))


@pytest.mark.parametrize("uniform_us, expected", [(100.0, "yes"), (98.0, "yes"), (96.0, "no")])
def test_skewed_routing_is_held_against_uniform(uniform_us, expected, tmp_path):
    anchors = anchors_of("expert")
    hot = next(i for i, each in enumerate(anchors) if each["routing"] == "hot" and each["pass"] == FORWARD)
    rows = [anchored_row(anchors[hot], 100.0), anchored_row({**anchors[hot], "routing": "uniform"}, uniform_us)]
    line = anchor_lines(tmp_path, "expert", rows)[hot]
    assert line[0] == "T 4096, H 1024, E 16384, K 64, hot, bfloat16"
    assert line[8:] == ["as fast as uniform", expected]
    alone = anchor_lines(tmp_path, "expert", rows[:1])[hot]
    assert alone[9] == "no"


@pytest.mark.parametrize("time_us, expected", [(10.0, "yes"), (10.1, "no")])
def test_dense_products_are_held_against_gathering(time_us, expected, tmp_path):
    anchors = anchors_of("expert")
    dense = next(i for i, each in enumerate(anchors) if each.get("goal") == {"times_faster_than_gathering": 3})
    line = anchor_lines(tmp_path, "expert", [anchored_row(anchors[dense], time_us)])[dense]
    assert line[8:] == ["3 × as fast as gathering", expected]


@pytest.mark.parametrize(
    "ours_us, theirs_us, goal, holds",
    [
        ((100.0, None), (98.0, 120.0), ": 0.098", "yes"),
        ((102.0, None), (98.0, 120.0), ": 0.098", "no"),
        ((100.0, 90.0), (98.0, 85.0), ": 0.098, 0.085", "no"),
        ((100.0, 90.0), (None, None), "", "no"),
    ],
)
def test_the_mlp_is_held_against_pytorch_in_each_way_that_both_were_measured(ours_us, theirs_us, goal, holds, tmp_path):
    anchors = anchors_of("mlp")
    against = [i for i, each in enumerate(anchors) if each.get("goal", {}).get("as_fast_as")]
    assert len(against) == 6
    anchor = anchors[against[0]]
    rows = [
        anchored_row(anchor, time_us, launch, backend=backend)
        for backend, times in (("triton", ours_us), ("reference", theirs_us))
        for time_us, launch in zip(times, ("eager", "graph"), strict=True)
        if time_us and (backend == "triton" or launch == "eager" or ours_us[1])
    ]
    line = anchor_lines(tmp_path, "mlp", rows)[against[0]]
    assert line[8:] == [f"as fast as torch.compile and cuBLAS{goal}", holds]


def test_one_token_has_a_goal_in_a_graph_and_one_for_an_eager_call(tmp_path):
    anchors = anchors_of("layer")
    assert [(each["launch"], each["goal_ms"]) for each in anchors[:2]] == [("graph", 0.012), ("eager", 0.03)]
    rows = [anchored_row(anchors[0], time_us, launch) for time_us, launch in ((13.0, "graph"), (29.0, "eager"))]
    graph, eager = anchor_lines(tmp_path, "layer", rows)[:2]
    assert graph[0] == "T 1, H 1024, I 4096, E 16384, K 64, CUDA graph, bfloat16"
    assert graph[4:6] + graph[8:] == ["", "0.013", "0.012", "no"]
    assert eager[4:6] + eager[8:] == ["0.029", "", "0.03", "yes"]


def test_unknown_anchors_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"anchors.json: expected the anchors of 'coffee'; got none"):
        anchor_lines(tmp_path, "coffee", [])


# Pictures


def row_at(T, E, backend="triton", which=FORWARD, time=10.0, **more):
    return {
        "op": "flash_expert", "case": f"T {T}, H 8, E {E}, K 2", "backend": backend, "pass": which, "launch": "eager",
        "dtype": "bfloat16", "routing": "uniform", "sizes": {"T": T, "H": 8, "E": E, "K": 2}, "roof": "gather",
        "time_us": [time, 1.1 * time, 1.3 * time], "roof_us": 5.0, "roof_pct": 45.0, "gpu": "An H200", **more,
    }  # fmt: skip


def test_pictures_are_drawn_from_rows_alone(tmp_path):
    rows = [row_at(T, 16, backend) for T in (1, 16, 256) for backend in ("triton", "reference")]
    rows += [row_at(1, 16, launch="graph", case="T 1, H 8, E 16, K 2, CUDA graph"), row_at(16, 64), row_at(16, 256)]
    file = tmp_path / "rows.jsonl"
    stale = {**rows[0], "time_us": [99.0, 99.0, 99.0]}
    other = {"preset": "gpu", "steps": 3}
    file.write_text("\n".join(json.dumps(row) for row in (stale, other, *rows)) + "\n\n")
    read = plot.read_rows([file])
    assert len(read) == len(rows)
    assert stale not in read
    drawn = plot.draw_all(read, tmp_path / "plots")
    names = [f"flash_expert_an_h200_{name}.png" for name in ("time_T", "time_E", "roof")]
    assert [path.name for path in drawn] == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)

    (axes,) = plot.draw_times(read, "T").axes
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_xlabel()) == ("log", "log", "T")
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert lines["triton"] == [[1, 11], [16, 11], [256, 11]]
    assert set(lines) == {"triton", "PyTorch", "triton, CUDA graph", "roof"}
    assert [x for x, _ in lines["roof"]] == [1, 16, 256]
    (axes,) = plot.draw_times(read, "E").axes
    assert axes.get_xlabel() == "E"
    bars = plot.draw_shares(read).axes[0]
    assert [bar.get_width() for bar in bars.patches] == [45.0] * len(read)


def test_the_roof_beside_a_layer_is_the_layers():
    rows = [row_at(T, 16, backend, roof_us=roof) for T in (1, 4) for backend, roof in (("triton", 5), ("dense_mlp", 3))]
    (axes,) = plot.draw_times(rows, "T").axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert set(lines) == {"triton", "dense MLP, same arithmetic", "roof"}
    assert lines["roof"] == [[1, 5], [4, 5]]


def test_plot_reads_the_documents_rows_over_those_of_the_sweep(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "benchmarks" / "results"
    (results / "sweep").mkdir(parents=True)
    (results / "sweep" / "rows.jsonl").write_text("".join(json.dumps(row_at(T, 16)) + "\n" for T in (1, 16)))
    (results / "a.jsonl").write_text(json.dumps(row_at(16, 16, time=20.0)) + "\n")
    drawn = []
    monkeypatch.setattr(plot, "draw_all", lambda rows, out, anchors: drawn.append((rows, anchors)) or [])
    assert call(monkeypatch, "plot") == 0
    ((rows, anchors),) = drawn
    assert [(row["sizes"]["T"], row["time_us"][0]) for row in rows] == [(1, 10.0), (16, 20.0)]
    assert anchors is None


def test_what_does_not_vary_is_not_drawn_against():
    assert plot.draw_times([row_at(1, 16), row_at(16, 64)], "T") is None
    router = [{**row_at(4, 0), "op": "flash_router", "sizes": {"T": 4, "N": N, "K": 2}} for N in (8, 16)]
    assert plot.draw_times(router, "E").axes[0].get_xlabel() == "N"


def test_a_broken_file_of_rows_is_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row_at(1, 16)) + "\n{broken\n")
    with pytest.raises(ValueError, match=r"files: .*rows.jsonl, line 2"):
        plot.read_rows([file])


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("op", LETTERS)
def test_small_cases_on_a_gpu(op):
    names = ("triton", "torch", "reference", "pytorch_smart")
    rows = list(run_bench(Request([op], "small", names, seconds=0.02, commit="abc")))
    refusals = [row for row in rows if isinstance(row, Refusal)]
    assert not [refusal for refusal in refusals if refusal.is_failure or refusal.backend != "pytorch_smart"]
    rows = [row for row in rows if not isinstance(row, Refusal)]
    graphs = {(row["backend"], row["pass"]) for row in rows if row["launch"] == "graph"}
    assert ("triton", FORWARD) in graphs
    assert ("triton", BOTH if op == "layer" else BACKWARD) in graphs
    for row in rows:
        assert row["is_cold"]
        assert row["gpu"] == torch.cuda.get_device_name()
        if row["launch"] == "eager":
            assert row["launches"] >= 1
            assert row["peak_mib"] >= 0
