"""flash-moe bench decode: what it refuses, what it counts, what its rows say, what is drawn from them."""

import importlib.util
import json
import sys
import types
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import flash_moe
from flash_moe import cli, flash_decode
from flash_moe.bench import competitors, decode, decode_competitors, plot
from flash_moe.bench.checks import MismatchError
from flash_moe.bench.decode_cases import (
    DecodeCase,
    count_decode_work,
    count_experts,
    draw_tokens,
    find_decode_cases,
    make_pools,
)
from flash_moe.bench.decode_checks import check_decode, find_truth, tied_share
from flash_moe.bench.decode_competitors import Absence, bind_block, find_decode_competitors
from flash_moe.bench.rows import Refusal, Request
from flash_moe.bench.run import run_bench
from flash_moe.bench.timing import CpuTimer, CudaTimer, Replayed
from flash_moe.ops._reference.decode import decode_reference
from flash_moe.schedule.policies import POLICIES

ROOT = Path(flash_moe.__file__).parent.parent
CPU = torch.device("cpu")
MODEL = "24x17x9x3"


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def no_peers(monkeypatch):
    monkeypatch.setattr(decode_competitors, "find_spec", lambda name: None)


def make_case(T=5, format="float32"):
    (case,) = find_decode_cases(f"{MODEL}:T{T}", (format,), "cpu")
    return case


def make_inputs(case):
    return [draw_tokens(case, *pool) for pool in make_pools(case, CPU)]


def names_of(found):
    return [each.name for each in found]


