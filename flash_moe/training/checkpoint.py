"""Checkpoints of a run: weights in ``model.safetensors``, and beside it what it takes to continue training from them.

The two files must never disagree, whenever the machine stops. So the training state is written first, under a name with
its step in it; ``model.safetensors``, which says its step, is moved into place second, and that one move is the moment
the new checkpoint counts. The previous state is removed only then.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flash_moe.training.files import write_atomically

MODEL_FILE = "model.safetensors"
STATE_PATTERN = "training-state-*.safetensors"


def save_checkpoint(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Save everything needed to continue after ``step`` steps.

    Raises:
        OSError: a file could not be written, on a full disk say. The previous checkpoint, if any, is as it was.
    """
    state = _state_file(run, step)
    try:
        _write_tensors(state, _training_state(model, optimizer), step)
        _write_tensors(run / MODEL_FILE, model.state_dict(), step)
    except (OSError, SafetensorError) as error:
        previous = saved_step(run)
        if previous != step:
            state.unlink(missing_ok=True)
        kept = "there is no earlier one" if previous is None else f"the one after step {previous} is intact"
        raise OSError(f"cannot save the checkpoint after step {step} in {run} ({error}); {kept}") from error
    for old in run.glob(STATE_PATTERN):
        if old != state:
            old.unlink()


def load_checkpoint(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load weights, optimizer and random state in place; returns the step after which they were saved."""
    step = load_weights(run, model)
    path = _state_file(run, step)
    state = _read_tensors(path)
    for name, parameter in model.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            if f"{name}/{moment}" in state:
                _check_shape(path, f"{name}/{moment}", state[f"{name}/{moment}"], parameter)
    names = _optimizer_order(model, optimizer)
    per_parameter: dict[int, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        name, _, slot = key.rpartition("/")
        if name in names:
            per_parameter.setdefault(names.index(name), {})[slot] = tensor
    optimizer.load_state_dict({"state": per_parameter, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(state["random/cpu"])
    if "random/cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random/cuda"])
    return step


def load_weights(run: Path, model: nn.Module) -> int:
    """Load ``model.safetensors`` into ``model``; returns the step after which it was saved.

    Raises:
        ValueError: there is no such file, it is damaged, or its names or shapes differ from the model's.
    """
    path = run / MODEL_FILE
    tensors = _read_tensors(path)
    expected = model.state_dict()
    if missing := expected.keys() - tensors.keys():
        raise ValueError(f"{path}: expected a tensor named {min(missing)}; found none")
    if unknown := tensors.keys() - expected.keys():
        raise ValueError(f"{path}: expected only the model's tensors; found {min(unknown)} too")
    for name, tensor in tensors.items():
        _check_shape(path, name, tensor, expected[name])
    model.load_state_dict(tensors)
    step = saved_step(run)
    if step is None:
        raise ValueError(f"{path}: expected its step in the metadata; found none")
    return step


def saved_step(run: Path) -> int | None:
    """The step of the checkpoint in ``run``, ``None`` where there is none."""
    path = run / MODEL_FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file; it is damaged ({error})") from error
    return int(metadata["step"]) if "step" in metadata else None


def _state_file(run: Path, step: int) -> Path:
    return run / STATE_PATTERN.replace("*", f"{step:08d}")


def _training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    order = _optimizer_order(model, optimizer)
    tensors = {f"{order[i]}/{slot}": value for i, slots in state.items() for slot, value in slots.items()}
    tensors["random/cpu"] = torch.get_rng_state()
    if next(model.parameters()).is_cuda:
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    return tensors


def _optimizer_order(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Parameter names in the order in which the optimizer numbers them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _write_tensors(path: Path, tensors: dict[str, Tensor], step: int) -> None:
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(contiguous, temporary, metadata={"step": str(step)}))


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise ValueError(f"run: expected a checkpoint; {path} does not exist")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file; it is damaged ({error})") from error


def _check_shape(path: Path, name: str, found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape:
        raise ValueError(f"{path}: {name}: expected shape {tuple(expected.shape)}; found {tuple(found.shape)}")
