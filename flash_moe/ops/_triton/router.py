"""Product router: exact top K of N * N sums of two scores, and its backward.

T tokens, N keys a half, K experts per token, R ranks kept of each half (the next power of two of min(K, N)). One
program serves one token. A score and its id travel as one 64-bit key that orders (score descending, id ascending), so
ties need no care. The K best pairs are among the pairs of ranks (i, j) with (i + 1) * (j + 1) <= K, about
K * (1 + ln K) of them; these lie in dyadic blocks, block p holding the ranks i + 1 in [2^p, 2^(p+1)) beside
j < K / 2^p: K slots a block, K the next power of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_moe.ops._triton.math import round_for

PADDING = tl.constexpr(-(2**63))
# Keys sorted at a time, unless more than these must be kept. More does no less work and takes far longer to compile.
MAX_SORT = 512
# One warp sorts up to MAX_SORT keys: on an H200 1.7 ms at T 4096, N 320, K 512 against 1.8 to 2.4 with 2 to 8 warps.
# More keys than that go 128 to a warp, since with 512 they take a minute to compile.
KEYS_PER_WARP = 128
# Best of eight shapes on an H200 at every size but T = 1: 0.025 ms at T 4096, N 128, K 64.
BACKWARD_BLOCK_N, BACKWARD_BLOCK_K, BACKWARD_WARPS = 128, 8, 1


@triton.jit
def _pack(scores, ids, mask):
    """int64 keys; a masked slot is below every key, a NaN above."""
    scores = tl.where(scores == 0.0, 0.0, scores)  # -0.0 ties with 0.0
    scores = tl.where(scores == scores, scores, float("nan"))  # one NaN, the positive one
    bits = scores.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - ids.to(tl.int64))
    return tl.where(mask, keys, PADDING)


@triton.jit
def _scores(keys):
    ordered = (keys >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _ids(keys):
    return 0xFFFFFFFF - (keys & 0xFFFFFFFF)


@triton.jit
def _merge_best(best, keys, SIZE: tl.constexpr):
    """The SIZE greatest of ``best [SIZE]`` and ``keys``, in descending order."""
    # Of two sorted lists, one reversed, the elementwise maxima are the SIZE greatest, unsorted.
    return tl.topk(tl.maximum(best, tl.flip(tl.topk(keys, SIZE), 0)), SIZE)


@triton.jit
def _half_keys(logits_ptr, start, N, BLOCK_N: tl.constexpr):
    n = start + tl.arange(0, BLOCK_N)
    scores = tl.load(logits_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    return _pack(scores, n, n < N)


@triton.jit
def _rank_half(logits_ptr, N, R: tl.constexpr, BLOCK_N: tl.constexpr, N_IS_ONE_BLOCK: tl.constexpr):
    """Keys of the R best logits, in descending order."""
    if N_IS_ONE_BLOCK:
        return tl.topk(_half_keys(logits_ptr, 0, N, BLOCK_N), R)
    best = tl.full([R], PADDING, tl.int64)
    for start in range(0, N, BLOCK_N):
        best = _merge_best(best, _half_keys(logits_ptr, start, N, BLOCK_N), R)
    return best


@triton.jit
def _pair_keys(
    rows, cols, start, N, K, R: tl.constexpr, K_POW2: tl.constexpr, LOG_K: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Keys of the candidates in slots [start, start + BLOCK_C)."""
    slot = start + tl.arange(0, BLOCK_C)
    block = slot >> LOG_K
    log_width = tl.maximum(LOG_K - block, 0)
    in_block = slot & (K_POW2 - 1)
    i = (1 << tl.minimum(block, LOG_K)) - 1 + (in_block >> log_width)
    j = in_block & ((1 << log_width) - 1)
    mask = (block <= LOG_K) & ((i + 1) * (j + 1) <= K) & (i < N) & (j < N)
    row = tl.gather(rows, tl.minimum(i, R - 1), 0)
    col = tl.gather(cols, tl.minimum(j, R - 1), 0)
    return _pack(_scores(row) + _scores(col), _ids(row) * N + _ids(col), mask)


