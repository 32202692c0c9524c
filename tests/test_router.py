"""flash_router: values, gradients, and above all the order it promises."""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flash_moe.bench.timing import count_launches
from flash_moe.ops._reference.router import router_reference, routing_reference
from flash_moe.ops.flash_router import flash_router, flash_routing, triton_flash_router_func
from flash_moe.testing import (
    assert_no_worse_than,
    make_router_inputs,
    peak_nbytes,
    run_with_grads,
    surround_with_nan,
    to_float64,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("scores", "dlogits")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_backends = pytest.mark.parametrize("backend", ["triton", "torch"])
every_backend = pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
# In the interpreter a token costs 0.1 s to 1 s, by the number of its candidates.
SHAPES = [(1, 1, 1), (1, 2, 4), (2, 3, 1), (2, 3, 9), (3, 5, 7), (2, 16, 16), (1, 17, 40), (1, 100, 17), (1, 320, 12)]


def in_documented_order(logits: Tensor, K: int) -> Tensor:
    """``indices [T, K]``, from the docstring's words and token by token, in plain Python."""
    N = logits.shape[2]
    chosen = []
    for row, col in zip(*logits.double().tolist(), strict=True):
        row_ranks = sorted(range(N), key=lambda i: -row[i])  # stable: equal values by id
        col_ranks = sorted(range(N), key=lambda j: -col[j])
        ids = [i * N + j for r, i in enumerate(row_ranks) for c, j in enumerate(col_ranks) if (r + 1) * (c + 1) <= K]
        # Two float32 added in float64 and then rounded are the float32 sum: 53 bits are enough for that.
        sums = torch.tensor([row[e // N] + col[e % N] for e in ids], dtype=torch.float32).tolist()
        chosen.append([e for _, e in sorted((-s, e) for s, e in zip(sums, ids, strict=True))[:K]])
    return torch.tensor(chosen, dtype=torch.int64).view(-1, K)


def all_sums(logits: Tensor) -> Tensor:
    """``[T, N * N]`` in float32: what brute force would rank."""
    rows, cols = logits.float().cpu()
    return (rows[:, :, None] + cols[:, None, :]).flatten(1)


def assert_order(logits: Tensor, K: int, backend: str) -> tuple[Tensor, Tensor]:
    """Fail unless scores and indices are those of the documented order; return them."""
    scores, indices = flash_router(logits, logits.shape[2], K, backend=backend)
    assert_documented(logits, K, scores, indices)
    return scores, indices


def assert_documented(logits: Tensor, K: int, scores: Tensor, indices: Tensor) -> None:
    assert indices.dtype == torch.int64
    assert scores.dtype == logits.dtype
    assert torch.equal(indices.cpu(), in_documented_order(logits, K))
    sums = all_sums(logits).gather(1, indices.cpu())
    assert torch.equal(scores.cpu(), sums.to(logits.dtype))


def assert_values_order_and_gradients(inputs: tuple[Tensor, int, int], dscores: Tensor, backend: str) -> None:
    """All there is to check, of one run; ``inputs`` are those of ``make_router_inputs``."""
    logits, N, K = inputs
    leaf = logits.detach().requires_grad_()
    scores, indices = flash_router(leaf, N, K, backend=backend)
    (dlogits,) = torch.autograd.grad(scores, leaf, dscores)
    assert_documented(logits, K, scores.detach(), indices)
    exact = run_with_grads(router_reference, to_float64(inputs), to_float64(dscores))
    low = run_with_grads(router_reference, inputs, dscores)
    assert_no_worse_than(low, exact, (scores.detach(), dlogits), NAMES)


@both_backends
@every_dtype
@pytest.mark.parametrize("T, N, K", SHAPES, ids=str)
def test_router_matches_reference(T, N, K, dtype, backend, device):
    assert_values_order_and_gradients(*make_router_inputs(T, N, K, dtype, device), backend)


@every_backend
@every_dtype
@pytest.mark.parametrize("T, N, K", [(3, 3, 5), (2, 20, 15), (1, 1024, 9)], ids=str)
def test_order_of_unrounded_logits(T, N, K, dtype, backend, device):
    logits = torch.randn(2, T, N, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    assert_order(logits, K, backend)


@both_backends
def test_more_than_a_thousand_experts_a_token(backend, device):
    assert_values_order_and_gradients(*make_router_inputs(1, 32, 1001, torch.float32, device), backend)


@every_backend
@pytest.mark.parametrize("levels", [1, 2, 5])
@pytest.mark.parametrize("N, K", [(1, 1), (3, 9), (5, 11), (7, 49), (13, 20), (33, 7)], ids=str)
def test_ties_break_to_the_lowest_id(N, K, levels, backend, device):
    """With exact sums the order is brute force's, ties to the lowest id."""
    generator = torch.Generator().manual_seed(N)
    logits = (torch.randint(levels, (2, 2, N), generator=generator) / 2.0).to(device)
    _, indices = assert_order(logits, K, backend)
    by_brute_force = all_sums(logits).argsort(dim=1, descending=True, stable=True)
    assert torch.equal(indices.cpu(), by_brute_force[:, :K])


@every_backend
@pytest.mark.parametrize("N, K", [(5, 25), (64, 30), (10, 37)], ids=str)
def test_an_all_zero_row_gets_the_lowest_ids(N, K, backend, device):
    logits = torch.zeros(2, 2, N, dtype=torch.bfloat16, device=device)
    scores, indices = flash_router(logits, N, K, backend=backend)
    assert torch.equal(indices.cpu(), torch.arange(K).expand(2, K))
    assert torch.equal(scores.cpu(), torch.zeros(2, K, dtype=torch.bfloat16))


@every_backend
@pytest.mark.parametrize("N, K", [(3, 4), (7, 49), (12, 30), (50, 17)], ids=str)
def test_scores_are_brute_forces_and_so_are_ids_of_distinct_sums(N, K, backend, device):
    logits = torch.randn(2, 3, N, generator=torch.Generator().manual_seed(1)).to(device)
    scores, indices = flash_router(logits, N, K, backend=backend)
    sums, ids = all_sums(logits).sort(dim=1, descending=True, stable=True)
    assert torch.equal(scores.cpu(), sums[:, :K])
    for t in range(3):
        first_tie = next((k for k in range(K) if k + 1 < N * N and sums[t, k] == sums[t, k + 1]), K)
        assert torch.equal(indices[t, :first_tie].cpu(), ids[t, :first_tie])


@every_backend
def test_rounding_can_make_different_sums_equal(backend, device):
    """1 + 2^-25 and 1 are one float32 sum; the rank decides who is a candidate, and the id the order."""
    logits = torch.tensor([[[1.0, 0.5, 1.0]], [[0.0, 2.0**-25, 2.0**-26]]], device=device)
    for K in range(1, 10):
        assert_order(logits, K, backend)


@every_backend
@every_dtype
def test_negative_zero_counts_as_zero(dtype, backend, device):
    zeros = torch.zeros(2, 2, 6, dtype=dtype, device=device)
    mixed = zeros.clone()
    mixed[:, :, ::2] = -0.0
    mixed[0, 1], mixed[1, 1] = -0.0, 0.0
    for K in (5, 36):
        scores, indices = flash_router(mixed, 6, K, backend=backend)
        assert torch.equal(indices.cpu(), torch.arange(K).expand(2, K))
        assert torch.equal(scores, torch.zeros_like(scores))


@every_backend
@every_dtype
@pytest.mark.parametrize("N, K", [(3, 9), (5, 25), (9, 3)], ids=str)
def test_minus_infinity_comes_last(N, K, dtype, backend, device):
    logits = torch.randn(2, 4, N, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    logits[0, 0, 1:] = -torch.inf
    logits[1, 1, ::2] = -torch.inf
    logits[0, 2] = -torch.inf
    logits[:, 3] = -torch.inf
    scores, indices = assert_order(logits, K, backend)
    assert torch.equal(indices[3].cpu(), torch.arange(K))
    finite = scores.isfinite()
    assert torch.equal(finite, finite.sort(dim=1, descending=True, stable=True).values)


@every_backend
def test_plus_infinity_comes_first(backend, device):
    logits = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(3)).to(device)
    logits[0, 0, 3] = torch.inf
    logits[1, 1, 1:4] = torch.inf
    for K in (1, 7, 25):
        assert_order(logits, K, backend)


@every_backend
@pytest.mark.parametrize("N, K", [(3, 9), (5, 4), (20, 12)], ids=str)
@pytest.mark.parametrize("where", ["one", "row half", "column half", "both"])
def test_nan_spoils_its_own_row_only(where, N, K, backend, device):
    clean = torch.randn(2, 3, N, generator=torch.Generator().manual_seed(4)).to(device)
    spoiled = clean.clone()
    target = {
        "one": (1, 1, N // 2),
        "row half": (0, 1),
        "column half": (1, 1),
        "both": (slice(None), 1),
    }[where]
    spoiled[target] = torch.nan
    spoiled.requires_grad_()
    scores, indices = flash_router(spoiled, N, K, backend=backend)
    want_scores, want_indices = flash_router(clean, N, K, backend=backend)
    for t in (0, 2):
        assert torch.equal(scores[t], want_scores[t])
        assert torch.equal(indices[t], want_indices[t])
    assert 0 <= indices.min() <= indices.max() < N * N
    (dlogits,) = torch.autograd.grad(scores, spoiled, torch.ones_like(scores))
    assert dlogits.isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value encountered in add:RuntimeWarning")  # numpy's, in the interpreter
@both_backends
def test_16_bit_logits_choose_what_the_same_float32_logits_choose(backend, device):
    """Also among NaN, where the order is no promise: the search that expects ties must not count it as a bound."""
    N, K = 24, 22
    logits = torch.randn(2, 5, N, generator=torch.Generator().manual_seed(13)).to(device, torch.bfloat16)
    logits[0, 0, 4], logits[1, 0, 9] = torch.inf, torch.inf
    logits[:, 1, 1:9] = -torch.inf
    logits[:, 2, 3] = torch.nan
    logits[1, 3, 2] = torch.nan
    logits[0, 4, 4], logits[1, 4, : N // 2] = torch.inf, -torch.inf
    scores, indices = flash_router(logits, N, K, backend=backend)
    assert_documented(logits[:, :2], K, scores[:2], indices[:2])
    want_scores, want_indices = flash_router(logits.float(), N, K, backend=backend)
    assert torch.equal(indices, want_indices)
    assert torch.equal(scores.isnan(), want_scores.isnan())
    assert torch.equal(scores.nan_to_num(), want_scores.to(torch.bfloat16).nan_to_num())


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # numpy's, in the interpreter
@every_backend
def test_sums_beyond_float16_keep_their_float32_order(backend, device):
    logits = torch.tensor(
        [[[40000.0, 60000.0, 50000.0]], [[59000.0, 60000.0, 1.0]]], dtype=torch.float16, device=device
    )
    scores, _ = assert_order(logits, 6, backend)
    assert scores.isinf().all()


@every_backend
@pytest.mark.parametrize("N", [1, 3, 5, 7])
def test_every_expert_can_be_chosen_and_no_other(N, backend, device):
    """K = N * N is a permutation; an N that is no power of two yields no id from the padding."""
    logits = torch.randn(2, 2, N, generator=torch.Generator().manual_seed(5)).to(device) - 100
    _, indices = flash_router(logits, N, N * N, backend=backend)
    assert torch.equal(indices.sort(dim=1).values.cpu(), torch.arange(N * N).expand(2, -1))


@both_backends
@pytest.mark.parametrize("N, K", [(65, 4097), (70, 4900), (300, 5000)], ids=str)
def test_more_than_4096_experts_a_token(N, K, backend, device):
    assert_values_order_and_gradients(*make_router_inputs(2, N, K, torch.float32, device), backend)


@both_backends
@every_dtype
def test_no_tokens(dtype, backend, device):
    inputs, dscores = make_router_inputs(0, 5, 7, dtype, device)
    scores, indices = flash_router(*inputs, backend=backend)
    assert scores.shape == indices.shape == (0, 7)
    assert (scores.dtype, indices.dtype) == (dtype, torch.int64)
    _, dlogits = run_with_grads(flash_router, inputs, dscores, backend=backend)
    assert dlogits.shape == (2, 0, 5)
    assert dlogits.dtype == dtype


@both_backends
def test_unchosen_logits_get_exactly_zero(backend, device):
    inputs, dscores = make_router_inputs(3, 40, 2, torch.float32, device)
    _, indices = flash_router(*inputs, backend=backend)
    _, dlogits = run_with_grads(flash_router, inputs, dscores, backend=backend)
    chosen = torch.zeros(2, 3, 40, dtype=torch.bool, device=device)
    chosen[0].scatter_(1, indices // 40, True)
    chosen[1].scatter_(1, indices % 40, True)
    assert torch.equal(dlogits[~chosen], torch.zeros_like(dlogits[~chosen]))
    assert dlogits[chosen].abs().min() > 0


@both_backends
@pytest.mark.parametrize("dtype, large", [(torch.float16, 2048.0), (torch.bfloat16, 256.0)], ids=str)
def test_gradients_are_summed_in_float32(dtype, large, backend, device):
    """Every logit has eight gradients of 1 and one so large that a running 16-bit sum would lose each of the eight."""
    N = 9
    inputs, dscores = make_router_inputs(1, N, N * N, dtype, device)
    _, indices = flash_router(*inputs, backend=backend)
    dscores.fill_(1.0)
    dscores[0, indices[0] // N == indices[0] % N] = large
    _, dlogits = run_with_grads(flash_router, inputs, dscores, backend=backend)
    assert torch.equal(dlogits, torch.full_like(dlogits, large + 8))


@both_backends
def test_reads_nothing_outside_its_input(backend, device):
    (logits, N, K), _ = make_router_inputs(3, 5, 11, torch.float32, device)
    want = flash_router(logits, N, K, backend=backend)
    actual = flash_router(surround_with_nan(logits), N, K, backend=backend)
    assert torch.equal(actual[0], want[0])
    assert torch.equal(actual[1], want[1])


@both_backends
def test_non_contiguous_logits_give_the_same_bits(backend, device):
    """As the layer makes them, ``[T, 2, N]`` transposed; and one token seen T times through a stride of zero."""
    (logits, N, K), dscores = make_router_inputs(3, 5, 11, torch.float32, device)
    transposed = logits.transpose(0, 1).contiguous().transpose(0, 1)
    expanded = logits[:, :1].expand(-1, 3, -1)
    for strided, same in ((transposed, logits), (expanded, expanded.clone())):
        assert not strided.is_contiguous()
        want = run_with_grads(flash_router, (same, N, K), dscores, backend=backend)
        actual = run_with_grads(flash_router, (strided, N, K), dscores, backend=backend)
        assert torch.equal(actual[0], want[0])
        assert torch.equal(actual[1], want[1])


def test_never_materialises_all_sums_on_a_cpu():
    """N = 20,000: the sums of one token alone would be 1.6 GB."""
    logits = torch.randn(2, 4, 20_000, generator=torch.Generator().manual_seed(6)).requires_grad_()

    def forward_and_backward():
        flash_router(logits, 20_000, 16)[0].sum().backward()

    assert peak_nbytes(forward_and_backward, "cpu") < 32 * 2**20


@both_backends
@pytest.mark.parametrize("N", [65_535, 65_536, 70_000])
def test_many_keys(N, backend, device):
    """Expert ids past 2^32; the answer is read off by hand."""
    if N == 65_535 and backend == "triton" and device.type == "cpu":
        N = 2_000  # more would take the interpreter minutes
    K = 5
    logits = torch.zeros(2, 1, N, device=device)
    logits[0, 0, N - 1], logits[1, 0, N - 2] = 2.0, 1.0
    scores, indices = flash_router(logits, N, K, backend=backend)
    last_row = (N - 1) * N
    assert indices.tolist() == [[last_row + N - 2, last_row, last_row + 1, last_row + 2, last_row + 3]]
    assert scores.tolist() == [[3.0, 2.0, 2.0, 2.0, 2.0]]


@both_backends
@pytest.mark.parametrize("spread", [1e-7, 1e-5, 1e30, 1e38], ids=str)
@pytest.mark.parametrize("N, K", [(12, 5), (12, 70), (40, 64), (40, 100)], ids=str)
def test_logits_too_close_to_tell_apart_quickly(N, K, spread, backend, device):
    """One logit far from the rest leaves these within a step or two of 32-bit keys: order must be restored."""
    logits = 1 + 1e-5 * torch.randn(2, 2, N, generator=torch.Generator().manual_seed(6))
    logits[:, :, N // 2] = 1e-5 / spread if spread < 1 else -spread
    assert_order(logits.to(device), K, backend)


@both_backends
@every_dtype
@pytest.mark.parametrize("N, K", [(40, 20), (40, 64), (40, 128)], ids=str)
def test_sums_that_are_not_spread_evenly(N, K, dtype, backend, device):
    """Few sums far above the rest, or nearly as many as are chosen: a threshold is not where the counts suggest it."""
    logits = torch.randn(2, 3, N, generator=torch.Generator().manual_seed(8))
    logits[:, 0, 3] = 3e4
    logits[0, 1, 5:] -= 3e4
    logits[:, 2] = -logits[:, 2].exp()
    assert_order(logits.to(device, dtype), K, backend)


@both_backends
def test_gradients_of_many_experts_a_token(backend, device):
    assert_values_order_and_gradients(*make_router_inputs(1, 24, 256, torch.float32, device), backend)


@both_backends
@pytest.mark.parametrize("N, K", [(33, 20), (20, 40), (23, 130)], ids=str)
def test_more_equal_sums_than_are_sorted_at_a_time(N, K, backend, device):
    logits = torch.randint(2, (2, 3, N), generator=torch.Generator().manual_seed(7)).float()
    logits[:, 0] = torch.arange(N)[None] // (N - 2)  # two ones each: all sums but some are equal
    assert_order(logits.to(device), K, backend)


@both_backends
@every_dtype
@pytest.mark.parametrize("norm_topk_prob", [False, True], ids=str)
@pytest.mark.parametrize("T, N, K", [(1, 1, 1), (2, 3, 9), (3, 5, 7), (2, 16, 16), (2, 20, 40), (1, 600, 3)], ids=str)
def test_routing_weights_and_gradients(T, N, K, norm_topk_prob, dtype, backend, device):
    (logits, *sizes), dweights = make_router_inputs(T, N, K, dtype, device)
    dweights = dweights.float()
    inputs = (logits, *sizes, norm_topk_prob)

    def routing(logits, N, K, norm_topk_prob):
        return flash_routing(logits, N, K, norm_topk_prob=norm_topk_prob, backend=backend)

    weights, indices = routing(*inputs)
    assert weights.dtype == torch.float32
    assert torch.equal(indices, flash_router(logits.float(), *sizes, backend=backend)[1])
    # The float64 reference must weigh the same experts: make its logits the float32 ones, with the same ties.
    exact = run_with_grads(routing_reference, to_float64(inputs), dweights.double())
    low = run_with_grads(routing_reference, inputs, dweights)
    assert_no_worse_than(low, exact, run_with_grads(routing, inputs, dweights), ("weights", "dlogits"))


@both_backends
@pytest.mark.parametrize("norm_topk_prob", [False, True], ids=str)
def test_routing_takes_a_gate_product_as_it_lies(norm_topk_prob, backend, device):
    T, N, K = 3, 9, 6
    product = torch.randn(T, 2 * N, generator=torch.Generator().manual_seed(8)).to(device)
    seen = product.requires_grad_().view(T, 2, N).transpose(0, 1)
    copied = seen.detach().contiguous().requires_grad_()
    both = [flash_routing(x, N, K, norm_topk_prob=norm_topk_prob, backend=backend) for x in (seen, copied)]
    assert torch.equal(both[0][0], both[1][0])
    assert torch.equal(both[0][1], both[1][1])
    dweights = torch.randn(T, K, generator=torch.Generator().manual_seed(9)).to(device)
    (dseen,) = torch.autograd.grad(both[0][0], seen, dweights, retain_graph=True)
    (dcopied,) = torch.autograd.grad(both[1][0], copied, dweights)
    assert torch.equal(dseen, dcopied)
    assert dseen.transpose(0, 1).is_contiguous()  # so that the product's gradient is no copy either
    strided = torch.stack((copied.detach(),) * 2, dim=-1)[..., 0]
    weights, indices = flash_routing(strided, N, K, norm_topk_prob=norm_topk_prob, backend=backend)
    assert torch.equal(weights, both[1][0])
    assert torch.equal(indices, both[1][1])


@every_backend
def test_routing_weights_are_products_of_softmaxes(backend, device):
    logits = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(10)).to(device)
    weights, indices = flash_routing(logits, 6, 36, backend=backend)
    torch.testing.assert_close(weights.sum(1), torch.ones(4, device=device))  # K = N * N takes all
    rows, cols = logits.softmax(dim=-1)
    torch.testing.assert_close(weights, rows.gather(1, indices // 6) * cols.gather(1, indices % 6))
    normed, same = flash_routing(logits, 6, 5, norm_topk_prob=True, backend=backend)
    torch.testing.assert_close(normed, weights[:, :5] / weights[:, :5].sum(1, keepdim=True))
    assert torch.equal(same, indices[:, :5])


@both_backends
@pytest.mark.parametrize("norm_topk_prob", [False, True], ids=str)
def test_routing_of_no_tokens_and_of_nan(norm_topk_prob, backend, device):
    empty = torch.zeros(2, 0, 5, device=device, requires_grad=True)
    weights, indices = flash_routing(empty, 5, 7, norm_topk_prob=norm_topk_prob, backend=backend)
    assert weights.shape == indices.shape == (0, 7)
    assert torch.autograd.grad(weights.sum(), empty)[0].shape == (2, 0, 5)
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(11)).to(device)
    want, _ = flash_routing(logits, 5, 7, norm_topk_prob=norm_topk_prob, backend=backend)
    logits[0, 1] = torch.nan
    got, indices = flash_routing(logits, 5, 7, norm_topk_prob=norm_topk_prob, backend=backend)
    assert torch.equal(got[[0, 2]], want[[0, 2]])
    assert got[1].isnan().all()
    assert 0 <= indices.min() <= indices.max() < 25


@every_backend
def test_routing_errors_name_the_argument(backend):
    logits = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"router_logits: .*5.*\(2, 3, 4\)"):
        flash_routing(logits, 5, 2, backend=backend)
    with pytest.raises(TypeError, match="norm_topk_prob: expected True or False; got 1"):
        flash_routing(logits, 4, 2, norm_topk_prob=1, backend=backend)


@settings(deadline=None, derandomize=True, max_examples=15)
@given(data=st.data())
@both_backends
def test_values_order_and_gradients_over_shapes(backend, device, data):
    T, N = data.draw(st.integers(0, 2), "T"), data.draw(st.integers(1, 19), "N")
    K = data.draw(st.integers(1, min(N * N, 25)), "K")
    dtype, seed = data.draw(st.sampled_from(DTYPES), "dtype"), data.draw(st.integers(0, 99), "seed")
    inputs, dscores = make_router_inputs(T, N, K, dtype, device, seed)
    if data.draw(st.booleans(), "ties"):
        inputs[0].round_()
    assert_values_order_and_gradients(inputs, dscores, backend)


@every_backend
def test_errors_name_the_argument(backend):
    logits = torch.zeros(2, 3, 4)
    cases = [
        ((logits[0], 4, 2), ValueError, r"router_logits: .*\[2, T, N\].*\(3, 4\)"),
        ((torch.zeros(3, 3, 4), 4, 2), ValueError, r"router_logits: .*\(3, 3, 4\)"),
        ((logits, 5, 2), ValueError, r"router_logits: .*5.*\(2, 3, 4\)"),
        ((logits, 0, 1), ValueError, "num_expert_keys: .*0"),
        ((logits, 4, 0), ValueError, "num_experts_per_tok: .*16.*0"),
        ((logits, 4, 17), ValueError, "num_experts_per_tok: .*16.*17"),
        ((logits, 4, 2.0), TypeError, "num_experts_per_tok: .*float"),
        ((logits, 4, True), TypeError, "num_experts_per_tok: .*bool"),
        ((logits, "4", 2), TypeError, "num_expert_keys: .*str"),
        ((logits.long(), 4, 2), TypeError, "router_logits: .*int64"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            flash_router(*arguments, backend=backend)


@both_backends
def test_float64_is_for_the_reference_only(backend, device):
    with pytest.raises(TypeError, match=r"router_logits: .*float32.*float64"):
        flash_router(torch.zeros(2, 3, 4, device=device).double(), 4, 2, backend=backend)


def assert_matches_reference(inputs: tuple[Tensor, int, int], dscores: Tensor) -> None:
    """The Triton kernels against the reference, where ``in_documented_order`` would take too long."""
    want_scores, want_indices = router_reference(*inputs)
    scores, indices = triton_flash_router_func(*inputs)
    assert torch.equal(indices, want_indices)
    assert torch.equal(scores, want_scores)
    exact = run_with_grads(router_reference, to_float64(inputs), to_float64(dscores))
    low = run_with_grads(router_reference, inputs, dscores)
    assert_no_worse_than(low, exact, run_with_grads(triton_flash_router_func, inputs, dscores), NAMES)


def throughput_case(device: torch.device) -> tuple[tuple[Tensor, int, int], Tensor, str]:
    pytest.importorskip("triton", reason="there is triton for Linux only")
    T, N, K = (4096, 128, 64) if device.type == "cuda" else (2, 12, 10)
    inputs, dscores = make_router_inputs(T, N, K, torch.float32, device)
    assert_matches_reference(inputs, dscores)
    return inputs, dscores, f"T={T} N={N} K={K} float32"


def test_router_forward_throughput(device, print_throughput):
    inputs, dscores, title = throughput_case(device)
    nbytes = inputs[0].nbytes + dscores.nbytes + 8 * dscores.numel()
    functions = {"PyTorch": lambda: router_reference(*inputs), "Triton": lambda: triton_flash_router_func(*inputs)}
    print_throughput(f"router forward, {title}", nbytes, functions)


def test_router_backward_throughput(device, print_throughput):
    (logits, *sizes), dscores, title = throughput_case(device)
    logits.requires_grad_()
    nbytes = logits.nbytes + dscores.nbytes + 8 * dscores.numel()
    outs = {"PyTorch": router_reference(logits, *sizes)[0], "Triton": triton_flash_router_func(logits, *sizes)[0]}
    functions = {
        name: lambda out=out: torch.autograd.grad(out, logits, dscores, retain_graph=True) for name, out in outs.items()
    }
    print_throughput(f"router backward, {title}", nbytes, functions)


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("T, N, K", [(4096, 128, 64), (4096, 320, 512), (65_537, 128, 16), (70_001, 5, 25)], ids=str)
def test_realistic_sizes(T, N, K, dtype, device):
    inputs, dscores = make_router_inputs(T, N, K, dtype, device)
    assert_matches_reference(inputs, dscores)


@pytest.mark.gpu
@pytest.mark.parametrize("N, K", list(itertools.product([64, 100, 1024], [1000, 2049, 4096])), ids=str)
def test_thousands_of_experts_a_token(N, K, device):
    inputs, dscores = make_router_inputs(65, N, K, torch.float32, device)
    assert_order(inputs[0][:, :3].contiguous(), K, "triton")
    assert_matches_reference(inputs, dscores)


@pytest.mark.gpu
@pytest.mark.parametrize("T, N, K", [(4096, 1024, 64), (16_384, 128, 16), (512, 4096, 512)], ids=str)
def test_memory_is_of_the_order_of_the_pairs_on_a_gpu(T, N, K, device):
    """Beyond inputs and outputs at most 64 bytes a (token, expert) pair."""
    inputs, dscores = make_router_inputs(T, N, K, torch.float32, device)
    inputs[0].requires_grad_()
    triton_flash_router_func(*inputs)
    outputs = 12 * T * K
    assert peak_nbytes(lambda: triton_flash_router_func(*inputs), device) - outputs <= 64 * T * K
    scores, _ = triton_flash_router_func(*inputs)
    peak = peak_nbytes(lambda: torch.autograd.grad(scores, inputs[0], dscores, retain_graph=True), device)
    assert peak - inputs[0].nbytes <= 64 * T * K


@pytest.mark.gpu
@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("T, N, K", [(1, 128, 64), (16, 128, 64), (4096, 128, 16), (300, 320, 512)], ids=str)
def test_launches_of_a_routing_call(T, N, K, norm_topk_prob, device):
    (logits, *_), dweights = make_router_inputs(T, N, K, torch.bfloat16, device)
    logits, dweights = logits.requires_grad_(), dweights.float()

    def forward():
        return flash_routing(logits, N, K, norm_topk_prob=norm_topk_prob)

    weights, _ = forward()
    backward = partial(torch.autograd.grad, weights, logits, dweights, retain_graph=True)
    backward()
    assert (count_launches(forward), count_launches(backward)) == (1, 1)


@pytest.mark.gpu
def test_two_billion_pairs(device):
    """T * K just below 2^31: element numbers fit 32 bits, byte addresses do not."""
    T, N, K = 2**21, 32, 1023
    logits = make_router_inputs(T, N, K=1, dtype=torch.bfloat16, device=device)[0][0].requires_grad_()
    scores, indices = triton_flash_router_func(logits, N, K)
    some = torch.tensor([0, 1, 2**20, T - 2, T - 1], device=device)
    want_scores, want_indices = router_reference(logits.detach()[:, some], N, K)
    assert torch.equal(indices[some], want_indices)
    assert torch.equal(scores[some], want_scores)
    del indices
    (dlogits,) = torch.autograd.grad(
        scores, logits, torch.ones((), dtype=scores.dtype, device=device).expand_as(scores)
    )
    few = logits.detach()[:, some].requires_grad_()
    (want,) = torch.autograd.grad(router_reference(few, N, K)[0].sum(), few)
    assert torch.equal(dlogits[:, some], want)
