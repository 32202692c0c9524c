"""The layer among what PyTorch has for training and serving, as docs/pytorch.md promises it.

Copies, saved state and checkpointing are in tests/test_flash_moe.py, several processes in tests/test_distributed.py.
"""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from flash_moe import FlashMoE, FlashMoEConfig

SIZES = {"hidden_size": 12, "intermediate_size": 20, "num_experts": 25, "num_experts_per_tok": 3}
NORMS = ("batch", "rms", "none")
LOSSES = {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.1, "track_expert_usage": True}

every_norm = pytest.mark.parametrize("router_norm", NORMS)
train_and_eval = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def make_layer(device, seed=0, **changes):
    torch.manual_seed(seed)
    return FlashMoE(FlashMoEConfig(**{**SIZES, **changes})).to(device)


def make_batches(count, *shape, device, hidden_size=SIZES["hidden_size"], seed=1):
    """``count`` pairs of inputs and targets ``[*shape, H]``."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, *shape, hidden_size, generator=generator).to(device) for _ in range(count)]


def loss_of(layer, x, target, call=None):
    y, _ = layer(x) if call is None else call(x)
    loss = F.mse_loss(y.float(), target)
    return loss if layer.router_loss is None else loss + layer.router_loss


def make_adamw(layer, **settings):
    return torch.optim.AdamW(layer.parameters(), lr=1e-2, **settings)


def train(layer, batches, *optimizers, autocast=False):
    """The losses."""
    losses = []
    for x, target in batches:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            loss = loss_of(layer, x, target)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def assert_trained_alike(actual, expected, start, bound=0.01):
    """Each parameter's way from ``start``, in norm: Adam makes much of a gradient of nearly zero."""
    for (name, value), parameter, first in zip(
        expected.named_parameters(), actual.parameters(), start.parameters(), strict=True
    ):
        way = (value - first).norm()
        assert way > 0, name
        assert (parameter - value).norm() < bound * way, name


# torch.compile


@train_and_eval
@every_norm
def test_one_compilation_serves_every_number_of_tokens(router_norm, training, device):
    layer = make_layer(device, router_norm=router_norm, **LOSSES).train(training)
    twin = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, dynamic=True, backend="aot_eager")
    for T, stance in ((7, "default"), (2, "fail_on_recompile"), (3, "fail_on_recompile"), (64, "fail_on_recompile")):
        (batch,) = make_batches(1, T, device=device)
        want = loss_of(layer, *batch)
        with torch.compiler.set_stance(stance):
            actual = loss_of(twin, *batch, call=compiled)
            if training:
                actual.backward()
        torch.testing.assert_close(actual, want)
        if training:
            want.backward()
            for name, parameter in layer.named_parameters():
                torch.testing.assert_close(twin.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-5)


def test_one_compilation_serves_sparse_gradients(device):
    """Whose number of rows depends on T up to where every expert has one."""
    layer = make_layer(device, sparse_grad=True)
    twin = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, dynamic=True, backend="aot_eager")
    for T, stance in ((7, "default"), (2, "fail_on_recompile"), (64, "fail_on_recompile")):
        (batch,) = make_batches(1, T, device=device)
        with torch.compiler.set_stance(stance):
            loss_of(twin, *batch, call=compiled).backward()
        loss_of(layer, *batch).backward()
        for name in ("down_embed", "up_embed"):
            grad = twin.get_submodule(name).weight.grad
            assert grad.is_sparse
            torch.testing.assert_close(grad.to_dense(), layer.get_submodule(name).weight.grad.to_dense())


