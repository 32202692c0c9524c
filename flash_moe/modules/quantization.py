"""Expert tables in 8 bits with a scale a row, for inference. E experts, H hidden size."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
# Elements of a table that are in float32 at a time.
CHUNK = 2**24
# The largest number of a quantized row.
_LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
_BITS = {torch.float8_e4m3fn: torch.uint8, torch.int8: torch.int8, torch.float32: torch.int32}


class QuantizedTable(nn.Module):
    """A table ``weight * scale[:, None]``: ``weight [E, H]`` of 8 bits, ``scale [E]`` float32.

    Neither takes another dtype when the module is converted.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def extra_repr(self) -> str:
        return f"{', '.join(map(str, self.weight.shape))}, dtype={self.weight.dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedTable":
        # Conversions change tensors of floating point: shown as integers, both keep their bits.
        for name, buffer in self._buffers.items():
            assert buffer is not None
            bits = buffer.view(_BITS[buffer.dtype])
            applied = fn(bits)
            applied = applied if applied.dtype == bits.dtype else bits.to(applied.device)
            self._buffers[name] = applied.view(buffer.dtype)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        *_, error_msgs = rest
        loaded = state_dict.get(f"{prefix}weight")
        if loaded is not None and loaded.dtype != self.weight.dtype:
            # Copied, it would be cast, and mean something else.
            error_msgs.append(f"{prefix}weight: expected dtype {self.weight.dtype}; got {loaded.dtype}")
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)


def quantize_tables(layer: nn.Module, names: Sequence[str], dtype: str) -> None:
    """Replace the layer's embeddings of these names by quantized tables; where it raises, nothing has changed.

    Raises:
        ValueError: ``dtype`` is unknown, a table is quantized already, or a weight is not finite.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}; got {dtype!r}")
    for name in names:
        if isinstance(table := layer.get_submodule(name), QuantizedTable):
            raise ValueError(f"{name}: expected a table that is not quantized yet; got one of {table.weight.dtype}")
    weights = {name: cast(Tensor, layer.get_submodule(name).weight).detach() for name in names}
    scales = {name: row_scales(f"{name}.weight", weights[name], DTYPES[dtype]) for name in names}
    for name in names:
        # One after the other, so that what is replaced is freed first.
        quantized = quantize_table(weights.pop(name), scales[name], DTYPES[dtype])
        setattr(layer, name, quantized.train(layer.training))


def table_scales(down: nn.Module | None, up: nn.Module | None) -> dict[str, Tensor]:
    """What ``flash_expert`` is to be told beside the tables' weights: nothing if they are not quantized."""
    if isinstance(down, QuantizedTable) and isinstance(up, QuantizedTable):
        return {"down_scale": down.scale, "up_scale": up.scale}
    return {}


def check_for_inference(training: bool, hidden_states: Tensor) -> None:
    """Raise ``ValueError`` where quantized tables would be trained, or a gradient would have to pass them."""
    if not torch.is_grad_enabled():
        return
    if training:
        raise ValueError(
            "down_embed, up_embed: expected tables that can be trained; got quantized ones, which are for inference: "
            "call eval(), or run under torch.no_grad()"
        )
    if hidden_states.requires_grad:
        raise ValueError(
            "hidden_states: expected no gradient to be asked for, since quantized tables are for inference; "
            "got requires_grad=True; run under torch.no_grad(), or detach the tensor"
        )


def row_scales(name: str, table: Tensor, dtype: torch.dtype) -> Tensor:
    """``[E]`` float32: of each row its largest magnitude over the largest number of ``dtype``; 1 for a row of zeros.

    Raises:
        ValueError: an element is not finite in float32; the message names the table.
    """
    scales = torch.empty(len(table), dtype=torch.float32, device=table.device)
    for rows in _chunks(table):
        torch.amax(table[rows].float().abs(), dim=1, out=scales[rows])
    if not table.is_meta and not scales.isfinite().all():
        raise ValueError(f"{name}: expected finite weights; got infinity or NaN")
    scales /= _LARGEST[dtype]
    return scales.masked_fill_(scales == 0, 1.0)


def quantize_table(table: Tensor, scales: Tensor, dtype: torch.dtype) -> QuantizedTable:
    """The rows over their scales, rounded to nearest even in ``dtype``."""
    weight = torch.empty(table.shape, dtype=dtype, device=table.device)
    for rows in _chunks(table):
        quotients = table[rows].float().div(scales[rows, None])
        # A scale rounded down, as the smallest ones are, leaves quotients beyond the largest number.
        quotients.clamp_(-_LARGEST[dtype], _LARGEST[dtype])
        weight[rows] = (quotients if dtype.is_floating_point else quotients.round_()).to(dtype)
    return QuantizedTable(weight, scales)


def _chunks(table: Tensor) -> Iterator[slice]:
    E, H = table.shape
    step = max(1, CHUNK // max(1, H))
    return (slice(start, min(E, start + step)) for start in range(0, E, step))
