"""flash_decode for few tokens in one launch: persistent programs that meet at counters, dealt the work ahead.

T tokens, H hidden size, I intermediate size, E experts, K experts a token, G programs, S slots: slot i is the i-th
distinct expert hit, in ascending order of ids. Contiguous x [T, H], router [E, H], gate_up [E, 2I, H], down [E, H, I].

Every program

    routes    the logits of experts p, p + G, ..., and waits for those of the others
    selects   the K experts of all tokens; each program for itself, so that nobody waits for a second time
    gate_up   tiles p, p + G, ... of the slots' columns of I: a round is G tiles, one a program
    down      in between, ``LEAD`` rounds behind, its own rows of H, of each slot whose gate_up tiles are all done,
              added up over the slots in registers

Weights are loaded one step ahead of their use, across the waits too. Three things are rounded to 16 bits in a 16-bit
layer: logits, activated, out. Nothing is added atomically but to counters, so the bits are the same on every run.

Programs wait by polling, and a wait that takes too long gives up and raises a flag, so that nothing can hang. A wait is
over in the order of the program, too, for a single program: that is what the interpreter runs.
"""

from collections import OrderedDict
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_moe._checks import debug_enabled
from flash_moe._moe_layer import TINY, MoELayer
from flash_moe.ops._triton.math import INTERPRETED, accurate_exp, activation, round_for

MAX_TOKENS, MAX_EXPERTS = 4, 1024
# Counters, a cache line each: programs that have routed, programs that have left, then gate_up tiles done of each slot.
ROUTED, LEFT, FIRST_SLOT = (tl.constexpr(i) for i in range(3))
LINE = tl.constexpr(32)
# Polls that a program makes in all before it gives up: about a second, an atomic taking most of a microsecond.
MAX_POLLS = 2**20
# Comparisons of keys at once: 128 for each of 512 threads.
RANK_COMPARISONS = 2**16
# Scratch of this many calls that may be captured is made beside that of a stream, zeroed before any capture begins.
GRAPH_SCRATCHES = 64
MAX_REMEMBERED = 256
NO_POLLS_LEFT = tl.constexpr(0)
# Below every logit, and finite: a token of NaNs would subtract infinities.
NO_LOGIT = tl.constexpr(-3.4e38)
SMALLEST_KEY = tl.constexpr(-(2**31))
LARGEST_KEY = tl.constexpr(2**31 - 1)
TINY_SUM = tl.constexpr(TINY)


class Config(NamedTuple):
    """How the work is cut. A program of 16 warps has a row of gate and one of up for each warp in every step."""

    rows: int = 16
    chunks: int = 4
    """Vectors of 16 bytes that a thread loads of each row in one step."""
    lead: int = 1
    """Rounds between a slot's last gate_up tile and its down rows."""
    num_warps: int = 16


def config_of(T: int) -> Config:
    """Not measured yet. One token spills no registers at H 2048, I 768; several want half as many loads in flight."""
    return Config() if T == 1 else Config(chunks=2)


@triton.jit
def _arrive(counter_ptr):
    tl.debug_barrier()  # every thread has stored its part before the program arrives
    tl.atomic_add(counter_ptr, 1, sem="release")


@triton.jit
def _wait(counter_ptr, count, polls_left):
    """Until ``count`` have arrived, or no polls are left; gives how many are."""
    arrived = tl.atomic_add(counter_ptr, 0, sem="acquire")
    while (arrived < count) & (polls_left > 0):
        arrived = tl.atomic_add(counter_ptr, 0, sem="acquire")
        polls_left -= 1
    return polls_left