@every_norm
def test_batch_and_sequence_may_both_change(router_norm, device):
    layer = make_layer(device, router_norm=router_norm)
    torch._dynamo.reset()
    compiled = torch.compile(layer.eval(), fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        compiled(make_batches(1, 4, 6, device=device)[0][0])
        with torch.compiler.set_stance("fail_on_recompile"):
            for B, S in ((2, 3), (5, 2), (3, 40)):
                x, _ = make_batches(1, B, S, device=device)[0]
                torch.testing.assert_close(compiled(x), layer(x))


def test_compiled_under_autocast(device):
    layer = make_layer(device, **LOSSES)
    twin = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, dynamic=True, backend="aot_eager")
    for T, stance in ((7, "default"), (33, "fail_on_recompile")):
        (batch,) = make_batches(1, T, device=device)
        with torch.autocast(device.type, torch.bfloat16), torch.compiler.set_stance(stance):
            want, actual = loss_of(layer, *batch), loss_of(twin, *batch, call=compiled)
        torch.testing.assert_close(actual, want, rtol=0.01, atol=0.0)
        want.backward()
        actual.backward()
        for name, parameter in layer.named_parameters():
            grad = twin.get_parameter(name).grad
            assert grad.dtype == torch.float32
            assert (grad - parameter.grad).norm() < 0.02 * parameter.grad.norm(), name


@train_and_eval
@every_norm
def test_one_compilation_serves_every_padding_mask(router_norm, training, device):
    layer = make_layer(device, router_norm=router_norm, router_bias_update_rate=0.01, **LOSSES).train(training)
    twin = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, dynamic=True, backend="aot_eager")
    for T, stance in ((7, "default"), (2, "fail_on_recompile"), (64, "fail_on_recompile")):
        (batch,) = make_batches(1, T, device=device)
        mask = torch.rand(T, generator=torch.Generator().manual_seed(T)).to(device) < 0.7
        mask[:2] = True
        want = loss_of(layer, *batch, call=lambda x, mask=mask: layer(x, mask))
        with torch.compiler.set_stance(stance):
            actual = loss_of(twin, *batch, call=lambda x, mask=mask: compiled(x, mask))
            if training:
                actual.backward()
        torch.testing.assert_close(actual, want)
        torch.testing.assert_close(twin.state_dict(), layer.state_dict())


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # one that PyTorch captures to keep its memory
@pytest.mark.parametrize("T", [1, 40])
def test_compiled_into_cuda_graphs(T, device):
    """By torch.compile itself, which lets nothing stay in a graph's memory that is no result."""
    layer = make_layer(device).to(torch.bfloat16).eval()
    compiled = torch.compile(layer, mode="reduce-overhead")
    with torch.no_grad():
        for seed in range(5):
            ((x, _),) = make_batches(1, T, device=device, seed=seed)
            torch.compiler.cudagraph_mark_step_begin()
            results = [result.clone() for result in compiled(x.bfloat16())]
            for actual, want in zip(results, layer(x.bfloat16()), strict=True):
                torch.testing.assert_close(actual, want)


@pytest.mark.gpu
@train_and_eval
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inductor_compiles_once_for_every_number_of_tokens(dtype, training, compiler, device):
    layer = make_layer(device, hidden_size=64, intermediate_size=96, num_experts=256, num_experts_per_tok=8, **LOSSES)
    layer.to(dtype).train(training)
    twin = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, dynamic=True, backend=compiler)
    for T, stance in ((33, "default"), (2, "fail_on_recompile"), (500, "fail_on_recompile")):
        ((x, target),) = make_batches(1, T, device=device, hidden_size=64)
        want = loss_of(layer, x.to(dtype), target)
        with torch.compiler.set_stance(stance):
            actual = loss_of(twin, x.to(dtype), target, call=compiled)
            if training:
                actual.backward()
        # In 16 bits a logit that rounds otherwise may choose another expert.
        torch.testing.assert_close(actual, want, rtol=1e-4 if dtype == torch.float32 else 0.01, atol=1e-6)


# CUDA graphs


# How far losses may differ, the ways that parameters went, and how often each expert was chosen: another rounding to 16
# bits may move a parameter, and that a choice.
PRECISIONS = {"float32": (1e-3, 0.03, 1e-3), "bfloat16": (5e-3, 0.5, 0.2), "autocast": (5e-3, 0.2, 0.2)}


