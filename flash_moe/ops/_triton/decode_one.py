"""flash_decode for one token: a launch in which programs wait for one another twice, and for no single task.

H hidden size, I intermediate size, E experts, K experts a token, G programs, all on the GPU at once. Contiguous
tensors; sums in float32 and in a fixed order. Each program

    routes    takes a row of the router, if it is one of the first E, and waits for all other rows
    selects   the K experts, for itself, so that nobody waits to be told
    gate_up   takes tiles of ROWS gate and ROWS up rows, ``activated [K, I]``, and waits for all others' tiles
    down      takes ROWS rows of the output over all K experts: their weighted sum is its own

Weights go from memory to registers in whole rows, without shared memory and without tensor cores, which one token
cannot fill. The first chunks of the down rows are asked for before the second wait: they do not depend on it.

Whatever programs tell each other they read by plain loads, so that the programs of a multiprocessor share its L1 cache:
``activated`` is read by every program. That is right by the memory model of PTX, since writer's stores, its release,
the reader's acquire, a barrier and the reader's loads are in causality order; acquiring drops what L1 holds.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_moe._checks import debug_enabled
from flash_moe._moe_layer import MoELayer
from flash_moe.ops._triton.counters import LINE, MAX_POLLS, arrive, wait_again
from flash_moe.ops._triton.decode_call import PreparedCall, captured, check_flag
from flash_moe.ops._triton.decode_routing import NO_LOGIT, TINY_SUM, _score
from flash_moe.ops._triton.math import INTERPRETED, accurate_exp, activation, round_for
from flash_moe.ops._triton.ranking import LARGEST_KEY, SMALLEST_KEY, ordered_key, with_ids
from flash_moe.ops._triton.relaunch import Kept, Relaunch
from flash_moe.ops._triton.scratch import Scratch, current_stream, keep
from flash_moe.ops._triton.sizes import cdiv, next_power_of_2
from flash_moe.schedule.tasks import sizes_of

# The code goes through the experts, and through an expert's down row in chunks, without a loop.
MAX_EXPERTS_PER_TOKEN, MAX_CHUNKS = 16, 64
MAX_EXPERTS = 1024
# A cache line each: how many launches there were, what programs count, and whether one has given up.
LAUNCHES, ROUTED, DONE, FLAG = (tl.constexpr(i) for i in range(4))
NUM_COUNTERS = 4
# In a key with an id.
ID_MASK = tl.constexpr(8191)
# What a thread loads at once, and how much of a row a program does.
LOAD_NBYTES, ROW_NBYTES = 16, 4096
# Of a multiprocessor.
REGISTERS = 2**16


class Config(NamedTuple):
    programs: int = 4
    """On a multiprocessor."""
    num_warps: int = 4
    gate_up_rows: int = 4
    down_rows: int = 4
    ahead: int = 4
    """Chunks of the down rows that are on their way at a time, also across the wait."""

    @property
    def max_registers(self) -> int:
        """Of a thread, so that the programs fit."""
        return min(255, REGISTERS // (32 * self.num_warps * self.programs) // 8 * 8)


@triton.jit
def _route(x_ptr, router_ptr, logits_ptr, num_routers, H: tl.constexpr, E: tl.constexpr, BLOCK_H: tl.constexpr):
    for e in range(tl.program_id(0), E, num_routers):
        products = tl.zeros([BLOCK_H], tl.float32)
        for first in tl.static_range(0, H, BLOCK_H):
            h = first + tl.arange(0, BLOCK_H)
            weights = tl.load(router_ptr + e * H + h, mask=h < H, other=0.0)
            x = tl.load(x_ptr + h, mask=h < H, other=0.0)
            products += weights.to(tl.float32) * x.to(tl.float32)
        tl.store(logits_ptr + e, round_for(logits_ptr, tl.sum(products, 0)))


@triton.jit
def _with_wide_ids(keys, ids):
    """As ``with_ids``, of any floats."""
    return (keys.to(tl.int64) << 32) | (ID_MASK - ids)


@triton.jit
def _float_of(key):
    """The 16-bit float that ``ordered_key`` and ``with_ids`` were given, or any that ``_with_wide_ids`` was."""
    if key.dtype == tl.int64:
        high = (key >> 32).to(tl.int32)
        return tl.where(high < 0, high ^ LARGEST_KEY, high).to(tl.float32, bitcast=True)
    return tl.where(key < 0, (key | ID_MASK) ^ LARGEST_KEY, key & ~ID_MASK).to(tl.float32, bitcast=True)


@triton.jit
def _select(
    logits_ptr, bias_ptr, E: tl.constexpr, K: tl.constexpr, SCORING: tl.constexpr, HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The ids and logits of the K best, best first, largest logit of all, and the sum of exponentials below that."""
    e = tl.arange(0, BLOCK_E)
    logits = tl.load(logits_ptr + e, mask=e < E, other=0.0).to(tl.float32)
    logits = tl.where(e < E, logits, NO_LOGIT)
    largest, total = 0.0, 1.0
    if SCORING == "softmax" and (HAS_BIAS or not NORM):
        largest = tl.max(logits, 0)
        total = tl.sum(accurate_exp(logits - largest), 0)
    ranked = logits  # without a bias a softmax ranks as logits do
    if SCORING == "sigmoid" or HAS_BIAS:
        ranked = _score(logits, largest, total, SCORING)
        if HAS_BIAS:
            ranked += tl.load(bias_ptr + e, mask=e < E, other=0.0).to(tl.float32)
    keys = tl.where(e < E, ordered_key(ranked), SMALLEST_KEY)
    lowest = tl.full([BLOCK_E], SMALLEST_KEY, tl.int32)
    if SCORING == "softmax" and not HAS_BIAS and logits_ptr.dtype.element_ty != tl.float32:
        keys, lowest = with_ids(keys, e), with_ids(lowest, e)
    else:
        keys, lowest = _with_wide_ids(keys, e), _with_wide_ids(lowest, e)
    ids, chosen = (), ()
    for _ in tl.static_range(K):  # K largest keys in turn: less work than comparing each with each
        best = tl.max(keys, 0)
        id = ID_MASK - (best & ID_MASK).to(tl.int32)
        keys = tl.where(e == id, lowest, keys)
        if SCORING == "sigmoid" or HAS_BIAS:
            logit = tl.sum(tl.where(e == id, logits, 0.0), 0)
        else:
            logit = _float_of(best)
        ids, chosen = ids + (id,), chosen + (logit,)
    return ids, chosen, largest, total


