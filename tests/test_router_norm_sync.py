"""``router_sync`` in two processes, each with some of the tokens, against one process with all of them.

On a CPU over gloo, and over NCCL where there are two GPUs. One start of the processes serves all cases of a device.
"""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import library
from torch.utils.checkpoint import checkpoint

from flash_moe import FlashMoE, FlashMoEConfig

RANKS = 2
STEPS = 3
# Tokens of each rank, the share of them that is no padding, and how the layer is called.
CASES = {
    "equal shares": ((6, 6), None, "plain"),
    "unequal shares": ((3, 9), None, "plain"),
    "padding": ((6, 6), 0.6, "plain"),
    "one token on a rank": ((11, 1), None, "plain"),
    "no token on a rank": ((12, 0), None, "plain"),
    "nothing but padding on a rank": ((8, 4), "first rank", "plain"),
    "checkpointed": ((5, 7), 0.6, "checkpointed"),
    "compiled": ((5, 7), None, "compiled"),
    "without batch norm": ((5, 7), None, "rms"),
    "without any norm": ((5, 7), None, "none"),
}


def make_layer(how, device):
    torch.manual_seed(0)
    config = FlashMoEConfig(
        hidden_size=12,
        intermediate_size=20,
        num_experts=25,
        num_experts_per_tok=3,
        router_norm=how if how in ("rms", "none") else "batch",
        router_sync=True,
        router_bias_update_rate=0.5,
    )
    return FlashMoE(config).to(device)


def make_step(shares, real, seed, device):
    """Tokens with a mean far from 0, the upstream gradients of both outputs, and the mask; of all ranks."""
    generator = torch.Generator().manual_seed(seed)
    T = sum(shares)
    x = torch.randn(T, 12, generator=generator) + 30.0
    dy, dlogits = torch.randn(T, 12, generator=generator), torch.randn(2, T, 5, generator=generator)
    mask = torch.ones(T, dtype=torch.bool)
    if real == "first rank":
        mask[shares[0] :] = False
    elif real is not None:
        mask = torch.rand(T, generator=generator) < real
    dlogits[:, ~mask] = 0.0
    return [each.to(device) for each in (x, dy, dlogits)], None if real is None else mask.to(device)


def run(case, tokens, device):
    """Outputs and gradients of ``tokens`` (a slice of all), step by step, and the buffers after each."""
    shares, real, how = CASES[case]
    layer = make_layer(how, device)
    call = layer
    if how == "compiled":
        torch._dynamo.reset()
        call = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for seed in range(STEPS):
        (x, dy, dlogits), mask = make_step(shares, real, seed, device)
        x = x[tokens].requires_grad_()
        mask = None if mask is None else mask[tokens]
        y, router_logits = checkpoint(call, x, mask, use_reentrant=False) if how == "checkpointed" else call(x, mask)
        torch.autograd.backward((y, router_logits), (dy[tokens], dlogits[:, tokens]))
        kept = slice(None) if mask is None else mask
        results.append(
            {
                "tokens": {"y": y.detach()[kept], "dx": x.grad[kept], "router_logits": router_logits.detach()[:, kept]},
                "gradients": {name: parameter.grad.clone() for name, parameter in layer.named_parameters()},
                "buffers": {
                    name: buffer.clone()
                    for name, buffer in layer.named_buffers()
                    if name != "router_bias_in_use"  # by a rank's own tokens
                },
            }
        )
        layer.zero_grad()
    return results


def work(rank, device_type, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)  # PyTorch 2.11's own, on importing Inductor
    device = torch.device(device_type, rank if device_type == "cuda" else None)
    if device_type == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device_type == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        device_id=device if device_type == "cuda" else None,
    )
    results = {}
    for case, (shares, _, _) in CASES.items():
        start = sum(shares[:rank])
        try:
            results[case] = run(case, slice(start, start + shares[rank]), device)
        except Exception as error:
            raise RuntimeError(f"rank {rank}, {case}") from error
    x = torch.ones(3, device=device, requires_grad=True)
    library.opcheck(torch.ops.flash_moe.sum_over_ranks, (x,))
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two GPUs")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, two_gpus])])
def ranks(request, tmp_path_factory, run_ranks):
    """The results of each rank by case."""
    return run_ranks(work, request.param, tmp_path_factory.mktemp("ranks"), RANKS)


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("case", CASES)
def test_ranks_together_are_one_process_with_all_tokens(case, ranks):
    first, second = (each[case] for each in ranks)
    device = first[0]["buffers"]["router_bias"].device
    expected = run(case, slice(None), device)
    for step in range(STEPS):
        a, b, whole = first[step], second[step], expected[step]
        for name, value in whole["tokens"].items():
            halves = torch.cat((a["tokens"][name], b["tokens"][name]), dim=1 if name == "router_logits" else 0)
            assert relative_error(halves, value) < 1e-5, name
        for name, value in whole["gradients"].items():
            assert relative_error(a["gradients"][name] + b["gradients"][name], value) < 1e-5, name
        torch.testing.assert_close(a["buffers"], whole["buffers"], rtol=1e-5, atol=1e-6)
        assert all(torch.equal(b["buffers"][name], value) for name, value in a["buffers"].items())
    assert whole["buffers"]["router_bias"].ne(0).any()
    if "router_norm.num_batches_tracked" in whole["buffers"]:
        assert whole["buffers"]["router_norm.num_batches_tracked"] == STEPS


def test_without_a_process_group_it_changes_nothing():
    synced = make_layer("plain", "cpu")
    plain = FlashMoE(FlashMoEConfig(**{**vars(synced.config), "router_sync": False}))
    plain.load_state_dict(synced.state_dict())
    x = torch.randn(6, 12)
    assert torch.equal(synced(x)[0], plain(x)[0])
    with pytest.raises(ValueError, match="expected 2 or more tokens"):
        synced(x[:1])
