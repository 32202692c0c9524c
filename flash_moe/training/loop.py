"""The training loop: a run folder that can be stopped at any step and continued to the same losses.

Nothing a step does depends on how the process got there: its batch is drawn from (seed, step), its learning rate
follows from the step, and all else is in the checkpoint. On a CPU with the same number of threads, losses are the same
to the bit.
"""

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_moe.training.checkpoint import MODEL_FILE, load_checkpoint, load_weights, save_checkpoint
from flash_moe.training.data import HELDOUT_FILE, TRAIN_FILE, ByteWindows, Corpus, build_corpus, load_corpus
from flash_moe.training.environment import describe_environment
from flash_moe.training.files import read_json_lines, write_atomically, write_json
from flash_moe.training.model import LanguageModel
from flash_moe.training.optim import build_optimizer, learning_rate_factor, set_learning_rate
from flash_moe.training.presets import TrainConfig
from flash_moe.training.profiling import CLIPPING, StepProfile, describe, profile_step, write_text

CONFIG_FILE, METRICS_FILE, PROFILE_FILE, DATA_FOLDER = "config.json", "metrics.jsonl", "profile.txt", "data"
LOSS_PLOT, EXPERTS_PLOT = "loss.png", "experts.png"
# Steps before the one that is profiled: kernels are compiled and the allocator has what it needs.
STEPS_BEFORE_PROFILE = 20

Row = dict[str, Any]


@dataclass(frozen=True)
class TrainResult:
    run: Path
    step: int
    finished: bool
    """False after Ctrl-C: everything is saved, and ``train(..., resume=True)`` continues."""
    heldout_bits_per_byte: float | None
    """After the last step; ``None`` unless finished."""
    note: str = ""
    """What could not be done, if anything."""


def start_run(config: TrainConfig, run: str | Path) -> Path:
    """Make a run folder: its corpus and its ``config.json``, which is written last.

    Raises:
        ValueError: the folder holds a run or anything else, the data path is missing, or the corpus is empty or too
            small.
        OSError: the corpus or its record could not be written, on a full disk say; nothing of it is left behind.
    """
    run = Path(run)
    choose_device(config.device)
    if (run / CONFIG_FILE).exists():
        raise ValueError(f"run: expected a new folder; {run} holds a run already (continue it with --resume {run})")
    if run.exists() and not (run.is_dir() and not any(run.iterdir())):
        raise ValueError(f"run: expected a new or empty folder; {run} holds something else")
    try:
        corpus = build_corpus(config.data, run / DATA_FOLDER, min_bytes=config.model.context_length + 1)
        content = {"train": config.to_json(), "corpus": asdict(corpus), "environment": describe_environment()}
        write_json(run / CONFIG_FILE, content)
    except BaseException as error:  # Ctrl-C too: a corpus may be large, and half of one is of no use
        shutil.rmtree(run / DATA_FOLDER, ignore_errors=True)
        if isinstance(error, OSError):
            raise OSError(f"cannot write the corpus of the run {run} ({error}); nothing of it is left there") from error
        raise
    return run


