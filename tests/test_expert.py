"""flash_expert: values and every gradient, wherever the pairs may fall."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, library

from flash_moe._activations import ACTIVATIONS
from flash_moe._backend import why_not_triton
from flash_moe.ops._reference.expert import expert_reference
from flash_moe.ops.flash_expert import flash_expert, triton_flash_expert_func
from flash_moe.testing import (
    assert_no_worse_than,
    make_expert_inputs,
    peak_nbytes,
    poison_memory,
    run_rounded_once,
    run_with_grads,
    surround_with_nan,
    to_float64,
)

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ARGUMENTS = ("hidden_states", "down_weights", "up_weights", "indices", "routing_weights")
NAMES = ("out", "dx", "ddown", "dup", "dweights")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_backends = pytest.mark.parametrize("backend", ["triton", "torch"])
every_backend = pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
# The interpreter computes with numpy, which warns where exp reaches infinity on the way to a right answer.
overflow_is_fine = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
every_activation = pytest.mark.parametrize("hidden_act", list(ACTIVATIONS))
# T, H, E, K: ones; K = E; more choices than experts; nothing a power of two; even; more experts than pairs; rows longer
# than any tile.
SHAPES = [
    (1, 1, 1, 1),
    (1, 16, 4, 1),
    (2, 5, 4, 4),
    (4, 33, 3, 8),
    (13, 37, 9, 3),
    (8, 64, 16, 4),
    (3, 48, 150, 7),
    (2, 1030, 5, 3),
    (2, 2050, 3, 2),
    (2, 24, 20, 65),
]
# Without the widest, which is slow in the interpreter: sums of 1030 columns are cut, too.
NARROWER_SHAPES = [shape for shape in SHAPES if shape[1] < 2000]


def assert_accurate(inputs: Inputs, dout: Tensor, backend: str, hidden_act: str = "silu") -> None:
    exact = run_with_grads(expert_reference, to_float64(inputs), to_float64(dout), hidden_act=hidden_act)
    low = run_rounded_once(expert_reference, inputs, dout, hidden_act=hidden_act)
    actual = run_with_grads(flash_expert, inputs, dout, hidden_act=hidden_act, backend=backend)
    assert_no_worse_than(low, exact, actual, NAMES)


def assert_same_bits(actual: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for name, x, want_x in zip(NAMES, actual, want, strict=True):
        assert x.dtype == want_x.dtype, name
        assert torch.equal(x, want_x), name


def with_indices(inputs: Inputs, indices: Tensor) -> Inputs:
    return (*inputs[:3], indices.to(inputs[3]), inputs[4])


def by_hand(inputs: Inputs, dout: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, ...]:
    """The silu experts and their gradients in float64, written out, in memory that does not grow with T * K * H.

    ``out`` and ``dx`` of the tokens in ``rows``; ``ddown`` and ``dup`` at the columns in ``cols``; all of ``dweights``.
    """
    x, down, up, indices, weights = inputs
    (T, H), (E, _), (_, K) = x.shape, down.shape, indices.shape
    indices, weights = indices.long(), weights.double()
    z, q = torch.empty_like(weights), torch.empty_like(weights)  # x . down[e] and dout . up[e]
    step = max(1, 2**24 // (K * H))
    for chunk in (slice(t, t + step) for t in range(0, T, step)):
        z[chunk] = torch.einsum("th,tkh->tk", x[chunk].double(), down[indices[chunk]].double())
        q[chunk] = torch.einsum("th,tkh->tk", dout[chunk].double(), up[indices[chunk]].double())
    gate = z.sigmoid()
    coefficients, dweights, dz = weights * z * gate, q * z * gate, q * weights * gate * (1 + z * (1 - gate))

    def weighted_rows(weights: Tensor, table: Tensor) -> Tensor:
        return torch.stack([weights[t] @ table[indices[t]].double() for t in rows.tolist()])

    def summed_by_expert(weights: Tensor, vectors: Tensor) -> Tensor:
        pairs = (weights[:, :, None] * vectors[:, None, cols].double()).flatten(0, 1)
        return pairs.new_zeros(E, len(cols)).index_add_(0, indices.flatten(), pairs)

    out, dx = weighted_rows(coefficients, up), weighted_rows(dz, down)
    return out, dx, summed_by_expert(dz, x), summed_by_expert(coefficients, dout), dweights


def test_the_reference_is_the_formula(device):
    inputs, dout = make_expert_inputs(5, 7, 4, 6, torch.float64, device)
    everything = torch.arange(5, device=device), torch.arange(7, device=device)
    actual = run_with_grads(expert_reference, inputs, dout)
    for name, x, want in zip(NAMES, actual, by_hand(inputs, dout, *everything), strict=True):
        torch.testing.assert_close(x, want, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@both_backends
@every_dtype
@pytest.mark.parametrize("T, H, E, K", SHAPES, ids=str)
def test_expert_matches_reference(T, H, E, K, dtype, backend, device):
    assert_accurate(*make_expert_inputs(T, H, E, K, dtype, device), backend)


@overflow_is_fine
@both_backends
@every_dtype
@every_activation
def test_every_activation(hidden_act, dtype, backend, device):
    inputs, dout = make_expert_inputs(12, 40, 6, 5, dtype, device)
    inputs[0].mul_(4)  # pre-activations from about -12 to 12
    assert_accurate(inputs, dout, backend, hidden_act)


@both_backends
def test_activations_differ(backend, device):
    inputs, _ = make_expert_inputs(4, 19, 6, 5, torch.float32, device)
    outs = [flash_expert(*inputs, hidden_act=hidden_act, backend=backend) for hidden_act in ACTIVATIONS]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(outs, 2))


@overflow_is_fine
@both_backends
@every_activation
def test_huge_pre_activations(hidden_act, backend, device):
    """At -1e5 and 1e5 a careless exp or tanh gives NaN."""
    inputs, dout = make_expert_inputs(4, 16, 6, 5, torch.float32, device)
    inputs[0].mul_(1e5)
    assert_accurate(inputs, dout, backend, hidden_act)


@both_backends
@every_activation
def test_a_token_of_zeros(hidden_act, backend, device):
    """Pre-activations of exactly zero, where relu has its kink: its slope there is 0, as PyTorch has it."""
    inputs, dout = make_expert_inputs(3, 16, 6, 5, torch.float32, device)
    inputs[0][1] = 0
    assert_accurate(inputs, dout, backend, hidden_act)


@both_backends
def test_intermediates_may_exceed_float16(backend, device):
    """Pre-activations near 1e5 with routing weights near 1e-4: the sums are float32, so only the output has to fit."""
    inputs, _ = make_expert_inputs(4, 64, 6, 3, torch.float16, device)
    inputs[0].copy_(inputs[0].abs() * 200 + 100)
    inputs[1].copy_(inputs[1].abs() * 64)
    inputs[4].mul_(1e-4)
    pre_activations = torch.einsum("th,tkh->tk", inputs[0].float(), inputs[1][inputs[3]].float())
    assert pre_activations.max() > torch.finfo(torch.float16).max
    exact = expert_reference(*to_float64(inputs))
    low = expert_reference(*(x.float() if x.is_floating_point() else x for x in inputs)).half()
    assert low.isfinite().all()
    assert_no_worse_than([low], [exact], [flash_expert(*inputs, backend=backend)], ["out"])


@both_backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_routing_weights_beside_16_bit_tables(dtype, backend, device):
    inputs, dout = make_expert_inputs(5, 37, 9, 3, dtype, device, weights_dtype=torch.float32)
    assert_accurate(inputs, dout, backend)
    out, *_, dweights = run_with_grads(flash_expert, inputs, dout, backend=backend)
    assert (out.dtype, dweights.dtype) == (dtype, torch.float32)


@both_backends
def test_int32_and_int64_indices_give_the_same_bits(backend, device):
    inputs, dout = make_expert_inputs(5, 37, 9, 3, torch.bfloat16, device, indices_dtype=torch.int32)
    assert inputs[3].dtype == torch.int32
    want = run_with_grads(flash_expert, with_indices(inputs, inputs[3]), dout, backend=backend)
    longer = (*inputs[:3], inputs[3].long(), inputs[4])
    assert_same_bits(run_with_grads(flash_expert, longer, dout, backend=backend), want)


@both_backends
@every_dtype
def test_duplicates_within_a_token(dtype, backend, device):
    inputs, dout = make_expert_inputs(4, 20, 5, 6, dtype, device)
    indices = torch.tensor([[2] * 6, [0, 4, 0, 4, 0, 4], [1, 1, 1, 3, 3, 3], [4, 3, 2, 1, 0, 0]])
    assert_accurate(with_indices(inputs, indices), dout, backend)


@both_backends
@every_dtype
def test_an_empty_expert_gets_exactly_zero(dtype, backend, device):
    inputs, dout = make_expert_inputs(6, 20, 11, 4, dtype, device)
    inputs = with_indices(inputs, inputs[3] % 5 * 2 + 1)  # 1, 3, 5, 7, 9
    _, _, ddown, dup, _ = run_with_grads(flash_expert, inputs, dout, backend=backend)
    used = torch.zeros(11, dtype=torch.bool, device=device).index_fill_(0, inputs[3].flatten(), True)
    for grad in (ddown, dup):
        assert torch.equal(grad[~used], torch.zeros_like(grad[~used]))
        assert grad[used].abs().amax(dim=1).min() > 0
    assert_accurate(inputs, dout, backend)


@both_backends
@every_dtype
@pytest.mark.parametrize("expert", [0, 3, 6])
def test_every_token_on_one_expert(expert, dtype, backend, device):
    inputs, dout = make_expert_inputs(9, 20, 7, 5, dtype, device)
    assert_accurate(with_indices(inputs, torch.full_like(inputs[3], expert)), dout, backend)


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", [[128], [513], [0, 700], [1100, 1], [127, 1, 0, 513, 129, 64, 63, 256]], ids=str)
def test_hundreds_of_pairs_on_one_expert(counts, dtype, backend, device):
    """``counts[e]`` pairs on expert e, dealt to the tokens at random."""
    P = sum(counts)
    T = next(T for T in range(40, 0, -1) if P % T == 0)
    inputs, dout = make_expert_inputs(T, 21, len(counts), P // T, dtype, device)
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    ids = ids[torch.randperm(P, generator=torch.Generator().manual_seed(0))]
    assert_accurate(with_indices(inputs, ids.view(T, P // T)), dout, backend)


@every_dtype
def test_dots_in_column_slices(dtype, device, monkeypatch):
    """What a table beyond the L2 cache gets, here of a table of any size; the last slice is a ragged one."""
    kernels = pytest.importorskip("flash_moe.ops._triton.expert")
    monkeypatch.setattr(kernels, "_slice_width", lambda table, num_pairs: kernels.SLICE)
    plan = pytest.importorskip("flash_moe.ops._triton.expert_plan")
    with plan.use_variant("gather"):
        assert_accurate(*make_expert_inputs(3, 2 * kernels.SLICE + 37, 7, 40, dtype, device), "triton")


def test_dots_in_slices_keep_a_number_for_each(monkeypatch):
    kernels = pytest.importorskip("flash_moe.ops._triton.expert")
    monkeypatch.setattr(kernels, "_slice_width", lambda table, num_pairs: kernels.SLICE)
    monkeypatch.setattr(kernels, "launch", lambda *_, **__: None)
    rows, table, indices = torch.zeros(3, 8192), torch.zeros(5, 8192), torch.zeros(3, 4, dtype=torch.int64)
    partials = kernels._dots(rows, table, indices)
    assert partials.nbytes == 128 * indices.numel()


@both_backends
def test_more_tokens_than_a_tile(backend, device):
    assert_accurate(*make_expert_inputs(130, 4, 6, 1, torch.float32, device), backend)


@both_backends
@every_dtype
def test_no_tokens(dtype, backend, device):
    inputs, dout = make_expert_inputs(0, 16, 4, 3, dtype, device)
    out, dx, ddown, dup, dweights = run_with_grads(flash_expert, inputs, dout, backend=backend)
    assert out.shape == dx.shape == (0, 16)
    assert dweights.shape == (0, 3)
    assert torch.equal(ddown, torch.zeros_like(inputs[1]))
    assert torch.equal(dup, torch.zeros_like(inputs[2]))
    assert {x.dtype for x in (out, dx, ddown, dup, dweights)} == {dtype}


@pytest.fixture(params=["fused", "gather", "dense"])
def variant(request, device):
    """Runs every pass that has it, whatever the cost model would choose."""
    if reason := why_not_triton(device.type):
        pytest.skip(reason)
    from flash_moe.ops._triton.expert_plan import use_variant

    with use_variant(request.param):
        yield request.param


def skip_what_nothing_chooses(variant, dtype, device):
    if variant == "dense" and dtype == torch.float32 and device.type == "cuda":
        pytest.skip("nothing chooses it there, and its products add up in an order of their own")


@every_dtype
@pytest.mark.parametrize(
    "T, H, E, K",
    [(0, 16, 4, 3), (1, 1, 1, 1), (4, 33, 3, 8), (13, 37, 9, 3), (3, 48, 150, 7), (2, 1030, 5, 3), (2, 300, 20, 17)],
    ids=str,
)
def test_every_variant_matches_reference(T, H, E, K, dtype, variant, device):
    skip_what_nothing_chooses(variant, dtype, device)
    assert_accurate(*make_expert_inputs(T, H, E, K, dtype, device), "triton")


@every_dtype
@pytest.mark.parametrize("num_parts", [1, 3, 8])
@pytest.mark.parametrize("T, H, E, K", [(1, 1, 1, 1), (5, 37, 9, 3), (2, 300, 20, 17)], ids=str)
def test_parts_of_a_residual_are_added(T, H, E, K, num_parts, dtype, variant, device):
    skip_what_nothing_chooses(variant, dtype, device)
    from flash_moe.ops._triton.expert import expert_forward

    inputs, _ = make_expert_inputs(T, H, E, K, dtype, device, weights_dtype=torch.float32)
    parts = torch.randn(num_parts, T, H, generator=torch.Generator(device).manual_seed(1), device=device)
    exact = expert_reference(*to_float64(inputs)) + parts.double().sum(0)
    # Of tensor cores' sums the residual is added to what is rounded already, so there they round twice.
    low = (expert_reference(*inputs) + parts.sum(0)).to(dtype)
    with poison_memory():
        out, _ = expert_forward(*inputs, "silu", surround_with_nan(parts))
    assert_no_worse_than([low], [exact], [out], ["out"])


@pytest.mark.parametrize(
    "variant, bound", [("fused", 0.002), ("gather", 0.002), ("dense", 0.0025)], indirect=["variant"]
)
def test_relative_error_of_bfloat16(variant, bound, device):
    """Rounding the output alone is 0.17 %; the dense product rounds each pair's coefficient, too."""
    T, H, E, K = (512, 512, 256, 32) if device.type == "cuda" else (32, 64, 32, 8)
    inputs, _ = make_expert_inputs(T, H, E, K, torch.bfloat16, device)
    exact = expert_reference(*to_float64(inputs))
    assert (flash_expert(*inputs, backend="triton") - exact).norm() <= bound * exact.norm()