@triton.jit
def _leave(counters_ptr, flag_ptr, polls_left, NUM_COUNTERS: tl.constexpr, BLOCK: tl.constexpr):
    """Whoever leaves last zeroes the counters: all have arrived wherever they do, and nobody waits any more."""
    if polls_left <= NO_POLLS_LEFT:
        tl.store(flag_ptr, 1)
    left = tl.atomic_add(counters_ptr + LEFT * LINE, 1, sem="acq_rel")
    if left == tl.num_programs(0) - 1:
        counter = tl.arange(0, BLOCK)
        tl.store(counters_ptr + counter * LINE, tl.zeros([BLOCK], tl.int32), mask=counter < NUM_COUNTERS)


@triton.jit
def _route(x_ptr, router_ptr, logits_ptr, T: tl.constexpr, H: tl.constexpr, E: tl.constexpr, BLOCK_H: tl.constexpr):
    h = tl.arange(0, BLOCK_H)
    for e in range(tl.program_id(0), E, tl.num_programs(0)):
        weights = tl.load(router_ptr + e * H + h, mask=h < H, other=0.0).to(tl.float32)
        for t in tl.static_range(T):
            x = tl.load(x_ptr + t * H + h, mask=h < H, other=0.0).to(tl.float32)
            tl.store(logits_ptr + t * E + e, round_for(logits_ptr, tl.sum(weights * x, 0)))


@triton.jit
def _score(logits, largest, total, SCORING: tl.constexpr):
    if SCORING == "softmax":
        return accurate_exp(logits - largest) / total
    small = accurate_exp(-tl.abs(logits))  # of either sign: an exponential that cannot overflow
    return tl.where(logits >= 0.0, 1.0, small) / (1.0 + small)


@triton.jit
def _keys(logits, e, bias_ptr, largest, total, E: tl.constexpr, SCORING: tl.constexpr, HAS_BIAS: tl.constexpr):
    """int32 that sort as what ranks the experts, NaN the largest; without a bias a softmax ranks as logits do."""
    ranked = logits
    if SCORING == "sigmoid" or HAS_BIAS:
        ranked = _score(logits, largest, total, SCORING)
    if HAS_BIAS:
        ranked += tl.load(bias_ptr + e, mask=e < E, other=0.0).to(tl.float32)
    bits = (ranked + 0.0).to(tl.int32, bitcast=True)  # -0.0 + 0.0 is 0.0
    keys = tl.where(bits < 0, bits ^ LARGEST_KEY, bits)
    keys = tl.where(ranked == ranked, keys, LARGEST_KEY)
    return tl.where(e < E, keys, SMALLEST_KEY)


@triton.jit
def _num_above(others, other, keys, e):
    """For each key how many of the others are larger, or equal with a lower id."""
    others, other = others[:, None], other[:, None]
    is_above = (others > keys[None, :]) | ((others == keys[None, :]) & (other < e[None, :]))
    return tl.sum(is_above.to(tl.int32), 0)


@triton.jit
def _select(
    logits_ptr,
    bias_ptr,
    keys_ptr,
    factor,
    E: tl.constexpr,
    K: tl.constexpr,
    SCORING: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
):
    """Of one token: whether each expert is chosen, and its weight. An expert's rank is how many stand above it.

    Of many experts the keys go through memory of the program's own, to compare them with a block at a time.
    """
    e = tl.arange(0, BLOCK_E)
    # Past the L1 cache, which knows nothing of other multiprocessors' stores; and once, since all programs read them.
    logits = tl.load(logits_ptr + e, mask=e < E, other=0.0, cache_modifier=".cg")
    logits = tl.where(e < E, logits.to(tl.float32), NO_LOGIT)
    largest = tl.max(logits, 0)
    total = tl.sum(accurate_exp(logits - largest), 0)
    keys = _keys(logits, e, bias_ptr, largest, total, E, SCORING, HAS_BIAS)
    if RANK_BLOCK == BLOCK_E:
        ranks = _num_above(keys, e, keys, e)
    else:
        tl.store(keys_ptr + e, keys)
        tl.debug_barrier()  # all keys are there before any thread reads
        ranks = tl.zeros([BLOCK_E], tl.int32)
        for first in tl.range(0, BLOCK_E, RANK_BLOCK):
            other = first + tl.arange(0, RANK_BLOCK)
            ranks += _num_above(tl.load(keys_ptr + other), other, keys, e)
        tl.debug_barrier()  # all have read before the next token's keys are there
    chosen = (ranks < K) & (e < E)
    if NORM and SCORING == "softmax":
        weights = tl.where(chosen, accurate_exp(logits - tl.max(tl.where(chosen, logits, NO_LOGIT), 0)), 0.0)
        weights = weights / tl.sum(weights, 0)
    else:
        weights = tl.where(chosen, _score(logits, largest, total, SCORING), 0.0)
        if NORM:
            weights = weights / (tl.sum(weights, 0) + TINY_SUM)
    return chosen.to(tl.int32), weights * factor


