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
from flash_moe.ops._triton.decode_call import PreparedCall, check_flag
from flash_moe.ops._triton.decode_config import max_registers, scale_kind
from flash_moe.ops._triton.decode_experts import BLOCK_OF_SCALE
from flash_moe.ops._triton.decode_kernel import _num_scales
from flash_moe.ops._triton.decode_routing import NO_LOGIT, TINY_SUM, _score
from flash_moe.ops._triton.math import INTERPRETED, accurate_exp, activation, round_for
from flash_moe.ops._triton.ranking import LARGEST_KEY, SMALLEST_KEY, ordered_key, with_ids
from flash_moe.ops._triton.relaunch import Kept, Relaunch
from flash_moe.ops._triton.scratch import Scratch, current_stream
from flash_moe.ops._triton.sizes import cdiv, next_power_of_2
from flash_moe.schedule.tasks import sizes_of

# The code goes through the experts, and through chunks of a gate row and of all experts' down rows, without a loop.
MAX_EXPERTS_PER_TOKEN, MAX_CHUNKS = 16, 64
MAX_EXPERTS = 1024
# A cache line each: how many launches there were, what programs count, and whether one has given up.
LAUNCHES, ROUTED, DONE, FLAG = (tl.constexpr(i) for i in range(4))
NUM_COUNTERS = 4
# In a key with an id.
ID_MASK = tl.constexpr(8191)
# What a thread loads at once, and how much of the router's row a program does.
LOAD_NBYTES, ROW_NBYTES = 16, 4096
WORD_NBYTES = 4


