"""The command line: what it prints, what it leaves behind, and how it says no."""

import io
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import flash_moe
from flash_moe import cli
from flash_moe.training import commands, environment
from flash_moe.training.presets import PRESETS

ROOT = Path(flash_moe.__file__).parent.parent


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch):
    """The real commands with a preset that takes a moment."""
    tiny = replace(
        PRESETS["cpu"].model, hidden_size=16, num_layers=1, num_heads=2, num_experts=16, num_experts_per_tok=2,
        context_length=8,
    )  # fmt: skip
    settings = replace(PRESETS["cpu"], model=tiny, num_steps=4, batch_size=2, eval_every=2, eval_windows=4)
    monkeypatch.setitem(PRESETS, "cpu", settings)
    monkeypatch.setattr(commands, "SAMPLE_BYTES", 20)


@pytest.fixture
def text_file(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("some words to learn, over and over again\n" * 30)
    return path


def call(monkeypatch, *arguments: object) -> int:
    """Run ``flash-moe`` with ``arguments`` in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["flash-moe", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code or 0


def test_train_shows_what_it_learnt_and_where_it_is(monkeypatch, capsys, tmp_path, text_file):
    run = tmp_path / "run"
    assert call(monkeypatch, "train", "--run", run, "--data", text_file) == 0
    out = capsys.readouterr().out
    for part in ("step 4/4", "loss ", "tokens/s", "time left", "bits per byte of held-out text", "a sample", "def "):
        assert part in out
    assert "held-out bits per byte: " in out
    assert f"saved in {run}" in out
    assert f"flash-moe generate --run {run}" in out
    assert (run / "loss.png").exists()


def test_default_run_folder_is_new_and_under_runs(monkeypatch, capsys, tmp_path, text_file):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "train", "--data", text_file, "--steps", 1) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "model.safetensors").exists()


def test_options_reach_the_run(monkeypatch, tmp_path, text_file):
    options = ["--steps", 2, "--batch-size", 3, "--seed", 7, "--device", "cpu"]
    assert call(monkeypatch, "train", "--run", tmp_path / "run", "--data", text_file, *options) == 0
    config = commands.read_config(tmp_path / "run")
    assert (config.num_steps, config.batch_size, config.seed, config.device) == (2, 3, 7, "cpu")


def test_profile_is_shown_and_kept(monkeypatch, capsys, tmp_path, text_file):
    run = tmp_path / "run"
    assert call(monkeypatch, "train", "--run", run, "--data", text_file, "--profile", "--backend", "reference") == 0
    assert commands.read_config(run).model.backend == "reference"
    shown, kept = capsys.readouterr().out, (run / "profile.txt").read_text(encoding="utf-8")
    for part in ("One step: the device is busy for", "FlashMoE layers", "attention", "optimizer", "norms"):
        assert part in shown
        assert part in kept


def test_progress_bar_on_a_terminal():
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120)
    with commands.ProgressDisplay(console, PRESETS["cpu"]) as display:
        display.show({"kind": "train", "step": 3, "loss": 2.5, "tokens_per_s": 1234.5, "seconds": 0.1})
        display.bar.refresh()
    for part in ("step 3/4", "loss 2.500", "1,234 tokens/s", "time left"):
        assert part in output.getvalue()


def test_generate_prints_text(monkeypatch, capsys, tmp_path, text_file):
    call(monkeypatch, "train", "--run", tmp_path / "run", "--data", text_file)
    capsys.readouterr()
    texts = []
    for seed in (1, 1, 2):
        options = ["--prompt", "def żółw", "--num-bytes", 25, "--seed", seed]
        assert call(monkeypatch, "generate", "--run", tmp_path / "run", *options) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("def żółw")
    assert len(texts[0]) > len("def żółw") + 10
    assert texts[0] == texts[1] != texts[2]


def test_ctrl_c_says_how_to_resume(monkeypatch, capsys, tmp_path, text_file):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(commands.ProgressDisplay, "show", lambda self, row: signal.raise_signal(signal.SIGINT))
        assert call(patch, "train", "--run", run, "--data", text_file) == 130
    out = capsys.readouterr().out
    assert "saved after step 1" in out
    assert f"flash-moe train --resume {run}" in out
    assert call(monkeypatch, "train", "--resume", run) == 0
    assert "step 4/4" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "--data", "nowhere"], "data: expected a text file or a folder"),
        (["train", "--preset", "tpu"], "preset: expected one of"),
        (["train", "--steps", "0"], "num_steps: expected"),
        (["train", "--device", "tpu"], "device: expected one of"),
        (["train", "--resume", "nowhere"], "run: expected a folder made by flash-moe train"),
        (["train", "--resume", "nowhere", "--steps", "3"], "resume: expected no other option"),
        (["train", "--resume", "nowhere", "--run", "x"], "resume: expected no other option"),
        (["train", "--resume", "nowhere", "--backend", "torch"], "resume: expected no other option"),
        (["train", "--backend", "cuda"], "backend: expected one of auto, triton, torch, reference; got 'cuda'"),
        (["generate", "--run", "nowhere"], "run: expected a folder made by flash-moe train"),
        (["generate"], "--run"),
        (["train", "--steps", "many"], "--steps"),
        (["brew-coffee"], "brew-coffee"),
    ],
    ids=" ".join,
)
def test_mistakes_are_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    if captured.err.startswith("flash-moe: error: "):
        assert captured.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_mistake_shows_its_traceback_when_debugging(monkeypatch):
    monkeypatch.setenv("FLASH_MOE_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["flash-moe", "train", "--data", "nowhere"])
    with pytest.raises(ValueError, match="data: expected"):
        cli.main()


def test_full_disk_is_one_line(monkeypatch, capsys, tmp_path, text_file):
    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flash_moe.training.checkpoint.save_file", no_space)
    assert call(monkeypatch, "train", "--run", tmp_path / "run", "--data", text_file) == 2
    error = capsys.readouterr().err
    assert "cannot save the checkpoint" in error
    assert "No space left on device" in error
    assert error.count("\n") == 1


def test_env_is_ready_to_paste(monkeypatch, capsys):
    monkeypatch.setenv("FLASH_MOE_DEBUG", "0")
    monkeypatch.setenv("FLASH_MOE_OTHER", "something")
    assert call(monkeypatch, "env") == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["flash_moe"].split()[0] == flash_moe.__version__
    assert lines["torch"].strip() == torch.__version__
    assert lines["FLASH_MOE_DEBUG"].strip() == "0"
    assert lines["FLASH_MOE_OTHER"].strip() == "something"
    assert lines["backend torch"].strip() == "available"
    assert "available" in lines["backend triton"]
    for name in ("Python", "OS", "CPU", "driver", "CUDA (of torch)", "triton", "TRITON_INTERPRET"):
        assert lines[name].strip()
    assert any(name.startswith("GPU") for name in lines)


@pytest.mark.parametrize(
    "cuda, why_not, expected",
    [
        (True, {"cuda": None, "cpu": "x"}, "available"),
        (True, {"cuda": "triton is not installed; do", "cpu": "x"}, "not available: triton is not installed; do"),
        (False, {"cuda": "triton is not installed; do", "cpu": "x"}, "not available: triton is not installed; do"),
        (False, {"cuda": None, "cpu": None}, "available in Triton's interpreter"),
        (False, {"cuda": None, "cpu": "no"}, "not available: "),
    ],
)
def test_env_says_why_a_backend_is_missing(monkeypatch, cuda, why_not, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(environment, "why_not_triton", lambda device_type: why_not[device_type])
    assert environment.backends()["triton"].startswith(expected)


def test_module_runs_as_a_command():
    command = [sys.executable, "-m", "flash_moe", "env"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("flash_moe:")


@pytest.mark.parametrize("missing", ["typer", "rich", "safetensors"])
def test_missing_extra_is_named(missing):
    script = f"import sys; sys.modules[{missing!r}] = None; from flash_moe.cli import main; main()"
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr == (f"flash-moe: error: the command line needs {missing}: pip install 'flash_moe[train]'\n")
