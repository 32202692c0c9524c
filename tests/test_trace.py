"""Traces: what they record of a call, what is computed from them, what they are written as, and the command."""

import itertools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from flash_moe import cli, flash_decode
from flash_moe._moe_layer import Routing
from flash_moe.bench import tracing
from flash_moe.bench.timeline import COLORS, draw_timeline
from flash_moe.schedule.policies import POLICIES
from flash_moe.schedule.tasks import Kind, Sizes
from flash_moe.schedule.trace import TaskSpan, Trace, WaitSpan
from flash_moe.testing import decode_arguments, make_decode_inputs

SIZES = "64x32x16x4"
IMAGES = Path(__file__).parents[1] / "docs" / "images"


def by_hand():
    """Two programs: one at work for 10 of 10 ns, the other for 2 of its first 4, waiting for the rest."""
    return Trace(
        policy="static", clock="logical", num_programs=2, sizes={"T": 1},
        tasks=[
            TaskSpan(0, "gate_up", 0, 4, 3, 7, (0, 8), 4000),
            TaskSpan(0, "down", 4, 10, 4, 7, (8, 16), 3000),
            TaskSpan(1, "gate_up", 2, 4, 5, 9, (0, 8), 2000),
        ],
        waits=[WaitSpan(1, "selection", 0, 2), WaitSpan(1, "gate-up tiles of slot 0", 4, 10)],
    )  # fmt: skip


def test_shares_and_rates_by_hand():
    trace = by_hand()
    assert trace.end_ns == 10
    assert trace.idle_share == pytest.approx(1 - 12 / 20)
    assert trace.idle_shares() == pytest.approx([0.0, 0.8])
    assert trace.bytes_per_second == pytest.approx(9000 / 10e-9)
    gate_up, down = trace.phases()
    assert (gate_up.kind, gate_up.start_ns, gate_up.end_ns, gate_up.num_tasks, gate_up.nbytes) == (
        "gate_up",
        0,
        4,
        2,
        6000,
    )
    assert gate_up.idle_share == pytest.approx(1 - 6 / 8)
    assert gate_up.bytes_per_second == pytest.approx(6000 / 4e-9)
    assert (down.kind, down.start_ns, down.end_ns) == ("down", 4, 10)
    assert down.idle_share == pytest.approx(0.5)
    assert [wait.ns for wait in trace.longest_waits()] == [6, 2]
    assert trace.longest_waits(1)[0].what == "gate-up tiles of slot 0"


def test_summary_says_it_in_words():
    lines = by_hand().summary().splitlines()
    assert lines[0] == "policy static, 2 programs, logical time; T 1"
    assert lines[1] == "0.01 us, 40.0% idle, 0.90 TB/s"
    assert lines[3].split() == ["gate_up", "0.00", "0.00", "2", "25.0%", "1.50"]
    assert lines[5] == "2 waits, 0.01 us in all; the longest:"
    assert lines[6] == "  0.01 us for gate-up tiles of slot 0: program 1 from 0.00 us"


def test_chrome_events(tmp_path):
    path = tmp_path / "trace.json"
    by_hand().write_chrome(path)
    written = json.loads(path.read_text())
    assert written["otherData"] == {"policy": "static", "clock": "logical", "T": 1}
    names = [event for event in written["traceEvents"] if event["ph"] == "M"]
    assert [event["args"]["name"] for event in names] == ["program 0", "program 1"]
    spans = [event for event in written["traceEvents"] if event["ph"] == "X"]
    assert [(event["name"], event["cat"], event["tid"]) for event in spans] == [
        ("gate_up", "task", 0), ("down", "task", 0), ("gate_up", "task", 1), ("wait for selection", "wait", 1),
        ("wait for gate-up tiles of slot 0", "wait", 1),
    ]  # fmt: skip
    assert (spans[1]["ts"], spans[1]["dur"]) == (0.004, 0.006)
    assert spans[1]["args"] == {"task": 4, "expert": 7, "tile": [8, 16], "bytes": 3000}


def test_steps_of_the_clock():
    trace = by_hand()
    assert trace.step_ns == 2
    trace.waits.append(WaitSpan(0, "an order", 10, 11))
    assert trace.step_ns == 1
    trace.clock = "GPU"
    assert trace.summary().splitlines()[0] == "policy static, 2 programs, GPU time in steps of 1 ns; T 1"


@pytest.mark.parametrize("clock, scale, is_said", [("GPU", 51, True), ("GPU", 50, False), ("logical", 51, False)])
def test_a_timer_of_coarse_steps_is_said(clock, scale, is_said):
    trace = by_hand()
    trace.clock = clock
    for spans in (trace.tasks, trace.waits):
        spans[:] = [replace(x, start_ns=x.start_ns * scale, end_ns=x.end_ns * scale) for x in spans]
    assert trace.step_ns == 2 * scale
    said = "the GPU's timer has steps of 102 ns, more than 100: tasks and waits that are shorter cannot be told apart"
    assert (said in trace.summary()) == is_said


