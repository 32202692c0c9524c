"""flash_decode in one launch: how its work is cut, where its programs meet, and how many there are.

T tokens, H hidden size, I intermediate size, E experts, K experts a token, G programs. The kernel is in
``decode_kernel.py``, the schedule that it runs in ``flash_moe.schedule.decode``.
"""

from collections import OrderedDict
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from flash_moe._checks import debug_enabled
from flash_moe._moe_layer import MoELayer, NoRoomError
from flash_moe.ops._triton.counters import LINE
from flash_moe.ops._triton.decode_kernel import FEW, NUM_OWN, decode_kernel
from flash_moe.ops._triton.decode_routing import TAKER_STRIDE
from flash_moe.ops._triton.decode_trace import MAX_RECORDS, fill_trace, make_records
from flash_moe.ops._triton.math import INTERPRETED
from flash_moe.schedule.decode import SELECTED, Schedule, build_schedule
from flash_moe.schedule.tasks import Sizes, Tiles
from flash_moe.schedule.trace import Trace

MAX_TOKENS, MAX_EXPERTS = 128, 1024
# float8 and asynchronous copies.
MIN_CAPABILITY = (8, 9)
# Polls that a program makes in all before it gives up: about a second, an atomic taking most of a microsecond.
MAX_POLLS = 2**20
# Comparisons of keys at once.
RANK_COMPARISONS = 2**14
# State of this many calls that may be captured is made beside that of a stream, zeroed before any capture begins.
GRAPH_STATES = 64
MAX_REMEMBERED = 256
# Up to which "auto" is the static policy.
MAX_STATIC_TOKENS = 2
# Of a multiprocessor.
REGISTERS = 2**16
# Rows of scratch begin a cache line, whatever the dtype.
ROW_ELEMENTS = 64


