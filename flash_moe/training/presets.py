"""What a training run can be told, and two ready-made answers: "cpu" and "gpu"."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from flash_moe._checks import check_int
from flash_moe.training.model import LanguageModelConfig

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run. Invalid values raise ``ValueError`` or ``TypeError`` at once."""

    model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    data: str | None = None
    """A text file or a folder of them; ``None`` for the standard library's own source."""
    seed: int = 0
    device: str = "auto"
    """"auto" is the GPU where there is one; there the model runs under bfloat16 autocast."""
    num_steps: int = 600
    batch_size: int = 16
    """Sequences of ``model.context_length`` bytes in a step."""
    learning_rate: float = 6e-3
    expert_learning_rate: float = 3e-3
    """Of the two expert tables of every layer."""
    weight_decay: float = 0.1
    """Of the matrices; not of the expert tables, the embedding and the norms."""
    warmup_steps: int = 60
    gradient_clip: float = 1.0
    eval_every: int = 150
    """Steps between looks at the held-out text; there is one at the end in any case."""
    eval_windows: int = 512
    """Windows of ``model.context_length`` bytes, spread evenly over the held-out text."""
    save_every: int = 150
    log_every: int = 1

    def __post_init__(self) -> None:
        check_int("seed", self.seed, 0, 2**31 - 1)
        for name in ("num_steps", "batch_size", "eval_every", "eval_windows", "save_every", "log_every"):
            check_int(name, getattr(self, name), 1, 2**31 - 1)
        check_int("warmup_steps", self.warmup_steps, 0, 2**31 - 1)
        for name in ("learning_rate", "expert_learning_rate", "gradient_clip"):
            _check_number(name, getattr(self, name), positive=True)
        _check_number("weight_decay", self.weight_decay, positive=False)
        if self.device not in DEVICES:
            raise ValueError(f"device: expected one of {', '.join(DEVICES)}; got {self.device!r}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "TrainConfig":
        """The inverse of ``to_json``. Raises ``ValueError`` at a name that is not a setting."""
        settings = dict(content)
        model = dict(settings.pop("model", {}))
        for name, given, known in (("model", model, LanguageModelConfig), ("train", settings, cls)):
            if unknown := given.keys() - {setting.name for setting in fields(known)}:
                raise ValueError(f"{name}: expected only known settings; got {min(unknown)!r}")
        return cls(model=LanguageModelConfig(**model), **settings)


def _check_number(name: str, value: float, *, positive: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number; got {type(value).__name__} {value!r}")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{name}: expected a finite number {'above 0' if positive else '0 or more'}; got {value!r}")


PRESETS = {
    "cpu": TrainConfig(),
    "gpu": TrainConfig(
        model=LanguageModelConfig(
            hidden_size=512,
            num_layers=8,
            num_heads=8,
            intermediate_size=1024,
            num_experts=16384,
            num_experts_per_tok=32,
            context_length=1024,
        ),
        num_steps=1250,
        batch_size=32,
        learning_rate=1e-3,
        expert_learning_rate=2e-3,
        warmup_steps=100,
        eval_every=250,
        eval_windows=512,
        save_every=1000,
        log_every=10,
    ),
}


def preset(name: str) -> TrainConfig:
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}; got {name!r}")
    return PRESETS[name]