class Config(NamedTuple):
    programs: int = 4
    """On a multiprocessor."""
    num_warps: int = 4
    gate_up_rows: int = 4
    """As many as warps, or a multiple."""
    gate_up_chunks: int = 8
    """Of a row, a warp's loads that are on their way at a time."""
    down_rows: int = 4
    ahead: int = 4
    """Chunks of the down rows that are on their way at a time, also across the wait."""

    @property
    def max_registers(self) -> int:
        """Of a thread, so that the programs fit."""
        return max_registers(self.num_warps, self.programs)


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
        bits = tl.where(high < 0, high ^ LARGEST_KEY, high)
    else:
        bits = tl.where(key < 0, (key | ID_MASK) ^ LARGEST_KEY, key & ~ID_MASK)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _select(
    logits_ptr, bias_ptr, E: tl.constexpr, K: tl.constexpr, SCORING: tl.constexpr, HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr, WARPS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The ids of the K best, best first, as scalars, and their weights, ``[WARPS, BLOCK_K]``.

    All rows are the same: each warp has one to itself, and none waits for another until the ids are there.
    """
    e = tl.broadcast_to(tl.arange(0, BLOCK_E)[None, :], [WARPS, BLOCK_E])
    k = tl.arange(0, BLOCK_K)[None, :]
    logits = tl.load(logits_ptr + e, mask=e < E, other=0.0).to(tl.float32)
    logits = tl.where(e < E, logits, NO_LOGIT)
    largest = tl.zeros([WARPS, 1], tl.float32)
    total = largest + 1.0
    if SCORING == "softmax" and (HAS_BIAS or not NORM):
        largest = tl.max(logits, 1)[:, None]
        total = tl.sum(accurate_exp(logits - largest), 1)[:, None]
    ranked = logits  # without a bias a softmax ranks as logits do
    if SCORING == "sigmoid" or HAS_BIAS:
        ranked = _score(logits, largest, total, SCORING)
        if HAS_BIAS:
            ranked += tl.load(bias_ptr + e, mask=e < E, other=0.0).to(tl.float32)
    keys = tl.where(e < E, ordered_key(ranked), SMALLEST_KEY)
    lowest = tl.full([WARPS, BLOCK_E], SMALLEST_KEY, tl.int32)
    if SCORING == "softmax" and not HAS_BIAS and logits_ptr.dtype.element_ty != tl.float32:
        keys, lowest = with_ids(keys, e), with_ids(lowest, e)
    else:
        keys, lowest = _with_wide_ids(keys, e), _with_wide_ids(lowest, e)
    ids = tl.zeros([WARPS, BLOCK_K], tl.int32)
    chosen = tl.full([WARPS, BLOCK_K], NO_LOGIT, tl.float32)
    for j in tl.static_range(K):  # the K largest keys in turn: less work than comparing each with each
        best = tl.max(keys, 1)[:, None]
        id = ID_MASK - (best & ID_MASK).to(tl.int32)
        keys = tl.where(e == id, lowest, keys)
        if SCORING == "sigmoid" or HAS_BIAS:
            logit = tl.sum(tl.where(e == id, logits, 0.0), 1)[:, None]
        else:
            logit = _float_of(best)
        ids, chosen = tl.where(k == j, id, ids), tl.where(k == j, logit, chosen)
    if NORM and SCORING == "softmax":
        weights = tl.where(k < K, accurate_exp(chosen - tl.max(chosen, 1)[:, None]), 0.0)
        weights = weights / tl.sum(weights, 1)[:, None]
    else:
        weights = tl.where(k < K, _score(chosen, largest, total, SCORING), 0.0)
        if NORM:
            weights = weights / (tl.sum(weights, 1)[:, None] + TINY_SUM)
    return _scalars(tl.max(ids, 0), K), weights


@triton.jit
def _scalars(values, K: tl.constexpr):
    """The first K of a vector."""
    found = ()
    for j in tl.static_range(K):
        found = found + (tl.sum(tl.where(tl.arange(0, values.shape[0]) == j, values, 0), 0),)
    return found


@triton.jit
def _sum_in_threads(products, VECTOR: tl.constexpr):
    """Over what a thread has of a row, without asking another."""
    return tl.sum(tl.reshape(products, [products.shape[0], products.shape[1] // VECTOR, VECTOR]), 2)


@triton.jit
def _scaled(sums, scale_ptr, row, first, R: tl.constexpr, C: tl.constexpr, VECTOR: tl.constexpr, SCALE: tl.constexpr):
    """Sums of VECTOR columns each, from ``first`` on, of rows of float8 weights ``[R, C]``, times their scales."""
    if SCALE == "row":
        sums *= tl.load(scale_ptr + row, mask=row < R, other=0.0)[:, None]
    elif SCALE == "block":
        column = first + tl.arange(0, sums.shape[1]) * VECTOR
        per_row = (C + BLOCK_OF_SCALE - 1) // BLOCK_OF_SCALE
        at = row[:, None] // BLOCK_OF_SCALE * per_row + column[None, :] // BLOCK_OF_SCALE
        sums *= tl.load(scale_ptr + at, mask=(row < R)[:, None] & (column < C)[None, :], other=0.0)
    return sums


@triton.jit
def _gate_up(
    x_ptr, gate_up_ptr, scale_ptr, activated_ptr, ids, H: tl.constexpr, I: tl.constexpr, K: tl.constexpr,
    HIDDEN_ACT: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """activated[k] = act(gate[ids[k]] x) * (up[ids[k]] x).

    A warp has whole rows, CHUNKS pieces of a gate row and of an up row on their way at a time, and waits for no other.
    """
    TILES: tl.constexpr = (I + ROWS - 1) // ROWS
    lane = tl.arange(0, WIDTH // VECTOR)[None, :]
    for tile in range(tl.program_id(0), K * TILES, tl.num_programs(0)):
        slot = tile // TILES
        id = ids[0]
        for k in tl.static_range(1, K):
            id = tl.where(slot == k, ids[k], id)
        row = (tile - slot * TILES) * ROWS + tl.arange(0, ROWS)
        i = row[:, None]
        gate_ptr = gate_up_ptr + id.to(tl.int64) * (2 * I * H)
        own_scale_ptr = scale_ptr
        if SCALE != "none":
            own_scale_ptr += id.to(tl.int64) * _num_scales(2 * I, H, SCALE)
        gate = tl.zeros([ROWS, WIDTH // VECTOR], tl.float32)
        up = tl.zeros([ROWS, WIDTH // VECTOR], tl.float32)
        for first in tl.static_range(0, H, CHUNKS * WIDTH):
            pieces = ()
            for chunk in tl.static_range(CHUNKS):
                h = first + chunk * WIDTH + tl.arange(0, WIDTH)[None, :]
                mask, at = (i < I) & (h < H), i * H + h
                gates = tl.load(gate_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first")
                ups = tl.load(gate_ptr + I * H + at, mask=mask, other=0.0, eviction_policy="evict_first")
                pieces = pieces + ((gates, ups),)
            for chunk in tl.static_range(CHUNKS):
                # As wide as the rows: each thread loads what it needs, and nothing changes threads.
                h = tl.broadcast_to((first + chunk * WIDTH + tl.arange(0, WIDTH))[None, :], [ROWS, WIDTH])
                x = tl.load(x_ptr + h, mask=h < H, other=0.0).to(tl.float32)
                gates = _sum_in_threads(pieces[chunk][0].to(tl.float32) * x, VECTOR)
                ups = _sum_in_threads(pieces[chunk][1].to(tl.float32) * x, VECTOR)
                gate += _scaled(gates, own_scale_ptr, row, first + chunk * WIDTH, I, H, VECTOR, SCALE)
                up += _scaled(ups, own_scale_ptr, I + row, first + chunk * WIDTH, 2 * I, H, VECTOR, SCALE)
        activated = activation(tl.sum(gate, 1), HIDDEN_ACT) * tl.sum(up, 1)
        # By one lane of each row's warp, where the sum is.
        at = slot * I + i + lane
        activated = tl.broadcast_to(round_for(activated_ptr, activated)[:, None], at.shape)
        tl.store(activated_ptr + at, activated, mask=(i < I) & (lane == 0))


@triton.jit
def _as_words(ptr):
    return ptr.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def _halves(words, dtype: tl.constexpr):
    """The two 16-bit floats of each word, as float32."""
    if dtype == tl.bfloat16:
        low, high = (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)
    else:
        low, high = words.to(tl.int16).to(dtype, bitcast=True), (words >> 16).to(tl.int16).to(dtype, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _load_down(
    down_ptr, ids, row, end, CHUNK: tl.constexpr, H: tl.constexpr, I: tl.constexpr, K: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_I: tl.constexpr, IN_WORDS: tl.constexpr,
):  # fmt: skip
    """A chunk ``[rows, BLOCK_I]`` of K experts' down rows, each in PARTS, over and over; zeros from row ``end`` on."""
    expert_ptr = down_ptr + ids[CHUNK // PARTS % K].to(tl.int64) * (H * I)
    SCALE: tl.constexpr = 2 if IN_WORDS else 1
    i = CHUNK % PARTS * (BLOCK_I // SCALE) + tl.arange(0, BLOCK_I // SCALE)
    mask, at = (row < end)[:, None] & (i < I // SCALE)[None, :], row[:, None] * (I // SCALE) + i[None, :]
    if IN_WORDS:
        expert_ptr = _as_words(expert_ptr)
    return tl.load(expert_ptr + at, mask=mask, other=0 if IN_WORDS else 0.0, eviction_policy="evict_first")


@triton.jit
def _down_products(
    tile, activated_ptr, CHUNK: tl.constexpr, I: tl.constexpr, PARTS: tl.constexpr, BLOCK_I: tl.constexpr,
    VECTOR: tl.constexpr, IN_WORDS: tl.constexpr,
):  # fmt: skip
    SCALE: tl.constexpr = 2 if IN_WORDS else 1
    i = CHUNK % PARTS * (BLOCK_I // SCALE) + tl.arange(0, BLOCK_I // SCALE)
    own_ptr = activated_ptr + CHUNK // PARTS * I
    if IN_WORDS:
        activated = tl.load(_as_words(own_ptr) + i, mask=i < I // SCALE, other=0)[None, :]
        low, high = _halves(tile, activated_ptr.dtype.element_ty)
        activated_low, activated_high = _halves(activated, activated_ptr.dtype.element_ty)
        products = low * activated_low + high * activated_high
    else:
        i = i[None, :]
        if tile.dtype != activated_ptr.dtype.element_ty:  # of other sizes, and so in other threads
            i = tl.broadcast_to(i, tile.shape)
        activated = tl.load(own_ptr + i, mask=i < I, other=0.0)
        products = tile.to(tl.float32) * activated.to(tl.float32)
    return _sum_in_threads(products, VECTOR // SCALE)


@triton.jit
def decode_one_kernel(
    x_ptr, router_ptr, gate_up_ptr, down_ptr, bias_ptr, gate_up_scale_ptr, down_scale_ptr, logits_ptr, out_ptr,
    counters_ptr, activated_ptr, factor, max_polls,
    H: tl.constexpr, I: tl.constexpr, E: tl.constexpr, K: tl.constexpr, SCORING: tl.constexpr, HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr, HIDDEN_ACT: tl.constexpr, GATE_UP_SCALE: tl.constexpr, DOWN_SCALE: tl.constexpr,
    GATE_UP_ROWS: tl.constexpr, GATE_UP_CHUNKS: tl.constexpr, GATE_UP_VECTOR: tl.constexpr, WIDTH: tl.constexpr,
    DOWN_ROWS: tl.constexpr, BLOCKS: tl.constexpr, AHEAD: tl.constexpr, PARTS: tl.constexpr, VECTOR: tl.constexpr,
    WARPS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr,
    IN_WORDS: tl.constexpr,
):  # fmt: skip
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    launches = tl.load(counters_ptr + LAUNCHES * LINE)
    num_routers = tl.minimum(num_programs, E)
    if program < num_routers:
        _route(x_ptr, router_ptr, logits_ptr, num_routers, H, E, BLOCK_H)
        arrive(counters_ptr + ROUTED * LINE)
    polls_left = wait_again(counters_ptr + ROUTED * LINE, launches, num_routers, max_polls)
    ids, weights = _select(logits_ptr, bias_ptr, E, K, SCORING, HAS_BIAS, NORM, WARPS, BLOCK_E, BLOCK_K)
    _gate_up(x_ptr, gate_up_ptr, gate_up_scale_ptr, activated_ptr, ids, H, I, K, HIDDEN_ACT, GATE_UP_SCALE,
             GATE_UP_ROWS, GATE_UP_CHUNKS, WIDTH, GATE_UP_VECTOR)  # fmt: skip
    arrive(counters_ptr + DONE * LINE)  # before more is loaded: a release waits for every load before it
    row = program * DOWN_ROWS + tl.arange(0, DOWN_ROWS)
    tiles = (_load_down(down_ptr, ids, row, H, 0, H, I, K, PARTS, BLOCK_I, IN_WORDS),)
    for chunk in tl.static_range(1, AHEAD):
        tiles = tiles + (_load_down(down_ptr, ids, row, H, chunk, H, I, K, PARTS, BLOCK_I, IN_WORDS),)
    is_first = (tl.arange(0, WARPS) == 0)[:, None]
    weights = _scalars(tl.sum(tl.where(is_first, weights, 0.0), 0), K)
    polls_left = wait_again(counters_ptr + DONE * LINE, launches, num_programs, polls_left)
    for block in range(BLOCKS):
        next_row = row + num_programs * DOWN_ROWS
        next_end = tl.where(block + 1 < BLOCKS, H, 0)
        sums = tl.zeros([DOWN_ROWS, BLOCK_I // VECTOR], tl.float32)
        for chunk in tl.static_range(K * PARTS):
            if chunk + AHEAD < K * PARTS:
                tile = _load_down(down_ptr, ids, row, H, chunk + AHEAD, H, I, K, PARTS, BLOCK_I, IN_WORDS)
            else:
                tile = _load_down(down_ptr, ids, next_row, next_end, chunk + AHEAD, H, I, K, PARTS, BLOCK_I, IN_WORDS)
            products = _down_products(tiles[0], activated_ptr, chunk, I, PARTS, BLOCK_I, VECTOR, IN_WORDS)
            own_scale_ptr = down_scale_ptr
            if DOWN_SCALE != "none":
                own_scale_ptr += ids[chunk // PARTS].to(tl.int64) * _num_scales(H, I, DOWN_SCALE)
            products = _scaled(products, own_scale_ptr, row, chunk % PARTS * BLOCK_I, H, I, VECTOR, DOWN_SCALE)
            sums += weights[chunk // PARTS] * products
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


def config_of(layer: MoELayer) -> Config:
    """By the registers that chunks take which are held across a wait: float8 ones a register a number."""
    return Config() if layer.down_scale is None else Config(ahead=2)


def takes_one(x: Tensor, layer: MoELayer) -> bool:
    """Whether ``OneToken`` is for such a call."""
    E, H, I = layer.down_proj.shape
    K = layer.routing.num_experts_per_tok
    if x.shape[0] != 1 or layer.routing.num_expert_groups > 1 or layer.shared is not None:
        return False
    if E > MAX_EXPERTS or K > MAX_EXPERTS_PER_TOKEN or max(E, 2 * I) * H >= 2**31:
        return False
    down_chunks = K * cdiv(I, _block_i(I, layer.down_proj.element_size(), config_of(layer)))
    return max(down_chunks, cdiv(H, _width(H, layer.gate_up_proj.element_size()))) <= MAX_CHUNKS


class OneToken(PreparedCall):
    """The scratch and the launch of a call on one token, where ``takes_one`` says so."""

    def __init__(self, x: Tensor, layer: MoELayer, config: Config | None = None) -> None:
        super().__init__(sizes_of(x, layer), x.device)
        config = config or config_of(layer)
        self._dtype, self._logits_dtype = x.dtype, layer.router_weight.dtype
        num_programs, options = 1, {"num_warps": config.num_warps}
        if not INTERPRETED:
            num_programs = config.programs * torch.cuda.get_device_properties(x.device).multi_processor_count
            # All programs at once or an error, since they wait for each other.
            options |= {"launch_cooperative_grid": True, "maxnreg": config.max_registers}
        numbers = (float(layer.routing.routed_scaling_factor), MAX_POLLS)
        self._launches = [
            Relaunch(decode_one_kernel, num_programs, numbers, constants, **options)
            for constants in _constants(layer, num_programs, x.element_size(), config)
        ]
        # Not a method of this object, which would then outlive its last reference.
        self.scratch = Scratch(partial(_make_counters, x.device), x.device)

    def __call__(self, tensors: Sequence[Tensor | None], logits: Tensor | None, out: Tensor) -> None:
        stream, is_capturing = current_stream(self.device_index)
        own = None if is_capturing else self._own_of_stream.get(stream)
        if own is None:
            own = self._make_own(stream, is_capturing)
        down: Any = tensors[3]
        launch = self._launches[down.data_ptr() % WORD_NBYTES == 0]
        launch((*tensors[:5], *tensors[9:], own.logits if logits is None else logits, out), stream, own.kept)
        self.has_launched = True
        if debug_enabled() and not is_capturing:
            check_flag(self._flag(own.kept.tensors[0]))

    def _flag(self, state: Tensor) -> Tensor:
        return state[FLAG.value * LINE.value :]

    def _own(self, state: Tensor, buffers: tuple[Tensor, Tensor]) -> "_Own":
        activated, logits = buffers
        return _Own(logits, Kept.of(state, activated))

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


def _width(H: int, itemsize: int) -> int:
    """A chunk of a gate row: a load for each thread of a warp."""
    return min(32 * LOAD_NBYTES // itemsize, next_power_of_2(max(16, H)))


def _constants(layer: MoELayer, num_programs: int, itemsize: int, config: Config) -> list[dict[str, Any]]:
    """For down rows that begin anywhere, and at a word."""
    routing, (E, H, I) = layer.routing, layer.down_proj.shape
    gate_up_itemsize, down_itemsize = layer.gate_up_proj.element_size(), layer.down_proj.element_size()
    K, block_i = routing.num_experts_per_tok, _block_i(I, down_itemsize, config)
    parts = cdiv(I, block_i)
    width = _width(H, gate_up_itemsize)
    constants = {
        "H": H, "I": I, "E": E, "K": K,
        "SCORING": routing.scoring,
        "HAS_BIAS": routing.correction_bias is not None,
        "NORM": routing.norm_topk_prob,
        "HIDDEN_ACT": layer.hidden_act,
        "GATE_UP_ROWS": config.gate_up_rows,
        "DOWN_ROWS": config.down_rows,
        "GATE_UP_CHUNKS": min(config.gate_up_chunks, cdiv(H, width)),
        "BLOCKS": cdiv(H, num_programs * config.down_rows),
        "AHEAD": min(config.ahead, K * parts),
        "PARTS": parts,
        "GATE_UP_SCALE": scale_kind(layer.gate_up_scale),
        "DOWN_SCALE": scale_kind(layer.down_scale),
        "GATE_UP_VECTOR": LOAD_NBYTES // gate_up_itemsize,
        "VECTOR": LOAD_NBYTES // down_itemsize,
        "WARPS": config.num_warps,
        "BLOCK_E": next_power_of_2(max(16, E)),
        "BLOCK_K": next_power_of_2(K),
        "WIDTH": width,
        "BLOCK_H": min(ROW_NBYTES // itemsize, next_power_of_2(max(16, H))),
        "BLOCK_I": block_i,
    }  # fmt: skip
    # What is held in registers across a wait takes one for each 16 bits, but in words.
    return [constants | {"IN_WORDS": False}, constants | {"IN_WORDS": down_itemsize == 2 and I % 2 == 0}]
