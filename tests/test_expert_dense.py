"""The experts' products on tensor cores, each against float64."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flash_moe.ops._reference.expert import expert_reference
from flash_moe.testing import (
    assert_no_worse_than,
    make_expert_inputs,
    peak_nbytes,
    poison_memory,
    surround_with_nan,
    to_float64,
)

dense = pytest.importorskip("flash_moe.ops._triton.expert_dense", reason="there is triton for Linux only")

NAMES = ("dots", "token sums", "expert sums")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# T, H, E, K: ones; K = E; more choices than experts; nothing a power of two; even; beyond a tile of tokens, of experts,
# of columns, and of the pairs that the dots look up at a time.
SHAPES = [
    (1, 1, 1, 1),
    (1, 16, 4, 1),
    (2, 5, 4, 4),
    (4, 33, 3, 8),
    (13, 37, 9, 3),
    (16, 64, 16, 4),
    (130, 8, 40, 2),
    (3, 48, 600, 7),
    (2, 300, 20, 5),
    (1, 8, 140, 130),
]

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # rows [T, H], table [E, H], coefficients [T, K], indices [T, K]


class Watched(TorchDispatchMode):
    """Keeps the dtypes that scattering works on."""

    def __init__(self) -> None:
        super().__init__()
        self.scattered: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scatter" in func.__name__:
            self.scattered.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def make_inputs(T: int, H: int, E: int, K: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    (rows, _, table, indices, _), _ = make_expert_inputs(T, H, E, K, dtype, device)
    generator = torch.Generator(device).manual_seed(1)
    return rows, table, torch.randn(T, K, generator=generator, device=device), indices


def with_indices(inputs: Inputs, indices: Tensor) -> Inputs:
    return (*inputs[:3], indices.to(inputs[3]))


def products(rows: Tensor, table: Tensor, coefficients: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
    return (
        dense.dense_dots(rows, table, indices)[0],
        dense.dense_token_sums(coefficients, table, indices),
        dense.dense_expert_sums(rows, coefficients, indices, len(table)),
    )


def by_hand(rows: Tensor, table: Tensor, coefficients: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
    indices = indices.long()
    p = coefficients.new_zeros(len(rows), len(table)).scatter_add_(1, indices, coefficients)
    return (rows @ table.t()).gather(1, indices), p @ table, p.t() @ rows


def assert_accurate(inputs: Inputs) -> None:
    exact, (dots, *sums) = by_hand(*to_float64(inputs)), products(*inputs)
    assert_dots_close(dots, exact[0], inputs[0].shape[1])
    assert_no_worse_than([x.to(inputs[0].dtype) for x in exact[1:]], exact[1:], sums, NAMES[1:])


def assert_dots_close(dots: Tensor, exact: Tensor, H: int) -> None:
    """Tensor cores cut float32 sums off instead of rounding them, once for every 16 products."""
    assert (dots.dtype, dots.shape) == (torch.float32, exact.shape)
    if exact.numel():
        assert (dots - exact).abs().max() <= 1e-5 * max(1, H / 1024) * exact.abs().max()


def assert_same_bits(actual: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for name, x, want_x in zip(NAMES, actual, want, strict=True):
        assert torch.equal(x, want_x), name


@every_dtype
@pytest.mark.parametrize("T, H, E, K", SHAPES, ids=str)
def test_products_match_float64(T, H, E, K, dtype, device):
    assert_accurate(make_inputs(T, H, E, K, dtype, device))


@every_dtype
def test_duplicates_within_a_token_add_up(dtype, device):
    indices = torch.tensor([[2] * 6, [0, 4, 0, 4, 0, 4], [1, 1, 1, 3, 3, 3], [4, 3, 2, 1, 0, 0]])
    assert_accurate(with_indices(make_inputs(4, 20, 5, 6, dtype, device), indices))


@every_dtype
@pytest.mark.parametrize("expert", [0, 7, 8, 19])
def test_every_token_on_one_expert(expert, dtype, device):
    inputs = make_inputs(9, 20, 20, 5, dtype, device)
    inputs = with_indices(inputs, torch.full_like(inputs[3], expert))
    sums = products(*inputs)[2]
    others = torch.arange(20, device=device) != expert
    assert torch.equal(sums[others], torch.zeros_like(sums[others]))
    assert_accurate(inputs)


@every_dtype
def test_no_tokens(dtype, device):
    dots, token_sums, expert_sums = products(*make_inputs(0, 16, 4, 3, dtype, device))
    assert (dots.shape, token_sums.shape) == ((0, 3), (0, 16))
    assert torch.equal(expert_sums, torch.zeros(4, 16, dtype=dtype, device=device))
    assert {token_sums.dtype, expert_sums.dtype} == {dtype}


def test_int32_and_int64_indices_give_the_same_bits(device):
    inputs = make_inputs(5, 37, 9, 3, torch.bfloat16, device)
    assert_same_bits(products(*inputs[:3], inputs[3].int()), products(*inputs))


@every_dtype
def test_sums_shared_out_among_programs(dtype, device, monkeypatch):
    """As where a GPU would stand idle; the last share is a ragged one, and the number of shares changes little."""
    inputs = make_inputs(140, 12, 150, 2, dtype, device)
    monkeypatch.setattr(dense, "_split", lambda length, num_programs, depth, operand: 2**20)
    whole = products(*inputs)
    monkeypatch.setattr(dense, "_split", lambda length, num_programs, depth, operand: depth)
    assert_accurate(inputs)
    for x, y in zip(products(*inputs), whole, strict=True):
        torch.testing.assert_close(x, y, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


@every_dtype
def test_writes_all_of_its_results_and_nothing_else(dtype, device):
    inputs = make_inputs(5, 37, 19, 3, dtype, device)
    want = products(*inputs)
    with poison_memory():
        actual = products(*inputs)
    assert_same_bits(actual, want)


@every_dtype
def test_reads_nothing_outside_its_inputs(dtype, device):
    inputs = make_inputs(5, 37, 19, 3, dtype, device)
    rows, table, coefficients, indices = (surround_with_nan(x) for x in inputs)
    assert_same_bits(products(rows, table, coefficients, indices), products(*inputs))


def test_the_example_of_compressed(device):
    indices = torch.tensor([[17, 2, 17]], device=device)
    p = dense.compress(torch.tensor([[0.5, 3, 1]], device=device), indices, 20, torch.bfloat16)
    assert p.slots.tolist() == [[0] + [-1] * 15, [-1] * 16, [1] + [-1] * 15]
    assert p.values[0, :2].tolist() == [[0, 0, 3, 0, 0, 0, 0, 0], [0, 1.5, 0, 0, 0, 0, 0, 0]]
    assert p.scales is None


def test_one_compressed_operand_serves_both_sums(device):
    rows, table, coefficients, indices = make_inputs(5, 37, 9, 3, torch.bfloat16, device)
    p = dense.compress(coefficients, indices, 9, torch.bfloat16)
    _, *want = products(rows, table, coefficients, indices)
    assert torch.equal(dense.dense_token_sums(coefficients, table, indices, p), want[0])
    assert torch.equal(dense.dense_expert_sums(rows, coefficients, indices, 9, p), want[1])


@every_dtype
def test_activation_and_weights_within_compress(dtype, device):
    """The forward of the experts in two products: s = x . down, then sums of silu(s) * w."""
    inputs, _ = make_expert_inputs(5, 37, 9, 6, dtype, device)
    x, down, up, indices, weights = inputs
    s = dense.dense_dots(x, down, indices)[0]
    p = dense.compress(s, indices, len(up), dtype, weights=weights, hidden_act="silu")
    exact = expert_reference(*to_float64(inputs))
    assert_no_worse_than([exact.to(dtype)], [exact], [dense.dense_token_sums(s, up, indices, p)], ["out"])


def test_float16_coefficients_of_any_size(device):
    """A row of the result from coefficients near 1e9, beside rows from coefficients near 1e-9."""
    rows, table, coefficients, indices = make_inputs(4, 20, 24, 3, torch.float16, device)
    indices = torch.arange(12, device=device).view(4, 3) * 2
    powers = torch.tensor([1e-9, 1.0, 1e9, 1e-9], device=device)[:, None]
    p = torch.zeros(4, 24, device=device).scatter_(1, indices, coefficients * powers)
    token_sums = dense.dense_token_sums(coefficients * powers, table / 2**20, indices)
    exact = p.double() @ (table / 2**20).double()
    assert_no_worse_than([exact.half()], [exact], [token_sums], ["token sums"])
    small, large = indices[0], indices[2]
    expert_sums = dense.dense_expert_sums(rows * 1e-4, coefficients * powers / 1e3, indices, 24)
    exact = (p / 1e3).double().t() @ (rows * 1e-4).double()
    assert_no_worse_than([exact[large].half()], [exact[large]], [expert_sums[large]], ["expert sums"])
    assert expert_sums[small].isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's numpy, of inf * 0
def test_infinite_coefficients_stay_with_their_token(device):
    _, table, coefficients, indices = make_inputs(3, 20, 9, 3, torch.bfloat16, device)
    coefficients[1, 2] = torch.inf
    sums = dense.dense_token_sums(coefficients, table, indices)
    assert not sums[1].isfinite().any()
    assert sums[[0, 2]].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)  # float32 is gathered, whatever the sizes
@pytest.mark.parametrize(
    "T, H, E, K",
    [(4096, 1024, 1024, 64), (4096, 1024, 4096, 128), (1000, 1032, 1000, 9), (777, 2048, 1000, 300), (5, 1000, 333, 2)],
    ids=str,
)
def test_realistic_sizes(T, H, E, K, dtype, device):
    inputs = make_inputs(T, H, E, K, dtype, device)
    assert_accurate(inputs)
    assert_same_bits(products(*inputs), products(*inputs))


@pytest.mark.gpu
def test_relative_error_of_bfloat16(device):
    inputs = make_inputs(2048, 512, 512, 64, torch.bfloat16, device)
    for x, exact in list(zip(products(*inputs), by_hand(*to_float64(inputs)), strict=True))[1:]:
        assert (x - exact).norm() <= 0.0025 * exact.norm()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "T, H, E, K",
    [(70_000, 32_768, 16, 2), (32, 2064, 2**20, 8), (2**20, 8, 2**15, 1)],
    ids=["T*H past 2^31", "E*H past 2^31", "T*G past 2^31"],
)
def test_past_two_to_the_31(T, H, E, K, device):
    """The last tokens and the last expert."""
    rows, table, coefficients, indices = make_inputs(T, H, E, K, torch.bfloat16, device)
    indices[-1, -1] = E - 1
    dots, token_sums, expert_sums = products(rows, table, coefficients, indices)
    chosen = table[indices[-8:]].double()
    last = coefficients[-8:].double()
    exact = (chosen @ rows[-8:].double()[:, :, None]).squeeze(2), (last[:, None] @ chosen).squeeze(1)
    assert_dots_close(dots[-8:], exact[0], H)
    assert_no_worse_than([exact[1].bfloat16()], [exact[1]], [token_sums[-8:]], NAMES[1:2])
    t, k = (indices == E - 1).nonzero(as_tuple=True)
    exact = (coefficients[t, k].double() @ rows[t].double())[None]
    assert_no_worse_than([exact.bfloat16()], [exact], [expert_sums[-1:]], NAMES[2:])


@pytest.mark.gpu
def test_memory_is_of_the_order_of_the_pairs(device):
    """16 bytes a pair, 2 bytes a token and group of 8 experts; no [T, E] of scores or coefficients."""
    T, H, E, K = 4096, 64, 4096, 64
    rows, table, coefficients, indices = make_inputs(T, H, E, K, torch.bfloat16, device)
    nbytes = peak_nbytes(lambda: dense.dense_token_sums(coefficients, table, indices), device)
    assert nbytes <= 16 * T * K + T * E // 4 + 10 * T * H * 4
    assert peak_nbytes(lambda: dense.dense_dots(rows, table, indices), device) <= 4 * T * K + 512


def test_scales_of_experts_are_of_their_largest_coefficient_without_floating_point_atomics(device):
    """On a GPU to scatter is to work atomically. Zero, infinity and NaN are coefficients, too."""
    coefficients = torch.tensor([[0.75, -3.0], [-0.0, 2.0**-120], [torch.inf, 1.0]], device=device)
    indices = torch.tensor([[0, 0], [1, 2], [3, 5]], device=device)
    with Watched() as watched:
        scales = dense._expert_scales(coefficients, indices, 7)
    assert watched.scattered == [torch.int32]
    assert scales[[0, 1, 2, 4, 5, 6]].tolist() == [2.0**12, 2.0**14, 2.0**114, 2.0**14, 2.0**13, 2.0**14]
    assert dense._expert_scales(coefficients.nan_to_num(torch.nan), indices, 7).isfinite().all()