@overflow_is_fine
@every_activation
def test_every_variant_has_every_activation(hidden_act, variant, device):
    inputs, dout = make_expert_inputs(6, 40, 6, 5, torch.bfloat16, device, weights_dtype=torch.float32)
    inputs[0].mul_(4)
    assert_accurate(inputs, dout, "triton", hidden_act)


@every_dtype
def test_every_variant_adds_up_duplicates(dtype, variant, device):
    inputs, dout = make_expert_inputs(4, 20, 5, 6, dtype, device, indices_dtype=torch.int32)
    indices = torch.tensor([[2] * 6, [0, 4, 0, 4, 0, 4], [1, 1, 1, 3, 3, 3], [4, 3, 2, 1, 0, 0]])
    assert_accurate(with_indices(inputs, indices), dout, "triton")


@every_dtype
def test_every_variant_writes_everything_and_reads_nothing_else(dtype, variant, device):
    inputs, dout = make_expert_inputs(5, 37, 20, 3, dtype, device)
    want = run_with_grads(flash_expert, inputs, dout, backend="triton")
    with poison_memory():
        surrounded = [surround_with_nan(x) for x in inputs]
        assert_same_bits(run_with_grads(flash_expert, surrounded, surround_with_nan(dout), backend="triton"), want)


def test_experts_nobody_chose_do_not_matter_unless_dense(variant, device):
    """Nor what they hold; a dense product multiplies it by 0, as a dense layer does, and 0 * NaN is NaN."""
    inputs, dout = make_expert_inputs(3, 24, 9, 2, torch.float32, device)
    want = run_with_grads(flash_expert, inputs, dout, backend="triton")
    unused = next(e for e in range(9) if e not in inputs[3])
    for table in inputs[1:3]:
        table[unused] = float("nan")
    out, dx, *rest = run_with_grads(flash_expert, inputs, dout, backend="triton")
    if variant == "dense":
        assert out.isnan().all()
        assert dx.isnan().all()
        out, dx = want[:2]
    assert_same_bits((out, dx, *rest), want)


