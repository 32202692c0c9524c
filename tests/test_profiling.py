"""The profile of a training step: whose each kernel is, and how long a part keeps the device busy."""

import io

import pytest
import torch
from rich.console import Console
from test_training import TINY_MODEL

from flash_moe.training.loop import METRICS_FILE, PROFILE_FILE, read_json_lines, start_run, train
from flash_moe.training.model import LanguageModel, LanguageModelConfig
from flash_moe.training.presets import TrainConfig
from flash_moe.training.profiling import CLIPPING, OPTIMIZER, REST, Item, StepProfile, describe, profile_step, summarize

MOE, ATTENTION, NORMS = "FlashMoE layers", "attention", "norms"


def call(number, name, start, duration, *, category="cpu_op", thread=1, node=None):
    """What the host does, in us; ``node`` is the number of the next node of autograd, or in a backward of its own."""
    args = {"External id": number} | ({} if node is None else {"Sequence number": node})
    return {"ph": "X", "cat": category, "name": name, "tid": thread, "ts": start, "dur": duration, "args": args}


def kernel(name, start, duration, launched_by, *, category="kernel"):
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "ts": start,
        "dur": duration,
        "args": {"External id": launched_by},
    }


BACKWARD = "autograd::engine::evaluate_function: MmBackward0"
HOST = [
    call(1, "aten::embedding", 0, 5, node=7),
    call(2, MOE, 10, 20, category="user_annotation"),
    call(3, NORMS, 11, 8, category="user_annotation"),  # inside the layer, and so the layer's
    call(4, "aten::empty", 12, 1, node=8),  # makes no node: the next call has the same number
    call(5, "aten::mm", 14, 3, node=8),
    call(6, "aten::add", 40, 5, node=9),
    call(7, BACKWARD, 100, 20, thread=2, node=8),
    call(8, "aten::mm", 105, 5, thread=2),
    call(9, BACKWARD, 130, 9, thread=2, node=9),
    call(10, "Optimizer.step#AdamW.step", 150, 20, category="user_annotation"),
    call(11, "aten::_fused_adamw_", 155, 5),
]


def test_kernels_belong_to_what_launched_them_or_its_forward():
    device = [
        kernel("gemm", 1000, 100, 5),
        kernel("gemm", 1050, 100, 8),  # beside the first for a while
        kernel("gather", 1200, 10, 1),
        kernel("add", 1300, 4, 9),
        kernel("adamw", 1400, 30, 11),
        kernel("Memcpy", 1500, 6, 99, category="gpu_memcpy"),  # nobody's
    ]
    profile = summarize([*HOST, *device, {"ph": "M", "name": "process_name"}])
    assert profile.parts == [Item(MOE, 0.15, 2), Item(OPTIMIZER, 0.03, 1), Item(REST, 0.02, 3)]
    assert profile.busy_ms == pytest.approx(0.2)
    assert profile.span_ms == pytest.approx(0.506)
    assert profile.kernels[0] == Item(f"{MOE}: gemm", 0.15, 2)


def test_nothing_ran():
    assert summarize([]) == StepProfile()


@pytest.mark.parametrize("router_norm", ["batch", "rms"])
def test_every_part_of_a_model_is_found(router_norm):
    torch.manual_seed(0)
    model = LanguageModel(LanguageModelConfig(**{**vars(TINY_MODEL), "router_norm": router_norm}))
    optimizer = torch.optim.AdamW(model.parameters())
    with profile_step(model) as profile:
        model(torch.randint(256, (2, 12))).logsumexp(-1).mean().backward()
        optimizer.step()
    found = {item.name: item for item in profile.parts}
    assert found.keys() == {MOE, ATTENTION, NORMS, OPTIMIZER, REST}
    assert found[MOE].ms > found[REST].ms
    assert 0 < found[MOE].ms < profile.busy_ms <= profile.span_ms
    names = {item.name for item in profile.kernels}
    assert any(name.startswith(f"{MOE}: flash_moe::") and "backward" in name for name in names)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_of_a_run_it_is_kept_and_changes_nothing_else(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of a small text, {i * i} squared\n" for i in range(120)))
    config = TrainConfig(model=TINY_MODEL, data=str(text), device="cpu", num_steps=3, batch_size=3, eval_windows=5)
    rows = {}
    for name in ("plain", "profiled"):
        run = start_run(config, tmp_path / name)
        train(run, with_profile=name == "profiled")
        rows[name] = read_json_lines(run / METRICS_FILE)
    losses = [[row["loss"] for row in each if row["kind"] == "train"] for each in rows.values()]
    assert losses[0] == losses[1]
    assert not (tmp_path / "plain" / PROFILE_FILE).exists()
    (row,) = (row for row in rows["profiled"] if row["kind"] == "profile")
    assert row["step"] == 3
    profile = StepProfile.from_json(row)
    assert {item.name for item in profile.parts} >= {MOE, ATTENTION, NORMS, OPTIMIZER, CLIPPING}
    assert rows["profiled"][-1]["profile"] == profile.to_json()
    shown = io.StringIO()
    Console(file=shown, width=120).print(describe(profile, TINY_MODEL.num_layers))
    assert shown.getvalue() == (tmp_path / "profiled" / PROFILE_FILE).read_text(encoding="utf-8")


@pytest.mark.gpu
def test_on_a_gpu_it_counts_kernels(device):
    model = LanguageModel(TINY_MODEL).to(device)
    with profile_step(model) as profile, torch.autocast("cuda", torch.bfloat16):
        model(torch.randint(256, (2, 12), device=device)).logsumexp(-1).mean().backward()
    found = {item.name: item for item in profile.parts}
    assert found.keys() == {MOE, ATTENTION, NORMS, REST}
    assert found[MOE].launches > 2 * TINY_MODEL.num_layers * 3  # forward and backward