def measure(*backends, case=f"{MODEL}:T1,5", policies=(), formats=()):
    request = Request(["decode"], case, backends, seconds=1e-3, commit="abc", policies=policies, formats=formats)
    return list(run_bench(request))


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["flash-moe", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code or 0


# Cases


def test_default_cases():
    on_gpu, on_cpu = (find_decode_cases(None, (), device_type) for device_type in ("cuda", "cpu"))
    assert [case.name for case in on_gpu] == [f"qwen3-30b-a3b:T{2**i}" for i in range(8)]
    assert {(case.sizes[1:], case.dtype, case.format) for case in on_gpu} == {
        ((2048, 768, 128, 8), torch.bfloat16, "bfloat16")
    }
    assert {case.dtype for case in on_cpu} == {torch.float32}
    assert on_gpu[3].by_letter == {"T": 8, "H": 2048, "I": 768, "E": 128, "K": 8}
    both = find_decode_cases("qwen3-30b-a3b:T1,8", ("float16", "fp8_block"), "cuda")
    assert [(case.T, case.dtype_name, case.dtype) for case in both] == [
        (T, format, dtype)
        for format, dtype in (("float16", torch.float16), ("fp8_block", torch.bfloat16))
        for T in (1, 8)
    ]


def test_tokens_that_do_not_tie_are_preferred():
    case = make_case(T=100, format="bfloat16")
    (pool, layer), *_ = make_pools(case, CPU)
    inputs = draw_tokens(case, pool, layer)
    few = draw_tokens(make_case(T=3, format="bfloat16"), pool, layer)
    assert torch.equal(few.tokens, inputs.tokens[:3])
    assert 0 < inputs.pool_tied_share < 1
    assert not inputs.is_tied.any()
    assert tied_share([inputs]) == 0
    flat = draw_tokens(case, pool, layer._replace(router_weight=torch.zeros_like(layer.router_weight)))
    assert flat.is_tied.all()
    with pytest.raises(MismatchError, match=r"100.0% of the rows tie, less than 5% expected"):
        tied_share([flat])
    everything = layer._replace(routing=layer.routing._replace(num_experts_per_tok=9))
    assert not draw_tokens(case, pool, everything).is_tied.any()


@pytest.mark.parametrize("format, scales_nbytes", [("float32", 0), ("fp8_row", 4 * (2 * 17 + 24)), ("fp8_block", 8)])
def test_bytes_are_those_of_the_experts_hit(format, scales_nbytes):
    case = make_case(format=format)
    inputs = make_inputs(case)
    T, H, I, E, K = case.sizes
    hit = [len({i for row in each.logits.topk(K).indices.tolist() for i in row}) for each in inputs]
    assert [count_experts(each) for each in inputs] == hit
    itemsize = 1 if scales_nbytes else 4
    work = count_decode_work(case, inputs)
    assert work.nbytes == 4 * (E * H + 2 * T * H) + sum(hit) * (3 * H * I * itemsize + scales_nbytes) // len(hit)
    assert work.flops == 2 * T * E * H + 6 * T * K * H * I


# Competitors


def test_ours_is_measured_for_each_policy_that_it_takes(no_peers, monkeypatch):
    case = make_case()
    first = make_inputs(case)[0]
    find = partial(find_decode_competitors, case, first, CPU)
    assert names_of(find(("torch",), ())) == [f"torch_{policy}" for policy in POLICIES]
    assert names_of(find((), ()))[-1] == "reference"

    def refuses(*args, policy, **kwargs):
        if policy != "auto":
            raise ValueError("policy: runs no schedule")
        return flash_decode(*args, policy=policy, **kwargs)

    monkeypatch.setattr(decode_competitors, "flash_decode", refuses)
    (only,) = find(("torch",), ())
    assert (only.name, only.policy, only.is_ours) == ("torch", "auto", True)
    assert find(("torch",), ("queue",)) == [Absence("torch_queue", "policy: runs no schedule")]

    def refuses_all(*args, **kwargs):
        raise ValueError("hidden_states: too many tokens")

    monkeypatch.setattr(decode_competitors, "flash_decode", refuses_all)
    assert find(("torch",), ()) == [Absence("torch", "hidden_states: too many tokens")]


def test_one_launch_is_measured_as_it_is_by_default_too(monkeypatch):
    monkeypatch.setattr(decode_competitors, "why_not_decode", lambda name, device: None)
    monkeypatch.setattr(decode_competitors, "_refusal", lambda backend, policy, first: None)
    case = make_case()
    found = find_decode_competitors(case, make_inputs(case)[0], CPU, ("triton",), ())
    assert names_of(found) == ["triton", *(f"triton_{policy}" for policy in POLICIES)]


def test_what_copies_every_pair_stops_at_16_tokens():
    case = make_case(T=17)
    found = find_decode_competitors(case, make_inputs(case)[0], CPU, ("torch_compile",), ())
    assert [type(each) for each in found] == [Absence]
    assert "at most 16 tokens" in found[0].reason


def test_compiled_competitor_is_right(monkeypatch):
    monkeypatch.setattr(competitors, "COMPILER", "aot_eager")
    case = make_case(format="bfloat16")
    inputs = make_inputs(case)
    (compiled,) = find_decode_competitors(case, inputs[0], CPU, ("torch_compile",), ())
    calls = [compiled.bind(each) for each in inputs]
    error, difference = check_decode(case, compiled, inputs, calls, [find_truth(each, False) for each in inputs])
    assert error < 0.01
    assert difference is None
    competitors.free_competitor("torch_compile")


def fake_modules(monkeypatch, **modules):
    for name, functions in modules.items():
        monkeypatch.setitem(sys.modules, name.replace("__", "."), types.SimpleNamespace(**functions))
    monkeypatch.setattr(decode_competitors, "why_not_decode", lambda name, device: None)


def experts_of(x, gate_up_proj, down_proj, weights, indices):
    """What a serving engine's fused experts compute, from weights and indices alone."""
    gate, up = torch.einsum("tkih,th->tki", gate_up_proj[indices], x).chunk(2, dim=-1)
    return torch.einsum("tkhi,tki->th", down_proj[indices], F.silu(gate) * up * weights[..., None])


def test_serving_engines_take_our_weights(monkeypatch, no_gpu):
    def fused_topk(x, logits, topk, renormalize):
        values, indices = logits.topk(topk)
        return values.softmax(-1), indices, None

    config = lambda **options: types.SimpleNamespace(**options)  # noqa: E731
    fake_modules(
        monkeypatch,
        vllm__model_executor__layers__fused_moe={"fused_topk": fused_topk, "fused_experts": experts_of},
        sglang__srt__layers__moe__topk={
            "TopKConfig": config,
            "select_experts": lambda x, logits, c: fused_topk(x, logits, c.top_k, c.renormalize)[:2],
        },
        sglang__srt__layers__moe__moe_runner={"MoeRunnerConfig": config},
        sglang__srt__layers__moe__fused_moe_triton__fused_moe={
            "fused_moe": lambda x, w1, w2, chosen, moe_runner_config: experts_of(x, w1, w2, *chosen)
        },
    )
    case = make_case()
    inputs = make_inputs(case)
    for name in ("vllm", "sglang"):
        (engine,) = find_decode_competitors(case, inputs[0], CPU, (name,), ())
        truths = [find_truth(each, False) for each in inputs]
        error, _ = check_decode(case, engine, inputs, [engine.bind(each) for each in inputs], truths)
        assert error < 1e-5
        (fp8,) = find_decode_competitors(case, make_inputs(make_case(format="fp8_row"))[0], CPU, (name,), ())
        assert isinstance(fp8, Absence)


def test_an_engine_of_another_version_is_left_out(monkeypatch, no_gpu):
    fake_modules(monkeypatch, vllm__model_executor__layers__fused_moe={})
    monkeypatch.setattr(decode, "why_not_decode", lambda name, device: "not here")
    refusals = measure("vllm", case=f"{MODEL}:T1")
    assert [(each.backend, each.is_failure) for each in refusals] == [("vllm", False)]
    assert "vllm has another interface here" in refusals[0].reason


def test_blocks_of_transformers(no_gpu):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("transformers")
    inputs = make_inputs(make_case(format="bfloat16"))[0]
    block = bind_block(inputs, "grouped_mm")
    assert block.experts.gate_up_proj.data_ptr() == inputs.layer.gate_up_proj.data_ptr()
    assert block.experts.down_proj.data_ptr() == inputs.layer.down_proj.data_ptr()
    rows = measure("torch", *decode_competitors.TRANSFORMERS, case="16x8x9x3:T1,17", formats=("bfloat16",))
    refusals = [row for row in rows if isinstance(row, Refusal)]
    assert [(each.backend, each.case.T) for each in refusals] == [("transformers_batched_mm", 17)]
    rows = [row for row in rows if not isinstance(row, Refusal)]
    assert {row["backend"] for row in rows} >= {*decode_competitors.TRANSFORMERS, "torch_actor"}
    for row in rows:
        assert row["error"] < 0.02
        if row["backend"].startswith("torch"):
            assert row["difference_from_transformers"] < 0.01


# Rows


def load_tables():
    spec = importlib.util.spec_from_file_location("tables_of_decode", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("format", ["float32", "bfloat16", "fp8_row", "fp8_block"])
def test_rows_are_complete(format, no_gpu, no_peers):
    rows = measure("torch", "reference", formats=(format,))
    assert [(row["sizes"]["T"], row["backend"], row["policy"]) for row in rows] == [
        (T, backend, policy)
        for T in (1, 5)
        for backend, policy in (*((f"torch_{policy}", policy) for policy in POLICIES), ("reference", None))
    ]
    tables = load_tables()
    for row in rows:
        tables.check_row(json.loads(json.dumps(row)))
        assert tables.table_of(row) == "cpu flash_decode"
        assert row["case"] == f"{MODEL}, T {row['sizes']['T']}"
        assert (row["dtype"], row["launch"], row["launches"], row["layers"]) == (format, "eager", None, 2)
        assert 3 <= row["experts_hit"] <= 9
        assert row["tied_pct"] < 5
        assert row["roof_pct"] == pytest.approx(100 * row["roof_us"] / row["time_us"][1], rel=0.01)
        assert row["error"] < (1e-5 if row["dtype"] != "bfloat16" else 0.01)


class FakeCudaTimer(CudaTimer):
    """A graph that is no graph, on a CPU."""

    def __init__(self, seconds):
        self.timer, self.free = CpuTimer(seconds), lambda: None
        self.warm_up, self.time_eager = self.timer.warm_up, self.timer.time_eager

    def time_graph(self, prepare):
        calls = [each() for each in prepare]
        times = self.time_eager(lambda: [call() for call in calls])
        return Replayed([time / len(calls) for time in times], calls[0]() * self.fault, 3)

    fault = 1.0


@pytest.mark.parametrize("fault", [1.0, 1.01])
def test_graphs_of_all_but_loops(fault, no_gpu, no_peers, monkeypatch):
    monkeypatch.setattr(FakeCudaTimer, "fault", fault)
    monkeypatch.setattr(decode, "make_timer", lambda device, seconds: FakeCudaTimer(seconds))
    monkeypatch.setattr(decode, "count_launches", lambda call: 7)
    found = measure("torch", "reference", case=f"{MODEL}:T1", policies=("static",))
    rows = [row for row in found if not isinstance(row, Refusal)]
    eager = [(row["backend"], row["launch"], row["launches"]) for row in rows if row["launch"] == "eager"]
    assert eager == [("torch_static", "eager", 7), ("reference", "eager", 7)]
    graphs = [row for row in found if row not in rows or row["launch"] == "graph"]
    if fault == 1.0:
        assert [(row["backend"], row["case"]) for row in graphs] == [("torch_static", f"{MODEL}, T 1, CUDA graph")]
    else:
        assert [(each.backend, each.launch, each.is_failure) for each in graphs] == [("torch_static", "graph", True)]
        assert "replayed output" in graphs[0].reason


@pytest.mark.parametrize(
    "what, message", [("output", "budget"), ("logits", "router logits differ"), ("competitor", "relative RMS error")]
)
def test_wrong_numbers_get_no_row_and_exit_code_1(what, message, monkeypatch, capsys, tmp_path, no_gpu, no_peers):
    def wrong(*args, backend, return_router_logits=False, **kwargs):
        out, logits = flash_decode(*args, backend=backend, return_router_logits=True, **kwargs)
        factor = 1.02 if what == ("competitor" if backend == "reference" else "output") else 1.0
        return (out * factor, logits * (1.02 if what == "logits" else 1.0)) if return_router_logits else out * factor

    monkeypatch.setattr(decode_competitors, "flash_decode", wrong)
    out = tmp_path / "rows.jsonl"
    options = ["--backend", "torch", "--backend", "reference", "--policy", "queue", "--case", f"{MODEL}:T2"]
    assert call(monkeypatch, "bench", "decode", *options, "--seconds", 0.001, "--commit", "abc", "--out", out) == 1
    (row,) = map(json.loads, out.read_text().splitlines())
    assert row["backend"] == ("torch_queue" if what == "competitor" else "reference")
    printed = capsys.readouterr().out
    assert f"FAILED: decode {MODEL}, T 2, float32" in printed
    assert message in printed


def test_the_share_of_tied_rows_is_printed_once_a_case(monkeypatch, capsys, tmp_path, no_gpu, no_peers):
    options = ["--backend", "torch", "--backend", "reference", "--case", f"{MODEL}:T1,2", "--dtype", "bfloat16"]
    out = tmp_path / "rows.jsonl"
    assert call(monkeypatch, "bench", "decode", *options, "--seconds", 0.001, "--commit", "abc", "--out", out) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    printed = capsys.readouterr().out.splitlines()
    for T in (1, 2):
        row = next(row for row in rows if row["sizes"]["T"] == T)
        shares = f"{row['tied_pct']:.1f} % of the rows tie, of all to draw from {row['tied_pct_of_pool']:.1f} %"
        assert printed.count(f"{MODEL}, T {T}, bfloat16: {shares}") == 1
    assert sum("rows tie" in line for line in printed) == 2


def test_our_difference_from_the_block_is_bounded():
    case = make_case()
    inputs = make_inputs(case)
    (ours, *_) = find_decode_competitors(case, inputs[0], CPU, ("torch",), ("static",))
    calls = [ours.bind(each) for each in inputs]
    truths = [find_truth(each, False) for each in inputs]
    near, far = (
        [truth.__class__(truth.exact, truth.low, truth.low * factor) for truth in truths] for factor in (1.005, 1.02)
    )
    assert check_decode(case, ours, inputs, calls, near)[1] == pytest.approx(0.005, rel=0.01)
    with pytest.raises(MismatchError, match=r"difference from transformers' block: relative RMS error"):
        check_decode(case, ours, inputs, calls, far)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["decode", "--case", "gpt"], "case: expected one of anchors, small, or qwen3-30b-a3b or sizes HxIxExK"),
        (["decode", "--case", "qwen3-30b-a3b:T0"], "case: expected"),
        (["decode", "--case", "qwen3-30b-a3b:T129"], "at most 128; got 'qwen3-30b-a3b:T129'"),
        (["decode", "--backend", "magic"], "backend: expected one of triton, torch, reference, transformers_eager"),
        (["decode", "--backend", "vllm"], "backend: vllm cannot run here: its kernels need a CUDA GPU"),
        (["decode", "--backend", "transformers_eager"], "transformers is not installed"),
        (["decode", "--policy", "chaos"], "policy: expected one of auto, static, queue, actor; got 'chaos'"),
        (["decode", "--dtype", "int4"], "dtype: expected one of bfloat16, float16, float32, fp8_row, fp8_block"),
        (["mlp", "--policy", "queue"], "policy: expected only with decode; got queue"),
        (["mlp", "--dtype", "float16"], "dtype: expected only with decode; got float16"),
    ],
    ids=" ".join,
)
def test_mistakes_are_said_before_anything_is_measured(
    monkeypatch, capsys, tmp_path, no_gpu, no_peers, arguments, message
):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "bench", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_there_is_no_backward(no_gpu):
    assert list(run_bench(Request(["decode"], passes=("bwd",), seconds=1e-3, commit="abc"))) == []