@triton.jit
def _weigh(chosen, largest, total, K: tl.constexpr, SCORING: tl.constexpr, NORM: tl.constexpr):
    weights = ()
    if NORM and SCORING == "softmax":
        best = chosen[0]
        for k in tl.static_range(1, K):
            best = tl.maximum(best, chosen[k])
        for k in tl.static_range(K):
            weights = weights + (accurate_exp(chosen[k] - best),)
    else:
        for k in tl.static_range(K):
            weights = weights + (_score(chosen[k], largest, total, SCORING),)
    if NORM:
        own_total = weights[0]
        for k in tl.static_range(1, K):
            own_total += weights[k]
        if SCORING == "sigmoid":
            own_total += TINY_SUM
        normalised = ()
        for k in tl.static_range(K):
            normalised = normalised + (weights[k] / own_total,)
        return normalised
    return weights


@triton.jit
def _product(rows, vector, VECTOR: tl.constexpr):
    """Of each row with a vector, summed over what a thread has of it."""
    products = rows.to(tl.float32) * vector.to(tl.float32)[None, :]
    return tl.sum(tl.reshape(products, [rows.shape[0], rows.shape[1] // VECTOR, VECTOR]), 2)


@triton.jit
def _gate_up(
    x_ptr, gate_up_ptr, activated_ptr, ids, H: tl.constexpr, I: tl.constexpr, K: tl.constexpr,
    HIDDEN_ACT: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """activated[k] = act(gate[ids[k]] x) * (up[ids[k]] x)."""
    TILES: tl.constexpr = (I + ROWS - 1) // ROWS
    for tile in range(tl.program_id(0), K * TILES, tl.num_programs(0)):
        slot = tile // TILES
        id = ids[0]
        for k in tl.static_range(1, K):
            id = tl.where(slot == k, ids[k], id)
        i = (tile - slot * TILES) * ROWS + tl.arange(0, ROWS)
        gate_ptr = gate_up_ptr + id.to(tl.int64) * (2 * I * H)
        gate = tl.zeros([ROWS, BLOCK_H // VECTOR], tl.float32)
        up = tl.zeros([ROWS, BLOCK_H // VECTOR], tl.float32)
        for first in tl.static_range(0, H, BLOCK_H):
            h = first + tl.arange(0, BLOCK_H)
            mask, at = (i < I)[:, None] & (h < H)[None, :], i[:, None] * H + h[None, :]
            gate_rows = tl.load(gate_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first")
            up_rows = tl.load(gate_ptr + I * H + at, mask=mask, other=0.0, eviction_policy="evict_first")
            x = tl.load(x_ptr + h, mask=h < H, other=0.0)
            gate += _product(gate_rows, x, VECTOR)
            up += _product(up_rows, x, VECTOR)
        activated = activation(tl.sum(gate, 1), HIDDEN_ACT) * tl.sum(up, 1)
        tl.store(activated_ptr + slot * I + i, round_for(activated_ptr, activated), mask=i < I)


@triton.jit
def _load_down(
    down_ptr, ids, row, end, CHUNK: tl.constexpr, H: tl.constexpr, I: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_I: tl.constexpr,
):  # fmt: skip
    """A chunk ``[rows, BLOCK_I]`` of one expert's down rows, of which there are PARTS; zeros from row ``end`` on."""
    i = CHUNK % PARTS * BLOCK_I + tl.arange(0, BLOCK_I)
    mask = (row < end)[:, None] & (i < I)[None, :]
    expert_ptr = down_ptr + ids[CHUNK // PARTS].to(tl.int64) * (H * I)
    return tl.load(expert_ptr + row[:, None] * I + i[None, :], mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def decode_one_kernel(
    x_ptr, router_ptr, gate_up_ptr, down_ptr, bias_ptr, logits_ptr, out_ptr, counters_ptr, activated_ptr,
    factor, max_polls,
    H: tl.constexpr, I: tl.constexpr, E: tl.constexpr, K: tl.constexpr, SCORING: tl.constexpr, HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr, HIDDEN_ACT: tl.constexpr, GATE_UP_ROWS: tl.constexpr, DOWN_ROWS: tl.constexpr,
    BLOCKS: tl.constexpr, AHEAD: tl.constexpr, PARTS: tl.constexpr, VECTOR: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    launches = tl.load(counters_ptr + LAUNCHES * LINE)
    num_routers = tl.minimum(num_programs, E)
    if program < num_routers:
        _route(x_ptr, router_ptr, logits_ptr, num_routers, H, E, BLOCK_H)
        arrive(counters_ptr + ROUTED * LINE)
    polls_left = wait_again(counters_ptr + ROUTED * LINE, launches, num_routers, max_polls)
    ids, chosen, largest, total = _select(logits_ptr, bias_ptr, E, K, SCORING, HAS_BIAS, NORM, BLOCK_E)
    _gate_up(x_ptr, gate_up_ptr, activated_ptr, ids, H, I, K, HIDDEN_ACT, GATE_UP_ROWS, BLOCK_H, VECTOR)
    # First of all: a release waits for every load before it.
    arrive(counters_ptr + DONE * LINE)
    row = program * DOWN_ROWS + tl.arange(0, DOWN_ROWS)
    tiles = ()
    for chunk in tl.static_range(AHEAD):
        tiles = tiles + (_load_down(down_ptr, ids, row, H, chunk, H, I, PARTS, BLOCK_I),)
    weights = _weigh(chosen, largest, total, K, SCORING, NORM)
    polls_left = wait_again(counters_ptr + DONE * LINE, launches, num_programs, polls_left)
    for block in range(BLOCKS):
        next_row = row + num_programs * DOWN_ROWS
        next_end = tl.where(block + 1 < BLOCKS, H, 0)
        sums = tl.zeros([DOWN_ROWS, BLOCK_I // VECTOR], tl.float32)
        for chunk in tl.static_range(K * PARTS):
            if chunk + AHEAD < K * PARTS:
                tile = _load_down(down_ptr, ids, row, H, chunk + AHEAD, H, I, PARTS, BLOCK_I)
            else:
                tile = _load_down(down_ptr, ids, next_row, next_end, chunk + AHEAD - K * PARTS, H, I, PARTS, BLOCK_I)
            i = chunk % PARTS * BLOCK_I + tl.arange(0, BLOCK_I)
            activated = tl.load(activated_ptr + chunk // PARTS * I + i, mask=i < I, other=0.0)
            sums += weights[chunk // PARTS] * _product(tiles[0], activated, VECTOR)
            tiles = tiles[1:] + (tile,)
        out = tl.sum(sums, 1) * factor
        out = tl.where(polls_left > 0, out, float("nan"))  # whoever has given up waiting says so
        tl.store(out_ptr + row, round_for(out_ptr, out), mask=row < H)
        row = next_row
    if polls_left <= 0:
        tl.store(counters_ptr + FLAG * LINE, 1)
    if program == 0:
        # All have read it before they arrived for the last time.
        tl.store(counters_ptr + LAUNCHES * LINE, launches + 1)


def takes_one(x: Tensor, layer: MoELayer) -> bool:
    """Whether ``OneToken`` is for such a call."""
    E, H, I = layer.down_proj.shape
    K = layer.routing.num_experts_per_tok
    if x.shape[0] != 1 or layer.routing.num_expert_groups > 1 or layer.shared is not None:
        return False
    if layer.gate_up_scale is not None or layer.down_scale is not None:
        return False
    if E > MAX_EXPERTS or K > MAX_EXPERTS_PER_TOKEN or 2 * I * H >= 2**31:
        return False
    return K * cdiv(I, _block_i(I, x.element_size(), Config())) <= MAX_CHUNKS


class OneToken(PreparedCall):
    """The scratch and the launch of a call on one token, where ``takes_one`` says so."""

    def __init__(self, x: Tensor, layer: MoELayer, config: Config | None = None) -> None:
        super().__init__(sizes_of(x, layer), x.device)
        config = config or Config()
        self._dtype, self._logits_dtype = x.dtype, layer.router_weight.dtype
        num_programs, options = 1, {"num_warps": config.num_warps}
        if not INTERPRETED:
            num_programs = config.programs * torch.cuda.get_device_properties(x.device).multi_processor_count
            # All programs at once or an error, since they wait for each other.
            options |= {"launch_cooperative_grid": True, "maxnreg": config.max_registers}
        numbers = (float(layer.routing.routed_scaling_factor), MAX_POLLS)
        constants = _constants(layer, num_programs, x.element_size(), config)
        self._launch = Relaunch(decode_one_kernel, num_programs, numbers, constants, **options)
        # Not a method of this object, which would then outlive its last reference.
        self.scratch = Scratch(partial(_make_counters, x.device), x.device)
        self._own_of_stream: dict[int, _Own] = {}

    def __call__(self, tensors: Sequence[Tensor | None], logits: Tensor | None, out: Tensor) -> None:
        stream, is_capturing = current_stream(self.device_index)
        own = None if is_capturing else self._own_of_stream.get(stream)
        if own is None:
            own = self._make_own(stream, is_capturing)
        self._launch((*tensors[:5], own.logits if logits is None else logits, out), stream, own.kept)
        self.has_launched = True
        if debug_enabled() and not is_capturing:
            check_flag(own.kept.tensors[0][FLAG.value * LINE.value])

    def _make_own(self, stream: int, is_capturing: bool) -> "_Own":
        """A stream's, which are kept, or a captured call's, whose buffers are in its graph's memory."""
        if is_capturing:
            captured.add(self)
        counters = self.scratch.get(stream, is_capturing=is_capturing)
        activated, logits = self._make_buffers() if is_capturing else keep(self._make_buffers, self.device)
        own = _Own(logits, Kept.of(counters, activated))
        if not is_capturing:
            self._own_of_stream[stream] = own
            for given_up in self._own_of_stream.keys() - self.scratch.of_stream.keys():
                self._own_of_stream.pop(given_up, None)
        return own

    def _make_buffers(self) -> tuple[Tensor, Tensor]:
        activated = torch.empty(self.sizes.K, self.sizes.I, dtype=self._dtype, device=self.device)
        return activated, torch.empty(self.sizes.E, dtype=self._logits_dtype, device=self.device)


class _Own(NamedTuple):
    """What belongs to one stream, or to one call in a graph."""

    logits: Tensor
    """Where the caller does not ask for them."""
    kept: Kept
    """Counters and activated products."""


def _make_counters(device: torch.device, count: int) -> list[Tensor]:
    return list(torch.zeros(count, NUM_COUNTERS * LINE.value, dtype=torch.int32, device=device).unbind())


def _block_i(I: int, itemsize: int, config: Config) -> int:
    """A chunk of a down row: at most a load for each thread, so that all rows of a tile lie alike in the threads."""
    return min(config.num_warps * 32 * LOAD_NBYTES // itemsize, next_power_of_2(max(16, I)))


def _constants(layer: MoELayer, num_programs: int, itemsize: int, config: Config) -> dict[str, Any]:
    routing, (E, H, I) = layer.routing, layer.down_proj.shape
    K, block_i = routing.num_experts_per_tok, _block_i(I, itemsize, config)
    parts = cdiv(I, block_i)
    return {
        "H": H, "I": I, "E": E, "K": K,
        "SCORING": routing.scoring,
        "HAS_BIAS": routing.correction_bias is not None,
        "NORM": routing.norm_topk_prob,
        "HIDDEN_ACT": layer.hidden_act,
        "GATE_UP_ROWS": config.gate_up_rows,
        "DOWN_ROWS": config.down_rows,
        "BLOCKS": cdiv(H, num_programs * config.down_rows),
        "AHEAD": min(config.ahead, K * parts),
        "PARTS": parts,
        "VECTOR": LOAD_NBYTES // itemsize,
        "BLOCK_E": next_power_of_2(max(16, E)),
        "BLOCK_H": min(ROW_NBYTES // itemsize, next_power_of_2(max(16, H))),
        "BLOCK_I": block_i,
    }  # fmt: skip
