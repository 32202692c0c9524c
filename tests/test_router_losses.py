"""Router losses and expert usage against their definitions, with the ``[T, E]`` probabilities written out.

T tokens, N keys a half, E = N * N experts, K experts a token.
"""

import copy
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flash_moe import FlashMoE, FlashMoEConfig
from flash_moe.modules.expert_usage import count_experts
from flash_moe.modules.router_losses import load_balancing_loss, router_z_loss

SHAPES = [(1, 1, 1), (7, 3, 2), (40, 5, 4), (33, 12, 30)]
BOTH = {"router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.07}


def all_probs(router_logits):
    """``[T, E]``: the probability of expert i * N + j is that of row i times that of column j."""
    row, col = router_logits.softmax(-1)
    return (row[:, :, None] * col[:, None, :]).flatten(1)


def naive_aux_loss(router_logits, num_experts_per_tok, mask=None):
    """E * sum_e f_e p_e: f_e the pairs of e over the tokens, p_e the mean probability of e."""
    probs = all_probs(router_logits)
    if mask is not None:
        probs = probs[mask]
    T, E = probs.shape
    f = torch.bincount(probs.detach().topk(num_experts_per_tok).indices.flatten(), minlength=E).to(probs.dtype) / T
    return E * (f * probs.mean(0)).sum()


def naive_z_loss(router_logits, mask=None):
    """The mean over tokens of log(sum(exp(row logits)))^2 + log(sum(exp(column logits)))^2."""
    squares = (torch.log(torch.exp(router_logits).sum(-1)) ** 2).sum(0)
    return (squares if mask is None else squares[mask]).mean()


def make_logits(T, N, seed=0, dtype=torch.float32):
    return torch.randn(2, T, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_mask(T, seed=1):
    mask = torch.rand(T, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[0] = True
    return mask


def make_layer(device="cpu", dtype=torch.float32, **changes):
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_experts": 25, "num_experts_per_tok": 3}
    torch.manual_seed(0)
    return FlashMoE(FlashMoEConfig(**{**sizes, **changes})).to(device, dtype)


def make_tokens(*shape, device="cpu", dtype=torch.float32, seed=1):
    return torch.randn(*shape, 12, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def loss_and_gradient(loss, router_logits):
    router_logits = router_logits.detach().requires_grad_()
    value = loss(router_logits)
    return value.detach(), torch.autograd.grad(value, router_logits)[0]


def assert_agree(actual, expected, tolerance=2e-6):
    for x, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(
            x.double(), exact.double(), rtol=tolerance, atol=tolerance * exact.abs().max().item()
        )


# The load-balancing loss


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("T, N, K", SHAPES, ids=str)
def test_load_balancing_loss_and_its_gradient(T, N, K, masked):
    mask = make_mask(T) if masked else None
    router_logits = make_logits(T, N)
    experts = all_probs(router_logits.double()).topk(K).indices
    counts = count_experts(experts, N * N, mask)
    weights = None if mask is None else mask.float()
    actual = loss_and_gradient(lambda x: load_balancing_loss(x.log_softmax(-1), counts, weights), router_logits)
    assert_agree(actual, loss_and_gradient(lambda x: naive_aux_loss(x, K, mask), router_logits.double()))


@pytest.mark.parametrize("K", [1, 3])
def test_load_balancing_loss_of_even_routing_is_k(K):
    counts = torch.full((25,), 4 * K)
    log_probs = torch.zeros(2, 100, 5).log_softmax(-1)
    torch.testing.assert_close(load_balancing_loss(log_probs, counts), torch.tensor(float(K)))


def test_load_balancing_loss_of_one_expert_for_all_is_e():
    router_logits = torch.zeros(2, 100, 5)
    router_logits[:, :, 2] = 40.0
    counts = torch.zeros(25, dtype=torch.int64)
    counts[12] = 100
    torch.testing.assert_close(load_balancing_loss(router_logits.log_softmax(-1), counts), torch.tensor(25.0))


def test_following_the_gradient_evens_the_routing_out():
    noise = make_logits(200, 6, seed=1)
    preference = 2 * make_logits(1, 6)
    preference.requires_grad_()
    optimizer = torch.optim.Adam([preference], lr=0.1)
    before = naive_aux_loss(preference + noise, 2).item()
    for _ in range(60):
        experts = all_probs(preference + noise).topk(2).indices
        optimizer.zero_grad()
        load_balancing_loss((preference + noise).log_softmax(-1), count_experts(experts, 36)).backward()
        optimizer.step()
    assert before > 4
    assert naive_aux_loss(preference + noise, 2).item() < 2.3  # 2 is the least


class LargestResult(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_losses_form_no_probability_of_every_token_and_expert():
    T, N = 300, 64
    router_logits = make_logits(T, N).requires_grad_()
    counts = torch.ones(N * N, dtype=torch.int64)
    with LargestResult() as largest:
        weights = make_mask(T).float()
        loss = load_balancing_loss(router_logits.log_softmax(-1), counts, weights) + router_z_loss(
            router_logits, weights
        )
        loss.backward()
    assert largest.numel <= max(2 * T * N, N * N) < T * N * N


# The z-loss


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("T, N", [shape[:2] for shape in SHAPES], ids=str)
def test_z_loss_and_its_gradient(T, N, masked):
    mask = make_mask(T) if masked else None
    weights = None if mask is None else mask.float()
    router_logits = make_logits(T, N)
    actual = loss_and_gradient(lambda x: router_z_loss(x, weights), router_logits)
    assert_agree(actual, loss_and_gradient(lambda x: naive_z_loss(x, mask), router_logits.double()))


def test_z_loss_of_zero_logits():
    torch.testing.assert_close(router_z_loss(torch.zeros(2, 9, 5)), torch.tensor(2 * math.log(5) ** 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_z_loss_of_16_bit_logits_is_summed_in_float32(dtype):
    router_logits = make_logits(4000, 16, dtype=dtype)
    loss = router_z_loss(router_logits)
    assert loss.dtype == torch.float32
    assert_agree([loss], [naive_z_loss(router_logits.double())])


def test_z_loss_of_large_logits_is_finite():
    assert_agree([router_z_loss(torch.full((2, 3, 4), 500.0))], [torch.tensor(2 * (500 + math.log(4)) ** 2)])


# Losses in the layer


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("coefficients", [(0.3, 0.0), (0.0, 0.07), (0.3, 0.07)], ids=["aux", "z", "both"])
def test_router_loss_and_its_gradients(coefficients, masked, backend, device):
    aux, z = coefficients
    layer = make_layer(device, router_norm="none", router_aux_loss_coef=aux, router_z_loss_coef=z, backend=backend)
    x = make_tokens(2, 4, device=device).requires_grad_()
    mask = make_mask(8).to(device) if masked else None
    layer(x, attention_mask=None if mask is None else mask.view(2, 4))
    inputs = (x, layer.router_gate.weight)
    actual = torch.autograd.grad(layer.router_loss, inputs)
    exact = [each.detach().double().requires_grad_() for each in inputs]
    router_logits = (exact[0].flatten(0, 1) @ exact[1].T).view(8, 2, 5).transpose(0, 1)
    expected = aux * naive_aux_loss(router_logits, 3, mask) + z * naive_z_loss(router_logits, mask)
    assert_agree([layer.router_loss.detach(), *actual], [expected.detach(), *torch.autograd.grad(expected, exact)])


def test_router_loss_reaches_no_parameter_but_the_gate():
    layer = make_layer(**BOTH)
    layer(make_tokens(6))
    layer.router_loss.backward()
    assert [name for name, parameter in layer.named_parameters() if parameter.grad is not None] == [
        "router_gate.weight"
    ]


def test_router_loss_in_float64():
    layer = make_layer(dtype=torch.float64, backend="reference", **BOTH)
    for mask in (None, make_mask(9)):
        _, router_logits = layer(make_tokens(9, dtype=torch.float64), attention_mask=mask)
        expected = 0.3 * naive_aux_loss(router_logits, 3, mask) + 0.07 * naive_z_loss(router_logits, mask)
        assert_agree([layer.router_loss.detach()], [expected.detach()], 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_router_loss_is_float32_in_16_bits(autocast, dtype, device):
    layer_dtype = torch.float32 if autocast else dtype
    layer = make_layer(device, layer_dtype, **BOTH)
    with torch.autocast(device.type, dtype, enabled=autocast):
        _, router_logits = layer(make_tokens(30, device=device, dtype=layer_dtype))
    assert layer.router_loss.dtype == torch.float32
    exact = router_logits.detach().double()
    assert_agree([layer.router_loss.detach()], [0.3 * naive_aux_loss(exact, 3) + 0.07 * naive_z_loss(exact)])
    layer.router_loss.backward()
    assert layer.router_gate.weight.grad.isfinite().all()


def test_router_loss_is_there_only_while_training_with_a_coefficient():
    layer = make_layer()
    assert layer.router_loss is None
    layer(make_tokens(6))
    assert layer.router_loss is None

    layer = make_layer(**BOTH)
    assert layer.router_loss is None
    layer(make_tokens(6))
    assert layer.router_loss.shape == ()
    layer.eval()(make_tokens(6))
    assert layer.router_loss is None


def test_router_loss_is_that_of_the_last_forward():
    layer = make_layer(router_norm="none", **BOTH)
    losses = []
    for seed in (1, 2, 1):
        layer(make_tokens(6, seed=seed))
        losses.append(layer.router_loss.item())
    assert losses[0] == losses[2] != losses[1]
    with torch.no_grad():
        layer(make_tokens(6))
    assert layer.router_loss.item() == losses[0]
    assert layer.router_loss.grad_fn is None
    with torch.inference_mode():
        layer(make_tokens(6))
    assert not layer.router_loss.requires_grad


def test_losses_change_nothing_else():
    plain, watched = make_layer(), make_layer(track_expert_usage=True, **BOTH)
    x = make_tokens(2, 5)
    for actual, expected in zip(watched(x), plain(x), strict=True):
        assert torch.equal(actual, expected)
    for name, value in plain.state_dict().items():
        assert torch.equal(watched.state_dict()[name], value), name


def test_loss_of_nothing_but_padding_is_zero_with_zero_gradients():
    layer = make_layer(**BOTH)
    x = make_tokens(2, 3).requires_grad_()
    layer(x, attention_mask=torch.zeros(2, 3))
    gradients = torch.autograd.grad(layer.router_loss, (x, layer.router_gate.weight))
    assert layer.router_loss == 0
    assert all(gradient.eq(0).all() for gradient in gradients)


# Expert usage


def chosen_experts(layer, x, mask=None):
    """The pairs' experts by brute force, from the layer's logits."""
    with torch.no_grad():
        _, router_logits = copy.deepcopy(layer)(x, attention_mask=mask)
    experts = all_probs(router_logits.double()).topk(layer.config.num_experts_per_tok).indices
    return experts if mask is None else experts[mask.flatten()]


def as_defined(counts):
    """Dead share, and the divergence sum p log(p / (1 / E)) over the experts in use."""
    counts = counts.double().cpu()
    used = counts[counts > 0] / counts.sum()
    return (counts == 0).double().mean().item(), (used * torch.log(used * len(counts))).sum().item()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_usage_counts_pairs_since_the_reset(training, backend, device):
    layer = make_layer(device, track_expert_usage=True, backend=backend).train(training)
    expected = torch.zeros(25, dtype=torch.int64, device=device)
    for shape, masked in (((7,), False), ((2, 4), True), ((1, 3), False)):
        x = make_tokens(*shape, device=device, seed=len(shape))
        mask = make_mask(x.shape[:-1].numel()).view(shape).to(device) if masked else None
        expected += torch.bincount(chosen_experts(layer, x, mask).flatten(), minlength=25)
        layer(x, attention_mask=mask)
        usage = layer.expert_usage()
        assert usage.counts.dtype == torch.int64
        assert torch.equal(usage.counts, expected)
        dead_share, unevenness = as_defined(expected)
        assert usage.dead_share.item() == pytest.approx(dead_share)
        assert usage.unevenness.item() == pytest.approx(unevenness)
        assert {tensor.device for tensor in usage} == {layer.expert_counts.device}
    layer.reset_expert_usage()
    assert layer.expert_usage().counts.eq(0).all()


@pytest.mark.parametrize(
    "counts, dead_share, unevenness",
    [
        ([3] * 25, 0.0, 0.0),
        ([0] * 24 + [50], 24 / 25, math.log(25)),
        ([0] * 25, 1.0, 0.0),
        ([2**40] * 5 + [0] * 20, 0.8, math.log(5)),
    ],
    ids=["even", "one for all", "nothing yet", "large"],
)
def test_usage_at_its_limits(counts, dead_share, unevenness):
    layer = make_layer(track_expert_usage=True)
    layer.expert_counts.copy_(torch.tensor(counts))
    usage = layer.expert_usage()
    assert usage.counts.tolist() == counts
    assert usage.dead_share.item() == pytest.approx(dead_share, abs=1e-12)
    assert usage.unevenness.item() == pytest.approx(unevenness, abs=1e-12)


def test_usage_once_asked_for_stays_as_it_was():
    layer = make_layer(track_expert_usage=True)
    layer(make_tokens(6))
    usage = layer.expert_usage()
    layer(make_tokens(6))
    assert usage.counts.sum() == 18
    layer.reset_expert_usage()
    assert usage.counts.sum() == 18


def test_usage_is_no_part_of_the_state_and_keeps_its_dtype():
    layer = make_layer(track_expert_usage=True)
    layer(make_tokens(6))
    assert "expert_counts" not in layer.state_dict()
    layer.load_state_dict(make_layer().state_dict(), strict=True)
    assert layer.bfloat16().expert_usage().counts.sum() == 18
    assert layer.expert_counts.dtype == torch.int64
    assert layer.to("meta").expert_counts.device.type == "meta"


def test_usage_that_is_not_tracked_cannot_be_asked_for():
    layer = make_layer(**BOTH)
    assert not hasattr(layer, "expert_counts")
    for ask in (layer.expert_usage, layer.reset_expert_usage):
        with pytest.raises(ValueError, match=r"^track_expert_usage: expected True .*got False"):
            ask()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_layer_losses_and_usage_wait_for_no_device(training, masked, device):
    layer = make_layer(device, track_expert_usage=True, **BOTH).train(training)
    x = make_tokens(4, 50, device=device).requires_grad_()
    mask = make_mask(200).view(4, 50).to(device) if masked else None

    def step():
        y, router_logits = layer(x, attention_mask=mask)
        loss = y.square().mean() + router_logits.square().mean()
        if layer.router_loss is not None:
            loss = loss + layer.router_loss
        loss.backward()
        usage = layer.expert_usage()
        layer.reset_expert_usage()
        return usage

    step()  # loading kernels may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            x.sum().item()
        usage = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert usage.dead_share < 1