def strided(x: Tensor) -> Tensor:
    """The same values, every other element of a wider tensor, its dimensions stored in reverse order."""
    T, K = x.shape
    wide = x.new_empty(K, 2 * T)
    wide[:, ::2] = x.t()
    return wide[:, ::2].t()


@both_backends
@pytest.mark.parametrize("which", [*range(5), "all"], ids=[*ARGUMENTS, "all"])
def test_non_contiguous_inputs_give_the_same_bits(which, backend, device):
    inputs, dout = make_expert_inputs(5, 18, 7, 4, torch.float32, device)
    want = run_with_grads(flash_expert, inputs, dout, backend=backend)
    changed = tuple(strided(x) if which in (i, "all") else x for i, x in enumerate(inputs))
    assert sum(not x.is_contiguous() for x in changed) == (5 if which == "all" else 1)
    dout = strided(dout) if which == "all" else dout
    assert_same_bits(run_with_grads(flash_expert, changed, dout, backend=backend), want)


@both_backends
def test_expanded_inputs(backend, device):
    """One token, one row of ids and one row of weights, each seen T times through a stride of zero."""
    (x, down, up, indices, weights), dout = make_expert_inputs(6, 18, 7, 4, torch.float32, device)
    inputs = (x[:1].expand(6, -1), down, up, indices[:1].expand(6, -1), weights[:1].expand(6, -1))
    want = run_with_grads(flash_expert, tuple(y.clone() for y in inputs), dout, backend=backend)
    assert_same_bits(run_with_grads(flash_expert, inputs, dout, backend=backend), want)