@pytest.mark.gpu
@pytest.mark.parametrize("set_to_none", [True, False], ids=["gradients in the graph", "gradients kept"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "router_norm, T", [("batch", 2), ("batch", 300), ("rms", 1), ("rms", 2), ("rms", 300)], ids=str
)
def test_whole_training_step_in_a_graph(router_norm, T, precision, set_to_none, device):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_experts": 256, "num_experts_per_tok": 8}
    autocast, dtype = precision == "autocast", torch.bfloat16 if precision == "bfloat16" else torch.float32
    layer = make_layer(device, router_norm=router_norm, **sizes, **LOSSES).to(dtype)
    start, eager = copy.deepcopy(layer), copy.deepcopy(layer)
    batches = [(x.to(dtype), target) for x, target in make_batches(9, T, device=device, hidden_size=64)]
    optimizer, eager_optimizer = (make_adamw(each, capturable=True, fused=True) for each in (layer, eager))
    x, target = (each.clone() for each in batches[0])

    def step():
        optimizer.zero_grad(set_to_none)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = loss_of(layer, x, target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for batch in batches[:3]:
            x.copy_(batch[0])
            target.copy_(batch[1])
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # The warm-up's stream: router_loss keeps that pass's graph alive, and autograd wants one stream for both.
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    losses = []
    for batch in batches[3:]:
        x.copy_(batch[0])
        target.copy_(batch[1])
        graph.replay()
        losses.append(captured.clone())
    want = train(eager, batches, eager_optimizer, autocast=autocast)[3:]
    loss_bound, way_bound, choice_bound = PRECISIONS[precision]
    torch.testing.assert_close(torch.stack(losses), want, rtol=loss_bound, atol=0.0)
    assert want.max() > 1.05 * want.min()  # else a graph that ignores its data would pass
    assert_trained_alike(layer, eager, start, bound=way_bound)
    for name, buffer in eager.named_buffers():
        bound = choice_bound if name == "expert_counts" else 1e-3
        assert (layer.get_buffer(name).double() - buffer).norm() <= bound * buffer.double().norm(), name


# Autocast and GradScaler


@every_norm
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision_trains_as_float32_does(dtype, router_norm, device):
    layer = make_layer(device, router_norm=router_norm)
    start, full = copy.deepcopy(layer), copy.deepcopy(layer)
    batches = make_batches(4, 64, device=device)
    optimizer, scaler = make_adamw(layer), torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    losses = []
    for x, target in batches:
        with torch.autocast(device.type, dtype):
            loss = loss_of(layer, x, target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.detach())
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float32}
    want = train(full, batches, make_adamw(full))
    torch.testing.assert_close(torch.stack(losses), want, rtol=0.005, atol=0.0)
    assert_trained_alike(layer, full, start, bound=0.2)


def test_a_step_that_overflows_is_skipped(device):
    layer = make_layer(device)
    before = copy.deepcopy(layer)
    optimizer, scaler = make_adamw(layer), torch.amp.GradScaler(device.type, init_scale=2.0**40)
    scales = []
    for batch in make_batches(2, 16, device=device):
        with torch.autocast(device.type, torch.float16):
            loss = loss_of(layer, *batch)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    assert scales == [2.0**39, 2.0**38]
    assert all(torch.equal(*pair) for pair in zip(layer.parameters(), before.parameters(), strict=True))
    assert all(buffer.isfinite().all() for buffer in layer.buffers())
    assert loss.isfinite()


# Gradient accumulation


@pytest.mark.parametrize("router_norm", ["rms", "none"])
def test_accumulated_gradients_train_as_one_batch_does(router_norm, device):
    layer = make_layer(device, router_norm=router_norm, router_z_loss_coef=0.1)
    start, whole = copy.deepcopy(layer), copy.deepcopy(layer)
    batches = make_batches(4, 12, device=device)
    optimizer = make_adamw(layer)
    losses = []
    for x, target in batches:
        parts = [loss_of(layer, *part) / 3 for part in zip(x.chunk(3), target.chunk(3), strict=True)]
        for part in parts:
            part.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(parts).detach())
    torch.testing.assert_close(torch.stack(losses), train(whole, batches, make_adamw(whole)), rtol=1e-4, atol=0.0)
    assert_trained_alike(layer, whole, start)


# functional_call


