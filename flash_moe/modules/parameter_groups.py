"""Parameter groups for an optimizer, since tables, router and dense weights want different steps."""

from typing import Any

from torch import nn

from flash_moe.modules.flash_moe import FlashMoE


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    table_lr: float | None = None,
    router_lr: float | None = None,
    weight_decay: float = 0.01,
) -> list[dict[str, Any]]:
    """All parameters of ``model`` in up to four groups, for any ``torch.optim`` optimizer; empty ones are left out.

    ======== ======================================================================== ============= ================
    name     what is in it                                                            lr            weight_decay
    ======== ======================================================================== ============= ================
    tables   ``down_embed`` and ``up_embed`` of every ``FlashMoE``                    ``table_lr``  0
    router   ``router_gate`` of every ``FlashMoE``                                    ``router_lr`` ``weight_decay``
    matrices other parameters of 2 or more dimensions, but for embeddings             ``lr``        ``weight_decay``
    rest     embeddings, and what has one dimension or none                           ``lr``        0
    ======== ======================================================================== ============= ================

    A row of a table gets a gradient only from the tokens that chose it: far fewer than a dense weight gets, and so the
    tables want a larger step. They do not decay, since an optimizer would shrink rows that no token has chosen, too.

    Args:
        model: any module; ``FlashMoE`` layers may be anywhere in it, or be it.
        lr: of all groups whose own learning rate is not given.
        table_lr, router_lr: of the tables and of the router; ``lr`` when ``None``.
        weight_decay: of the groups that decay; the default is that of ``torch.optim.AdamW``.
    Returns:
        Dictionaries with ``params``, ``name``, ``lr`` and ``weight_decay``; a parameter shared by modules comes once.
        With ``sparse_grad=True`` give the group "tables" to ``torch.optim.SparseAdam`` and the others to an optimizer
        of dense gradients.
    """
    layers = [module for module in model.modules() if isinstance(module, FlashMoE)]
    name_of = {id(module.weight): "rest" for module in model.modules() if isinstance(module, nn.Embedding)}
    name_of |= {id(table.weight): "tables" for layer in layers for table in (layer.down_embed, layer.up_embed)}
    name_of |= {id(layer.router_gate.weight): "router" for layer in layers}
    groups: dict[str, list[nn.Parameter]] = {"tables": [], "router": [], "matrices": [], "rest": []}
    for parameter in model.parameters():
        groups[name_of.get(id(parameter), "matrices" if parameter.ndim >= 2 else "rest")].append(parameter)
    rates = {"tables": lr if table_lr is None else table_lr, "router": lr if router_lr is None else router_lr}
    return [
        {
            "params": parameters,
            "name": name,
            "lr": rates.get(name, lr),
            "weight_decay": weight_decay if name in ("router", "matrices") else 0.0,
        }
        for name, parameters in groups.items()
        if parameters
    ]
