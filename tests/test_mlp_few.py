"""The MLP of few tokens against float64."""

import pytest
import torch

from flash_moe.ops._reference.mlp import mlp_reference
from flash_moe.testing import make_mlp_inputs, poison_memory, to_float64

mlp_few = pytest.importorskip("flash_moe.ops._triton.mlp_few")


def assert_accurate(T, H, I, dtype, hidden_act, device):
    inputs, _ = make_mlp_inputs(T, H, I, dtype, device)
    exact = mlp_reference(*to_float64(inputs), hidden_act)
    low = mlp_reference(*(x.float() for x in inputs), hidden_act)
    with poison_memory():
        actual = mlp_few.few_tokens_mlp(*inputs, hidden_act)
    assert actual.dtype == torch.float32
    budget = 2 * (low - exact).abs().max() + 8 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (actual - exact).abs().max() <= budget
    with poison_memory():
        assert torch.equal(mlp_few.few_tokens_mlp(*inputs, hidden_act), actual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("T, H, I, hidden_act", [(1, 24, 5, "silu"), (2, 37, 17, "gelu"), (3, 8, 9, "relu2")])
def test_values(T, H, I, hidden_act, dtype, device):
    assert_accurate(T, H, I, dtype, hidden_act, device)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize("H, I", [(1024, 4096), (2048, 768), (1000, 3001)])
def test_realistic_sizes(T, H, I, device):
    assert_accurate(T, H, I, torch.bfloat16, "silu", device)
