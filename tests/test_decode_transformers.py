"""flash_decode gives what the MoE blocks of transformers give, from the same weights, and is no less exact."""

import warnings

import pytest
import torch

from flash_moe import flash_decode
from flash_moe._moe_layer import MoELayer, Routing, SharedExpert
from flash_moe.bench.decode_cases import POOL_TOKENS, ROUTER_SCALE, draw_tokens, find_decode_cases
from flash_moe.bench.decode_checks import _whole_sums, find_truth, tied_share
from flash_moe.bench.decode_competitors import bind_ours
from flash_moe.ops._reference.decode import decode_experts_reference, decode_routing_reference
from flash_moe.testing import assert_no_worse_than, make_decode_inputs

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what transformers says of other packages while it is imported
    pytest.importorskip("transformers")
    from transformers import DeepseekV3Config, MixtralConfig, OlmoeConfig, Qwen2MoeConfig, Qwen3MoeConfig
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

H, I, E, K = 64, 48, 16, 4
# By default a block alone, outside its model, has no way chosen to run its experts, which transformers remarks on.
SHARED = {"hidden_size": H, "experts_implementation": "eager"}


def qwen3(norm=True):
    config = Qwen3MoeConfig(
        moe_intermediate_size=I, num_experts=E, num_experts_per_tok=K, norm_topk_prob=norm, **SHARED
    )
    return Qwen3MoeSparseMoeBlock(config), {"norm_topk_prob": norm}


def olmoe():
    config = OlmoeConfig(intermediate_size=I, num_experts=E, num_experts_per_tok=K, **SHARED)
    return OlmoeSparseMoeBlock(config), {"norm_topk_prob": False}


def mixtral():
    config = MixtralConfig(intermediate_size=I, num_local_experts=E, num_experts_per_tok=2, **SHARED)
    return MixtralSparseMoeBlock(config), {"num_experts_per_tok": 2}


def qwen2():
    config = Qwen2MoeConfig(
        moe_intermediate_size=I, shared_expert_intermediate_size=72, num_experts=E, num_experts_per_tok=K,
        norm_topk_prob=False, **SHARED,
    )  # fmt: skip
    return Qwen2MoeSparseMoeBlock(config), {"norm_topk_prob": False}


def deepseek():
    config = DeepseekV3Config(
        moe_intermediate_size=I, n_routed_experts=E, num_experts_per_tok=K, n_group=4, topk_group=2,
        n_shared_experts=2, routed_scaling_factor=2.5, norm_topk_prob=True, **SHARED,
    )  # fmt: skip
    groups = {"num_expert_groups": 4, "topk_groups": 2, "routed_scaling_factor": 2.5}
    return DeepseekV3MoE(config), {"scoring": "sigmoid", **groups}


BLOCKS = {
    "qwen3": qwen3, "qwen3 raw": lambda: qwen3(False), "olmoe": olmoe, "mixtral": mixtral, "qwen2": qwen2,
    "deepseek": deepseek,
}  # fmt: skip


def multiples(*shape, of, up_to, seed):
    """So few bits that float32 adds up every logit exactly: the block rounds the same ones as ``flash_decode``."""
    generator = torch.Generator().manual_seed(seed)
    return of * torch.randint(-up_to, up_to + 1, shape, generator=generator)


def make_block(name, dtype, device):
    """The block with weights of about unit gain, and everything that ``flash_decode`` takes of it."""
    block, options = BLOCKS[name]()
    generator = torch.Generator().manual_seed(0)
    for tensor in block.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) / tensor.shape[-1] ** 0.5)
    block.gate.weight.detach().copy_(multiples(E, H, of=2**-6, up_to=12, seed=2))
    block = block.to(device=device, dtype=dtype).eval().requires_grad_(False)
    shared = getattr(block, "shared_expert", None) or getattr(block, "shared_experts", None)
    if shared is not None:
        options |= {f"shared_{part}": getattr(shared, part).weight for part in ("gate_proj", "up_proj", "down_proj")}
    if hasattr(block, "shared_expert_gate"):
        options["shared_expert_gate"] = block.shared_expert_gate.weight
    if hasattr(block.gate, "e_score_correction_bias"):
        options["correction_bias"] = block.gate.e_score_correction_bias
        options["router_weight"] = block.gate.weight.to(torch.promote_types(dtype, torch.float32))
    given = {
        "router_weight": block.gate.weight, "gate_up_proj": block.experts.gate_up_proj,
        "down_proj": block.experts.down_proj, "num_experts_per_tok": K,
    }  # fmt: skip
    return block, given | options


