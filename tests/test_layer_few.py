"""One or two tokens through the layer in one launch: what the kernels give that take any number of tokens."""

import pytest
import torch

from flash_moe import FlashMoE, FlashMoEConfig
from flash_moe.bench.timing import count_launches
from flash_moe.ops.flash_router import flash_routing
from flash_moe.testing import poison_memory

layer_few = pytest.importorskip("flash_moe.ops._triton.layer_few")
layer_inference = pytest.importorskip("flash_moe.ops._triton.layer_inference")

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def make_arguments(T, H, I, N, K, dtype, device, *, norm_topk_prob=False, hidden_act="silu"):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    x = draw(T, H)
    gate = (draw(2 * N, H), draw(H), draw(H).abs() + 0.5, 1e-5)
    dense = (draw(I, H) * H**-0.5, draw(I, H) * H**-0.5, draw(H, I) * I**-0.5)
    return x, gate, (draw(N * N, H) * H**-0.5, draw(N * N, H)), dense, K, norm_topk_prob, hidden_act


def by_many_launches(arguments, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(layer_inference, "takes", lambda *_: False)
        return layer_inference.layer_inference(*arguments)


def run(arguments):
    with poison_memory():
        return layer_few.layer_few(*arguments)


@every_dtype
@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize(
    "T, H, I, N, K, hidden_act",
    [(1, 24, 20, 5, 3, "silu"), (2, 40, 37, 6, 12, "gelu"), (2, 17, 1, 4, 16, "silu"), (1, 16, 600, 3, 1, "relu2")],
    ids=str,
)
def test_values(T, H, I, N, K, hidden_act, norm_topk_prob, dtype, device, monkeypatch):
    arguments = make_arguments(T, H, I, N, K, dtype, device, norm_topk_prob=norm_topk_prob, hidden_act=hidden_act)
    y, logits, indices = run(arguments)
    want, want_logits, _ = by_many_launches(arguments, monkeypatch)
    eps = torch.finfo(dtype).eps
    assert (logits - want_logits).abs().max() <= 2 * eps * want_logits.abs().max()
    # Of the kernel's own logits, since a rounding of another sum may choose another expert.
    assert torch.equal(indices, flash_routing(logits, N, K, norm_topk_prob=norm_topk_prob, backend="reference")[1])
    assert (y - want).abs().max() <= 8 * eps * want.abs().max()
    for first, second in zip((y, logits, indices), run(arguments), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_scores_go_to_the_lowest_ids(dtype, device, monkeypatch):
    x, gate, *rest = make_arguments(2, 16, 8, 6, 7, dtype, device)
    gate = (gate[0].sign().cumsum(0).fmod(2), *gate[1:])  # two rows that take turns
    arguments = (x, gate, *rest)
    y, _, indices = run(arguments)
    want, _, want_indices = by_many_launches(arguments, monkeypatch)
    assert torch.equal(indices, want_indices)
    assert (y - want).abs().max() <= 8 * torch.finfo(dtype).eps * want.abs().max()


def test_many_keys(device, monkeypatch):
    """More than are compared at once."""
    arguments = make_arguments(1, 16, 8, 200, 5, torch.bfloat16, device)
    _, _, indices = run(arguments)
    assert torch.equal(indices, by_many_launches(arguments, monkeypatch)[2])


def test_what_it_takes():
    assert layer_few.takes(1, 128, 64)
    assert layer_few.takes(2, layer_few.MAX_KEYS, 1)
    assert not layer_few.takes(0, 128, 64)
    assert not layer_few.takes(layer_few.MAX_TOKENS + 1, 128, 64)
    assert not layer_few.takes(1, layer_few.MAX_KEYS + 1, 1)
    assert not layer_few.takes(1, 256, 1024)


def counters_of(arguments, monkeypatch):
    """What the programs count in, after a first call."""
    plans, make_plan = [], layer_few._plan
    with monkeypatch.context() as patches:
        patches.setattr(layer_few, "_plan", lambda *sizes: plans.append(make_plan(*sizes)) or plans[-1])
        run(arguments)
    (memory,) = plans[0].memory.of_stream.values()
    return memory.counters[: layer_few.NUM_COUNTERS * layer_few.LINE]


@every_dtype
def test_counters_wrap_around(dtype, device, monkeypatch):
    """Of a 16-bit logit's word the launch's number is 16 bits, too."""
    arguments = make_arguments(1, 16, 8, 4, 2, dtype, device)
    counters = counters_of(arguments, monkeypatch)
    want, *_ = run(arguments)
    launches = int(counters[0])
    arrivals = counters // launches  # each launch's
    for start in (2**16 - 2, 2**31 - 2, 2**31 // int(arrivals.max()) - 1):
        moved = arrivals.long() * start
        moved[0] = start
        counters.copy_(((moved + 2**31) % 2**32 - 2**31).int())
        for _ in range(4):
            assert torch.equal(run(arguments)[0], want)
    layer_few._plan.cache_clear()


def test_who_waits_in_vain_says_so(device, monkeypatch):
    monkeypatch.setattr(layer_few, "MAX_POLLS", 3)
    layer_few._plan.cache_clear()
    arguments = make_arguments(1, 16, 8, 4, 3, torch.float32, device, hidden_act="identity")
    counters_of(arguments, monkeypatch)[0] += 1000  # as if launches had happened that never arrived
    assert run(arguments)[0].isnan().all()
    layer_few._plan.cache_clear()


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize("H, I, N, K", [(1024, 4096, 128, 64), (2048, 768, 256, 16), (1000, 3001, 90, 33)])
def test_realistic_sizes(T, H, I, N, K, dtype, device, monkeypatch):
    arguments = make_arguments(T, H, I, N, K, dtype, device)
    y, logits, indices = run(arguments)
    weights, want_indices = flash_routing(logits, N, K, backend="reference")
    assert torch.equal(indices, want_indices)
    x, down, up, *dense = (z.double() for z in (arguments[0], *arguments[2], *arguments[3]))
    s = (down[indices] @ x[:, :, None])[..., 0]
    exact = ((torch.nn.functional.silu(s) * weights)[:, None, :] @ up[indices])[:, 0]
    exact += (torch.nn.functional.silu(x @ dense[0].T) * (x @ dense[1].T)) @ dense[2].T
    assert (y - exact).abs().max() <= 8 * torch.finfo(dtype).eps * exact.abs().max()
    for _ in range(100):
        assert torch.equal(run(arguments)[0], y)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 2])
def test_one_launch(T, device):
    config = FlashMoEConfig(hidden_size=1024, intermediate_size=4096, num_experts=16384, num_experts_per_tok=64)
    with device:
        layer, x = FlashMoE(config).bfloat16().eval(), torch.randn(T, 1024, dtype=torch.bfloat16)
    with torch.no_grad():
        layer(x)
        assert count_launches(lambda: layer(x)) == 1
