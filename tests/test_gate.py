"""BatchNorm and the router's gate in one product: statistics, values and gradients, each against float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library, nn
from torch.utils.checkpoint import checkpoint

from flash_moe.modules.flash_moe import FlashMoE, FlashMoEConfig
from flash_moe.ops.flash_gate import MAX_FLOAT32_TOKENS, batch_norm_statistics, flash_gate, fuses_gate
from flash_moe.testing import (
    assert_no_worse_than,
    poison_memory,
    run_with_grads,
    surround_with_nan,
    to_float64,
)

gate = pytest.importorskip("flash_moe.ops._triton.gate", reason="there is triton for Linux only")

EPS = 1e-5
NAMES = ("logits", "dx", "dweight")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
training_or_not = pytest.mark.parametrize("is_batch", [True, False], ids=["batch", "constant"])
# T, H, C: one token, which has no variance, and two, which have a test of their own; nothing a power of two; even;
# around the number of tokens from which programs take tiles of them; beyond a tile.
SHAPES = [(1, 3, 2), (2, 3, 2), (5, 24, 10), (16, 40, 34), (17, 40, 34), (37, 24, 34), (70, 130, 6)]


def make_inputs(T: int, H: int, C: int, dtype: torch.dtype, device: torch.device, mean: float = 0.5):
    """Tokens, weights and the gradient of the logits; and some mean and variance [H]."""
    generator = torch.Generator(device).manual_seed(T + H + C)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    x, weight, dlogits = randn(T, H) * (1 + randn(H).abs()) + mean, randn(C, H) / H**0.5, randn(T, C)
    constants = (randn(H) + mean, torch.rand(H, generator=generator, device=device) + 0.5)
    return (x.to(dtype), weight.to(dtype)), dlogits.to(dtype), constants


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    buffers = (torch.zeros(x.shape[1], device=x.device), torch.ones(x.shape[1], device=x.device))
    count = torch.zeros((), dtype=torch.int64, device=x.device)
    return batch_norm_statistics(x, *buffers, count, is_update=False)


def fused(x: Tensor, weight: Tensor, mean: Tensor | None = None, variance: Tensor | None = None) -> Tensor:
    is_batch = mean is None
    if is_batch:
        mean, variance = moments(x)
    return flash_gate(x, weight, mean, variance, eps=EPS, is_batch=is_batch)


def composed(x: Tensor, weight: Tensor, mean: Tensor | None = None, variance: Tensor | None = None) -> Tensor:
    mean, variance = (None if y is None else y.to(x.dtype) for y in (mean, variance))
    return F.linear(F.batch_norm(x, mean, variance, training=mean is None, eps=EPS), weight)


def assert_accurate(inputs: tuple[Tensor, Tensor], dlogits: Tensor, constants: tuple[Tensor, ...]) -> None:
    exact = run_with_grads(lambda x, weight: composed(x, weight, *constants), to_float64(inputs), dlogits.double())
    low = run_with_grads(lambda x, weight: composed(x, weight, *constants), inputs, dlogits)
    actual = run_with_grads(lambda x, weight: fused(x, weight, *constants), inputs, dlogits)
    assert_no_worse_than(low, exact, actual, NAMES)


def assert_sums_in_sequence(inputs: tuple[Tensor, Tensor], dlogits: Tensor, constants: tuple[Tensor, ...]) -> None:
    """Of products that nobody should ask of these kernels in float32: each sum adds its terms one after the other.

    n terms of one size have partial sums of up to sqrt(n) times that, each rounded: the error's root mean square is
    eps * sqrt(n) / 5 of the result's. Twice that is allowed, and six times that where it is largest, column by column,
    since columns differ in size.
    """
    exact = run_with_grads(lambda x, weight: composed(x, weight, *constants), to_float64(inputs), dlogits.double())
    actual = run_with_grads(lambda x, weight: fused(x, weight, *constants), inputs, dlogits)
    (T, H), C = inputs[0].shape, len(inputs[1])
    for name, x, want, num_terms in zip(NAMES, actual, exact, (H, C, T), strict=True):
        error, size = ((x - want).flatten(0, -2), want.flatten(0, -2).square().mean(0).sqrt())
        budget = 0.4 * torch.finfo(x.dtype).eps * num_terms**0.5 * size
        assert (error.square().mean(0).sqrt() <= budget).all(), name
        assert (error.abs() <= 6 * budget).all(), name


def assert_same_bits(actual, want) -> None:
    for i, (x, want_x) in enumerate(zip(actual, want, strict=True)):
        assert torch.equal(x, want_x), i


@every_dtype
@pytest.mark.parametrize(
    "T, H, C, is_batch", [(*shape, is_batch) for shape in SHAPES for is_batch in (True, False)[shape[0] < 3 :]], ids=str
)
def test_values_and_gradients_match_float64(T, H, C, is_batch, dtype, device):
    inputs, dlogits, constants = make_inputs(T, H, C, dtype, device)
    assert_accurate(inputs, dlogits, () if is_batch else constants)


@every_dtype
def test_two_tokens(dtype, device):
    """Normalised they are 1 and -1, whatever they were: dx is what is left of terms a million times as large."""
    inputs, dlogits, _ = make_inputs(2, 24, 10, dtype, device)
    exact = run_with_grads(composed, to_float64(inputs), dlogits.double())
    actual = run_with_grads(fused, inputs, dlogits)
    x, weight, eps = inputs[0].double(), inputs[1].double(), torch.finfo(dtype).eps
    rstd = (x.var(0, correction=0) + EPS).rsqrt()
    # A mean is rounded, which counts the more the farther it is from 0; variance, root, product and result are too.
    dxhat = eps * (4 + x.mean(0).abs() * rstd)
    assert ((actual[0] - exact[0]).abs() <= weight.abs() @ dxhat + eps * exact[0].abs()).all()
    assert ((actual[2] - exact[2]).abs() <= dlogits.double().abs().sum(0)[:, None] * dxhat).all()
    largest = (dlogits.double() @ weight * rstd).abs().max()
    assert (actual[1] - exact[1]).abs().max() <= 4 * eps * largest


@every_dtype
@training_or_not
def test_tokens_far_from_zero(is_batch, dtype, device):
    inputs, dlogits, constants = make_inputs(37, 40, 10, dtype, device, mean=30.0)
    assert_accurate(inputs, dlogits, () if is_batch else constants)


@training_or_not
@every_dtype
def test_tokens_split_among_programs(dtype, is_batch, device, monkeypatch):
    inputs, dlogits, constants = make_inputs(150, 24, 10, dtype, device)
    monkeypatch.setattr(gate, "MIN_SPLIT", 40)
    assert_accurate(inputs, dlogits, () if is_batch else constants)


@every_dtype
@pytest.mark.parametrize("max_chunks", [1, 2, 3, 7])
@pytest.mark.parametrize("T, H", [(2, 3), (5, 24), (37, 40), (130, 17)], ids=str)
def test_statistics_match_float64_and_move_as_batch_norm_does(T, H, max_chunks, dtype, device, monkeypatch):
    monkeypatch.setattr(gate, "STATISTICS_BLOCK_T", 16)
    monkeypatch.setattr(gate, "STATISTICS_MIN_CHUNK", 4)
    monkeypatch.setattr(gate, "STATISTICS_PROGRAMS", max_chunks * -(-H // gate.STATISTICS_BLOCK_H))
    (x, _), *_ = make_inputs(T, H, 2, dtype, device, mean=30.0)
    norm = nn.BatchNorm1d(H, affine=False, momentum=0.3).to(device, dtype)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    expected = copy.deepcopy(norm).double()
    expected(x.double())
    buffers = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    mean, variance = batch_norm_statistics(x, *buffers, momentum=0.3)
    torch.testing.assert_close(mean, x.double().mean(0).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance, x.double().var(0, correction=0).float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(norm.running_mean, expected.running_mean.to(dtype))
    torch.testing.assert_close(norm.running_var, expected.running_var.to(dtype))
    assert norm.num_batches_tracked == 1
    before = [buffer.clone() for buffer in buffers]
    assert_same_bits(batch_norm_statistics(x, *buffers, is_update=False), (mean, variance))
    assert_same_bits(buffers, before)


def test_gradient_goes_through_the_statistics(device):
    """By finite differences of the op itself, with its constants from float64, since it has no float64."""
    (x, weight), dlogits, _ = make_inputs(5, 4, 6, torch.float32, device)
    _, dx, _ = run_with_grads(fused, (x, weight), dlogits)
    step = 1e-2
    numeric = torch.empty_like(dx)
    for t in range(5):
        for h in range(4):
            moved = x.repeat(2, 1, 1)
            moved[0, t, h] += step
            moved[1, t, h] -= step
            up, down = ((fused(y, weight) * dlogits).double().sum() for y in moved)
            numeric[t, h] = (up - down) / (2 * step)
    torch.testing.assert_close(dx, numeric, rtol=1e-3, atol=1e-3)


@every_dtype
@training_or_not
@pytest.mark.parametrize("T", [3, 70])
def test_same_bits_on_every_run(T, is_batch, dtype, device):
    inputs, dlogits, constants = make_inputs(T, 40, 10, dtype, device)
    constants = () if is_batch else constants
    first = run_with_grads(lambda x, weight: fused(x, weight, *constants), inputs, dlogits)
    for _ in range(3):
        assert_same_bits(run_with_grads(lambda x, weight: fused(x, weight, *constants), inputs, dlogits), first)


@every_dtype
@training_or_not
@pytest.mark.parametrize("T", [3, 37])
def test_writes_all_of_its_results_and_reads_nothing_else(T, is_batch, dtype, device, monkeypatch):
    monkeypatch.setattr(gate, "STATISTICS_MIN_CHUNK", 2)
    monkeypatch.setattr(gate, "MIN_SPLIT", 10)
    inputs, dlogits, constants = make_inputs(T, 20, 10, dtype, device)
    constants = () if is_batch else constants
    want = run_with_grads(lambda x, weight: fused(x, weight, *constants), inputs, dlogits)
    alone = tuple(surround_with_nan(x) for x in inputs)
    constants = tuple(surround_with_nan(x) for x in constants)
    with poison_memory():
        actual = run_with_grads(lambda x, weight: fused(x, weight, *constants), alone, surround_with_nan(dlogits))
    assert_same_bits(actual, want)


def test_layouts_other_than_contiguous(device):
    (x, weight), dlogits, constants = make_inputs(5, 24, 10, torch.float32, device)
    want = run_with_grads(lambda x, weight: fused(x, weight, *constants), (x, weight), dlogits)
    transposed = (x.t().contiguous().t(), weight.t().contiguous().t())
    actual = run_with_grads(lambda x, weight: fused(x, weight, *constants), transposed, dlogits.t().contiguous().t())
    assert_same_bits(actual, want)
    assert_same_bits(moments(transposed[0]), moments(x))


@training_or_not
def test_opcheck(is_batch, device):
    (x, weight), dlogits, constants = make_inputs(5, 24, 10, torch.float32, device)
    ops = torch.ops.flash_moe
    library.opcheck(ops.flash_gate_backward.default, (dlogits, x, weight, *constants, EPS, is_batch))
    library.opcheck(ops.batch_norm_statistics.default, (x, *constants, torch.tensor(3, device=device), 0.1, is_batch))
    leaves = (x.requires_grad_(), weight.requires_grad_())
    library.opcheck(ops.flash_gate.default, (*leaves, *(moments(x) if is_batch else constants), EPS, is_batch))


def test_backward_of_an_evaluation_notices_that_statistics_have_moved(device):
    (x, weight), _, (mean, variance) = make_inputs(5, 24, 10, torch.float32, device)
    logits = flash_gate(x, weight.requires_grad_(), mean, variance)
    batch_norm_statistics(x, mean, variance, torch.tensor(0, device=device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"hidden_states": torch.zeros(3)}, ValueError, "hidden_states: expected 2 dimensions"),
        ({"gate_weight": torch.zeros(4, 7)}, ValueError, "gate_weight: expected shape"),
        ({"gate_weight": torch.zeros(4, 8).half()}, TypeError, "gate_weight: expected dtype torch.float32"),
        ({"mean": torch.zeros(7)}, ValueError, "mean: expected shape"),
        ({"variance": torch.ones(8, device="meta")}, ValueError, "variance: expected device cpu"),
        ({"hidden_states": torch.zeros(3, 8).double()}, TypeError, "hidden_states: expected dtype"),
    ],
    ids=str,
)
def test_bad_arguments(changes, error, message):
    arguments = {
        "hidden_states": torch.zeros(3, 8),
        "gate_weight": torch.zeros(4, 8),
        "mean": torch.zeros(8),
        "variance": torch.ones(8),
    }
    with pytest.raises(error, match=message):
        flash_gate(**{**arguments, **changes})


def test_one_token_has_no_statistics():
    with pytest.raises(ValueError, match="hidden_states: expected 2 or more tokens"):
        batch_norm_statistics(torch.zeros(1, 8), torch.zeros(8), torch.ones(8), torch.tensor(0))


# In the layer


def make_layer(device, **changes) -> FlashMoE:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 0, "num_experts": 25, "num_experts_per_tok": 3}
    return FlashMoE(FlashMoEConfig(**{**sizes, "backend": "triton", **changes})).to(device)


def step(layer, device, *, call=None, T=11):
    """Router logits, gradients of what they depend on, and the norm's buffers after a forward and backward."""
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(T, 24, generator=generator) + 3).to(device).requires_grad_()
    dlogits = torch.randn(2, T, 5, generator=generator).to(device)
    y, router_logits = layer(x) if call is None else call(layer, x)
    grads = torch.autograd.grad((y, router_logits), (x, layer.router_gate.weight), (torch.ones_like(y), dlogits))
    return router_logits.detach(), *grads, *layer.router_norm.buffers()