# Pictures and tables


def row_at(T, backend="triton_static", launch="graph", time=20.0, **more):
    text = f"qwen3-30b-a3b, T {T}" + (", CUDA graph" if launch == "graph" else "")
    return {
        "op": "flash_decode", "case": text, "model": "qwen3-30b-a3b", "backend": backend, "pass": "forward",
        "launch": launch, "dtype": "bfloat16", "routing": None, "time_us": [time, time, time],
        "sizes": {"T": T, "H": 2048, "I": 768, "E": 128, "K": 8}, "roof": "stream", "roof_us": 15.0, "roof_pct": 75.0,
        "experts_hit": 8.0, "launches": 1 if launch == "eager" else None, "gpu": "NVIDIA H200", "torch": "2",
        "triton": "3", "commit": "0123456789", "date": "2026-01-02", **more,
    }  # fmt: skip


def test_pictures_are_drawn_from_rows_alone(tmp_path):
    backends = {"triton_static": 1, "triton_queue": 1, "vllm": 8}
    rows = [
        row_at(T, backend, launch, launches=count if launch == "eager" else None)
        for T in (1, 2, 128)
        for backend, count in backends.items()
        for launch in ("graph", "eager")
    ]
    drawn = plot.draw_all(rows, tmp_path)
    assert [path.name for path in drawn] == [f"flash_decode_nvidia_h200_{name}.png" for name in ("time_T", "launches")]
    graph, eager = plot.draw_decode_times(rows).axes
    assert "CUDA graph" in graph.get_title()
    assert "eager" in eager.get_title()
    lines = {line.get_label(): line.get_xydata().tolist() for line in graph.get_lines()}
    assert lines["roof"] == [[1, 15], [2, 15], [128, 15]]
    assert set(lines) == {"ours, static", "ours, queue", "vLLM", "roof"}
    for axes, T in zip(plot.draw_launches(rows).axes, (1, 128), strict=True):
        assert axes.get_title() == f"T {T}"
        assert sorted(bar.get_width() for bar in axes.patches) == [1, 1, 8]
    assert plot.draw_launches([row for row in rows if row["launch"] == "graph"]) is None