@both_backends
def test_expanded_and_transposed_upstream_gradients(backend, device):
    inputs, _ = make_expert_inputs(6, 18, 7, 4, torch.float32, device)
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
    wanted = [x for x in leaves if x.requires_grad]
    scale = torch.rand(18, 6, device=device)
    cases: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
        (lambda out: out.sum(), torch.ones(6, 18, device=device)),
        (lambda out: (out.t() * scale).sum(), scale.t().contiguous()),
    ]
    for loss, dout in cases:
        grads = torch.autograd.grad(loss(flash_expert(*leaves, backend=backend)), wanted)
        want = torch.autograd.grad(flash_expert(*leaves, backend=backend), wanted, dout)
        for name, grad, want_grad in zip(NAMES[1:], grads, want, strict=True):
            assert torch.equal(grad, want_grad), name


@both_backends
@pytest.mark.parametrize("wanted", [c for n in (1, 2, 3) for c in itertools.combinations((0, 1, 2, 4), n)], ids=str)
def test_only_some_inputs_require_a_gradient(wanted, backend, device):
    inputs, dout = make_expert_inputs(4, 10, 5, 3, torch.float32, device)
    all_grads = dict(zip((0, 1, 2, 4), run_with_grads(flash_expert, inputs, dout, backend=backend)[1:], strict=True))
    leaves = [x.detach().requires_grad_(i in wanted) if i != 3 else x for i, x in enumerate(inputs)]
    flash_expert(*leaves, backend=backend).backward(dout)
    for i, x in enumerate(leaves):
        if i in wanted:
            assert torch.equal(x.grad, all_grads[i]), ARGUMENTS[i]
        else:
            assert x.grad is None, ARGUMENTS[i]


@both_backends
def test_no_gradient_at_all(backend, device):
    inputs, dout = make_expert_inputs(4, 10, 5, 3, torch.float32, device)
    out = flash_expert(*inputs, backend=backend)
    assert not out.requires_grad
    assert torch.equal(out, run_with_grads(flash_expert, inputs, dout, backend=backend)[0])


@both_backends
@every_dtype
def test_reads_nothing_outside_its_inputs(dtype, backend, device):
    inputs, dout = make_expert_inputs(5, 37, 9, 3, dtype, device)
    want = run_with_grads(flash_expert, inputs, dout, backend=backend)
    surrounded = [surround_with_nan(x) for x in inputs]
    assert_same_bits(run_with_grads(flash_expert, surrounded, surround_with_nan(dout), backend=backend), want)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(data=st.data())
@both_backends
def test_accurate_over_shapes(backend, device, data):
    T, H = data.draw(st.integers(0, 6), "T"), data.draw(st.integers(1, 70), "H")
    E, K = data.draw(st.integers(1, 9), "E"), data.draw(st.integers(1, 20), "K")
    dtype, seed = data.draw(st.sampled_from(DTYPES), "dtype"), data.draw(st.integers(0, 99), "seed")
    indices_dtype = data.draw(st.sampled_from([torch.int32, torch.int64]), "indices")
    weights_dtype = data.draw(st.sampled_from([dtype, torch.float32]), "weights")
    hidden_act = data.draw(st.sampled_from(list(ACTIVATIONS)), "hidden_act")
    inputs, dout = make_expert_inputs(
        T, H, E, K, dtype, device, seed, indices_dtype=indices_dtype, weights_dtype=weights_dtype
    )
    assert_accurate(inputs, dout, backend, hidden_act)


def test_the_cpu_path_gathers_in_chunks():
    """Gathering [T, K, H] once would take 64 MiB; forward and backward together stay below a quarter of that."""
    T, H, E, K = 2048, 256, 1024, 32
    inputs, dout = make_expert_inputs(T, H, E, K, torch.float32, "cpu")
    results = run_with_grads(flash_expert, inputs, dout)
    peak = peak_nbytes(lambda: run_with_grads(flash_expert, inputs, dout), "cpu")
    assert peak - sum(x.nbytes for x in results) < T * K * H * 4 / 4


