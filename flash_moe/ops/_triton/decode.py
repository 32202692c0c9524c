"""flash_decode in one launch: calls, and what is prepared for those that differ in their tensors' addresses alone.

T tokens, H hidden size, I intermediate size, E experts, K experts a token, G programs. The kernel is in
``decode_kernel.py``, the schedule that it runs in ``flash_moe.schedule.decode``.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from flash_moe._checks import debug_enabled
from flash_moe._moe_layer import MoELayer, NoRoomError
from flash_moe.ops._triton.counters import LINE, MAX_POLLS
from flash_moe.ops._triton.decode_call import PreparedCall, check_flag, is_want_of_room
from flash_moe.ops._triton.decode_config import Config, config_of, kernel_constants, tiles_of
from flash_moe.ops._triton.decode_few import FewTokens, takes_few
from flash_moe.ops._triton.decode_kernel import FEW, NUM_OWN, decode_kernel
from flash_moe.ops._triton.decode_routing import TAKER_STRIDE
from flash_moe.ops._triton.decode_scratch import Buffers, Own, State
from flash_moe.ops._triton.decode_trace import MAX_RECORDS, fill_trace, make_records
from flash_moe.ops._triton.math import INTERPRETED
from flash_moe.ops._triton.relaunch import Kept, Relaunch
from flash_moe.ops._triton.scratch import Scratch, current_stream, keep
from flash_moe.ops._triton.sizes import cdiv, next_power_of_2
from flash_moe.schedule.decode import SELECTED, build_schedule
from flash_moe.schedule.tasks import sizes_of
from flash_moe.schedule.trace import Trace

MAX_TOKENS, MAX_EXPERTS = 128, 1024
# float8 and asynchronous copies.
MIN_CAPABILITY = (8, 9)
# Up to which "auto" is the static policy.
MAX_STATIC_TOKENS = 2
# Rows of scratch begin a cache line, whatever the dtype.
ROW_ELEMENTS = 64
MAX_PREPARED = 256


def takes(hidden_states: Tensor, layer: MoELayer) -> bool:
    """Whether ``check_decode`` lets it pass, on a GPU that has what the kernel needs."""
    is_new_enough = torch.cuda.get_device_capability(hidden_states.device) >= MIN_CAPABILITY
    return is_new_enough and _too_large(hidden_states, layer) is None


def check_decode(hidden_states: Tensor, layer: MoELayer) -> None:
    """Raise ``ValueError``, naming the argument, for what the kernel does not take."""
    if (found := _too_large(hidden_states, layer)) is not None:
        raise ValueError(f'{found}; use backend="torch"')


def _too_large(hidden_states: Tensor, layer: MoELayer) -> str | None:
    T, E = hidden_states.shape[0], layer.router_weight.shape[0]
    if T > MAX_TOKENS:
        return f'hidden_states: expected at most {MAX_TOKENS} tokens with backend="triton"; got {T}'
    if E > MAX_EXPERTS:
        return f'router_weight: expected at most {MAX_EXPERTS} experts with backend="triton"; got {E}'
    return None


def decode_forward(hidden_states: Tensor, layer: MoELayer, policy: str) -> tuple[Tensor, Tensor]:
    """``out [T, H]`` and the router's logits ``[T, E]``, in one launch.

    Raises:
        ValueError: the kernel does not take this call.
        NoRoomError: its programs cannot all be on the device at once.
        RuntimeError: under ``FLASH_MOE_DEBUG=1`` a program has given up waiting, in this call or in an earlier one.
    """
    return _decode(hidden_states, layer, policy, None)


def decode_traced(hidden_states: Tensor, layer: MoELayer, policy: str, trace: Trace) -> tuple[Tensor, Tensor]:
    """As ``decode_forward``, waiting for the device; ``trace`` gets what every program did."""
    return _decode(hidden_states, layer, policy, trace)


def prepared_for(hidden_states: Tensor, layer: MoELayer, policy: str) -> PreparedCall | None:
    """What a call of ``decode_forward`` has left for others like it; ``None`` where nothing was launched."""
    prepared = _prepared.get(_key(hidden_states, layer, policy, is_traced=False))
    return prepared if prepared is not None and prepared.has_launched else None


def _decode(x: Tensor, layer: MoELayer, policy: str, trace: Trace | None) -> tuple[Tensor, Tensor]:
    check_decode(x, layer)
    out = torch.empty_like(x)
    logits = layer.router_weight.new_empty(x.shape[0], layer.router_weight.shape[0])
    if x.shape[0] > 0:
        with torch.cuda.device_of(x):
            _launch(x, layer, policy, logits, out, trace)
    elif trace is not None:
        trace.begin(policy, "GPU", 0, {})
    return out, logits


_prepared: OrderedDict[Hashable, PreparedCall] = OrderedDict()


def _launch(x: Tensor, layer: MoELayer, policy: str, logits: Tensor, out: Tensor, trace: Trace | None) -> None:
    """All programs at once, of as many as there is room for."""
    is_traced = trace is not None
    key = _key(x, layer, policy, is_traced=is_traced)
    prepared = _prepared.get(key) or _remember(key, _prepare(x, layer, policy, is_traced))
    tensors = (x, *layer.tensors)
    while True:
        try:
            if isinstance(prepared, Prepared):
                return prepared(tensors, logits, out, trace)
            return prepared(tensors, logits, out)
        except (RuntimeError, OutOfResources) as error:
            if not is_want_of_room(error):
                raise
            if isinstance(prepared, Prepared):
                config = prepared.config._replace(programs=prepared.config.programs - 1)
                if config.programs == 0:
                    message = f"flash_decode: expected room for a program a multiprocessor; got {error}"
                    raise NoRoomError(message) from error
                prepared = _remember(key, Prepared(x, layer, policy, is_traced, config))
            else:
                prepared = _remember(key, _prepare_scheduled(x, layer, policy, is_traced))


def _prepare(x: Tensor, layer: MoELayer, policy: str, is_traced: bool) -> PreparedCall:
    """A kernel of its own for a few tokens, where nobody has asked for a policy or a trace, which it has not."""
    if policy == "auto" and not is_traced and takes_few(x, layer):
        return FewTokens(x, layer)
    return _prepare_scheduled(x, layer, policy, is_traced)


def _prepare_scheduled(x: Tensor, layer: MoELayer, policy: str, is_traced: bool) -> "Prepared":
    weight_itemsize = max(layer.gate_up_proj.element_size(), layer.down_proj.element_size())
    return Prepared(x, layer, policy, is_traced, config_of(x.shape[0], x.element_size(), weight_itemsize))


def _remember(key: Hashable, prepared: PreparedCall) -> PreparedCall:
    _prepared[key] = prepared
    if len(_prepared) > MAX_PREPARED:
        _prepared.popitem(last=False)
    return prepared


def _key(x: Tensor, layer: MoELayer, policy: str, *, is_traced: bool) -> Hashable:
    """All that a call's preparation depends on."""
    routing, shared, bias = layer.routing, layer.shared, layer.routing.correction_bias
    return (
        x.shape, x.dtype, x.device, layer.router_weight.dtype, layer.down_proj.shape, layer.down_proj.dtype,
        routing._replace(correction_bias=None), None if bias is None else bias.dtype, layer.hidden_act,
        None if shared is None else (shared.down_proj.shape, shared.gate is None),
        None if layer.gate_up_scale is None else layer.gate_up_scale.shape,
        None if layer.down_scale is None else layer.down_scale.shape, policy, is_traced,
    )  # fmt: skip


