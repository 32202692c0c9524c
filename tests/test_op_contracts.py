"""What every op promises alike: registration, compilation, autocast, memory, repeatability, graphs, no waiting."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import library
from torch.utils.checkpoint import checkpoint

from flash_moe.ops._reference.expert import expert_reference
from flash_moe.ops._reference.mlp import mlp_reference
from flash_moe.ops._reference.router import router_reference, routing_reference
from flash_moe.ops.flash_expert import flash_expert
from flash_moe.ops.flash_mlp import flash_mlp
from flash_moe.ops.flash_router import flash_router, flash_routing
from flash_moe.testing import make_expert_inputs, make_mlp_inputs, make_router_inputs, poison_memory, run_with_grads

both_backends = pytest.mark.parametrize("backend", ["triton", "torch"])
every_op = pytest.mark.parametrize("op", ["router", "routing", "expert", "mlp"])
FUNCTIONS = {"router": flash_router, "routing": flash_routing, "expert": flash_expert, "mlp": flash_mlp}


def make_inputs(op, device, T=6, dtype=torch.float32, seed=0):
    if op in ("router", "routing"):
        return make_router_inputs(T, 5, 7, dtype, device, seed)
    if op == "expert":
        return make_expert_inputs(T, 24, 9, 3, dtype, device, seed)
    return make_mlp_inputs(T, 16, 24, dtype, device, seed)


def realistic_inputs(op, device, seed=0):
    if op in ("router", "routing"):
        return make_router_inputs(512, 128, 64, torch.float32, device, seed)
    if op == "expert":
        return make_expert_inputs(512, 256, 1024, 32, torch.bfloat16, device, seed)
    return make_mlp_inputs(512, 256, 512, torch.bfloat16, device, seed)


def assert_same_bits(actual, want):
    for i, (x, want_x) in enumerate(zip(actual, want, strict=True)):
        assert torch.equal(x, want_x), i


def samples(backend, device):
    """Arguments for every registered op, by name."""
    (logits, N, K), dscores = make_inputs("router", device)
    _, ids = flash_router(logits, N, K, backend=backend)
    dweights, (weighed, _, log_sums) = dscores.float(), torch.ops.flash_moe.flash_routing(logits, K, False, backend)
    (x, down, up, indices, weights), dout = make_inputs("expert", device)
    s = torch.randn_like(weights)
    x, down, up, weights, logits = (t.requires_grad_() for t in (x, down, up, weights, logits))
    mlp, dmlp = make_inputs("mlp", device)
    products = torch.randn(3, 6, 24, device=device).unbind()
    constant = x.detach()
    return {
        "flash_router": (logits, K, backend),
        "flash_router_backward": (dscores, ids, N, backend),
        "flash_routing": (logits, K, False, backend),
        "flash_routing_backward": (dweights, weighed, ids, logits.detach(), log_sums, False, backend),
        "flash_expert": (x, down, up, indices, weights, "silu", backend),
        "flash_expert_quantized": (
            constant, *(torch.randint(-127, 128, (9, 24), device=device, dtype=torch.int8) for _ in range(2)),
            *torch.rand(2, 9, device=device) / 127, indices, weights.detach(), "silu", backend,
        ),
        "flash_expert_backward_tokens": (
            dout, constant, down.detach(), up.detach(), indices, weights.detach(), s, "silu", backend,
        ),
        "flash_expert_backward_tables": (dout, constant, indices, s, s, 9, backend),
        "flash_expert_backward_rows": (dout, constant, indices, s, s, 9, backend),
        "gated_mlp": (*(t.clone().requires_grad_() for t in mlp), "silu"),
        "gated_mlp_backward": (dmlp, *mlp, *products, "silu", [True, False, True, True]),
    }  # fmt: skip


def test_every_op_has_a_sample(device):
    ours = {name.removeprefix("flash_moe::") for name in torch._C._dispatch_get_all_op_names() if "flash_moe::" in name}
    # What only the layer uses, and an op without a gradient, has its opcheck beside tests of its own.
    elsewhere = {
        "flash_decode",
        "gated_product",
        "is_first_forward",
        "weigh_experts",
        "sum_over_ranks",
        "expert_mlp",
        "expert_mlp_backward",
        "layer_inference",
        "batch_norm_statistics",
        "flash_gate",
        "flash_gate_backward",
    }
    assert ours - elsewhere == samples("torch", device).keys()


@both_backends
@pytest.mark.parametrize(
    "name",
    [
        "flash_router",
        "flash_router_backward",
        "flash_routing",
        "flash_routing_backward",
        "flash_expert",
        "flash_expert_quantized",
        "flash_expert_backward_tokens",
        "flash_expert_backward_tables",
        "flash_expert_backward_rows",
        "gated_mlp",
        "gated_mlp_backward",
    ],
)
def test_opcheck(name, backend, device):
    library.opcheck(getattr(torch.ops.flash_moe, name).default, samples(backend, device)[name])


@every_op
def test_triton_asked_for_where_it_cannot_run(op):
    inputs, _ = make_inputs(op, "cpu")
    inputs = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in inputs]
    message = "^backend: expected torch or reference, since Triton cannot run here; got 'triton': .* move them to a"
    with pytest.raises(ValueError, match=message):
        FUNCTIONS[op](*inputs, backend="triton")


def routing_unnormed(logits, N, K):
    return routing_reference(logits, N, K, norm_topk_prob=False)


@every_op
def test_reference_passes_gradcheck(op, device):
    reference = {
        "router": router_reference,
        "routing": routing_unnormed,
        "expert": expert_reference,
        "mlp": mlp_reference,
    }[op]
    inputs, _ = make_inputs(op, device, T=3, dtype=torch.float64)
    floating = [x.requires_grad_() for x in inputs if isinstance(x, torch.Tensor) and x.is_floating_point()]
    positions = [i for i, x in enumerate(inputs) if isinstance(x, torch.Tensor) and x.is_floating_point()]

    def function(*tensors):
        arguments = list(inputs)
        for i, x in zip(positions, tensors, strict=True):
            arguments[i] = x
        out = reference(*arguments)
        return out[0] if isinstance(out, tuple) else out

    torch.autograd.gradcheck(function, floating)


@both_backends
@every_op
def test_compiles_whole_for_any_number_of_tokens(op, backend, compiler, device):
    torch._dynamo.reset()
    function = FUNCTIONS[op]
    compiled = torch.compile(
        lambda *args: function(*args, backend=backend), fullgraph=True, backend=compiler, dynamic=True
    )
    for T, stance in ((4, "default"), (7, "fail_on_recompile"), (5, "fail_on_recompile")):
        inputs, dout = make_inputs(op, device, T=T)
        want = run_with_grads(function, inputs, dout, backend=backend)
        with torch.compiler.set_stance(stance):
            actual = run_with_grads(compiled, inputs, dout)
        for x, want_x in zip(actual, want, strict=True):
            torch.testing.assert_close(x, want_x)


@both_backends
def test_autocast_casts_states_and_tables_but_not_routing_weights(backend, device):
    inputs, dout = make_inputs("expert", device)
    states_and_tables = [x.bfloat16() for x in inputs[:3]]
    want = run_with_grads(flash_expert, (*states_and_tables, *inputs[3:]), dout.bfloat16(), backend=backend)
    with torch.autocast(device.type, torch.bfloat16):
        actual = run_with_grads(flash_expert, inputs, dout.bfloat16(), backend=backend)
    assert actual[0].dtype == want[0].dtype == torch.bfloat16
    assert [grad.dtype for grad in actual[1:]] == [torch.float32] * 4
    assert_same_bits(actual, [want[0], *(grad.float() for grad in want[1:])])


@both_backends
def test_autocast_leaves_the_router_alone(backend, device):
    (logits, N, K), _ = make_inputs("router", device)
    with torch.autocast(device.type, torch.bfloat16):
        scores, _ = flash_router(logits, N, K, backend=backend)
    assert torch.equal(scores, flash_router(logits, N, K, backend=backend)[0])


@both_backends
def test_autocast_runs_the_mlp_in_its_dtype(backend, device):
    inputs, dout = make_inputs("mlp", device)
    with torch.autocast(device.type, torch.bfloat16):
        out, *grads = run_with_grads(flash_mlp, inputs, dout.bfloat16(), backend=backend)
    want, *_ = run_with_grads(flash_mlp, [x.bfloat16() for x in inputs], dout.bfloat16(), backend=backend)
    assert torch.equal(out, want)
    assert [grad.dtype for grad in grads] == [torch.float32] * 4


@both_backends
@every_op
def test_same_bits_on_every_run(op, backend, device):
    inputs, dout = make_inputs(op, device, T=9)
    first = run_with_grads(FUNCTIONS[op], inputs, dout, backend=backend)
    for _ in range(3):
        assert_same_bits(run_with_grads(FUNCTIONS[op], inputs, dout, backend=backend), first)


@both_backends
@every_op
def test_everything_promised_is_written_and_nothing_else(op, backend, device):
    inputs, dout = make_inputs(op, device, T=5)
    want = run_with_grads(FUNCTIONS[op], inputs, dout, backend=backend)
    with poison_memory():
        assert_same_bits(run_with_grads(FUNCTIONS[op], inputs, dout, backend=backend), want)


@both_backends
@every_op
def test_upstream_gradients_of_any_layout(op, backend, device):
    """``sum().backward()`` sends an expanded scalar, a transposed consumer a transposed gradient."""
    inputs, dout = make_inputs(op, device)
    leaves = [x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]
    wanted = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
    scale = torch.rand(dout.shape[::-1], device=device)
    for loss, same in ((torch.sum, torch.ones_like(dout)), (lambda x: (x.t() * scale).sum(), scale.t().contiguous())):
        out, want_out = (FUNCTIONS[op](*leaves, backend=backend) for _ in range(2))
        out, want_out = (x[0] if op in ("router", "routing") else x for x in (out, want_out))
        grads, want = torch.autograd.grad(loss(out), wanted), torch.autograd.grad(want_out, wanted, same)
        if op == "mlp":  # its products are torch's, which may take another kernel for another layout
            torch.testing.assert_close(grads, want)
        else:
            assert_same_bits(grads, want)


@both_backends
@every_op
def test_activation_checkpointing_changes_nothing(op, backend, device):
    inputs, dout = make_inputs(op, device)
    want = run_with_grads(FUNCTIONS[op], inputs, dout, backend=backend)

    def checkpointed(*arguments):
        return checkpoint(FUNCTIONS[op], *arguments, use_reentrant=False, backend=backend)

    assert_same_bits(run_with_grads(checkpointed, inputs, dout), want)


@every_op
def test_auto_is_triton_on_a_gpu_else_torch(op, device, monkeypatch):
    """Told apart by what runs: the backend that is not meant is made unusable."""
    inputs, dout = make_inputs(op, device)
    meant, other = ("triton", "torch") if device.type == "cuda" else ("torch", "triton")
    want = run_with_grads(FUNCTIONS[op], inputs, dout, backend=meant)
    assert importlib.util.find_spec(f"flash_moe.ops._{other}")
    for name in [name for name in sys.modules if name.startswith(f"flash_moe.ops._{other}")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, f"flash_moe.ops._{other}", None)
    assert_same_bits(run_with_grads(FUNCTIONS[op], inputs, dout, backend="auto"), want)


@both_backends
def test_at_most_two_to_the_31_less_one_pairs(backend, device):
    """Tensors of one element, seen 2^31 times through strides of zero: refused before anything is allocated."""
    zero = torch.zeros(1, 1, device=device)
    with pytest.raises(ValueError, match=r"router_logits: .*2147483647 .*2147483648 tokens x 1 "):
        flash_router(zero.expand(2, 2**31, 1), 1, 1, backend=backend)
    with pytest.raises(ValueError, match=r"router_logits: .*2147483647 .*1048576 tokens x 2048 "):
        flash_router(zero.expand(2, 2**20, 64), 64, 2048, backend=backend)
    ids, weights = zero.long().expand(2**20, 2048), zero.expand(2**20, 2048)
    with pytest.raises(ValueError, match=r"indices: .*2147483647 .*1048576 tokens x 2048 "):
        flash_expert(zero.expand(2**20, 1), zero, zero, ids, weights, backend=backend)


def run_python(code, **environment):
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "FLASH_MOE_DEBUG")
    }
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env={**inherited, **environment}, timeout=240)


@pytest.mark.parametrize("op", ["router", "expert", "mlp"])
def test_the_triton_names_do_not_fall_back(op):
    """On a CPU without the interpreter; a test above runs the same call with it."""
    code = f"""