def read_config(run: str | Path) -> TrainConfig:
    """The settings of a run. Raises ``ValueError`` where there is no run, or one that cannot be read."""
    path = Path(run) / CONFIG_FILE
    if not path.exists():
        raise ValueError(f"run: expected a folder made by flash-moe train; {path} does not exist")
    try:
        return TrainConfig.from_json(json.loads(path.read_text(encoding="utf-8"))["train"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"run: expected a config.json with the settings of a run; {path} is damaged ({error})"
        ) from error


def load_model(run: str | Path, device: str | None = None) -> LanguageModel:
    """The trained model of a run, in evaluation mode, on ``device`` or else where the run says."""
    config = read_config(run)
    target = choose_device(config.device if device is None else device)
    model = LanguageModel(config.model)
    load_weights(Path(run), model)
    return model.to(target).eval()


def choose_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError('device: expected "cpu" or "auto", since torch sees no CUDA device; got "cuda"')
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def train(
    run: str | Path, on_row: Callable[[Row], None] = lambda row: None, *, with_profile: bool = False
) -> TrainResult:
    """Train the run in ``run`` (from ``start_run``) from its last checkpoint, or from the beginning, to its end.

    Every row of ``metrics.jsonl`` is also given to ``on_row``. Ctrl-C or SIGTERM ends the step under way, saves and
    returns; a second Ctrl-C interrupts as usual. ``with_profile`` has one step profiled: ``profile.txt`` and a row.
    """
    trainer = Trainer(Path(run), on_row)
    profiled = min(trainer.step + STEPS_BEFORE_PROFILE, trainer.config.num_steps - 1) if with_profile else None
    with StopSignal() as stop:
        while trainer.step < trainer.config.num_steps:
            if trainer.step == profiled:
                trainer.profile_step()
            else:
                trainer.train_step()
            trainer.evaluate_if_due()
            if stop.requested:
                trainer.save()
                return TrainResult(trainer.run, trainer.step, False, None)
            trainer.save_if_due()
        trainer.save()
    return trainer.finish()


class Trainer:
    """A run under way: what the loop reads and changes."""

    def __init__(self, run: Path, on_row: Callable[[Row], None]):
        self.run, self.on_row = run, on_row
        self.config = config = read_config(run)
        self.device = choose_device(config.device)
        self.corpus: Corpus = load_corpus(run / DATA_FOLDER)
        length = config.model.context_length + 1  # a window's first byte is only read, its last only predicted
        self.train_windows = ByteWindows(run / DATA_FOLDER / TRAIN_FILE, length)
        self.heldout = ByteWindows(run / DATA_FOLDER / HELDOUT_FILE, length).evenly_spaced(config.eval_windows)
        torch.manual_seed(config.seed)
        self.model = LanguageModel(config.model).to(self.device)
        self.optimizer = build_optimizer(
            self.model,
            learning_rate=config.learning_rate,
            expert_learning_rate=config.expert_learning_rate,
            weight_decay=config.weight_decay,
        )
        self.step = load_checkpoint(run, self.model, self.optimizer) if (run / MODEL_FILE).exists() else 0
        self.saved_step = self.step
        self.last_loss = self.last_gradient_norm = torch.zeros(())
        self._drop_later_rows()
        self._clock, self._clock_step = time.perf_counter(), self.step
        self._profile: StepProfile | None = None

    def profile_step(self) -> None:
        """``train_step``, and what of the device's time goes where; the profiler's own time is nobody's."""
        before = time.perf_counter()
        with profile_step(self.model) as profile:
            self._clock += time.perf_counter() - before
            self.train_step()
            before = time.perf_counter()
        self._profile = profile
        write_text(describe(profile, self.config.model.num_layers), self.run / PROFILE_FILE)
        self._log({"kind": "profile", "step": self.step, **profile.to_json()})
        self._clock += time.perf_counter() - before

    def train_step(self) -> None:
        config = self.config
        factor = learning_rate_factor(self.step, config.num_steps, config.warmup_steps)
        set_learning_rate(self.optimizer, factor)
        generator = torch.Generator().manual_seed((config.seed << 32) + self.step)
        loss = self._loss(self.train_windows.random(config.batch_size, generator))
        router_loss = self.model.router_loss()
        self.optimizer.zero_grad(set_to_none=True)
        (loss if router_loss is None else loss + router_loss).backward()
        with torch.profiler.record_function(CLIPPING):
            self.last_gradient_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.gradient_clip)
        self.optimizer.step()
        self.step += 1
        self.last_loss = loss.detach()
        if self.step % config.log_every == 0 or self.step == config.num_steps:
            self._log_step(factor)

    def evaluate(self) -> float:
        """Bits per byte of the held-out windows; every byte after a window's first is predicted and counts."""
        self.model.eval()
        for moe in self.model.moe_layers():
            moe.reset_expert_usage()
        total = torch.zeros((), dtype=torch.float64)
        with torch.no_grad():
            for windows in self.heldout.split(self.config.batch_size):
                total += self._loss(windows).double().cpu() * windows[:, 1:].numel()
        self.model.train()
        return total.item() / self.heldout[:, 1:].numel() / math.log(2)

    def evaluate_if_due(self) -> None:
        """Not after the last step: ``finish`` does that one."""
        if self.step % self.config.eval_every == 0 and self.step < self.config.num_steps:
            self._log_heldout(self.evaluate())

    def save(self) -> None:
        if self.step == self.saved_step:
            return
        self._finite_loss()  # a spoilt model must not replace a good one
        save_checkpoint(self.run, self.model, self.optimizer, self.step)
        self.saved_step = self.step

    def save_if_due(self) -> None:
        if self.step % self.config.save_every == 0 and self.step < self.config.num_steps:
            self.save()

    def finish(self) -> TrainResult:
        """The last look at the held-out text, the row that sums the run up, and the pictures."""
        bits_per_byte = self.evaluate()
        self._log_heldout(bits_per_byte)
        self._log_result(bits_per_byte)
        return TrainResult(self.run, self.step, True, bits_per_byte, self._draw())

    def _loss(self, windows: Tensor) -> Tensor:
        """Mean cross-entropy, in nats per byte."""
        windows = windows.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model(windows[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())

    def _log_step(self, factor: float) -> None:
        loss, gradient_norm = self._finite_loss()
        seconds = time.perf_counter() - self._clock
        tokens = (self.step - self._clock_step) * self.config.batch_size * self.config.model.context_length
        row = {
            "kind": "train",
            "step": self.step,
            "loss": loss,
            "bits_per_byte": loss / math.log(2),
            "gradient_norm": gradient_norm,
            "learning_rate": factor * self.config.learning_rate,
            "tokens_per_s": round(tokens / seconds, 1),
            "seconds": round(seconds, 4),
        }
        self._log(row)
        self._clock, self._clock_step = time.perf_counter(), self.step

    def _finite_loss(self) -> tuple[float, float]:
        """The last loss and the size of its gradient, which are all right or end the run."""
        loss, gradient_norm = self.last_loss.item(), self.last_gradient_norm.item()
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            raise FloatingPointError(
                f"step {self.step} has loss {loss} and gradient norm {gradient_norm}; the last checkpoint is of step "
                f"{self.saved_step}; lower learning rates may help"
            )
        return loss, gradient_norm

    def _log_heldout(self, bits_per_byte: float) -> None:
        dead = [moe.expert_usage().dead_share.item() for moe in self.model.moe_layers()]
        self._log({
            "kind": "heldout",
            "step": self.step,
            "bits_per_byte": bits_per_byte,
            "bytes": self.heldout[:, 1:].numel(),
            "dead_experts": [round(share, 4) for share in dead],
        })  # fmt: skip
        self._clock = time.perf_counter()  # the next step's speed is its own

    def _log_result(self, bits_per_byte: float) -> None:
        config, rows = self.config, read_json_lines(self.run / METRICS_FILE)
        seconds = sum(row["seconds"] for row in rows if row["kind"] == "train")
        bytes_seen = self.step * config.batch_size * config.model.context_length
        environment = describe_environment()
        result = {
            "kind": "result",
            "step": self.step,
            "heldout_bits_per_byte": bits_per_byte,
            "heldout_bytes": self.heldout[:, 1:].numel(),
            "corpus_sha256": self.corpus.sha256,
            "bytes_seen": bytes_seen,
            "train_seconds": round(seconds, 1),
            "tokens_per_s": round(bytes_seen / seconds, 1),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "train": config.to_json(),
            "device": environment["GPU 0" if self.device.type == "cuda" else "CPU"],
            **{name: environment[name] for name in ("flash_moe", "torch", "triton", "Python")},
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        if self.device.type == "cuda":
            result["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
        if self._profile is not None:
            result["profile"] = self._profile.to_json()
        self._log(result)

    def _draw(self) -> str:
        try:
            from flash_moe.training.plots import plot_experts, plot_loss
        except ImportError as error:
            return f"{LOSS_PLOT} and {EXPERTS_PLOT} were not drawn: {error}"
        plot_loss(read_json_lines(self.run / METRICS_FILE), self.run / LOSS_PLOT)
        counts = [moe.expert_usage().counts.cpu() for moe in self.model.moe_layers()]
        plot_experts(counts, self.run / EXPERTS_PLOT)
        return ""

    def _log(self, row: Row) -> None:
        with open(self.run / METRICS_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.on_row(row)

    def _drop_later_rows(self) -> None:
        """Forget what a run that ended without saving wrote after its checkpoint: it is about to be written again."""
        path = self.run / METRICS_FILE
        last = self.step == self.config.num_steps
        kept = [
            row
            for row in read_json_lines(path)
            if row["step"] < self.step or (row["step"] == self.step and (row["kind"] == "train" or not last))
        ]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


class StopSignal:
    """Within it, the first SIGINT or SIGTERM sets ``requested``; the next acts as it would have without it."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses to set handlers
            self._previous = {number: signal.signal(number, self._request) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.__exit__()