def test_missing_records_are_said():
    trace = by_hand()
    assert "missing" not in trace.summary()
    assert "missing" not in trace.to_chrome()["otherData"]
    trace.num_lost = 7
    assert (
        trace.summary().splitlines()[-1] == "7 tasks and waits are missing: programs had no room to record more of them"
    )
    assert trace.to_chrome()["otherData"]["missing"] == 7
    trace.begin("queue", "GPU", 2, {})
    assert trace.num_lost == 0


@pytest.mark.parametrize("num_programs", [2, 40, 264])
def test_every_program_is_seen_in_the_picture(num_programs, tmp_path):
    """Every second one is at work, all the time: along a column of pixels colours and white take turns."""
    trace = Trace(
        policy="static", clock="GPU", num_programs=num_programs,
        tasks=[TaskSpan(program, "gate_up", 0, 1000) for program in range(0, num_programs, 2)],
    )  # fmt: skip
    draw_timeline(trace, tmp_path / "trace.png")
    picture = imread(tmp_path / "trace.png")[:, :, :3]
    red, _, blue = picture[:, picture.shape[1] // 2].T
    is_blue = (red < 0.2) & (blue > 0.6)
    starts = (is_blue[1:] & ~is_blue[:-1]).nonzero()[0]
    assert len(starts) == num_programs // 2
    assert is_blue.sum() >= 4 * len(starts)


def test_an_empty_trace_has_no_surprises(tmp_path):
    trace = Trace()
    assert (trace.end_ns, trace.idle_share, trace.bytes_per_second, trace.phases()) == (0, 0.0, 0.0, [])
    assert trace.step_ns == 0
    assert "0 waits" in trace.summary()
    draw_timeline(trace, tmp_path / "empty.png")


@pytest.mark.parametrize("policy", POLICIES)
def test_a_call_fills_its_trace(policy):
    x, layer = make_decode_inputs(3, 64, 48, 16, Routing(2), torch.float32, "cpu", shared_intermediate_size=24)
    trace = Trace()
    out, logits = flash_decode(x, **decode_arguments(layer), policy=policy, trace=trace, return_router_logits=True)
    assert torch.equal(out, flash_decode(x, **decode_arguments(layer)))
    assert (trace.policy, trace.clock, trace.sizes) == (policy, "logical", {"T": 3, "H": 64, "I": 48, "E": 16, "K": 2})
    experts = set(logits.topk(2).indices.flatten().tolist())
    for kind in ("gate_up", "down"):
        spans = [span for span in trace.tasks if span.kind == kind]
        assert {span.expert for span in spans} == experts | {None}  # None: the shared one
    assert {span.kind for span in trace.tasks} - {"dispatch"} == {kind.name.lower() for kind in Kind}
    weights = [
        *(layer.gate_up_proj[list(experts)], layer.down_proj[list(experts)]),
        layer.router_weight,
        *layer.shared[:3],
    ]
    assert trace.nbytes == sum(x.nbytes for x in weights)


@pytest.mark.parametrize("policy", POLICIES)
def test_no_program_does_two_things_at_once(policy):
    trace = tracing.simulate(Sizes(9, 64, 32, 16, 4, 8), policy, 6, seed=1)
    for program in range(6):
        spans = [span for span in (*trace.tasks, *trace.waits) if span.program == program]
        spans.sort(key=lambda span: (span.start_ns, span.end_ns))
        for earlier, later in itertools.pairwise(spans):
            assert earlier.start_ns < earlier.end_ns <= later.start_ns


def test_every_call_starts_the_trace_anew():
    trace = Trace()
    for T in (3, 1, 0):
        x, layer = make_decode_inputs(T, 16, 8, 4, Routing(2), torch.float32, "cpu")
        flash_decode(x, **decode_arguments(layer), trace=trace)
        assert trace.sizes["T"] == T
        once = len(trace.tasks)
        flash_decode(x, **decode_arguments(layer), trace=trace)
        assert len(trace.tasks) == once
    assert trace.tasks == []


# The command


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["flash-moe", "trace", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code or 0


@pytest.mark.parametrize("policy", ["auto", *POLICIES])
def test_trace_command_writes_three_files(policy, monkeypatch, capsys, tmp_path):
    out = tmp_path / "new" / "folder"
    options = {"--model": SIZES, "--tokens": 4, "--policy": policy, "--programs": 8, "--out": out}
    assert call(monkeypatch, "--simulate", *itertools.chain(*options.items())) == 0
    stem = f"{SIZES}_T4_{'static' if policy == 'auto' else policy}"
    assert {path.name for path in out.iterdir()} == {f"{stem}{ending}" for ending in (".json", ".png", ".txt")}
    printed = capsys.readouterr().out
    summary = (out / f"{stem}.txt").read_text()
    assert summary in printed
    ran = "static" if policy == "auto" else policy
    assert f"\ntraced: the schedule on a simulated GPU, policy {ran}; an untraced call with policy auto" in summary
    assert "8 programs, logical time; T 4, H 64, I 32, E 16, K 4" in summary
    assert (out / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / f"{stem}.json").read_text())["otherData"]["policy"] in POLICIES


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU its kernel is traced")
def test_without_a_gpu_the_machine_is_simulated(monkeypatch, capsys, tmp_path):
    assert call(monkeypatch, "--model", SIZES, "--out", tmp_path) == 0
    assert "132 programs, logical time; T 1" in capsys.readouterr().out
    assert call(monkeypatch, "--model", SIZES, "--no-simulate", "--out", tmp_path / "none") == 2
    error = capsys.readouterr().err
    assert "simulate: expected --simulate, since the kernel cannot run: there is no CUDA GPU" in error
    assert not (tmp_path / "none").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["auto", *POLICIES])