@triton.jit
def _router_fwd_kernel(
    logits_ptr,
    scores_ptr,
    indices_ptr,
    T,
    N,
    K,
    R: tl.constexpr,
    K_POW2: tl.constexpr,
    LOG_K: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    N_IS_ONE_BLOCK: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    rows = _rank_half(logits_ptr + t * N, N, R, BLOCK_N, N_IS_ONE_BLOCK)
    cols = _rank_half(logits_ptr + (t + T) * N, N, R, BLOCK_N, N_IS_ONE_BLOCK)
    if NUM_SLOTS <= BLOCK_C:
        best = tl.topk(_pair_keys(rows, cols, 0, N, K, R, K_POW2, LOG_K, BLOCK_C), K_POW2)
    else:
        best = tl.full([K_POW2], PADDING, tl.int64)
        for start in range(0, NUM_SLOTS, BLOCK_C):
            best = _merge_best(best, _pair_keys(rows, cols, start, N, K, R, K_POW2, LOG_K, BLOCK_C), K_POW2)
    k = tl.arange(0, K_POW2)
    tl.store(scores_ptr + t * K + k, round_for(scores_ptr, _scores(best)), mask=k < K)
    tl.store(indices_ptr + t * K + k, _ids(best), mask=k < K)


@triton.jit
def _router_bwd_kernel(dscores_ptr, indices_ptr, dlogits_ptr, T, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """dlogits[half, t, n] = the sum of dscores[t, k] over the k whose expert has n as that half's key."""
    t = tl.program_id(0).to(tl.int64)
    half = tl.program_id(2).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        dscores = tl.load(dscores_ptr + t * K + k, mask=k < K, other=0.0).to(tl.float32)
        # Unsigned 32-bit: ids are below 2^32 here, and a 64-bit division costs several times more.
        ids = tl.load(indices_ptr + t * K + k, mask=k < K, other=0).to(tl.uint32)
        keys_per_half = tl.full([BLOCK_K], N, tl.uint32)
        row = ids // keys_per_half
        key = tl.where(half == 0, row, ids - row * keys_per_half)
        acc += tl.where(key[:, None] == n.to(tl.uint32)[None, :], dscores[:, None], 0.0)
    tl.store(dlogits_ptr + (half * T + t) * N + n, round_for(dlogits_ptr, tl.sum(acc, 0)), mask=n < N)


def _num_warps(num_keys: int) -> int:
    return 1 if num_keys <= MAX_SORT else min(16, num_keys // KEYS_PER_WARP)


def router_forward(router_logits: Tensor, num_experts_per_tok: int) -> tuple[Tensor, Tensor]:
    """``scores [T, K]`` in the logits' dtype and ``indices [T, K]``, int64, for logits ``[2, T, N]``."""
    _, T, N = router_logits.shape
    K = num_experts_per_tok
    scores = router_logits.new_empty(T, K)
    indices = torch.empty_like(scores, dtype=torch.int64)
    # tl.topk needs at least two elements.
    R = max(2, triton.next_power_of_2(min(K, N)))
    k_pow2 = max(2, triton.next_power_of_2(K))
    log_k = k_pow2.bit_length() - 1
    num_slots = k_pow2 * R.bit_length()  # ranks i beyond R do not exist, and so neither do blocks beyond log2(R)
    block_n = max(R, min(MAX_SORT, triton.next_power_of_2(N)))
    block_c = max(k_pow2, min(MAX_SORT, triton.next_power_of_2(num_slots)))
    with torch.cuda.device_of(router_logits):
        _router_fwd_kernel[(T,)](
            router_logits,
            scores,
            indices,
            T,
            N,
            K,
            R,
            k_pow2,
            log_k,
            num_slots,
            block_n,
            block_c,
            block_n >= N,
            num_warps=_num_warps(max(block_n, block_c)),
        )
    return scores, indices


def router_backward(grad_scores: Tensor, indices: Tensor, num_expert_keys: int) -> Tensor:
    """``grad_logits [2, T, N]``, summed in float32 in the order of k."""
    T, K = indices.shape
    grad_logits = grad_scores.new_empty(2, T, num_expert_keys)
    block_n = min(BACKWARD_BLOCK_N, triton.next_power_of_2(num_expert_keys))
    grid = (T, triton.cdiv(num_expert_keys, block_n), 2)
    with torch.cuda.device_of(grad_scores):
        _router_bwd_kernel[grid](
            grad_scores,
            indices,
            grad_logits,
            T,
            num_expert_keys,
            K,
            block_n,
            BACKWARD_BLOCK_K,
            num_warps=BACKWARD_WARPS,
        )
    return grad_logits