def test_goals_and_engines_stand_in_the_pictures(tmp_path):
    anchors = json.loads((ROOT / "benchmarks" / "anchors.json").read_text())
    rows = [
        row_at(T, backend, launch) for T in (1, 3) for backend in ("triton", "vllm") for launch in ("graph", "eager")
    ]
    graph, eager = plot.draw_decode_times(rows, anchors["decode"]).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in graph.get_lines()}
    assert set(lines) == {
        "ours, auto", "vLLM", "roof", "goal",
        *(f"{name} (measured apart)" for name in ("vLLM", "vLLM, tiles tuned again", "SGLang", "FlashInfer")),
    }  # fmt: skip
    assert lines["goal"][0] == [1, 21]
    assert lines["SGLang (measured apart)"][-1] == [128, 309.8]
    (eager_goal,) = (line for line in eager.get_lines() if line.get_label() == "goal")
    assert eager_goal.get_xydata().tolist()[0] == [1, 32]
    first, second = plot.draw_launches(rows, anchors["decode"]).axes
    bars = dict(zip((label.get_text() for label in first.get_yticklabels()), first.patches, strict=True))
    widths = {label: bar.get_width() for label, bar in bars.items()}
    engines = {"FlashInfer (measured apart)": 7, "vLLM (measured apart)": 8, "SGLang (measured apart)": 9}
    assert widths == {"ours, auto": 1, "vLLM": 1, **engines}
    assert {"7", "7 – 8", "8 – 9"} <= {text.get_text().strip() for text in first.texts}
    assert len(second.patches) == 2  # no engine was measured on three tokens
    alone, with_anchors = (
        plot.draw_all([row_at(1, gpu=gpu)], tmp_path / gpu, anchors)[0].stat().st_size
        for gpu in ("Another", anchors["gpu"])
    )
    assert alone < with_anchors