@train_and_eval
@every_norm
def test_functional_call_uses_and_updates_what_it_is_given(router_norm, training, device):
    layer, other = (make_layer(device, seed, router_norm=router_norm, **LOSSES).train(training) for seed in (0, 1))
    for batch in make_batches(2, 9, device=device, seed=2):
        other(batch[0])  # statistics of its own
    before = copy.deepcopy(layer.state_dict())
    x, target = make_batches(1, 9, device=device)[0]
    parameters = {name: each.detach().clone().requires_grad_() for name, each in other.named_parameters()}
    buffers = {name: each.clone() for name, each in other.named_buffers()}
    y, router_logits = torch.func.functional_call(layer, (parameters, buffers), (x,))
    grads = torch.autograd.grad(F.mse_loss(y, target), list(parameters.values()))
    want_y, want_logits = other(x)
    want = torch.autograd.grad(F.mse_loss(want_y, target), list(other.parameters()))
    for each, want_each in zip((y, router_logits, *grads), (want_y, want_logits, *want), strict=True):
        torch.testing.assert_close(each, want_each)
    for name, buffer in other.named_buffers():
        torch.testing.assert_close(buffers[name], buffer)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_function_transforms_are_refused_by_pytorch(device):
    """Of ops that Python registers; docs/pytorch.md says to use ``torch.autograd.grad``."""
    layer = make_layer(device).eval()
    x, _ = make_batches(1, 4, device=device)[0]
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: layer(x)[0].sum())(x)


# Export


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_norm
def test_exported_evaluation_takes_any_number_of_tokens(router_norm, dtype, device):
    layer = make_layer(device, router_norm=router_norm).to(dtype)
    for x, _ in make_batches(3, 20, device=device, seed=2):
        layer(x.to(dtype))  # so that the running statistics are not those at the start
    layer.eval()
    example, _ = make_batches(1, 2, 6, device=device)[0]
    dynamic = torch.export.Dim.DYNAMIC
    exported = torch.export.export(layer, (example.to(dtype),), dynamic_shapes=({0: dynamic, 1: dynamic},))
    program = exported.module()
    for B, S in ((2, 6), (1, 1), (3, 2), (5, 40), (0, 3)):
        x, _ = make_batches(1, B, S, device=device)[0]
        torch.testing.assert_close(program(x.to(dtype)), layer(x.to(dtype)))
    assert all(torch.equal(buffer, layer.get_buffer(name)) for name, buffer in program.named_buffers())


def test_exported_evaluation_takes_a_padding_mask(device):
    layer = make_layer(device, router_bias_update_rate=0.01)
    for x, _ in make_batches(3, 20, device=device, seed=2):
        layer(x)
    layer.eval()
    (example, _), dynamic = make_batches(1, 2, 6, device=device)[0], torch.export.Dim.DYNAMIC
    shapes = ({0: dynamic, 1: dynamic}, {0: dynamic, 1: dynamic})
    program = torch.export.export(layer, (example, example[..., 0] > -1), dynamic_shapes=shapes).module()
    for B, S in ((2, 6), (1, 1), (5, 40), (0, 3)):
        x, _ = make_batches(1, B, S, device=device)[0]
        torch.testing.assert_close(program(x, x[..., 0] > 0), layer(x, x[..., 0] > 0))


