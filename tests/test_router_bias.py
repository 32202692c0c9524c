"""Loss-free balancing: the bias chooses, the logits weigh, and the bias moves against the load, once a step.

T tokens, N keys a half, E = N * N experts, K experts a token.
"""

import copy

import pytest
import torch
from torch import library
from torch.utils.checkpoint import checkpoint

from flash_moe import FlashMoE, FlashMoEConfig
from flash_moe.modules.biased_routing import biased_routing, update_bias
from flash_moe.modules.recomputation import MAX_WAITING
from flash_moe.ops.flash_router import flash_routing
from flash_moe.testing import assert_no_worse_than

BACKENDS = ("torch", "triton", "reference")
normed_or_not = pytest.mark.parametrize("norm_topk_prob", [False, True], ids=["as they are", "sum to one"])
RATE = 0.5  # large, so that a single update changes who is chosen


def make_layer(device="cpu", dtype=torch.float32, **changes):
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_experts": 25, "num_experts_per_tok": 3}
    torch.manual_seed(0)
    return FlashMoE(FlashMoEConfig(**{**sizes, "router_bias_update_rate": RATE, **changes})).to(device, dtype)


def make_tokens(*shape, device="cpu", dtype=torch.float32, seed=1):
    return torch.randn(*shape, 12, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def make_routing(T, N, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, T, N, generator=generator).to(device, dtype)
    return logits, torch.randn(2, N, generator=generator).to(device)


def naive(router_logits, bias, num_experts_per_tok, norm_topk_prob):
    """All E pairs of each token: the best biased sums, and their probabilities without the bias."""
    biased = router_logits.detach() + bias[:, None].to(router_logits)
    E = bias.shape[1] ** 2
    experts = (biased[0][:, :, None] + biased[1][:, None, :]).reshape(-1, E).topk(num_experts_per_tok).indices
    row, col = router_logits.log_softmax(-1)
    weights = (row[:, :, None] + col[:, None, :]).reshape(-1, E).gather(1, experts).exp()
    return (weights / weights.sum(-1, keepdim=True) if norm_topk_prob else weights), experts


# The routing step


@normed_or_not
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T, N, K", [(1, 1, 1), (7, 3, 2), (9, 5, 25), (12, 8, 4)], ids=str)
def test_bias_chooses_and_logits_weigh(T, N, K, backend, norm_topk_prob, device):
    router_logits, bias = make_routing(T, N, device)
    upstream = torch.randn(T, K, generator=torch.Generator().manual_seed(1)).to(device)

    def run(function, logits):
        logits = logits.clone().requires_grad_()
        weights, experts = function(logits)
        (gradient,) = torch.autograd.grad(weights, logits, upstream.to(weights))
        return experts, {"weights": weights.detach(), "grad": gradient}

    _, low = run(lambda x: naive(x, bias, K, norm_topk_prob), router_logits)
    exact_experts, exact = run(lambda x: naive(x, bias.double(), K, norm_topk_prob), router_logits.double())
    options = {"norm_topk_prob": norm_topk_prob, "backend": backend}
    experts, actual = run(lambda x: biased_routing(x, bias, N, K, **options), router_logits)
    assert torch.equal(experts, exact_experts)
    assert_no_worse_than(list(low.values()), list(exact.values()), list(actual.values()), names=tuple(exact))


@normed_or_not
@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_of_zero_is_no_bias(backend, norm_topk_prob, device):
    router_logits, bias = make_routing(9, 5, device)
    expected, experts = flash_routing(router_logits, 5, 3, norm_topk_prob=norm_topk_prob, backend=backend)
    options = {"norm_topk_prob": norm_topk_prob, "backend": backend}
    weights, chosen = biased_routing(router_logits, torch.zeros_like(bias), 5, 3, **options)
    assert torch.equal(chosen, experts)
    torch.testing.assert_close(weights, expected)


def test_16_bit_logits_are_biased_in_float32(device):
    """A bias far below a 16-bit logit's last place still decides between equal logits."""
    router_logits = torch.full((2, 1, 4), 100.0, dtype=torch.bfloat16, device=device)
    bias = torch.zeros(2, 4, device=device)
    bias[0, 2] = bias[1, 3] = 0.001
    _, experts = biased_routing(router_logits, bias, 4, 1)
    assert experts.item() == 2 * 4 + 3


@normed_or_not
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck_of_the_weights(backend, norm_topk_prob, device):
    router_logits = make_routing(7, 5, device)[0].transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    indices = torch.randint(25, (7, 3), device=device)
    library.opcheck(torch.ops.flash_moe.weigh_experts, (router_logits, indices, norm_topk_prob, backend))


def test_update_raises_what_is_below_its_half_mean():
    # 3 rows take 6, 3 and 3 pairs, the mean is 4; 3 columns take 4 each.
    counts = torch.tensor([[2, 2, 2], [2, 1, 0], [0, 1, 2]])
    bias = torch.tensor([[0.5, 0.5, 0.5], [1.0, 2.0, 3.0]])
    update_bias(bias, counts.flatten(), 0.25)
    assert bias.tolist() == [[0.25, 0.75, 0.75], [1.0, 2.0, 3.0]]


# In the layer


@normed_or_not
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_layer_chooses_by_its_bias(backend, norm_topk_prob, device):
    layer = make_layer(device, backend=backend, norm_topk_prob=norm_topk_prob, router_norm="none")
    options = {"backend": backend, "router_norm": "none", "norm_topk_prob": norm_topk_prob}
    plain = make_layer(device, router_bias_update_rate=0.0, **options)
    x = make_tokens(6, device=device)
    torch.testing.assert_close(layer(x), plain(x))  # the bias starts at 0
    with torch.no_grad():
        layer.router_bias.copy_(make_routing(1, 5, device)[1])
    for training in (True, False):
        y, router_logits = layer.train(training)(x)
        layer.router_bias.copy_(make_routing(1, 5, device)[1])
        weights, experts = naive(router_logits, layer.router_bias, 3, norm_topk_prob)
        expected = layer.down_proj(torch.nn.functional.silu(layer.gate_proj(x)) * layer.up_proj(x))
        act = torch.nn.functional.silu((x[:, None] * layer.down_embed(experts)).sum(-1))
        expected = expected + ((weights * act)[:, :, None] * layer.up_embed(experts)).sum(1)
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(y, plain(x)[0])


def pair_loads(layer, x, mask=None):
    """``[2, N]`` pairs of every key, by brute force."""
    with torch.no_grad():
        twin = copy.deepcopy(layer)
        _, router_logits = twin(x, mask)
    _, experts = naive(router_logits, layer.router_bias, 3, False)
    experts = experts if mask is None else experts[mask.flatten()]
    N = layer.num_expert_keys
    return torch.stack([torch.bincount(ids.flatten(), minlength=N) for ids in (experts // N, experts % N)])


@pytest.mark.parametrize("masked", [False, True])
def test_training_moves_the_bias_against_the_load(masked, device):
    layer = make_layer(device)
    expected = torch.zeros(2, 5, device=device)
    for seed in (1, 2, 3):
        x = make_tokens(2, 7, device=device, seed=seed)
        mask = (torch.rand(2, 7, generator=torch.Generator().manual_seed(seed)) < 0.6).to(device) if masked else None
        loads = pair_loads(layer, x, mask).double()
        expected += RATE * torch.sign(loads.mean(-1, keepdim=True) - loads).float()
        layer(x, mask)
        assert torch.equal(layer.router_bias, expected)
    assert expected.ne(0).any()
    layer.eval()(x)
    assert torch.equal(layer.router_bias, expected)


def test_padding_alone_moves_nothing():
    layer = make_layer()
    layer(make_tokens(2, 3), torch.zeros(2, 3))
    assert layer.router_bias.eq(0).all()


def test_bias_evens_a_skewed_router_out():
    layer = make_layer(router_norm="none", router_bias_update_rate=0.02, track_expert_usage=True)
    with torch.no_grad():  # every token has the same preference, in its last component
        layer.router_gate.weight[:, -1] = torch.randn(10, generator=torch.Generator().manual_seed(3))
    unevenness = []
    for steps in (1, 300, 1):
        layer.reset_expert_usage()
        for seed in range(steps):
            x = make_tokens(200, seed=seed)
            x[:, -1] = 3.0
            with torch.no_grad():
                layer(x)
        unevenness.append(layer.expert_usage().unevenness.item())
    assert unevenness[0] > 1.0
    assert unevenness[2] < 0.35


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_checkpointing_routes_the_same_and_moves_the_bias_once(use_reentrant, device):
    plain, checkpointed = (make_layer(device, router_aux_loss_coef=0.1) for _ in range(2))
    for seed in (1, 2, 3):
        gradients = []
        for layer in (plain, checkpointed):
            layer.zero_grad()
            x = make_tokens(2, 5, device=device, seed=seed).requires_grad_()
            y, _ = layer(x) if layer is plain else checkpoint(layer, x, use_reentrant=use_reentrant)
            (y.square().mean() + layer.router_loss).backward()
            gradients.append([x.grad, *(parameter.grad for parameter in layer.parameters())])
        assert all(torch.equal(actual, expected) for expected, actual in zip(*gradients, strict=True))
        assert torch.equal(checkpointed.router_bias, plain.router_bias)
    assert plain.router_bias.ne(0).any()


def accumulate(layer, call, inputs, order, device):
    """Forwards of all ``inputs``, then their backwards in ``order``: the gradients."""
    layer.zero_grad()
    losses = [(i + 1) * call(x.to(device))[0].square().mean() for i, x in enumerate(inputs)]
    for i in order:
        losses[i].backward()
    return {name: parameter.grad for name, parameter in layer.named_parameters()}


def waiting_tokens():
    """Micro-batches; the last two are the same tokens in another order."""
    inputs = [make_tokens(2, 25, seed=seed) for seed in (1, 2, 3)]
    return [*inputs, inputs[-1].flip(1)]


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("router_norm", ["batch", "none"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)], ids=str)
def test_every_recomputation_routes_as_its_own_forward(order, router_norm, use_reentrant, device):
    """The bias moves between forwards that wait for their backward."""
    plain, checkpointed = (make_layer(device, router_norm=router_norm) for _ in range(2))
    inputs = [x.requires_grad_() for x in waiting_tokens()]
    expected = accumulate(plain, plain, inputs, order, device)
    actual = accumulate(
        checkpointed, lambda x: checkpoint(checkpointed, x, use_reentrant=use_reentrant), inputs, order, device
    )
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert torch.equal(checkpointed.router_bias, plain.router_bias)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_one_checkpointed_layer_at_every_depth(use_reentrant, device):
    gradients = []
    for is_checkpointed in (False, True):
        layer = make_layer(device)
        y = make_tokens(2, 25, device=device).requires_grad_()
        for _ in range(4):
            y = y + (checkpoint(layer, y, use_reentrant=use_reentrant) if is_checkpointed else layer(y))[0]
        y.square().mean().backward()
        gradients.append([parameter.grad for parameter in layer.parameters()])
    assert all(torch.equal(actual, expected) for expected, actual in zip(*gradients, strict=True))


def test_a_forward_that_overflowed_is_nobodys_recomputation(device):
    plain, checkpointed = make_layer(device), make_layer(device)
    inputs = [x.requires_grad_() for x in waiting_tokens()[:2]]
    expected = accumulate(plain, plain, inputs, (0, 1), device)
    with torch.no_grad():
        checkpointed(torch.full((3, 12), torch.nan, device=device))
        for layer in (checkpointed, plain):
            layer.router_bias.zero_()
            layer.router_norm.reset_running_stats()
    actual = accumulate(
        checkpointed, lambda x: checkpoint(checkpointed, x, use_reentrant=False), inputs, (0, 1), device
    )
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_without_tokens_a_recomputation_finds_its_forward(device):
    layer = make_layer(device)
    checkpoint(layer, make_tokens(0, device=device).requires_grad_(), use_reentrant=False)[0].sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_more_waiting_forwards_than_are_remembered(use_reentrant, monkeypatch, device):
    monkeypatch.setenv("FLASH_MOE_DEBUG", "1")  # a GPU asks only then
    layer = make_layer(device)
    losses = []
    for seed in range(MAX_WAITING + 1):
        x = make_tokens(9, device=device, seed=seed).requires_grad_()
        losses.append(checkpoint(layer, x, use_reentrant=use_reentrant)[0].sum())
    losses[1].backward()
    with pytest.raises(RuntimeError, match=f"at most {MAX_WAITING} may wait"):
        losses[0].backward()


# On a GPU compiled layers are given tokens that are no leaf, where torch 2.11 warns itself.
compiled_for_no_leaf = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)


@compiled_for_no_leaf
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_checkpoint_around_a_compiled_layer_routes_as_its_own_forward(use_reentrant, device):
    torch._dynamo.reset()
    plain, checkpointed = make_layer(device), make_layer(device)
    compiled = torch.compile(checkpointed, fullgraph=True, backend="aot_eager")
    inputs = [x.requires_grad_() for x in waiting_tokens()]
    expected = accumulate(plain, plain, inputs, (0, 1, 2, 3), device)
    actual = accumulate(
        checkpointed, lambda x: checkpoint(compiled, x, use_reentrant=use_reentrant), inputs, (0, 1, 2, 3), device
    )
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(checkpointed.router_bias, plain.router_bias)


@compiled_for_no_leaf
def test_a_compiled_checkpoint_refuses_a_second_forward_before_its_backward(device):
    torch._dynamo.reset()
    layer = make_layer(device)
    compiled = torch.compile(lambda x: checkpoint(layer, x, use_reentrant=False), fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        accumulate(layer, compiled, waiting_tokens()[:2], (0, 1), device)


@compiled_for_no_leaf
@pytest.mark.parametrize("where", ["around", "inside"])
def test_compiled_with_checkpointing(where, device):
    torch._dynamo.reset()
    plain, checkpointed = make_layer(device), make_layer(device)
    if where == "around":
        compiled = torch.compile(checkpointed, fullgraph=True, backend="aot_eager")
    else:
        compiled = torch.compile(
            lambda x: checkpoint(checkpointed, x, use_reentrant=False), fullgraph=True, backend="aot_eager"
        )
    for seed in (1, 2, 3):
        gradients = []
        for layer in (plain, checkpointed):
            layer.zero_grad()
            x = make_tokens(2, 5, device=device, seed=seed).requires_grad_()
            if layer is plain:
                y, _ = layer(x)
            elif where == "around":
                y, _ = checkpoint(compiled, x, use_reentrant=False)
            else:
                y, _ = compiled(x)
            y.square().mean().backward()
            gradients.append([x.grad, *(parameter.grad for parameter in layer.parameters())])
        torch.testing.assert_close(gradients[1], gradients[0])
        torch.testing.assert_close(checkpointed.state_dict(), plain.state_dict())


# State


def test_state_dict_has_the_bias_only_where_there_is_one():
    balanced, plain = make_layer(), make_layer(router_bias_update_rate=0.0)
    assert set(balanced.state_dict()) - set(plain.state_dict()) == {"router_bias"}
    plain.load_state_dict(make_layer(router_bias_update_rate=0.0).state_dict(), strict=True)
    assert not hasattr(plain, "router_bias")
    with pytest.raises(RuntimeError, match="router_bias"):
        balanced.load_state_dict(plain.state_dict(), strict=True)


def test_state_continues_to_the_same_bits():
    layer = make_layer()
    for seed in (1, 2):
        layer(make_tokens(9, seed=seed))
    twin = make_layer()
    twin.load_state_dict(layer.state_dict(), strict=True)
    x = make_tokens(9, seed=3)
    assert torch.equal(twin(x)[0], layer(x)[0])
    assert torch.equal(twin.router_bias, layer.router_bias)


def test_bias_stays_float32_and_goes_where_the_layer_goes(device):
    layer = make_layer(router_bias_update_rate=1e-4)
    layer(make_tokens(9))
    before = layer.router_bias.clone()
    layer.to(device, torch.bfloat16)
    assert layer.router_bias.dtype == layer.router_bias_in_use.dtype == torch.float32
    assert layer.router_bias.device.type == device.type
    assert torch.equal(layer.router_bias.cpu(), before)
    layer(make_tokens(9, device=device, dtype=torch.bfloat16))
    assert layer.to("meta", torch.float16).router_bias.device.type == "meta"
    assert layer.router_bias.dtype == torch.float32


def test_reset_parameters_forgets_the_bias():
    layer = make_layer()
    layer(make_tokens(9))
    layer.reset_parameters()
    assert layer.router_bias.eq(0).all()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
def test_on_a_gpu_two_runs_give_the_same_bits_and_wait_for_nothing(device, monkeypatch):
    def run():
        layer = make_layer(device, hidden_size=12, num_experts=1024, num_experts_per_tok=16)
        x = make_tokens(2000, device=device).requires_grad_()
        layer(x)[0].square().sum().backward()
        return [x.grad, layer.router_bias, *(parameter.grad for parameter in layer.parameters())]

    expected = run()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        actual = run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))

    layer, x = make_layer(device), make_tokens(50, device=device)
    layer(x)[0].sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_recomputations_in_a_graph_route_as_their_forwards_and_wait_for_nothing(use_reentrant, device):
    plain, checkpointed = make_layer(device), make_layer(device)
    inputs = [x.to(device).requires_grad_() for x in waiting_tokens()[:3]]

    def step(layer, call):
        return accumulate(layer, call, inputs, (0, 2, 1), device)

    def call(x):
        return checkpoint(checkpointed, x, use_reentrant=use_reentrant, preserve_rng_state=False)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(checkpointed, call)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(checkpointed, call)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    for _ in range(2):
        step(plain, plain)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        actual = step(checkpointed, call)
    for seed in (4, 5):
        with torch.no_grad():
            for i, x in enumerate(inputs):
                x.copy_(make_tokens(2, 25, device=device, seed=3 * seed + i))
        graph.replay()
        expected = step(plain, plain)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
        assert torch.equal(checkpointed.router_bias, plain.router_bias)


@pytest.mark.gpu
def test_graph_replay_moves_the_bias(device):
    layer, x = make_layer(device), make_tokens(40, device=device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            layer(x)[0].sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y, router_logits = layer(x)
        y.sum().backward()
    for seed in (2, 3):
        x.copy_(make_tokens(40, device=device, seed=seed))
        before = layer.router_bias.clone()
        graph.replay()
        _, experts = naive(router_logits.detach().double(), before, 3, False)
        loads = torch.stack(
            [torch.bincount(ids.flatten(), minlength=5) for ids in (experts // 5, experts % 5)]
        ).double()
        expected = before + RATE * torch.sign(loads.mean(-1, keepdim=True) - loads).float()
        assert torch.equal(layer.router_bias, expected)
