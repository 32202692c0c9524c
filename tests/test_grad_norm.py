"""clip_grad_norm_ over dense and row-sparse gradients, against torch's own on the dense equivalents."""

import math

import pytest
import torch
from torch import Tensor, nn

from flash_moe.modules.flash_moe import FlashMoE, FlashMoEConfig
from flash_moe.modules.grad_norm import clip_grad_norm_
from flash_moe.testing import poison_memory


def sparse_rows(ids: list[int], num_rows: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    rows = torch.randn(len(ids), 5, generator=generator, device=device).to(dtype)
    return torch.sparse_coo_tensor([ids], rows, (num_rows, 5), device=device, check_invariants=True)


def parameters_with(grads: list[Tensor | None], shapes: list[tuple[int, ...]], device: torch.device) -> list[Tensor]:
    dtypes = [torch.float32 if grad is None else grad.dtype for grad in grads]
    parameters: list[Tensor] = []
    for shape, dtype, grad in zip(shapes, dtypes, grads, strict=True):
        parameters.append(nn.Parameter(torch.zeros(shape, dtype=dtype, device=device)))
        parameters[-1].grad = grad
    return parameters


def make_both(dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters with sparse gradients among dense ones, and the same with dense gradients throughout."""
    grads = [
        torch.randn(4, 3, generator=torch.Generator(device).manual_seed(9), device=device).to(dtype),
        sparse_rows([7, 2, 7, 0, 2, 7], 9, dtype, device),
        None,
        sparse_rows([3, 1], 4, dtype, device, seed=1).coalesce(),
        sparse_rows([], 4, dtype, device),
    ]
    dense = [None if grad is None else grad.to_dense().clone() for grad in grads]
    shapes = [(4, 3), (9, 5), (2,), (4, 5), (4, 5)]
    return parameters_with(grads, shapes, device), parameters_with(dense, shapes, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e9])
@pytest.mark.parametrize("norm_type", [1.0, 2, 3.5, math.inf])
def test_as_torch_does_on_the_dense_gradients(norm_type, max_norm, dtype, device):
    parameters, dense = make_both(dtype, device)
    want = torch.nn.utils.clip_grad_norm_(dense, max_norm, norm_type)
    with poison_memory():
        norm = clip_grad_norm_(parameters, max_norm, norm_type)
    assert norm.shape == ()
    torch.testing.assert_close(norm, want)
    for parameter, same in zip(parameters, dense, strict=True):
        assert (parameter.grad is None) == (same.grad is None)
        if same.grad is not None:
            # Rows of 16 bits that cancel, each rounded when scaled.
            atol = 4 * torch.finfo(dtype).eps * same.grad.abs().sum().item()
            torch.testing.assert_close(parameter.grad.to_dense(), same.grad, rtol=0, atol=atol)
    assert [x.grad is not None and x.grad.is_sparse for x in parameters] == [False, True, False, True, True]
    assert parameters[1].grad._nnz() == 6


def test_repeated_rows_count_by_their_sum(device):
    ones = torch.ones(3, 5, device=device)
    grad = torch.sparse_coo_tensor([[1, 1, 2]], ones * ones.new_tensor([[3.0], [-3.0], [2.0]]), (4, 5), device=device,
                                   check_invariants=True)  # fmt: skip
    (parameter,) = parameters_with([grad], [(4, 5)], device)
    assert clip_grad_norm_(parameter, 1.0).item() == pytest.approx(math.sqrt(5 * 4))


def test_a_generator_and_no_gradient_at_all(device):
    parameters = parameters_with([None], [(2,)], device)
    assert clip_grad_norm_((x for x in parameters), 1.0) == 0
    assert clip_grad_norm_([], 1.0) == 0


def test_errors(device):
    parameters, _ = make_both(torch.float32, device)
    for max_norm in (-1.0, math.nan):
        with pytest.raises(ValueError, match=r"max_norm: expected 0 or more; got "):
            clip_grad_norm_(parameters, max_norm)
    for norm_type in (0.0, -2, -math.inf, math.nan):
        with pytest.raises(ValueError, match=r"norm_type: .*above 0.*; got "):
            clip_grad_norm_(parameters, 1.0, norm_type)
    parameters[0].grad[0, 0] = math.nan
    with pytest.raises(RuntimeError, match="non-finite"):
        clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
    assert clip_grad_norm_(parameters, 1.0).isnan()
    grad = torch.eye(3, device=device).to_sparse()
    with pytest.raises(ValueError, match=r"parameters: .*\(3, 3\).* 2 sparse dimensions"):
        clip_grad_norm_(parameters_with([grad], [(3, 3)], device), 1.0)


def make_layer(device: torch.device, sparse_grad: bool) -> FlashMoE:
    torch.manual_seed(0)
    config = FlashMoEConfig(
        hidden_size=16, intermediate_size=8, num_experts=400, num_experts_per_tok=4, backend="torch",
        sparse_grad=sparse_grad,
    )  # fmt: skip
    return FlashMoE(config).to(device)


def test_a_layer_trains_on_sparse_gradients_as_on_dense_ones(device):
    """SGD, two backward passes a step; with Adam experts nobody chose would rightly differ."""
    sparse, dense = make_layer(device, True), make_layer(device, False)
    generator = torch.Generator(device).manual_seed(0)
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.3) for layer in (sparse, dense)]
    for _ in range(3):
        inputs = [torch.randn(6, 16, generator=generator, device=device) for _ in range(2)]
        for layer in (sparse, dense):
            for x in inputs:
                layer(x)[0].square().mean().backward()
        norm = clip_grad_norm_(sparse.parameters(), 0.1)
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(dense.parameters(), 0.1))
        assert norm > 0.1
        assert sparse.up_embed.weight.grad.is_sparse
        assert sparse.down_embed.weight.grad.is_sparse
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for (name, x), want in zip(sparse.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(x, want, msg=lambda text, name=name: f"{name}: {text}")


def test_sparse_adam_takes_the_tables_of_a_layer(device):
    layer = make_layer(device, True)
    tables = [layer.down_embed.weight, layer.up_embed.weight]
    before = [table.detach().clone() for table in tables]
    optimizer = torch.optim.SparseAdam(tables, lr=0.1)
    layer(torch.randn(3, 16, device=device))[0].sum().backward()
    used = tables[0].grad.coalesce().indices()[0]
    assert 0 < len(used) <= 3 * 4
    optimizer.step()
    for table, start in zip(tables, before, strict=True):
        assert torch.equal((table != start).any(dim=1).nonzero()[:, 0], used)


def test_the_config_checks_sparse_grad():
    with pytest.raises(TypeError, match="sparse_grad: expected True or False; got 'yes'"):
        FlashMoEConfig(
            hidden_size=4, intermediate_size=0, num_experts=4, num_experts_per_tok=1, sparse_grad="yes"
        )  # fmt: skip


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu(device):
    parameters, _ = make_both(torch.float32, device)
    clip_grad_norm_(parameters, 0.5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        clip_grad_norm_(parameters, 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
