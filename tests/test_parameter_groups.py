"""Groups of parameters for optimizers: every parameter once, where the documents put it, and training with them."""

import copy

import pytest
import torch
from torch import nn

from flash_moe import FlashMoE, FlashMoEConfig
from flash_moe.modules.grad_norm import clip_grad_norm_
from flash_moe.modules.parameter_groups import parameter_groups


def make_model(**changes):
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_experts": 64, "num_experts_per_tok": 3}
    torch.manual_seed(0)
    blocks = [FlashMoE(FlashMoEConfig(**{**sizes, "router_norm": "rms", **changes})) for _ in range(2)]
    return nn.ModuleDict({"embed": nn.Embedding(10, 12), "blocks": nn.ModuleList(blocks), "norm": nn.LayerNorm(12)})


def run(model, ids):
    x = model["embed"](ids)
    for block in model["blocks"]:
        x = x + block(x)[0]
    return model["norm"](x)


def names_by_group(model, groups):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: sorted(names[id(parameter)] for parameter in group["params"]) for group in groups}


def test_every_parameter_is_in_its_group_once():
    model = make_model()
    groups = parameter_groups(model, 0.1, table_lr=0.3, router_lr=0.05, weight_decay=0.2)
    assert names_by_group(model, groups) == {
        "tables": [f"blocks.{i}.{name}_embed.weight" for i in range(2) for name in ("down", "up")],
        "router": [f"blocks.{i}.router_gate.weight" for i in range(2)],
        "matrices": [f"blocks.{i}.{name}_proj.weight" for i in range(2) for name in ("down", "gate", "up")],
        "rest": ["embed.weight", "norm.bias", "norm.weight"],
    }
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in groups} == {
        "tables": (0.3, 0.0),
        "router": (0.05, 0.2),
        "matrices": (0.1, 0.2),
        "rest": (0.1, 0.0),
    }


def test_one_learning_rate_for_all_unless_given():
    assert {group["lr"] for group in parameter_groups(make_model(), 0.1)} == {0.1}
    assert [group["lr"] for group in parameter_groups(make_model(), 0.1, table_lr=0.0, router_lr=0.0)] == [
        0,
        0,
        0.1,
        0.1,
    ]


def test_empty_groups_are_left_out_and_shared_parameters_come_once():
    model = make_model()
    assert [group["name"] for group in parameter_groups(model["norm"], 0.1)] == ["rest"]
    assert [group["name"] for group in parameter_groups(model["blocks"][0], 0.1)] == ["tables", "router", "matrices"]
    model["blocks"][1].down_embed = model["blocks"][0].down_embed
    model["head"] = nn.Linear(12, 10, bias=False)
    model["head"].weight = model["embed"].weight
    assert sum(len(group["params"]) for group in parameter_groups(model, 0.1)) == len(list(model.parameters()))
    assert "embed.weight" in names_by_group(model, parameter_groups(model, 0.1))["rest"]


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor], ids=str)
def test_optimizers_take_the_groups_and_obey_them(optimizer, device):
    model = make_model().to(device)
    before = copy.deepcopy(model.state_dict())
    groups = parameter_groups(model, 0.01, table_lr=0.0)
    run(model, torch.arange(10, device=device)).square().sum().backward()
    optimizer(groups, lr=1.0).step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert "blocks.0.router_gate.weight" in moved
    assert not any(name.endswith(("down_embed.weight", "up_embed.weight")) for name in moved)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_sparse_adam_for_the_tables_and_adamw_for_the_rest(backend, device):
    """Learns as with dense gradients in Adam, as far as the rows go that every step has; others keep their values."""
    ids = torch.arange(10, device=device)
    target = torch.randn(10, 12, generator=torch.Generator().manual_seed(2)).to(device)
    losses, tables = {}, {}
    for sparse in (False, True):
        model = make_model(sparse_grad=sparse, backend=backend).to(device)
        before = copy.deepcopy(model["blocks"][0].up_embed.weight.detach())
        first, *others = parameter_groups(model, 1e-2, table_lr=2e-2, weight_decay=0.1)
        optimizers = [(torch.optim.SparseAdam if sparse else torch.optim.Adam)([first]), torch.optim.AdamW(others)]
        losses[sparse] = []
        for _ in range(3):
            loss = (run(model, ids) - target).square().mean()
            loss.backward()
            assert model["blocks"][0].up_embed.weight.grad.is_sparse == sparse
            clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses[sparse].append(loss.item())
        tables[sparse] = (model["blocks"][0].up_embed.weight != before).any(-1)
    assert losses[True][:2] == pytest.approx(losses[False][:2], rel=1e-5)  # the first update is the same
    assert losses[True][-1] < 0.95 * losses[True][0]
    assert torch.equal(tables[True], tables[False])
    assert not tables[True].all()