@triton.jit
def _find_slots(
    logits_ptr,
    bias_ptr,
    keys_ptr,
    slots_ptr,
    weights_ptr,
    factor,
    T: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    SCORING: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
):
    """Writes each slot's expert, its tokens as bits, and their weights; the number of slots hit.

    Into memory of this program's own, which it reads back: a slot's numbers are then one load.
    """
    e = tl.arange(0, BLOCK_E)
    tokens = tl.zeros([BLOCK_E], tl.int32)
    weights = ()
    for t in tl.static_range(T):
        chosen, token_weights = _select(
            logits_ptr + t * E, bias_ptr, keys_ptr, factor, E, K, SCORING, HAS_BIAS, NORM, BLOCK_E, RANK_BLOCK
        )
        tokens |= chosen << t
        weights = weights + (token_weights,)
    is_hit = tokens != 0
    slot = tl.cumsum(is_hit.to(tl.int32), 0) - 1
    tl.store(slots_ptr + slot * 2, e, mask=is_hit)
    tl.store(slots_ptr + slot * 2 + 1, tokens, mask=is_hit)
    for t in tl.static_range(T):
        tl.store(weights_ptr + slot * T + t, weights[t], mask=is_hit)
    tl.debug_barrier()  # all of it is there before any thread reads
    return tl.sum(is_hit.to(tl.int32), 0)