def test_with_a_gpu_its_kernel_is_traced(policy, monkeypatch, capsys, tmp_path):
    assert call(monkeypatch, "--model", "256x128x32x4", "--tokens", 3, "--policy", policy, "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\d+ programs, GPU time in steps of \d+ ns; T 3, H 256, I 128, E 32, K 4", printed)
    (written,) = tmp_path.glob("*.json")
    found = json.loads(written.read_text())
    ran = found["otherData"]["policy"]
    assert f"\ntraced: the kernel that runs the schedule, policy {ran}; an untraced call with policy auto" in printed
    assert ran in ((policy,) if policy != "auto" else POLICIES)
    kinds = {event["name"] for event in found["traceEvents"] if event.get("cat") == "task"}
    assert kinds - {"dispatch"} == {kind.name.lower() for kind in Kind}
    assert len(list(tmp_path.glob("*.png"))) == len(list(tmp_path.glob("*.txt"))) == 1
    assert call(monkeypatch, "--model", SIZES, "--programs", 8, "--out", tmp_path) == 2
    assert "programs: expected to be given with --simulate only; got 8" in capsys.readouterr().err


@pytest.mark.parametrize("model", tracing.MODELS)
def test_models_have_their_sizes(model):
    sizes = tracing.find_sizes(model, 1)
    trace = tracing.simulate(sizes, "static", 132, seed=0)
    experts = 3 * sizes.H * sizes.I * sizes.K + 3 * sizes.H * sizes.shared_intermediate_size
    assert trace.nbytes == 2 * (experts + sizes.E * sizes.H)
    assert trace.bytes_per_second < 4.27e12


@pytest.mark.parametrize("policy", ["static", "queue"])
def test_logical_time_is_near_a_gpus(policy):
    """Of the committed trace of an H200; ``Rates`` says so, and what it says of the actor is none of it."""
    summary = (IMAGES / f"decode_trace_{policy}.txt").read_text()
    assert summary.startswith(
        f"policy {policy}, 264 programs, GPU time in steps of 32 ns; T 8, H 2048, I 768, E 128, K 8"
    )
    measured = float(re.search(r"^([\d.]+) us,", summary, re.MULTILINE)[1])
    trace = tracing.simulate(tracing.find_sizes("qwen3-30b-a3b", 8), policy, 264, seed=0)
    assert trace.end_ns / 1e3 == pytest.approx(measured, rel=0.1)


def test_seed_changes_the_experts_and_nothing_else_does():
    sizes = tracing.find_sizes(SIZES, 3)
    first, again, other = (tracing.simulate(sizes, "queue", 8, seed) for seed in (0, 0, 1))
    assert first == again
    assert {span.expert for span in first.tasks} != {span.expert for span in other.tasks}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "gpt"], "model: expected one of qwen3-30b-a3b, .*, or sizes HxIxExK; got 'gpt'"),
        (["--model", "64x32x16"], "model: expected"),
        (["--model", "64x32x2x4"], "K: expected an integer from 1 to 2; got 4"),
        (["--tokens", "0"], "tokens: expected at least 1; got 0"),
        (["--policy", "fifo"], "policy: expected one of auto, static, queue, actor; got 'fifo'"),
        (["--programs", "0"], "num_programs: expected an integer from 1"),
        (["--programs", "1", "--policy", "actor"], "programs: expected at least 2"),
    ],
)
def test_mistakes_are_one_line(arguments, message, monkeypatch, capsys, tmp_path):
    assert call(monkeypatch, "--simulate", *arguments, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("flash-moe: error: ")
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert not (tmp_path / "out").exists()


def test_every_kind_has_a_color():
    assert set(COLORS) == {kind.name.lower() for kind in Kind} | {"dispatch"}