def run_sparse(inputs: Inputs, dout: Tensor, backend: str) -> tuple[Tensor, ...]:
    """``run_with_grads`` with row-sparse table gradients, whose rows and ids are checked."""
    results = run_with_grads(flash_expert, inputs, dout, backend=backend, sparse_grad=True)
    used, num_rows = inputs[3].long().unique(), min(inputs[3].numel(), inputs[1].shape[0])
    for grad in results[2:4]:
        assert grad.layout == torch.sparse_coo
        assert (grad.shape, grad.dtype, grad.device) == (inputs[1].shape, inputs[1].dtype, inputs[1].device)
        assert (grad.sparse_dim(), grad.dense_dim(), grad.is_coalesced()) == (1, 1, num_rows < 2)
        (ids,), rows = grad._indices(), grad._values()
        assert (ids.shape, rows.shape) == ((num_rows,), (num_rows, inputs[1].shape[1]))
        assert torch.equal(ids[: len(used)], used)
        assert torch.equal(ids.unique(), used)
        assert not rows[len(used) :].any()
        assert torch.equal(grad.coalesce().indices()[0], used)
        assert torch.equal(grad.coalesce().values(), rows[: len(used)])
    return results


def densified(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.to_dense() if x.is_sparse else x for x in results)


def assert_sparse_is_dense(inputs: Inputs, dout: Tensor, backend: str) -> None:
    want = run_with_grads(flash_expert, inputs, dout, backend=backend)
    assert_same_bits(densified(run_sparse(inputs, dout, backend)), want)


@both_backends
@every_dtype
@pytest.mark.parametrize("T, H, E, K", [*NARROWER_SHAPES, (0, 16, 4, 3), (3, 16, 4, 0)], ids=str)
def test_sparse_gradients_are_the_dense_ones(T, H, E, K, dtype, backend, device):
    assert_sparse_is_dense(*make_expert_inputs(T, H, E, K, dtype, device), backend)


@both_backends
@every_dtype
def test_sparse_gradients_match_the_reference(dtype, backend, device):
    inputs, dout = make_expert_inputs(13, 37, 30, 5, dtype, device, indices_dtype=torch.int32)
    inputs[3][:, 0] = 7
    exact = run_with_grads(expert_reference, to_float64(inputs), to_float64(dout))
    low = run_rounded_once(expert_reference, inputs, dout)
    assert_no_worse_than(low, exact, densified(run_sparse(inputs, dout, backend)), NAMES)


@both_backends
def test_padding_rows_are_dealt_to_the_experts_in_turn(backend, device):
    inputs, dout = make_expert_inputs(4, 8, 100, 3, torch.float32, device)
    indices = torch.tensor([[90, 5, 5], [5, 90, 41], [41, 5, 41], [5, 5, 90]])
    *_, ddown, dup, _ = run_sparse(with_indices(inputs, indices), dout, backend)
    for grad in (ddown, dup):
        assert grad._indices()[0].tolist() == [5, 41, 90] * 4


@both_backends
def test_sparse_gradients_take_no_memory_for_experts_nobody_chose(backend, device):
    T, H, E, K = 4, 8, 2**20, 3
    inputs, dout = make_expert_inputs(T, H, E, K, torch.float32, device)
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
    out = flash_expert(*leaves, backend=backend, sparse_grad=True)
    wanted = [x for x in leaves if x.requires_grad]
    peak = peak_nbytes(lambda: torch.autograd.grad(out, wanted, dout, retain_graph=True), device)
    # What the PyTorch backend's tiles and the least allocations on a GPU may take, but for a byte per expert.
    assert peak < E
    dense = flash_expert(*leaves, backend="torch")
    assert peak_nbytes(lambda: torch.autograd.grad(dense, wanted, dout), device) >= 2 * E * H * 4


@both_backends
def test_sparse_gradients_are_written_whole_and_repeat_bit_for_bit(backend, device):
    inputs, dout = make_expert_inputs(9, 20, 400, 6, torch.bfloat16, device)
    first = run_sparse(inputs, dout, backend)
    with poison_memory():
        again = run_with_grads(flash_expert, inputs, dout, backend=backend, sparse_grad=True)
    assert_same_bits(densified(again), densified(first))
    for grad, want in zip(again[2:4], first[2:4], strict=True):
        assert torch.equal(grad._values(), want._values())
        assert torch.equal(grad._indices(), want._indices())


@both_backends
@pytest.mark.parametrize("wanted", [1, 2], ids=["down_weights", "up_weights"])
def test_a_sparse_gradient_of_one_table(wanted, backend, device):
    inputs, dout = make_expert_inputs(4, 10, 50, 3, torch.float32, device)
    want = run_sparse(inputs, dout, backend)[1 + wanted]
    leaves = [x.detach().requires_grad_(i == wanted) if i != 3 else x for i, x in enumerate(inputs)]
    flash_expert(*leaves, backend=backend, sparse_grad=True).backward(dout)
    assert torch.equal(leaves[wanted].grad.to_dense(), want.to_dense())
    assert all(x.grad is None for i, x in enumerate(leaves) if i != wanted)


@every_backend
def test_sparse_gradients_accumulate(backend, device):
    inputs, dout = make_expert_inputs(6, 10, 50, 3, torch.float32, device)
    moved = with_indices(inputs, (inputs[3] + 1) % 50)
    tables = [x.clone().requires_grad_() for x in inputs[1:3]]
    for x, _, _, indices, weights in (inputs, moved):
        flash_expert(x, *tables, indices, weights, backend=backend, sparse_grad=True).backward(dout)
    want = [run_with_grads(flash_expert, arguments, dout, backend=backend)[2:4] for arguments in (inputs, moved)]
    for table, first, second in zip(tables, *want, strict=True):
        assert table.grad.is_sparse
        torch.testing.assert_close(table.grad.to_dense(), first + second)