@triton.jit
def _load_rows(matrix_ptr, row, end, PART: tl.constexpr, C: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """Chunks ``[rows, WIDTH]`` of a matrix with C columns; rows from ``end`` on are zeros, and not read.

    A chunk is what a warp loads of a row at once: a tile of no more columns is dealt to the warps by rows, so that sums
    over columns stay within a warp. Tiles of three dimensions were dealt otherwise by triton 3.6 than by 3.7.
    """
    tiles = ()
    for chunk in tl.static_range(CHUNKS):
        column = (PART * CHUNKS + chunk) * WIDTH + tl.arange(0, WIDTH)
        mask = (row < end)[:, None] & (column < C)[None, :]
        at = matrix_ptr + (row * C)[:, None] + column[None, :]
        tiles = tiles + (tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first"),)
    return tiles


@triton.jit
def _load_vector(
    vector_ptr,
    PART: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    CACHE: tl.constexpr,
):
    """float32 chunks ``[ROWS, WIDTH]`` of a vector, as wide as the rows that it is multiplied with.

    So each thread loads what it needs, and nothing changes threads.
    """
    tiles = ()
    for chunk in tl.static_range(CHUNKS):
        column = (PART * CHUNKS + chunk) * WIDTH + tl.arange(0, WIDTH)
        column = tl.broadcast_to(column[None, :], [ROWS, WIDTH])
        tile = tl.load(vector_ptr + column, mask=column < C, other=0.0, cache_modifier=CACHE)
        tiles = tiles + (tile.to(tl.float32),)
    return tiles


@triton.jit
def _dots(tiles, vector, CHUNKS: tl.constexpr):
    products = tiles[0].to(tl.float32) * vector[0]
    for chunk in tl.static_range(1, CHUNKS):
        products += tiles[chunk].to(tl.float32) * vector[chunk]
    return tl.sum(products, 1)


@triton.jit
def _load_gate_up(
    gate_up_ptr,
    slots_ptr,
    tile,
    num_tiles,
    PART: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    tiles_per_slot = tl.cdiv(I, ROWS)
    e = tl.load(slots_ptr + tile // tiles_per_slot * 2, mask=tile < num_tiles, other=0).to(tl.int64)
    i = tile % tiles_per_slot * ROWS + tl.arange(0, ROWS)
    end = tl.where(tile < num_tiles, I, 0)
    gate_ptr = gate_up_ptr + e * (2 * I * H)
    gate = _load_rows(gate_ptr, i, end, PART, H, CHUNKS, WIDTH)
    return gate, _load_rows(gate_ptr + I * H, i, end, PART, H, CHUNKS, WIDTH)


@triton.jit
def _load_down(
    down_ptr,
    slots_ptr,
    slot,
    hits,
    row,
    end,
    PART: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    e = tl.load(slots_ptr + slot * 2, mask=slot < hits, other=0).to(tl.int64)
    return _load_rows(down_ptr + e * (H * I), row, tl.where(slot < hits, end, 0), PART, I, CHUNKS, WIDTH)


@triton.jit
def _gate_up_tile(
    gate,
    up,
    x_ptr,
    gate_up_ptr,
    slots_ptr,
    activated_ptr,
    counters_ptr,
    tile,
    num_tiles,
    T: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,
    HIDDEN_ACT: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One tile, whose first part is loaded; gives the first part of this program's next one."""
    tiles_per_slot = tl.cdiv(I, ROWS)
    slot = tile // tiles_per_slot
    tokens = 1 if T == 1 else tl.load(slots_ptr + slot * 2 + 1)
    NUM_PARTS: tl.constexpr = (H + CHUNKS * WIDTH - 1) // (CHUNKS * WIDTH)
    sums = ((tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)),) * T
    for part in tl.static_range(NUM_PARTS):
        next_tile = tile if part + 1 < NUM_PARTS else tile + tl.num_programs(0)
        next_gate, next_up = _load_gate_up(
            gate_up_ptr, slots_ptr, next_tile, num_tiles, (part + 1) % NUM_PARTS, H, I, ROWS, CHUNKS, WIDTH
        )
        new_sums = ()
        for t in tl.static_range(T):
            gate_sum, up_sum = sums[t]
            if (tokens >> t) & 1 != 0:
                x = _load_vector(x_ptr + t * H, part, H, ROWS, CHUNKS, WIDTH, "")
                gate_sum += _dots(gate, x, CHUNKS)
                up_sum += _dots(up, x, CHUNKS)
            new_sums = new_sums + ((gate_sum, up_sum),)
        sums = new_sums
        gate, up = next_gate, next_up
    i = tile % tiles_per_slot * ROWS + tl.arange(0, ROWS)
    for t in tl.static_range(T):
        activated = activation(sums[t][0], HIDDEN_ACT) * sums[t][1]
        tl.store(activated_ptr + (slot * T + t) * I + i, round_for(activated_ptr, activated), mask=i < I)
    _arrive(counters_ptr + (FIRST_SLOT + slot) * LINE)
    return gate, up


@triton.jit
def _down_slot(
    down,
    sums,
    polls_left,
    down_ptr,
    slots_ptr,
    weights_ptr,
    activated_ptr,
    counters_ptr,
    slot,
    hits,
    row,
    end,
    T: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,
    ROWS: tl.constexpr,
    DOWN_ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One slot, whose first part is loaded; gives the first part of the next one, the sums, and the polls left."""
    tokens = 1 if T == 1 else tl.load(slots_ptr + slot * 2 + 1)
    NUM_PARTS: tl.constexpr = (I + CHUNKS * WIDTH - 1) // (CHUNKS * WIDTH)
    products = (tl.zeros_like(sums[0]),) * T
    for part in tl.static_range(NUM_PARTS):
        next_slot = slot if part + 1 < NUM_PARTS else slot + 1
        next_down = _load_down(
            down_ptr, slots_ptr, next_slot, hits, row, end, (part + 1) % NUM_PARTS, H, I, CHUNKS, WIDTH
        )
        if part == 0:
            polls_left = _wait(counters_ptr + (FIRST_SLOT + slot) * LINE, tl.cdiv(I, ROWS), polls_left)
        new_products = ()
        for t in tl.static_range(T):
            product = products[t]
            if (tokens >> t) & 1 != 0:
                # Past the L1 cache, as the logits.
                token_ptr = activated_ptr + (slot * T + t) * I
                activated = _load_vector(token_ptr, part, I, DOWN_ROWS, CHUNKS, WIDTH, ".cg")
                product += _dots(down, activated, CHUNKS)
            new_products = new_products + (product,)
        products = new_products
        down = next_down
    new_sums = ()
    for t in tl.static_range(T):
        token_sum = sums[t]
        if (tokens >> t) & 1 != 0:
            token_sum += products[t] * tl.load(weights_ptr + slot * T + t)
        new_sums = new_sums + (token_sum,)
    return down, new_sums, polls_left


@triton.jit
def _decode_kernel(
    x_ptr,
    router_ptr,
    gate_up_ptr,
    down_ptr,
    bias_ptr,
    logits_ptr,
    out_ptr,
    counters_ptr,
    flag_ptr,
    keys_ptr,
    slots_ptr,
    weights_ptr,
    activated_ptr,
    factor,
    max_polls,
    T: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    SCORING: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    HIDDEN_ACT: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    LEAD: tl.constexpr,
    H_WIDTH: tl.constexpr,
    I_WIDTH: tl.constexpr,
    DOWN_ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
):
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    keys_ptr += program * BLOCK_E
    slots_ptr += program * (2 * S)
    weights_ptr += program * (T * S)
    _route(x_ptr, router_ptr, logits_ptr, T, H, E, BLOCK_H)
    _arrive(counters_ptr + ROUTED * LINE)
    polls_left = _wait(counters_ptr + ROUTED * LINE, num_programs, max_polls)
    hits = _find_slots(
        logits_ptr, bias_ptr, keys_ptr, slots_ptr, weights_ptr, factor, T, E, K, SCORING, HAS_BIAS, NORM, BLOCK_E,
        RANK_BLOCK,
    )  # fmt: skip
    tiles_per_slot = tl.cdiv(I, ROWS)
    num_tiles = hits * tiles_per_slot
    per_program = tl.cdiv(H, num_programs)
    row = program * per_program + tl.arange(0, DOWN_ROWS)
    end = tl.minimum((program + 1) * per_program, H)
    gate, up = _load_gate_up(gate_up_ptr, slots_ptr, program, num_tiles, 0, H, I, ROWS, CHUNKS, H_WIDTH)
    down = _load_down(down_ptr, slots_ptr, 0, hits, row, end, 0, H, I, CHUNKS, I_WIDTH)
    sums = (tl.zeros([DOWN_ROWS], tl.float32),) * T
    done = 0
    # The rounds, and LEAD more in which only down is left to do.
    for first in range(0, num_tiles + LEAD * num_programs, num_programs):
        if first + program < num_tiles:
            gate, up = _gate_up_tile(
                gate, up, x_ptr, gate_up_ptr, slots_ptr, activated_ptr, counters_ptr, first + program, num_tiles,
                T, H, I, HIDDEN_ACT, ROWS, CHUNKS, H_WIDTH,
            )  # fmt: skip
        tiles_behind = tl.maximum(first + num_programs - LEAD * num_programs, 0)
        ready = tl.minimum(tiles_behind // tiles_per_slot, hits)
        for slot in range(done, ready):
            down, sums, polls_left = _down_slot(
                down, sums, polls_left, down_ptr, slots_ptr, weights_ptr, activated_ptr, counters_ptr, slot, hits,
                row, end, T, H, I, ROWS, DOWN_ROWS, CHUNKS, I_WIDTH,
            )  # fmt: skip
        done = ready
    for t in tl.static_range(T):
        tl.store(out_ptr + t * H + row, round_for(out_ptr, sums[t]), mask=row < end)
    _leave(counters_ptr, flag_ptr, polls_left, FIRST_SLOT + S, BLOCK_S)


class Scratch(NamedTuple):
    """What programs tell each other in one call. The counters are zero between calls."""

    counters: Tensor
    flag: Tensor
    keys: Tensor
    slots: Tensor
    weights: Tensor
    activated: Tensor


class _Shape(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    T: int
    S: int
    I: int
    E: int
    G: int

    def make(self, count: int) -> list[Scratch]:
        counters = (FIRST_SLOT.value + self.S) * LINE.value
        tensors = (
            torch.zeros(count, counters, dtype=torch.int32, device=self.device),
            torch.zeros(count, 1, dtype=torch.int32, device=self.device),
            torch.empty(count, self.G, triton.next_power_of_2(self.E), dtype=torch.int32, device=self.device),
            torch.empty(count, self.G, self.S, 2, dtype=torch.int32, device=self.device),
            torch.empty(count, self.G, self.S, self.T, dtype=torch.float32, device=self.device),
            torch.empty(count, self.S, self.T, self.I, dtype=self.dtype, device=self.device),
        )
        return [Scratch(*each) for each in zip(*(x.unbind() for x in tensors), strict=True)]


class _Scratches:
    """Scratch by stream and shape, made at the first call and kept; each captured call has one to itself, for ever.

    A graph may run beside anything, and how long it lives is not known here. Zeroing within a capture would be a launch
    of its own on each replay, so what graphs will need is zeroed before; beyond that it is done in the graph.
    """

    def __init__(self) -> None:
        self._of_stream: OrderedDict[tuple[int, _Shape], Scratch] = OrderedDict()
        self._spare: OrderedDict[_Shape, list[Scratch]] = OrderedDict()
        self._of_graphs: list[Scratch] = []

    def get(self, shape: _Shape) -> Scratch:
        on_gpu = shape.device.type == "cuda"
        if on_gpu and torch.cuda.is_current_stream_capturing():
            return self._take_spare(shape)
        stream = torch.cuda.current_stream(shape.device).cuda_stream if on_gpu else 0
        if (stream, shape) not in self._of_stream:
            num_spare = GRAPH_SCRATCHES if on_gpu and shape not in self._spare else 0
            found, *spare = shape.make(1 + num_spare)
            if spare:
                self._spare[shape] = spare
            self._of_stream[stream, shape] = found
            for table in (self._of_stream, self._spare):
                if len(table) > MAX_REMEMBERED:
                    table.popitem(last=False)
        return self._of_stream[stream, shape]

    def _take_spare(self, shape: _Shape) -> Scratch:
        spare = self._spare.get(shape)
        if not spare:
            return shape.make(1)[0]
        self._of_graphs.append(spare.pop())
        return self._of_graphs[-1]


_scratches = _Scratches()


def check_decode(hidden_states: Tensor, layer: MoELayer) -> None:
    """Raise ``ValueError``, naming the argument, for what the kernel does not take."""
    refused = {
        "hidden_states": (hidden_states.shape[0] > MAX_TOKENS, f"at most {MAX_TOKENS} tokens", hidden_states.shape[0]),
        "router_weight": (
            layer.router_weight.shape[0] > MAX_EXPERTS, f"at most {MAX_EXPERTS} experts", layer.router_weight.shape[0],
        ),
        "num_expert_groups": (layer.routing.num_expert_groups > 1, "1", layer.routing.num_expert_groups),
        "shared_gate_proj": (layer.shared is not None, "no shared expert", "one"),
        "gate_up_scale": (layer.gate_up_scale is not None, "no float8 weights", "their scale"),
        "down_scale": (layer.down_scale is not None, "no float8 weights", "their scale"),
    }  # fmt: skip
    for name, (is_refused, expected, got) in refused.items():
        if is_refused:
            raise ValueError(f'{name}: expected {expected} with backend="triton"; got {got}; use backend="torch"')


def decode_forward(hidden_states: Tensor, layer: MoELayer, policy: str) -> tuple[Tensor, Tensor]:
    """``out [T, H]`` and the router's logits ``[T, E]``, in one launch; the only policy is the static one.

    Raises:
        ValueError: the kernel does not take this call.
        RuntimeError: under ``FLASH_MOE_DEBUG=1`` a program has given up waiting, in this call or in an earlier one.
    """
    check_decode(hidden_states, layer)
    out = torch.empty_like(hidden_states)
    logits = layer.router_weight.new_empty(hidden_states.shape[0], layer.router_weight.shape[0])
    if hidden_states.shape[0] > 0:
        with torch.cuda.device_of(hidden_states):
            _launch(hidden_states, layer, logits, out)
    return out, logits


def _launch(x: Tensor, layer: MoELayer, logits: Tensor, out: Tensor) -> None:
    (T, H), (E, _, I), routing = x.shape, layer.down_proj.shape, layer.routing
    K = routing.num_experts_per_tok
    # A program fills a multiprocessor; the interpreter runs programs one after another, so there it is one.
    G = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    S = min(E, T * K)
    scratch, config = _scratches.get(_Shape(x.device, x.dtype, T, S, I, E, G)), config_of(T)
    options = {"num_warps": config.num_warps}
    if not INTERPRETED:
        # All programs at once or an error, since they wait for each other.
        options["launch_cooperative_grid"] = True
    _decode_kernel[(G,)](
        x,
        layer.router_weight,
        layer.gate_up_proj,
        layer.down_proj,
        routing.correction_bias,
        logits,
        out,
        *scratch,
        float(routing.routed_scaling_factor),
        MAX_POLLS,
        **kernel_constants(T, H, I, E, K, G, x.element_size(), config),
        SCORING=routing.scoring,
        HAS_BIAS=routing.correction_bias is not None,
        NORM=routing.norm_topk_prob,
        HIDDEN_ACT=layer.hidden_act,
        **options,
    )
    if debug_enabled() and not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        _check_flag(scratch)


def kernel_constants(T: int, H: int, I: int, E: int, K: int, G: int, itemsize: int, config: Config) -> dict[str, int]:
    """The kernel's sizes and blocks on G programs, for weights of ``itemsize`` bytes."""
    S, width = min(E, T * K), 32 * 16 // itemsize  # 16 bytes for each thread of a warp
    block_e = triton.next_power_of_2(E)
    return {
        "T": T, "H": H, "I": I, "E": E, "K": K, "S": S,
        "ROWS": config.rows,
        "CHUNKS": config.chunks,
        "LEAD": config.lead,
        "H_WIDTH": min(width, triton.next_power_of_2(H)),
        "I_WIDTH": min(width, triton.next_power_of_2(I)),
        "DOWN_ROWS": triton.next_power_of_2(triton.cdiv(H, G)),
        "BLOCK_H": triton.next_power_of_2(H),
        "BLOCK_E": block_e,
        "BLOCK_S": triton.next_power_of_2(FIRST_SLOT.value + S),
        "RANK_BLOCK": max(1, min(block_e, RANK_COMPARISONS // block_e)),
    }  # fmt: skip


def _check_flag(scratch: Scratch) -> None:
    if scratch.flag.item():
        scratch.flag.zero_()
        raise RuntimeError(
            f"flash_decode: expected every program to see the others' work within {MAX_POLLS} polls; one gave up, so "
            "the output of this call, or of one before it on this stream, is wrong"
        )