class Config(NamedTuple):
    """How the work is cut, and what a program is."""

    gate_up_rows: int = 32
    down_rows: int = 64
    block_h: int = 128
    block_i: int = 128
    stages: int = 4
    num_warps: int = 4
    programs: int = 2
    """At most, on a multiprocessor."""
    schedulers: int = 1
    batch: int = 2**20
    """Tasks that a scheduler hands out at once, at most."""

    @property
    def max_registers(self) -> int:
        """Of a thread, so that the programs fit."""
        return min(255, REGISTERS // (32 * self.num_warps * self.programs) // 8 * 8)


def config_of(T: int, itemsize: int) -> Config:
    """Measured on an H200 with the sizes of Qwen3-30B-A3B, for tokens and weights of ``itemsize`` bytes an element."""
    if T <= 4:
        return Config(32, 64, 256 // itemsize, 256 // itemsize, stages=4)
    return Config(64, 128, 128 // itemsize, 128 // itemsize, stages=6)


def tiles_of(sizes: Sizes, config: Config, G: int) -> Tiles:
    few = sizes.T <= 16
    return Tiles(
        route_experts=1 if few else 16,
        route_tokens=16 if few else 8,
        select_tokens=1,
        gate_up_columns=config.gate_up_rows,
        down_columns=config.down_rows,
        combine_tokens=_combine_tokens(sizes, config, G),
        combine_columns=_combine_columns(config),
        lead=max(1, -(-2 * G // -(-sizes.I // config.gate_up_rows))),
    )


def _combine_columns(config: Config) -> int:
    return max(config.down_rows, 64)


def _combine_tokens(sizes: Sizes, config: Config, G: int) -> int:
    """So that most programs combine something at the end."""
    columns = triton.cdiv(sizes.H, _combine_columns(config))
    return min(8, triton.next_power_of_2(max(1, sizes.T * columns // G)))


class State(NamedTuple):
    """What programs tell each other in one call. Counters and takers are zero between calls."""

    counters: Tensor
    flag: Tensor
    takers: Tensor
    pairs: Tensor
    weights: Tensor
    keys: Tensor
    slots: Tensor
    ready: Tensor
    doorbells: Tensor
    busy: Tensor


class _Call(NamedTuple):
    """All that a call's preparation depends on."""

    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    config: Config
    G: int

    @property
    def activated_stride(self) -> int:
        widest = max(self.sizes.I, self.sizes.shared_intermediate_size)
        return triton.cdiv(widest, ROW_ELEMENTS) * ROW_ELEMENTS

    @property
    def product_stride(self) -> int:
        return triton.cdiv(self.sizes.H, ROW_ELEMENTS) * ROW_ELEMENTS

    @property
    def num_places(self) -> int:
        """In the actor's list of ready tasks."""
        return len(plan(self).schedule.tasks) + self.config.schedulers

    @property
    def num_counters(self) -> int:
        return NUM_OWN.value + plan(self).schedule.num_counters

    def make_states(self, count: int) -> list[State]:
        """Pairs and weights begin as numbers in range: a program that gave up waiting must not write astray."""
        T, E, block_e = self.sizes.T, self.sizes.E, triton.next_power_of_2(self.sizes.E)
        words = {
            "counters": (self.num_counters * LINE.value,), "flag": (1,), "takers": (E * TAKER_STRIDE.value,),
            "pairs": (T, E), "weights": (T * (E + 1),), "keys": (self.G, 2, block_e), "slots": (self.G, E),
            "ready": (self.num_places,), "doorbells": (self.G * LINE.value,), "busy": (self.G,),
        }  # fmt: skip
        tensors = [
            torch.zeros(count, *shape, dtype=torch.float32 if name == "weights" else torch.int32, device=self.device)
            for name, shape in words.items()
        ]
        return [State(*each) for each in zip(*(x.unbind() for x in tensors), strict=True)]

    def make_buffers(self) -> tuple[Tensor, Tensor]:
        """For activated rows and for weighted products."""
        sizes = self.sizes
        shared = sizes.T * (sizes.shared_intermediate_size > 0)
        # Few tokens are all taken along by each slot.
        rows = shared + sizes.T * (sizes.num_slots if sizes.T <= FEW.value else sizes.K)
        activated = torch.empty(rows, self.activated_stride, dtype=self.dtype, device=self.device)
        rows = shared + sizes.T * sizes.K
        products = torch.empty(rows, self.product_stride, dtype=torch.float32, device=self.device)
        return activated, products


class Plan(NamedTuple):
    schedule: Schedule
    tasks: Tensor
    totals: Tensor
    released_offsets: Tensor
    released: Tensor


@lru_cache(MAX_REMEMBERED)
def plan(call: _Call) -> Plan:
    schedule = build_schedule(call.sizes, tiles_of(call.sizes, call.config, call.G), call.G)
    arrays = schedule.serialize()
    return Plan(schedule, *(torch.tensor(array, dtype=torch.int32, device=call.device) for array in arrays))


class _Scratches:
    """Scratch by stream and call, made at the first one and kept; each captured call has a state to itself, for ever.

    A graph may run beside anything, and how long it lives is not known here. Zeroing within a capture would be a launch
    of its own on each replay, so what graphs will need is zeroed before; beyond that it is done in the graph. What
    needs no zeros is the graph's own memory.
    """

    def __init__(self) -> None:
        self._of_stream: OrderedDict[tuple[int, _Call], tuple[State, tuple[Tensor, Tensor]]] = OrderedDict()
        self._spare: OrderedDict[_Call, list[State]] = OrderedDict()
        self._of_graphs: list[State] = []

    def get(self, call: _Call) -> tuple[State, tuple[Tensor, Tensor]]:
        on_gpu = call.device.type == "cuda"
        if on_gpu and torch.cuda.is_current_stream_capturing():
            return self._take_spare(call), call.make_buffers()
        stream = torch.cuda.current_stream(call.device).cuda_stream if on_gpu else 0
        if (stream, call) not in self._of_stream:
            num_spare = GRAPH_STATES if on_gpu and call not in self._spare else 0
            state, *spare = call.make_states(1 + num_spare)
            if spare:
                self._spare[call] = spare
            self._of_stream[stream, call] = state, call.make_buffers()
            for table in (self._of_stream, self._spare):
                if len(table) > MAX_REMEMBERED:
                    table.popitem(last=False)
        return self._of_stream[stream, call]

    def _take_spare(self, call: _Call) -> State:
        spare = self._spare.get(call)
        if not spare:
            return call.make_states(1)[0]
        self._of_graphs.append(spare.pop())
        return self._of_graphs[-1]


_scratches = _Scratches()


def decode_traced(hidden_states: Tensor, layer: MoELayer, policy: str, trace: Trace) -> tuple[Tensor, Tensor]:
    """As ``decode_forward``, waiting for the device; ``trace`` gets what every program did."""
    check_decode(hidden_states, layer)
    out, logits = _make_outputs(hidden_states, layer)
    if hidden_states.shape[0] == 0:
        trace.begin(policy, "GPU", 0, {})
        return out, logits
    with torch.cuda.device_of(hidden_states):
        call = _call_of(hidden_states, layer)
        records = make_records(call.G, hidden_states.device)
        call = _launch(call, hidden_states, layer, policy, logits, out, records)
        fill_trace(
            trace, records, _scratches.get(call)[0].slots, plan(call).schedule, _policy_of(hidden_states, policy)
        )
    return out, logits


def takes(hidden_states: Tensor, layer: MoELayer) -> bool:
    """Whether ``check_decode`` lets it pass, on a GPU that has what the kernel needs."""
    is_small = hidden_states.shape[0] <= MAX_TOKENS and layer.router_weight.shape[0] <= MAX_EXPERTS
    return is_small and torch.cuda.get_device_capability(hidden_states.device) >= MIN_CAPABILITY


def check_decode(hidden_states: Tensor, layer: MoELayer) -> None:
    """Raise ``ValueError``, naming the argument, for what the kernel does not take."""
    refused = {
        "hidden_states": (hidden_states.shape[0] > MAX_TOKENS, f"at most {MAX_TOKENS} tokens", hidden_states.shape[0]),
        "router_weight": (
            layer.router_weight.shape[0] > MAX_EXPERTS, f"at most {MAX_EXPERTS} experts", layer.router_weight.shape[0],
        ),
    }  # fmt: skip
    for name, (is_refused, expected, got) in refused.items():
        if is_refused:
            raise ValueError(f'{name}: expected {expected} with backend="triton"; got {got}; use backend="torch"')


def decode_forward(hidden_states: Tensor, layer: MoELayer, policy: str) -> tuple[Tensor, Tensor]:
    """``out [T, H]`` and the router's logits ``[T, E]``, in one launch.

    Raises:
        ValueError: the kernel does not take this call.
        NoRoomError: its programs cannot all be on the device at once.
        RuntimeError: under ``FLASH_MOE_DEBUG=1`` a program has given up waiting, in this call or in an earlier one.
    """
    check_decode(hidden_states, layer)
    out, logits = _make_outputs(hidden_states, layer)
    if hidden_states.shape[0] > 0:
        with torch.cuda.device_of(hidden_states):
            _launch(_call_of(hidden_states, layer), hidden_states, layer, policy, logits, out)
    return out, logits


def _make_outputs(hidden_states: Tensor, layer: MoELayer) -> tuple[Tensor, Tensor]:
    logits = layer.router_weight.new_empty(hidden_states.shape[0], layer.router_weight.shape[0])
    return torch.empty_like(hidden_states), logits


def _policy_of(x: Tensor, policy: str) -> str:
    """Whose tiles are few is done sooner without a queue; then the last ones had better go to whoever is free.

    The interpreter has one program, which is no actor's scheduler and worker at once.
    """
    if not x.is_cuda:
        return "static"
    if policy == "auto":
        return "static" if x.shape[0] <= MAX_STATIC_TOKENS else "queue"
    return policy


def _call_of(x: Tensor, layer: MoELayer) -> _Call:
    sizes = _sizes_of(x, layer)
    config = config_of(sizes.T, x.element_size())
    return _Call(x.device, x.dtype, sizes, config, _num_programs(x.device, config))


# Calls that were refused as many programs as their configuration asks for, and how many they have.
_fewer: dict[_Call, _Call] = {}


def _launch(
    call: _Call, x: Tensor, layer: MoELayer, policy: str, logits: Tensor, out: Tensor, records: Tensor | None = None
) -> _Call:
    """All programs at once, of as many as there is room for; gives the call as it was made."""
    call = _fewer.get(call, call)
    while True:
        try:
            _launch_all(call, x, layer, policy, logits, out, records)
            return call
        except (RuntimeError, triton.runtime.errors.OutOfResources) as error:
            if not isinstance(error, triton.runtime.errors.OutOfResources) and "cooperative" not in str(error):
                raise
            programs = call.config.programs - 1
            if programs == 0:
                raise NoRoomError(
                    f"flash_decode: expected room for a program on each multiprocessor; got {error}"
                ) from error
            config = call.config._replace(programs=programs)
            call = _fewer[call] = call._replace(config=config, G=_num_programs(call.device, config))


def _launch_all(
    call: _Call, x: Tensor, layer: MoELayer, policy: str, logits: Tensor, out: Tensor, records: Tensor | None
) -> None:
    sizes, config, routing = call.sizes, call.config, layer.routing
    constants = kernel_constants(sizes, config, layer, _policy_of(x, policy), call.G, is_traced=records is not None)
    state, (activated, products) = _scratches.get(call)
    schedule, *arrays = plan(call)
    shared = layer.shared or (None, None, None, None)
    options: dict[str, Any] = {"num_warps": config.num_warps}
    if not INTERPRETED:
        # All programs at once or an error, since they wait for each other.
        options |= {"launch_cooperative_grid": True, "maxnreg": config.max_registers}
    decode_kernel[(call.G,)](
        x, layer.router_weight, layer.gate_up_proj, layer.down_proj, routing.correction_bias, *shared,
        layer.gate_up_scale, layer.down_scale, logits, out, *arrays, *state, activated, products,
        state.flag if records is None else records, float(routing.routed_scaling_factor), MAX_POLLS, sizes.T,
        sizes.num_slots, schedule.total(SELECTED).fixed, schedule.num_head, schedule.num_tail, schedule.gate_up_tiles,
        schedule.down_tiles, schedule.lead, call.activated_stride, call.product_stride, MAX_RECORDS,
        schedule.num_counters, call.num_places, **constants, BLOCK_G=triton.next_power_of_2(call.G),
        NUM_COUNTERS=call.num_counters, BLOCK_COUNTERS=triton.next_power_of_2(call.num_counters), **options,
    )  # fmt: skip
    if debug_enabled() and not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        _check_flag(state)


def _sizes_of(x: Tensor, layer: MoELayer) -> Sizes:
    (T, H), (E, _, I), K = x.shape, layer.down_proj.shape, layer.routing.num_experts_per_tok
    return Sizes(
        T, H, I, E, K,
        shared_intermediate_size=layer.shared.gate_proj.shape[0] if layer.shared is not None else 0,
        itemsize=x.element_size(),
        weight_itemsize=layer.down_proj.element_size(),
        router_itemsize=layer.router_weight.element_size(),
    )  # fmt: skip


def _num_programs(device: torch.device, config: Config) -> int:
    """The interpreter runs programs one after another, so there it is one."""
    if device.type != "cuda":
        return 1
    return config.programs * torch.cuda.get_device_properties(device).multi_processor_count


def kernel_constants(
    sizes: Sizes, config: Config, layer: MoELayer, policy: str, G: int, *, is_traced: bool
) -> dict[str, int | str | bool]:
    routing, block_e = layer.routing, triton.next_power_of_2(sizes.E)
    block_t = max(16, triton.next_power_of_2(sizes.T))
    tiles = tiles_of(sizes, config, G)
    route_tokens = min(tiles.route_tokens, triton.next_power_of_2(sizes.T)) if tiles.route_experts == 1 else 16
    route_h = 4096 // route_tokens if tiles.route_experts == 1 else 512 // (sizes.itemsize // 2)
    return {
        "H": sizes.H, "I": sizes.I, "SHARED_I": sizes.shared_intermediate_size, "E": sizes.E, "K": sizes.K,
        "SCORING": routing.scoring,
        "HAS_BIAS": routing.correction_bias is not None,
        "NORM": routing.norm_topk_prob,
        "GROUPS": routing.num_expert_groups,
        "BEST_GROUPS": routing.topk_groups,
        "HIDDEN_ACT": layer.hidden_act,
        "GATE_UP_SCALE": _scale_kind(layer.gate_up_scale),
        "DOWN_SCALE": _scale_kind(layer.down_scale),
        "HAS_SHARED_GATE": layer.shared is not None and layer.shared.gate is not None,
        "POLICY": policy,
        "TRACE": is_traced,
        "SCHEDULERS": config.schedulers,
        "BATCH": config.batch,
        "BLOCK_T": block_t,
        "ROUTE_EXPERTS": 1 if tiles.route_experts == 1 else 16,
        "ROUTE_TOKENS": route_tokens,
        "ROUTE_H": min(route_h, max(16, triton.next_power_of_2(sizes.H))),
        "GATE_UP_ROWS": config.gate_up_rows,
        "DOWN_ROWS": config.down_rows,
        "COMBINE_COLUMNS": tiles.combine_columns,
        "COMBINE_TOKENS": tiles.combine_tokens,
        "BLOCK_H": min(config.block_h, max(16, triton.next_power_of_2(sizes.H))),
        "BLOCK_I": min(config.block_i, max(16, triton.next_power_of_2(max(sizes.I, sizes.shared_intermediate_size)))),
        "STAGES": config.stages,
        "BLOCK_E": block_e,
        "RANK_BLOCK": max(1, min(block_e, RANK_COMPARISONS // block_e)),
    }  # fmt: skip


def _scale_kind(scale: Tensor | None) -> str:
    if scale is None:
        return "none"
    return "block" if scale.dim() == 3 else "row"


def _check_flag(state: State) -> None:
    if state.flag.item():
        state.flag.zero_()
        raise RuntimeError(
            f"flash_decode: expected every program to see the others' work within {MAX_POLLS} polls; one gave up, so "
            "the output of this call, or of one before it on this stream, is wrong"
        )