@both_backends
def test_sparse_gradients_under_autocast(backend, device):
    inputs, dout = make_expert_inputs(6, 10, 50, 3, torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        want = run_with_grads(flash_expert, inputs, dout.bfloat16(), backend=backend)
        actual = run_sparse(inputs, dout.bfloat16(), backend)
    assert actual[2].dtype == actual[3].dtype == torch.float32
    assert_same_bits(densified(actual), want)


@both_backends
def test_sparse_gradients_of_non_contiguous_tables(backend, device):
    inputs, dout = make_expert_inputs(5, 18, 37, 4, torch.float32, device)
    want = run_sparse(inputs, dout, backend)
    changed = tuple(strided(x) for x in inputs)
    assert_same_bits(densified(run_sparse(changed, strided(dout), backend)), densified(want))


def test_sparse_gradients_of_the_reference(device):
    inputs, dout = make_expert_inputs(5, 18, 37, 4, torch.float64, device)
    want = run_with_grads(flash_expert, inputs, dout, backend="reference")
    actual = run_with_grads(flash_expert, inputs, dout, backend="reference", sparse_grad=True)
    assert actual[2].is_sparse
    assert actual[3].is_sparse
    for x, want_x in zip(densified(actual), want, strict=True):
        torch.testing.assert_close(x, want_x)


@both_backends
def test_sparse_adam_steps_as_on_the_coalesced_gradient(backend, device):
    """Moments and values of experts nobody chose stay bit for bit; the others move as with one row an expert."""
    inputs, dout = make_expert_inputs(6, 10, 50, 3, torch.float32, device)
    tables = [[x.clone().requires_grad_() for x in inputs[1:3]] for _ in range(2)]
    actual, want = (torch.optim.SparseAdam(copies, lr=0.1) for copies in tables)
    for step in range(3):
        x, _, _, indices, weights = with_indices(inputs, inputs[3] // (step + 1))
        current = (x, *(table.detach() for table in tables[1]), indices, weights)
        for table, grad in zip(
            tables[1], run_with_grads(flash_expert, current, dout, backend=backend)[2:4], strict=True
        ):
            used = indices.unique()
            table.grad = torch.sparse_coo_tensor(used[None], grad[used], grad.shape, check_invariants=False)
        flash_expert(x, *tables[0], indices, weights, backend=backend, sparse_grad=True).backward(dout)
        for optimizer in (actual, want):
            optimizer.step()
            optimizer.zero_grad()
    never = torch.ones(50, dtype=torch.bool, device=device)
    for step in range(3):
        never[(inputs[3] // (step + 1)).flatten()] = False
    assert never.any()
    for table, same, start in zip(*tables, inputs[1:3], strict=True):
        torch.testing.assert_close(table, same)
        assert torch.equal(table[never], start[never])
        assert not torch.equal(table, start)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(actual.state[table][name], want.state[same][name])
            assert not actual.state[table][name][never].any()


@both_backends
def test_sparse_gradients_compile(backend, compiler, device):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *arguments: flash_expert(*arguments, backend=backend, sparse_grad=True),
        fullgraph=True, backend=compiler, dynamic=True,
    )  # fmt: skip
    for T in (4, 7):
        inputs, dout = make_expert_inputs(T, 10, 15, 3, torch.float32, device)
        want = run_sparse(inputs, dout, backend)
        for x, want_x in zip(densified(run_with_grads(compiled, inputs, dout)), densified(want), strict=True):
            torch.testing.assert_close(x, want_x)


@both_backends
@pytest.mark.parametrize("E", [5, 90])
def test_opcheck_of_sparse_gradients(E, backend, device):
    (x, _, _, indices, weights), dout = make_expert_inputs(6, 24, E, 3, torch.float32, device)
    s = torch.randn_like(weights)
    library.opcheck(torch.ops.flash_moe.flash_expert_backward_rows.default, (dout, x, indices, s, s, E, backend))
    tables = (torch.randn(E, 24, device=device).requires_grad_() for _ in range(2))
    inputs = (x.requires_grad_(), *tables, indices, weights.requires_grad_())
    library.opcheck(torch.ops.flash_moe.flash_expert.default, (*inputs, "silu", backend, True))


@pytest.mark.gpu
@both_backends
def test_sparse_gradients_in_a_graph_and_without_waiting(backend, device):
    inputs, dout = make_expert_inputs(128, 64, 4096, 16, torch.bfloat16, device)

    def run() -> tuple[Tensor, ...]:
        return run_with_grads(flash_expert, inputs, dout, backend=backend, sparse_grad=True)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    fresh, fresh_dout = make_expert_inputs(128, 64, 4096, 16, torch.bfloat16, device, seed=1)
    for static, new in zip((*inputs, dout), (*fresh, fresh_dout), strict=True):
        static.copy_(new)
    graph.replay()
    assert_same_bits(densified(captured), densified(run_sparse(fresh, fresh_dout, backend)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_sparse_gradients_at_a_realistic_size(share, dtype, device):
    inputs, dout = make_expert_inputs(2048, 1024, 100_000, 64, dtype, device)
    hot = torch.rand(2048, 64, generator=torch.Generator(device).manual_seed(2), device=device) < share
    assert_sparse_is_dense(with_indices(inputs, inputs[3].masked_fill(hot, 7)), dout, "triton")


@every_backend
@pytest.mark.parametrize("bad", [-1, 5, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("indices_dtype", [torch.int32, torch.int64], ids=str)
def test_ids_out_of_range(indices_dtype, bad, backend, device, monkeypatch):
    """Always checked on a CPU; on a GPU with FLASH_MOE_DEBUG=1."""
    if device.type == "cuda" and backend != "reference":
        monkeypatch.setenv("FLASH_MOE_DEBUG", "1")
    else:
        device = "cpu"  # the reference on a GPU would end in a device-side assertion
        monkeypatch.delenv("FLASH_MOE_DEBUG", raising=False)
    inputs, _ = make_expert_inputs(3, 8, 5, 2, torch.float32, device, indices_dtype=indices_dtype)
    inputs[3][2, 1] = bad
    with pytest.raises(ValueError, match=rf"indices: .*\b0\b.*\b4\b.*{bad}"):
        flash_expert(*inputs, backend=backend)


BAD_ARGUMENTS = [
    ({"hidden_states": torch.zeros(3)}, ValueError, r"hidden_states: .*\[T, H\].*\(3,\)"),
    ({"hidden_states": torch.zeros(1, 3, 8)}, ValueError, r"hidden_states: .*\(1, 3, 8\)"),
    ({"hidden_states": torch.zeros(3, 7)}, ValueError, r"down_weights: .*7.*\(5, 8\)"),
    ({"down_weights": torch.zeros(5)}, ValueError, r"down_weights: .*\[E, H\].*\(5,\)"),
    ({"up_weights": torch.zeros(6, 8)}, ValueError, r"up_weights: .*5.*\(6, 8\)"),
    ({"indices": torch.zeros(3, dtype=torch.int64)}, ValueError, r"indices: .*\[T, K\].*\(3,\)"),
    ({"indices": torch.zeros(4, 2, dtype=torch.int64)}, ValueError, r"indices: .*3.*\(4, 2\)"),
    ({"routing_weights": torch.zeros(3, 1)}, ValueError, r"routing_weights: .*3, 2.*\(3, 1\)"),
    ({"indices": torch.zeros(3, 2)}, TypeError, "indices: .*int32.*int64.*float32"),
    ({"indices": torch.zeros(3, 2, dtype=torch.int16)}, TypeError, "indices: .*int16"),
    ({"hidden_states": torch.zeros(3, 8, dtype=torch.int64)}, TypeError, "hidden_states: .*float32.*int64"),
    ({"down_weights": torch.zeros(5, 8).half()}, TypeError, "down_weights: .*float32.*float16"),
    ({"up_weights": torch.zeros(5, 8).bfloat16()}, TypeError, "up_weights: .*float32.*bfloat16"),
    ({"routing_weights": torch.zeros(3, 2).half()}, TypeError, "routing_weights: .*float32.*float16"),
    ({"hidden_act": "swish"}, ValueError, "hidden_act: .*silu.*relu2.*'swish'"),
    ({"backend": "cuda"}, ValueError, "backend: .*auto.*triton.*torch.*reference.*'cuda'"),
    ({"sparse_grad": 1}, TypeError, "sparse_grad: .*True or False.*1"),
]


@both_backends
@pytest.mark.parametrize("changed, error, message", BAD_ARGUMENTS, ids=[message for *_, message in BAD_ARGUMENTS])
def test_errors_name_the_argument(changed, error, message, backend, device):
    inputs, _ = make_expert_inputs(3, 8, 5, 2, torch.float32, device)
    arguments = {**dict(zip(ARGUMENTS, inputs, strict=True)), "backend": backend, **changed}
    arguments = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in arguments.items()}
    with pytest.raises(error, match=message):
        flash_expert(**arguments)


@both_backends
@pytest.mark.parametrize("moved", range(1, 5), ids=ARGUMENTS[1:])
def test_mixed_devices(moved, backend, device):
    inputs, _ = make_expert_inputs(3, 8, 5, 2, torch.float32, device)
    mixed = [x.to("meta") if i == moved else x for i, x in enumerate(inputs)]
    with pytest.raises(ValueError, match=rf"{ARGUMENTS[moved]}: .*{device.type}.*meta"):
        flash_expert(*mixed, backend=backend)


def test_float64_is_for_the_reference_only(device):
    inputs, _ = make_expert_inputs(3, 8, 5, 2, torch.float64, device)
    assert flash_expert(*inputs, backend="reference").dtype == torch.float64
    for backend in ("triton", "torch"):
        with pytest.raises(TypeError, match=r"hidden_states: .*float32.*float64"):
            flash_expert(*inputs, backend=backend)


def throughput_case(device: torch.device) -> tuple[Inputs, Tensor, str, int]:
    """Inputs whose results are known to be right, a title, and the bytes of one table row per pair."""
    pytest.importorskip("triton", reason="there is triton for Linux only")
    T, H, E, K = (4096, 1024, 16384, 64) if device.type == "cuda" else (4, 24, 16, 4)
    inputs, dout = make_expert_inputs(T, H, E, K, torch.bfloat16, device)
    assert_accurate(inputs, dout, "triton")
    for x in inputs:
        x.requires_grad_(x.is_floating_point())
    return inputs, dout, f"T={T} H={H} E={E} K={K} bfloat16, TB/s by rows used", T * K * H * 2


def gradients(out: Tensor, inputs: Inputs, dout: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, [x for x in inputs if x.requires_grad], dout, retain_graph=True)


def test_expert_forward_throughput(device, print_throughput):
    inputs, _, title, row_nbytes = throughput_case(device)
    functions = {
        "PyTorch": torch.no_grad()(lambda: expert_reference(*inputs)),
        "Triton": torch.no_grad()(lambda: triton_flash_expert_func(*inputs)),
    }
    print_throughput(f"expert forward, {title}", 2 * row_nbytes, functions)


def test_expert_backward_throughput(device, print_throughput):
    inputs, dout, title, row_nbytes = throughput_case(device)
    outs = {"PyTorch": expert_reference(*inputs), "Triton": triton_flash_expert_func(*inputs)}
    functions = {name: lambda out=out: gradients(out, inputs, dout) for name, out in outs.items()}
    print_throughput(f"expert backward, {title}", 4 * row_nbytes, functions)


def test_expert_forward_backward_throughput(device, print_throughput):
    inputs, dout, title, row_nbytes = throughput_case(device)
    functions = {
        "PyTorch": lambda: gradients(expert_reference(*inputs), inputs, dout),
        "Triton": lambda: gradients(triton_flash_expert_func(*inputs), inputs, dout),
    }
    print_throughput(f"expert forward and backward, {title}", 6 * row_nbytes, functions)


def assert_samples_accurate(inputs: Inputs, dout: Tensor, num_samples: int = 8) -> tuple[Tensor, ...]:
    """Some rows and columns, the first and the last among them, against ``by_hand``; returns what was checked."""
    (T, H), generator = inputs[0].shape, torch.Generator(dout.device).manual_seed(1)
    rows, cols = (torch.randint(n, (num_samples,), generator=generator, device=dout.device) for n in (T, H))
    rows[0], rows[1], cols[0], cols[1] = 0, T - 1, 0, H - 1
    results = run_with_grads(triton_flash_expert_func, inputs, dout)
    out, dx, ddown, dup, dweights = results
    exact = by_hand(inputs, dout, rows, cols)
    actual = (out[rows], dx[rows], ddown[:, cols], dup[:, cols], dweights)
    rounded = [x.to(y.dtype) for x, y in zip(exact, actual, strict=True)]
    assert_no_worse_than(rounded, exact, actual, NAMES)
    return results


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize(
    "T, H, E, K",
    [(4096, 1024, 16384, 64), (1024, 1024, 4096, 32), (777, 2048, 1000, 9), (512, 1100, 40_000, 96)],
    ids=str,
)
def test_realistic_sizes(T, H, E, K, dtype, device):
    assert_accurate(*make_expert_inputs(T, H, E, K, dtype, device), "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("share", [1.0, 0.5, 0.02])
@pytest.mark.parametrize("H", [1024, 2500])
def test_a_hot_expert(H, share, dtype, device):
    """Up to 131,072 pairs on one expert, the rest uniform."""
    inputs, dout = make_expert_inputs(2048, H, 1024, 64, dtype, device)
    hot = torch.rand(2048, 64, generator=torch.Generator(device).manual_seed(2), device=device) < share
    assert_accurate(with_indices(inputs, inputs[3].masked_fill(hot, 7)), dout, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("T", [65_535, 65_536, 65_537, 200_001])
def test_more_tokens_than_a_grid_dimension(T, device):
    assert_accurate(*make_expert_inputs(T, 8, 5, 3, torch.float32, device), "triton")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "T, H, E, K",
    [(65_600, 32_768, 4, 2), (300, 2064, 2**20, 8), (33_000, 1024, 1024, 64)],
    ids=["T*H past 2^31", "E*H past 2^31", "T*K*H past 2^31"],
)
def test_past_two_to_the_31(T, H, E, K, device):
    inputs, dout = make_expert_inputs(T, H, E, K, torch.bfloat16, device)
    inputs[3][0, 0], inputs[3][-1, -1] = E - 1, 0
    _, _, ddown, dup, _ = assert_samples_accurate(inputs, dout)
    used = torch.zeros(E, dtype=torch.bool, device=device).index_fill_(0, inputs[3].flatten(), True)
    for grad in (ddown, dup):
        assert torch.equal(grad.ne(0).any(dim=1), used)


@pytest.mark.gpu
def test_two_billion_pairs(device):
    """T * K just below 2^31: pair numbers fit 32 bits, byte addresses do not."""
    T, H, E, K, step = 2**21, 2, 64, 1023, 2**14
    inputs, dout = make_expert_inputs(T, H, E, K, torch.bfloat16, device, indices_dtype=torch.int32)
    out, dx, ddown, dup, dweights = run_with_grads(triton_flash_expert_func, inputs, dout)
    x, down, up, indices, weights = inputs
    exact_down, exact_up = torch.zeros_like(down, dtype=torch.float64), torch.zeros_like(up, dtype=torch.float64)
    for t in range(0, T, step):
        chunk = slice(t, t + step)
        part = to_float64((x[chunk], down, up, indices[chunk], weights[chunk]))
        exact = run_with_grads(expert_reference, part, to_float64(dout[chunk]))
        exact_down += exact[2]
        exact_up += exact[3]
        if t in (0, T // 2, T - step):
            exact = (exact[0], exact[1], exact[4])
            actual = (out[chunk], dx[chunk], dweights[chunk])
            assert_no_worse_than([e.bfloat16() for e in exact], exact, actual, ("out", "dx", "dweights"))
    exact = (exact_down, exact_up)
    assert_no_worse_than([e.bfloat16() for e in exact], exact, (ddown, dup), ("ddown", "dup"))


@pytest.mark.gpu
def test_memory_is_of_the_order_of_the_pairs_on_a_gpu(device):
    """Beyond inputs and outputs: under 16 MB forward; backward 160 bytes a pair, 128 of them float32 sums of tiles."""
    T, H, E, K = 4096, 1024, 16384, 64
    inputs, dout = make_expert_inputs(T, H, E, K, torch.bfloat16, device)
    for x in inputs:
        x.requires_grad_(x.is_floating_point())
    out = triton_flash_expert_func(*inputs)
    outputs = sum(x.nbytes for x in gradients(out, inputs, dout))
    assert peak_nbytes(lambda: triton_flash_expert_func(*inputs), device) - out.nbytes < 16e6
    assert peak_nbytes(lambda: gradients(out, inputs, dout), device) - outputs < 160 * T * K