@pytest.fixture
def products(monkeypatch):
    """How many tokens each product took."""
    from flash_moe.modules import token_batch_norm

    taken = []

    def counted(x, *args, **kwargs):
        taken.append(len(x))
        return flash_gate(x, *args, **kwargs)

    monkeypatch.setattr(token_batch_norm, "flash_gate", counted)
    return taken


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_layer_equals_the_composed_one(training, device, products):
    fused_layer, composed_layer = (make_layer(device).train(training) for _ in range(2))
    actual = step(fused_layer, device)
    assert products == [11]
    composed_layer.router_gate.register_forward_hook(lambda *_: None)  # one who watches sees norm and gate called
    want = step(composed_layer, device)
    assert products == [11]
    for x, y in zip(actual, want, strict=True):  # sums of terms as large as the largest element, in another order
        largest = y.abs().max().item()
        torch.testing.assert_close(x, y, rtol=0, atol=16 * torch.finfo(torch.float32).eps * largest)
    assert actual[0].stride() == want[0].stride()
    assert fused_layer.router_norm.num_batches_tracked == int(training)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_recomputation_moves_statistics_once_and_gives_the_same_bits(use_reentrant, device, products):
    want = step(make_layer(device), device)
    layer = make_layer(device)
    actual = step_by_backward(layer, device, use_reentrant)
    assert products == [11, 11, 11]
    assert_same_bits(actual, want)
    assert layer.router_norm.num_batches_tracked == 1