import torch
from flash_moe.ops.flash_{op} import triton_flash_{op}_func as function
from flash_moe.testing import make_{op}_inputs as make_inputs
inputs, _ = make_inputs(2, 4, 3, {"2, " if op == "expert" else ""}torch.float32, "cpu")
try:
    function(*inputs)
except ValueError as error:
    print(error)
"""
    finished = run_python(code)
    assert "TRITON_INTERPRET=1" in finished.stdout, finished.stderr
    assert 'backend="torch"' in finished.stdout


@pytest.mark.gpu
def test_ids_out_of_range_raise_on_a_gpu_when_asked_for():
    code = """
import torch
from flash_moe import flash_expert
x, table = torch.randn(2, 8, device="cuda"), torch.randn(4, 8, device="cuda")
ids = torch.tensor([[0], [4]], device="cuda")
try:
    flash_expert(x, table, table, ids, torch.ones(2, 1, device="cuda"))
except ValueError as error:
    print(error)
"""
    finished = run_python(code, FLASH_MOE_DEBUG="1")
    assert "indices: expected ids from 0 to 3; got ids from 0 to 4" in finished.stdout, finished.stderr


@pytest.mark.gpu
@both_backends
@every_op
def test_graph_replay_sees_changed_data(op, backend, device):
    function = FUNCTIONS[op]
    inputs, dout = realistic_inputs(op, device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run_with_grads(function, inputs, dout, backend=backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_with_grads(function, inputs, dout, backend=backend)
    for seed in (1, 2):
        fresh, fresh_dout = realistic_inputs(op, device, seed)
        for static, new in zip((*inputs, dout), (*fresh, fresh_dout), strict=True):
            if isinstance(static, torch.Tensor):
                static.copy_(new)
        graph.replay()
        want = run_with_grads(function, fresh, fresh_dout, backend=backend)
        if op == "mlp":  # a graph may get other matrix product kernels than eager mode
            for x, want_x in zip(captured, want, strict=True):
                torch.testing.assert_close(x, want_x, rtol=0.05, atol=0.05 * want_x.abs().max().item())
        else:
            assert_same_bits(captured, want)


@pytest.mark.gpu
@both_backends
@every_op
def test_nothing_waits_for_the_gpu(op, backend, device):
    inputs, dout = realistic_inputs(op, device)
    run_with_grads(FUNCTIONS[op], inputs, dout, backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_with_grads(FUNCTIONS[op], inputs, dout, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@both_backends
@every_op
def test_same_bits_at_a_realistic_size(op, backend, device):
    inputs, dout = realistic_inputs(op, device)
    first = run_with_grads(FUNCTIONS[op], inputs, dout, backend=backend)
    for _ in range(5):
        assert_same_bits(run_with_grads(FUNCTIONS[op], inputs, dout, backend=backend), first)