def decode_document(tmp_path, *rows):
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (tmp_path / "benchmarks" / "anchors.json").write_text((ROOT / "benchmarks" / "anchors.json").read_text())
    (results / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "README.md").write_text("<!-- table: gpu flash_decode -->\n<!-- /table -->\n")
    tables = load_tables()
    assert tables.main(["--root", str(tmp_path)]) == 0
    assert tables.main(["--root", str(tmp_path), "--check"]) == 0
    return (tmp_path / "README.md").read_text().splitlines()


def test_goals_stand_without_rows(tmp_path):
    lines = decode_document(tmp_path)
    assert "| goal, CUDA graph | 21 | 38 | 67 | 117 | 188 | 252 | 288 | 295 |  |" in lines
    assert "| goal, eager | 32 | 46 | 75 | 125 | 195 | 260 | 295 | 302 |  |" in lines
    assert "| floor: the same bytes read once |" + "  |" * 9 in lines
    assert "| goal, CUDA graph | 13 |  |" in lines


def test_times_stand_beside_goals(tmp_path):
    rows = [row_at(1), row_at(2, time=39.0), row_at(1, launch="eager", time=30.0), row_at(4, "transformers_eager")]
    rows.append(row_at(4, "triton_queue", sm_mhz=[1980, 1800]))
    lines = decode_document(tmp_path, row_at(1, time=1.0), *rows, row_at(3, gpu="Another GPU"))
    assert "| distinct experts hit | 8 | 8 | 8 |  |  |  |  |  |  |" in lines
    assert "| triton_static, CUDA graph | **20.0** (75 %) | 39.0 (38 %) |  |  |  |  |  |  | 1 |" in lines
    assert "| triton_static, eager | **30.0** (50 %) |" + "  |" * 7 + " 1 |" in lines
    assert "| transformers_eager, CUDA graph |  |  | 20.0 (75 %) |  |  |  |  |  |  |" in lines
    assert "| triton_static, CUDA graph | 20.0 (75 %) |  |" in lines  # another GPU has no goals
    (moved,) = (line for line in lines if line.startswith("| triton_queue, CUDA graph |"))
    assert "**20.0**† (75 %)" in moved
    first, second = (i for i, line in enumerate(lines) if line.startswith("qwen3-30b-a3b, bfloat16, "))
    assert "NVIDIA H200" in lines[first]
    assert "Another GPU" in lines[second]


# On a GPU


@pytest.mark.gpu
def test_small_cases_on_a_gpu():
    found = measure("triton", "torch", "reference", case="64x48x16x4:T1,3", formats=("bfloat16",))
    assert not [each for each in found if isinstance(each, Refusal) and each.is_failure]
    rows = [row for row in found if not isinstance(row, Refusal)]
    ours = [row for row in rows if row["backend"].startswith("triton")]
    assert {(row["sizes"]["T"], row["launch"]) for row in ours} == {
        (T, how) for T in (1, 3) for how in ("eager", "graph")
    }
    assert {row["launches"] for row in ours if row["launch"] == "eager"} == {1}
    assert all(row["is_cold"] and row["layers"] == 8 for row in rows)


def test_cases_are_cases():
    assert isinstance(make_case(), DecodeCase)
    inputs = make_inputs(make_case())[0]
    assert torch.equal(decode_reference(inputs.tokens, inputs.layer)[1], inputs.logits)