def step_by_backward(layer, device, use_reentrant):
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(11, 24, generator=generator) + 3).to(device).requires_grad_()
    dlogits = torch.randn(2, 11, 5, generator=generator).to(device)
    y, router_logits = checkpoint(layer, x, use_reentrant=use_reentrant)
    torch.autograd.backward((y, router_logits), (torch.ones_like(y), dlogits))
    return router_logits.detach(), x.grad, layer.router_gate.weight.grad, *layer.router_norm.buffers()


def compile_and_record(layer):
    """The layer compiled for any number of tokens, and the names of the ops in its graphs, forward and backward."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    names = []

    def record(graph, _):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    return torch.compile(layer, fullgraph=True, dynamic=True, backend=backend), names


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiled_it_runs_the_same_kernels(training, device):
    layer = make_layer(device).to(torch.bfloat16).train(training)
    compiled, names = compile_and_record(copy.deepcopy(layer))
    for T, stance in ((11, "default"), (2, "fail_on_recompile"), (17, "fail_on_recompile")):
        x = (torch.randn(T, 24, generator=torch.Generator().manual_seed(T)) + 3).to(device, torch.bfloat16)
        results = []
        with torch.compiler.set_stance(stance):
            for call in (compiled, layer):
                leaf = x.clone().requires_grad_()
                y, router_logits = call(leaf)
                (y.sum() + router_logits.square().sum()).backward()
                results.append((y, router_logits, leaf.grad))
        assert_same_bits(*results)
    assert_same_bits(compiled.router_norm.buffers(), layer.router_norm.buffers())
    assert "flash_moe.flash_gate.default" in names
    assert "flash_moe.flash_gate_backward.default" in names


def test_compiled_inference_is_one_op(device):
    layer = make_layer(device, intermediate_size=20).to(torch.bfloat16).eval()
    compiled, names = compile_and_record(layer)
    with torch.no_grad():
        for T, stance in ((11, "default"), (2, "fail_on_recompile"), (17, "fail_on_recompile"), (1, "default")):
            x = torch.randn(T, 24, generator=torch.Generator().manual_seed(T)).to(device, torch.bfloat16)
            with torch.compiler.set_stance(stance):
                actual = compiled(x)
            for result, want in zip(actual, layer(x), strict=True):
                assert torch.equal(result, want)
                assert result.stride() == want.stride()
    assert [name for name in names if name.startswith("flash_moe")] == ["flash_moe.layer_inference.default"] * 2


def test_compiled_float32_tokens_are_left_to_cublas(device):
    """However few: how many there are would be a reason to compile again."""
    layer = make_layer(device)
    compiled, names = compile_and_record(layer)
    for T, stance in ((11, "default"), (30, "fail_on_recompile")):
        with torch.compiler.set_stance(stance):
            compiled(torch.randn(T, 24, device=device))
    assert not [name for name in names if "flash_gate" in name]


def test_compiled_with_another_eps_and_momentum(device):
    """Also when they change between two calls."""
    layer = make_layer(device).to(torch.bfloat16)
    twin = copy.deepcopy(layer)
    compiled, _ = compile_and_record(twin)
    x = torch.randn(11, 24, device=device, dtype=torch.bfloat16)
    for eps, momentum in ((1e-5, 0.1), (0.5, 0.7), (1e-5, 0.1)):
        for each in (layer, twin):
            each.router_norm.eps, each.router_norm.momentum = eps, momentum
        for training in (True, False):
            layer.train(training)
            twin.train(training)
            with torch.set_grad_enabled(training):
                assert_same_bits(compiled(x), layer(x))
        assert_same_bits(twin.router_norm.buffers(), layer.router_norm.buffers())


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_compiled_recomputation_moves_statistics_once(use_reentrant, device):
    layer = make_layer(device).to(torch.bfloat16)
    plain, x = copy.deepcopy(layer), torch.randn(11, 24, device=device, dtype=torch.bfloat16)
    plain(x)
    compiled, names = compile_and_record(layer)
    y, _ = checkpoint(compiled, x.requires_grad_(), use_reentrant=use_reentrant)
    y.sum().backward()
    assert "flash_moe.flash_gate.default" in names
    for name, buffer in plain.router_norm.named_buffers():
        torch.testing.assert_close(layer.router_norm.get_buffer(name), buffer, rtol=0.01, atol=0.001)


@pytest.mark.parametrize("changes", [{"router_norm": "rms"}, {"router_norm": "none"}, {"backend": "torch"}], ids=str)
def test_others_keep_to_the_composed_path(changes, device, products):
    step(make_layer(device, **changes), device)
    assert products == []


def test_padding_keeps_to_the_composed_path(device, products):
    mask = torch.ones(11, device=device)
    step(make_layer(device), device, call=lambda layer, x: layer(x, mask))
    assert products == []


def test_many_float32_tokens_are_left_to_cublas(device):
    x = torch.zeros(17, 8, device=device)
    assert not fuses_gate(x, "triton")
    assert fuses_gate(x[:16], "triton")
    assert fuses_gate(x.bfloat16(), "triton")
    assert not fuses_gate(x[:0].bfloat16(), "triton")
    assert not fuses_gate(x.bfloat16(), "torch")


@pytest.mark.gpu
@every_dtype
@training_or_not
@pytest.mark.parametrize("T", [1, 16, 100, 4096])
def test_realistic_size(T, is_batch, dtype, device):
    if is_batch and T == 1:
        T = 2
    inputs, dlogits, constants = make_inputs(T, 1024, 256, dtype, device)
    constants = () if is_batch else constants
    if dtype == torch.float32 and T > MAX_FLOAT32_TOKENS:
        assert_sums_in_sequence(inputs, dlogits, constants)
    else:
        assert_accurate(inputs, dlogits, constants)
    first, again = (run_with_grads(lambda x, weight: fused(x, weight, *constants), inputs, dlogits) for _ in range(2))
    assert_same_bits(again, first)