@pytest.mark.parametrize("track_expert_usage", [False, True], ids=["plain", "counting"])
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # torch 2.11, of its own file
def test_exported_program_survives_a_file(track_expert_usage, device):
    layer = make_layer(device, track_expert_usage=track_expert_usage).eval()
    tokens = torch.export.Dim("tokens", max=4096)
    example, _ = make_batches(1, 6, device=device)[0]
    file = io.BytesIO()
    torch.export.save(torch.export.export(layer, (example,), dynamic_shapes=({0: tokens},)), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    x, _ = make_batches(1, 50, device=device)[0]
    torch.testing.assert_close(loaded(x), layer(x))
    for name, buffer in layer.named_buffers():
        assert torch.equal(loaded.get_buffer(name), buffer)
    with pytest.raises((AssertionError, RuntimeError)):
        loaded(torch.zeros(5000, SIZES["hidden_size"], device=device))


def test_export_names_the_limit_of_an_unbounded_dimension():
    layer, tokens = make_layer("cpu").eval(), torch.export.Dim("tokens")
    with pytest.raises(torch._dynamo.exc.UserError, match="max=715827882"):  # 2^31 / K
        torch.export.export(layer, (torch.zeros(6, SIZES["hidden_size"]),), dynamic_shapes=({0: tokens},))


# Determinism


@pytest.fixture
def _deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense gradients", "sparse gradients"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@every_norm
def test_training_repeats_bit_by_bit_under_deterministic_algorithms(router_norm, autocast, sparse_grad, device):
    sizes, T = SIZES, 33
    if device.type == "cuda":
        sizes, T = {"hidden_size": 256, "intermediate_size": 512, "num_experts": 4096, "num_experts_per_tok": 32}, 2048
    results = []
    for _ in range(2):
        layer = make_layer(device, router_norm=router_norm, sparse_grad=sparse_grad, **sizes, **LOSSES)
        tables, rest = split_parameters(layer)
        optimizers = [(torch.optim.SparseAdam if sparse_grad else torch.optim.AdamW)(tables), torch.optim.AdamW(rest)]
        batches = make_batches(3, T, device=device, hidden_size=sizes["hidden_size"])
        losses = train(layer, batches, *optimizers, autocast=autocast)
        results.append([losses, layer.expert_counts, *layer.state_dict().values()])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.usefixtures("_deterministic")
def test_padding_bias_and_checkpointing_repeat_bit_by_bit_under_deterministic_algorithms(device):
    results = []
    for _ in range(2):
        layer = make_layer(device, router_bias_update_rate=0.01, **LOSSES)
        optimizer = make_adamw(layer)
        for x, target in make_batches(3, 4, 300 if device.type == "cuda" else 9, device=device):
            mask = x[..., 0] > -1
            y, _ = checkpoint(layer, x, mask, use_reentrant=False)
            (F.mse_loss(y, target) + layer.router_loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([layer.expert_counts, *layer.state_dict().values()])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


# Optimizers


def split_parameters(layer):
    """Both tables, and the rest."""
    tables = [layer.down_embed.weight, layer.up_embed.weight]
    return tables, [each for each in layer.parameters() if all(each is not table for table in tables)]


@pytest.mark.parametrize("settings", [{"foreach": True}, {"fused": True}], ids=["foreach", "fused"])
def test_every_kind_of_adamw_trains_alike(settings, device):
    layer = make_layer(device, **LOSSES)
    start, plain = copy.deepcopy(layer), copy.deepcopy(layer)
    batches = make_batches(4, 16, device=device)
    losses = train(layer, batches, make_adamw(layer, **settings))
    want = train(plain, batches, make_adamw(plain, foreach=False, fused=False))
    torch.testing.assert_close(losses, want, rtol=1e-4, atol=0.0)
    assert_trained_alike(layer, plain, start)


def test_sparse_adam_trains_the_tables_as_from_dense_gradients(device):
    """Rows that no token chose keep their value, with dense AdamW they would go on by their momentum."""
    layer = make_layer(device, sparse_grad=True)
    start, dense = copy.deepcopy(layer), make_layer(device)
    dense.load_state_dict(layer.state_dict())
    batches = make_batches(4, 3, device=device)
    tables, rest = split_parameters(layer)
    losses = train(layer, batches, torch.optim.SparseAdam(tables, lr=1e-2), torch.optim.AdamW(rest, lr=1e-2))

    want = []
    dense_tables, dense_rest = split_parameters(dense)
    optimizers = [torch.optim.SparseAdam(dense_tables, lr=1e-2), torch.optim.AdamW(dense_rest, lr=1e-2)]
    for batch in batches:
        loss = loss_of(dense, *batch)
        loss.backward()
        for table in dense_tables:
            table.grad = table.grad.to_sparse(1)  # the rows that are not all zero
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        want.append(loss.detach())
    torch.testing.assert_close(losses, torch.stack(want), rtol=1e-4, atol=0.0)
    assert_trained_alike(layer, dense, start)
