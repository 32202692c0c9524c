"""Launches past Triton's binder, to which a kernel of 40 arguments takes the host longer than the GPU needs for it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import triton
from torch import Tensor

ALIGNMENT = 16


class Kept(NamedTuple):
    """Tensors that stay where they are from call to call, so that their addresses are asked for once."""

    tensors: tuple[Tensor, ...]
    addresses: tuple[int, ...]

    @classmethod
    def of(cls, *tensors: Tensor) -> "Kept":
        return cls(tensors, tuple(x.data_ptr() for x in tensors))


NOTHING = Kept((), ())


class Relaunch:
    """A kernel on a given grid, with its constants, for calls that differ in the addresses of their tensors alone.

    The arguments are the kernel's, in its order: tensors, always of the same dtypes and on the same device, which is
    the current one, or always None; numbers, always the same; constants. The first call goes through Triton, which
    compiles. So does every call with a tensor that does not begin at a multiple of 16 bytes, since that compiles to
    other code, and every call that a profiler's hook watches.
    """

    def __init__(
        self, kernel: Any, num_programs: int, numbers: Sequence[float], constants: Mapping[str, Any], **options: Any
    ) -> None:
        self._through_triton = kernel[(num_programs,)]
        self._num_programs = num_programs
        self._constants, self._options = dict(constants), options
        self._numbers = tuple(numbers)
        self._rest = (*self._numbers, *(constants[name] for name in kernel.arg_names if name in constants))
        self._compiled: Any = None

    def __call__(self, tensors: Sequence[Tensor | None], stream: int, kept: Kept = NOTHING) -> None:
        """``stream``: the handle of the current stream. ``kept``: aligned tensors that follow upon ``tensors``."""
        addresses = [None if x is None else x.data_ptr() for x in tensors]
        bits = 0
        for address in addresses:
            bits |= address or 0
        is_aligned = bits % ALIGNMENT == 0
        compiled, hooks = self._compiled, triton.knobs.runtime
        if compiled is None or not is_aligned or hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
            # The interpreter compiles nothing, and gives None.
            launched = self._through_triton(*tensors, *kept.tensors, *self._numbers, **self._constants, **self._options)
            if is_aligned:
                self._compiled = launched
            return
        compiled.run(
            self._num_programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
            *addresses, *kept.addresses, *self._rest,
        )  # fmt: skip