class Prepared(PreparedCall):
    """The schedule, the scratch and the launch of the kernel that runs it."""

    def __init__(self, x: Tensor, layer: MoELayer, policy: str, is_traced: bool, config: Config) -> None:
        super().__init__(sizes_of(x, layer), x.device)
        self.config, self.dtype, self.logits_dtype = config, x.dtype, layer.router_weight.dtype
        self.policy = _policy_of(x, policy)
        self.num_programs = _num_programs(x.device, config)
        self.schedule = build_schedule(self.sizes, tiles_of(self.sizes, config, self.num_programs), self.num_programs)
        self._arrays = keep(self._make_arrays, x.device)
        # Not a method of this object, which would then outlive its last reference.
        self.scratch = Scratch(partial(_make_states, self._state_lines(), x.device), x.device)
        options: dict[str, Any] = {"num_warps": config.num_warps}
        if not INTERPRETED:
            # All programs at once or an error, since they wait for each other.
            options |= {"launch_cooperative_grid": True, "maxnreg": config.max_registers}
        constants = kernel_constants(self.sizes, config, layer, self.policy, self.num_programs, is_traced=is_traced)
        constants |= {
            "BLOCK_G": next_power_of_2(self.num_programs),
            "BLOCK_COUNTERS": next_power_of_2(self._num_counters),
        }
        factor = float(layer.routing.routed_scaling_factor)
        self._launch = Relaunch(decode_kernel, self.num_programs, self._numbers(factor), constants, **options)

    def __call__(
        self, tensors: Sequence[Tensor | None], logits: Tensor | None, out: Tensor, trace: Trace | None = None
    ) -> None:
        stream, is_capturing = current_stream(self.device_index)
        own = None if is_capturing else self._own_of_stream.get(stream)
        if own is None:
            own = self._make_own(stream, is_capturing)
        state, buffers, kept = own
        if trace is not None:
            records = make_records(self.num_programs, self.device)
            kept = Kept.of(*kept.tensors[:-1], records)
        self._launch((*tensors, buffers.logits if logits is None else logits, out), stream, kept)
        self.has_launched = True
        if debug_enabled() and not is_capturing:
            check_flag(state.flag)
        if trace is not None:
            slots = state.slots[: self.num_programs * self.sizes.E].view(self.num_programs, -1)
            fill_trace(trace, records, slots, self.schedule, self.policy)

    def _flag(self, state: State) -> Tensor:
        return state.flag

    @property
    def _num_counters(self) -> int:
        return NUM_OWN.value + self.schedule.num_counters

    @property
    def _num_places(self) -> int:
        """In the actor's list of ready tasks."""
        return len(self.schedule.tasks) + self.config.schedulers

    @property
    def _strides(self) -> tuple[int, int]:
        """Of activated rows and of products."""
        widest = max(self.sizes.I, self.sizes.shared_intermediate_size)
        activated, products = (cdiv(columns, ROW_ELEMENTS) * ROW_ELEMENTS for columns in (widest, self.sizes.H))
        return activated, products

    def _numbers(self, factor: float) -> tuple[float, ...]:
        schedule, sizes = self.schedule, self.sizes
        return (
            factor, MAX_POLLS, sizes.T, sizes.num_slots, schedule.total(SELECTED).fixed, schedule.num_head,
            schedule.num_tail, schedule.gate_up_tiles, schedule.down_tiles, schedule.lead, *self._strides,
            MAX_RECORDS, schedule.num_counters, self._num_places,
        )  # fmt: skip

    def _state_lines(self) -> list[int]:
        """The sizes of a ``State``'s parts."""
        T, E, G = self.sizes.T, self.sizes.E, self.num_programs
        sizes = {
            "counters": self._num_counters * LINE.value, "flag": 1, "takers": E * TAKER_STRIDE.value, "pairs": T * E,
            "weights": T * (E + 1), "slots": G * E, "ready": self._num_places,
            "doorbells": G * LINE.value, "busy": G,
        }  # fmt: skip
        # Whole lines: what begins off a line would compile to other code.
        return [cdiv(sizes[name], LINE.value) * LINE.value for name in State._fields]

    def _make_arrays(self) -> list[Tensor]:
        return [torch.tensor(each, dtype=torch.int32, device=self.device) for each in self.schedule.serialize()]

    def _own(self, state: State, buffers: Buffers) -> Own:
        records = state.flag  # which nobody writes without a trace
        return Own(state, buffers, Kept.of(*self._arrays, *state, *buffers[:-1], records))

    def _make_own(self, stream: int, is_capturing: bool) -> Own:
        if not is_capturing and self.device_index is not None:
            for array in self._arrays:  # made on the first call's stream
                array.record_stream(torch.cuda.current_stream(self.device))
        return super()._make_own(stream, is_capturing)

    def _make_buffers(self) -> Buffers:
        sizes, (activated_stride, product_stride) = self.sizes, self._strides
        shared = sizes.T * (sizes.shared_intermediate_size > 0)
        # Few tokens are all taken along by each slot.
        rows = shared + sizes.T * (sizes.num_slots if sizes.T <= FEW.value else sizes.K)
        activated = torch.empty(rows, activated_stride, dtype=self.dtype, device=self.device)
        rows = shared + sizes.T * sizes.K
        products = torch.empty(rows, product_stride, dtype=torch.float32, device=self.device)
        keys = torch.empty(self.num_programs, 2 * next_power_of_2(sizes.E), dtype=torch.int32, device=self.device)
        logits = torch.empty(sizes.T, sizes.E, dtype=self.logits_dtype, device=self.device)
        return Buffers(keys, activated, products, logits)


def _make_states(lines: list[int], device: torch.device, count: int) -> list[State]:
    states = torch.zeros(count, sum(lines), dtype=torch.int32, device=device)
    found = [State(*each.split(lines)) for each in states]
    return [state._replace(weights=state.weights.view(torch.float32)) for state in found]


def _policy_of(x: Tensor, policy: str) -> str:
    """Whose tiles are few is done sooner without a queue; then the last ones had better go to whoever is free.

    The interpreter has one program, which is no actor's scheduler and worker at once.
    """
    if not x.is_cuda:
        return "static"
    if policy == "auto":
        return "static" if x.shape[0] <= MAX_STATIC_TOKENS else "queue"
    return policy


def _num_programs(device: torch.device, config: Config) -> int:
    """The interpreter runs programs one after another, so there it is one."""
    if device.type != "cuda":
        return 1
    return config.programs * torch.cuda.get_device_properties(device).multi_processor_count
