"""flash_router by a lane a token: what it gives is what `router.py` gives, whose own tests say what is right."""

import pytest
import torch
from torch import Tensor

from flash_moe.ops._reference.router import router_reference, routing_reference
from flash_moe.ops._triton import router_lanes
from flash_moe.ops.flash_router import flash_router, flash_routing
from flash_moe.testing import assert_no_worse_than, make_router_inputs, run_with_grads, surround_with_nan, to_float64

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
# One token; fewer experts than ranks; as many keys as ranks; a tail of keys; two programs, of which one is not full.
SHAPES = [(1, 9, 1), (5, 20, 2), (3, 16, 16), (3, 33, 12), (34, 40, 8), (2, 72, 5)]


@pytest.fixture(autouse=True)
def _lanes_from_one_token_on(monkeypatch):
    monkeypatch.setattr(router_lanes, "MIN_TOKENS", {2: 1, 4: 1})


def assert_same_as_reference(logits: Tensor, K: int) -> None:
    """A float32 or 16-bit sum has the same bits wherever it is made, so all of it is equal."""
    N = logits.shape[2]
    assert router_lanes.takes_lanes(logits, K)
    scores, indices = flash_router(logits, N, K, backend="triton")
    want_scores, want_indices = flash_router(logits, N, K, backend="reference")
    assert torch.equal(indices, want_indices)
    torch.testing.assert_close(scores, want_scores, rtol=0, atol=0, equal_nan=True)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@every_dtype
@pytest.mark.parametrize("T, N, K", SHAPES, ids=str)
def test_values_order_and_gradients(T, N, K, dtype, device):
    inputs, dscores = make_router_inputs(T, N, K, dtype, device)
    assert_same_as_reference(inputs[0], K)
    exact = run_with_grads(router_reference, to_float64(inputs), to_float64(dscores))
    low = run_with_grads(router_reference, inputs, dscores)
    actual = run_with_grads(flash_router, inputs, dscores, backend="triton")
    assert_no_worse_than(low, exact, actual, ("scores", "dlogits"))


@every_dtype
@pytest.mark.parametrize("N, K", [(33, 12), (16, 7)], ids=str)
def test_ties_break_to_the_lowest_id(N, K, dtype, device):
    logits = torch.randint(3, (2, 20, N), generator=torch.Generator().manual_seed(1)).to(device, dtype)
    logits[:, :2] = 0.0
    logits[:, 2] *= -0.0
    logits[:, 3:6] -= 5.0  # below zero the bits of a float fall where it rises
    assert_same_as_reference(logits, K)


@pytest.mark.parametrize(
    "sign, spread", [(1, 0.0), (1, 1e-7), (1, 1e-6), (1, 1e-5), (1, 1e-3), (-1, 1e-7), (-1, 1e-5)], ids=str
)
def test_logits_that_differ_in_the_low_bits_of_float32(sign, spread, device):
    """A 32-bit key has no room for these bits: kept ones have to be put in order, and chosen among with others."""
    logits = sign * (1 + spread * normal(2, 20, 40))
    logits[:, :7, ::3] += 1.0  # fewer than are kept stand apart from the rest
    assert_same_as_reference(logits.to(device), 16)


def test_different_sums_that_rounding_makes_equal(device):
    """2^24 swallows what is below one, so lists of sums in order of rank are not in order of id."""
    logits = normal(2, 20, 24, seed=2) / 4
    logits[0, :, 5] = logits[1, 3:9, 7] = 2.0**24
    assert_same_as_reference(logits.to(device), 16)


@every_dtype
def test_infinities_and_nan(dtype, device):
    logits = normal(2, 12, 33, seed=3).to(device, dtype)
    logits[0, :, 3] = float("inf")
    logits[1, :, 5] = -float("inf")
    logits[0, 1] = -float("inf")
    logits[1, 2, 6] = float("nan")
    logits[0, 4, 9] = -float("nan")
    scores, indices = flash_router(logits, 33, 8, backend="triton")
    assert scores[2].isnan().any()
    assert scores[4].isnan().any()
    assert 0 <= indices.min() <= indices.max() < 33 * 33
    others = torch.tensor([t for t in range(12) if t not in (2, 4)], device=device)
    assert_same_as_reference(logits[:, others].contiguous(), 8)
    spoilt = flash_router(logits[:, others].contiguous(), 33, 8, backend="triton")
    assert torch.equal(indices[others], spoilt[1])


@pytest.mark.parametrize("norm_topk_prob", [False, True], ids=str)
@pytest.mark.parametrize("T, N, K", [(5, 20, 3), (3, 33, 16)], ids=str)
def test_routing_weights_and_gradients(T, N, K, norm_topk_prob, device):
    (logits, *sizes), dweights = make_router_inputs(T, N, K, torch.float32, device)
    inputs = (logits, *sizes, norm_topk_prob)

    def routing(logits, N, K, norm_topk_prob):
        return flash_routing(logits, N, K, norm_topk_prob=norm_topk_prob, backend="triton")

    assert torch.equal(routing(*inputs)[1], routing_reference(*inputs)[1])
    exact = run_with_grads(routing_reference, to_float64(inputs), dweights.double())
    low = run_with_grads(routing_reference, inputs, dweights)
    assert_no_worse_than(low, exact, run_with_grads(routing, inputs, dweights), ("weights", "dlogits"))


def test_logits_as_a_gate_product_has_them_and_nothing_beside_them(device):
    product = normal(3, 2 * 40, seed=4).to(device)
    want = flash_router(product.view(3, 2, 40).transpose(0, 1).contiguous(), 40, 8, backend="triton")
    alone = surround_with_nan(product.view(3, 2, 40).transpose(0, 1).contiguous())
    got = flash_router(alone, 40, 8, backend="triton")
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    weights, indices = flash_routing(product.view(3, 2, 40).transpose(0, 1), 40, 8, backend="triton")
    assert torch.equal(indices, want[1])
    assert weights.isfinite().all()


def test_which_sizes_it_takes(monkeypatch):
    monkeypatch.setattr(router_lanes, "MIN_TOKENS", {2: 3, 4: 5})

    def takes(T, N, K, dtype):
        return router_lanes.takes_lanes(torch.empty(2, T, N, dtype=dtype), K)

    assert takes(5, 16, 16, torch.float32)
    assert not takes(4, 16, 16, torch.float32)
    assert takes(3, 512, 1, torch.bfloat16)
    assert not takes(3, 513, 1, torch.bfloat16)
    assert not takes(9, 128, 17, torch.float32)
    assert not takes(9, 15, 9, torch.float32)


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("N, K", [(128, 16), (64, 8), (320, 12), (100, 3), (512, 16)], ids=str)
def test_thousands_of_tokens(N, K, dtype, device):
    """At the edge of float32's short keys some of 65,537 tokens have a tie of high bits, as random ones do."""
    assert_same_as_reference(normal(2, 65_537, N, seed=5).to(device, dtype), K)
