"""Launches past Triton's binder, which takes the host longer than the GPU takes for a kernel on few tokens.

What a kernel was compiled for is remembered, and the compiled kernel called with the tensors' addresses. Through Triton
goes the first call of each kind, which compiles; every call with a tensor that does not begin at a multiple of 16
bytes, since that compiles to other code; every call that a profiler's hook watches; and all of the interpreter's.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

ALIGNMENT = 16
# Far more than a process's models have kinds of launches; a bound only so that they cannot fill the memory.
MAX_REMEMBERED = 4096


class _Compiled(NamedTuple):
    run: Callable[..., None]
    before: tuple[Any, ...]
    """What ``run`` takes between the stream and the kernel's own arguments: no metadata and no hooks among it."""
    constants: tuple[Any, ...]
    kernel: Any
    """Kept, so that no other kernel has its id."""
    launched: Any
    """Triton's compiled kernel, kept as long as its code is called."""

    @classmethod
    def of(cls, kernel: Any, launched: Any, constants: Sequence[Any], named: Mapping[str, Any]) -> "_Compiled":
        """``launched``: what Triton's own launch returned."""
        in_order = (named[name] for name in kernel.arg_names if name in named)
        before = (launched.function, launched.packed_metadata, None, None, None)
        return cls(launched.run, before, (*constants, *in_order), kernel, launched)


_remembered: dict[tuple[Any, ...], _Compiled] = {}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Sequence[Tensor | TensorDescriptor | None],
    numbers: tuple[float, ...],
    *constants: Any,
    **named: Any,
) -> None:
    """``kernel[grid](*tensors, *numbers, *constants, **named)`` on the tensors' device and its current stream.

    Args:
        tensors: all on the device of the first; which are None may differ from call to call. Of a descriptor's blocks
            the constants tell the shape.
        numbers: what the kernel takes as such. Others of the same kind compile nothing: integers that are 1, that are
            multiples of 16, that need 64 bits.
        constants, named: what it is compiled for, in its order or by name, and Triton's options.
    """
    first: Any = tensors[0]
    index = (first.base if type(first) is TensorDescriptor else first).get_device()
    if index >= 0 and index != torch.cuda.current_device():
        with torch.cuda.device(index):
            launch(kernel, grid, tensors, numbers, *constants, **named)
        return
    addresses: list[int | TensorDescriptor | None] = []
    dtypes: list[Any] = []
    bits = 0
    tensor: Any
    for tensor in tensors:
        if tensor is None:
            addresses.append(None)
            dtypes.append(None)
        elif type(tensor) is TensorDescriptor:  # aligned, and encoded by Triton's launcher
            addresses.append(tensor)
            dtypes.append((TensorDescriptor, tensor.base.dtype))
        else:
            address = tensor.data_ptr()
            addresses.append(address)
            dtypes.append(tensor.dtype)
            bits |= address
    # The id, since Triton hashes a kernel by its source.
    key = (id(kernel), index, _kinds(*numbers), constants, *dtypes, *named.items())
    compiled = _remembered.get(key)
    is_aligned = bits % ALIGNMENT == 0
    if compiled is None or not is_aligned or _is_watched():
        launched = kernel[grid](*tensors, *numbers, *constants, **named)
        if is_aligned and launched is not None:  # the interpreter, which compiles nothing, gives None
            if len(_remembered) >= MAX_REMEMBERED:
                _remembered.clear()
            _remembered[key] = _Compiled.of(kernel, launched, constants, named)
        return
    stream = triton.runtime.driver.active.get_current_stream(index) if index >= 0 else 0
    programs = (*grid, 1, 1)[:3]
    compiled.run(*programs, stream, *compiled.before, *addresses, *numbers, *compiled.constants)


@lru_cache(MAX_REMEMBERED, typed=True)
def _kinds(*numbers: float) -> tuple[Any, ...]:
    """Numbers of the same kinds compile to the same code."""
    return tuple(_kind(number) if type(number) is int else type(number) for number in numbers)


def _kind(number: int) -> tuple[bool, ...]:
    return number == 1, number % 16 == 0, -(2**31) <= number < 2**31, number < 2**63


def _is_watched() -> bool:
    hooks = triton.knobs.runtime
    return bool(hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls)


class Kept(NamedTuple):
    """Tensors that stay where they are from call to call, so that their addresses are asked for once."""

    tensors: tuple[Tensor, ...]
    addresses: tuple[int, ...]

    @classmethod
    def of(cls, *tensors: Tensor) -> "Kept":
        return cls(tensors, tuple(x.data_ptr() for x in tensors))


NOTHING = Kept((), ())


class Relaunch:
    """``launch`` of a kernel on a given grid, with its constants, where calls differ in their tensors' addresses alone.

    The arguments are the kernel's, in its order: tensors, always of the same dtypes and on the same device, which is
    the current one, or always None; numbers, always the same; constants.
    """

    def __init__(
        self, kernel: Any, num_programs: int, numbers: Sequence[float], constants: Mapping[str, Any], **options: Any
    ) -> None:
        self._kernel, self._num_programs = kernel, num_programs
        self._numbers, self._named = tuple(numbers), {**constants, **options}
        self._compiled: _Compiled | None = None

    def __call__(self, tensors: Sequence[Tensor | None], stream: int, kept: Kept = NOTHING) -> None:
        """``stream``: the handle of the current stream. ``kept``: aligned tensors that follow upon ``tensors``."""
        addresses = [None if x is None else x.data_ptr() for x in tensors]
        bits = 0
        for address in addresses:
            bits |= address or 0
        is_aligned, compiled = bits % ALIGNMENT == 0, self._compiled
        if compiled is None or not is_aligned or _is_watched():
            launched = self._kernel[(self._num_programs,)](*tensors, *kept.tensors, *self._numbers, **self._named)
            if is_aligned and launched is not None:
                self._compiled = _Compiled.of(self._kernel, launched, (), self._named)
            return
        compiled.run(
            self._num_programs, 1, 1, stream, *compiled.before,
            *addresses, *kept.addresses, *self._numbers, *compiled.constants,
        )  # fmt: skip