def layer_of(arguments):
    """``arguments`` of ``flash_decode`` as its implementations take them."""
    shared = SharedExpert(*(arguments.get(f"shared_{part}") for part in ("gate_proj", "up_proj", "down_proj")))
    return MoELayer(
        *(arguments[name] for name in ("router_weight", "gate_up_proj", "down_proj")),
        Routing(**{name: arguments[name] for name in Routing._fields if name in arguments}),
        shared=shared._replace(gate=arguments.get("shared_expert_gate")) if "shared_gate_proj" in arguments else None,
    )


def in_float64(value):
    if isinstance(value, torch.Tensor):
        return value.double()
    return type(value)(*map(in_float64, value)) if hasattr(value, "_fields") else value


def tokens(T, dtype, device):
    # Of 64 such tokens two tie in bfloat16.
    return multiples(1, T, H, of=2**-4, up_to=48, seed=5).to(device=device, dtype=dtype)


@pytest.mark.parametrize("backend, T", [("triton", 1), ("torch", 40), ("reference", 40)])
@pytest.mark.parametrize("name", BLOCKS)
def test_same_as_the_block_in_float32(name, backend, T, device):
    block, arguments = make_block(name, torch.float32, device)
    x = tokens(T, torch.float32, device)
    torch.testing.assert_close(flash_decode(x[0], **arguments, backend=backend), block(x)[0], rtol=1e-4, atol=1e-5)


def may_choose_otherwise(logits, routing):
    """``[T]``: the K-th logit, rounded as the block rounds it, equals the next. Biased float32 scores may not tie."""
    ranked, K = logits.sort(dim=-1, descending=True).values, routing.num_experts_per_tok
    return (ranked[:, K - 1] == ranked[:, K]) & routing.ranks_by_logits


@pytest.mark.parametrize("T", [1, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_no_less_exact_than_the_block(name, dtype, T, device):
    """Against the specification in float64, for the tokens that both send to the same experts: a tie may be broken."""
    block, arguments = make_block(name, dtype, device)
    x = tokens(T, dtype, device)
    out, logits = flash_decode(x[0], **arguments, return_router_logits=True)
    with _whole_sums():
        theirs, (their_logits, scores, indices) = block(x)[0], block.gate(x)
    assert torch.equal(logits, their_logits)
    layer = in_float64(layer_of(arguments))
    weights, ours = decode_routing_reference(logits.double(), layer.routing)
    exact = decode_experts_reference(x[0].double(), layer, weights, ours)
    same = (indices.sort(dim=-1).values == ours.sort(dim=-1).values).all(dim=-1)
    print(f"{name}, {dtype}: {1 - same.float().mean():.1%} of {T} tokens have a tie that is broken otherwise")
    assert (same | may_choose_otherwise(logits, layer.routing)).all()
    assert same.float().mean() > 0.95
    rtol = 2 * torch.finfo(scores.dtype).eps
    scores, weights = scores.sort(dim=-1).values, weights.sort(dim=-1).values
    torch.testing.assert_close(scores.double(), weights, rtol=rtol, atol=1e-6)
    assert_no_worse_than([theirs[same]], [exact[same]], [out[same]], ["out"])
    difference = (out - theirs)[same].double().norm() / exact[same].norm()
    assert difference < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 6, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_no_less_exact_than_the_block_at_full_size(dtype, T, device):
    """Of Qwen3-30B-A3B, whose experts and scores ``find_truth`` compares."""
    (case,) = find_decode_cases(f"qwen3-30b-a3b:T{T}", (str(dtype).removeprefix("torch."),), device.type)
    _, *sizes, K = case.sizes
    pool, layer = make_decode_inputs(POOL_TOKENS, *sizes, Routing(K), dtype, device)
    inputs = draw_tokens(case, pool, layer._replace(router_weight=layer.router_weight * ROUTER_SCALE))
    tied_share([inputs])
    truth = find_truth(inputs, has_block=True)
    out = bind_ours("auto", "auto", inputs)()
    clear = ~inputs.is_tied
    assert_no_worse_than([truth.block[clear]], [truth.exact[clear]], [out[clear]], ["out"])
