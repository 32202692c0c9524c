"""How the one launch of flash_decode is cut: tiles of the schedule, and the kernel's constants.

T tokens, H hidden size, I intermediate size, E experts, K experts a token, G programs.
"""

from typing import NamedTuple

from torch import Tensor

from flash_moe._moe_layer import MoELayer
from flash_moe.ops._triton.sizes import cdiv, next_power_of_2
from flash_moe.schedule.tasks import Sizes, Tiles

# Comparisons of keys at once.
RANK_COMPARISONS = 2**14
# Of a multiprocessor.
REGISTERS = 2**16


class Config(NamedTuple):
    """How the work is cut, and what a program is."""

    gate_up_rows: int = 32
    down_rows: int = 64
    block_h: int = 128
    block_i: int = 128
    stages: int = 4
    num_warps: int = 4
    programs: int = 2
    """At most, on a multiprocessor."""
    schedulers: int = 1
    batch: int = 2**20
    """Tasks that a scheduler hands out at once, at most."""

    @property
    def max_registers(self) -> int:
        """Of a thread, so that the programs fit."""
        return max_registers(self.num_warps, self.programs)


def max_registers(num_warps: int, programs: int) -> int:
    """Of a thread, so that so many programs fit a multiprocessor."""
    return min(255, REGISTERS // (32 * num_warps * programs) // 8 * 8)


def config_of(T: int, itemsize: int, weight_itemsize: int) -> Config:
    """Measured on an H200 with the sizes of Qwen3-30B-A3B; bytes of an element of the tokens and of the weights."""
    if T <= 4:
        return Config(32, 64, 256 // itemsize, 256 // itemsize, stages=4)
    if itemsize == 4:  # no tensor cores: what many tokens need would not fit the registers
        return Config(16, 32, 32, 32, stages=4) if T > 16 else Config(64, 128, 32, 32, stages=6)
    block = 128 // weight_itemsize
    return Config(64, 128, block, block, stages=6 if weight_itemsize > 1 else 4)


def tiles_of(sizes: Sizes, config: Config, G: int) -> Tiles:
    few = sizes.T <= 16
    return Tiles(
        route_experts=1 if few else 16,
        route_tokens=16 if few else 8,
        select_tokens=1,
        gate_up_columns=config.gate_up_rows,
        down_columns=config.down_rows,
        combine_tokens=_combine_tokens(sizes, config, G),
        combine_columns=_combine_columns(config),
        lead=max(1, -(-2 * G // -(-sizes.I // config.gate_up_rows))),
    )


def _combine_columns(config: Config) -> int:
    return max(config.down_rows, 64)


def _combine_tokens(sizes: Sizes, config: Config, G: int) -> int:
    """So that most programs combine something at the end."""
    columns = cdiv(sizes.H, _combine_columns(config))
    return min(8, next_power_of_2(max(1, sizes.T * columns // G)))


def kernel_constants(
    sizes: Sizes, config: Config, layer: MoELayer, policy: str, G: int, *, is_traced: bool
) -> dict[str, int | str | bool]:
    routing, block_e = layer.routing, next_power_of_2(sizes.E)
    block_t = max(16, next_power_of_2(sizes.T))
    tiles = tiles_of(sizes, config, G)
    route_tokens = min(tiles.route_tokens, next_power_of_2(sizes.T)) if tiles.route_experts == 1 else 16
    route_h = 4096 // route_tokens if tiles.route_experts == 1 else 512 // (sizes.itemsize // 2)
    return {
        "H": sizes.H, "I": sizes.I, "SHARED_I": sizes.shared_intermediate_size, "E": sizes.E, "K": sizes.K,
        "SCORING": routing.scoring,
        "HAS_BIAS": routing.correction_bias is not None,
        "NORM": routing.norm_topk_prob,
        "GROUPS": routing.num_expert_groups,
        "BEST_GROUPS": routing.topk_groups,
        "HIDDEN_ACT": layer.hidden_act,
        "GATE_UP_SCALE": scale_kind(layer.gate_up_scale),
        "DOWN_SCALE": scale_kind(layer.down_scale),
        "HAS_SHARED_GATE": layer.shared is not None and layer.shared.gate is not None,
        "POLICY": policy,
        "TRACE": is_traced,
        "SCHEDULERS": config.schedulers,
        "BATCH": config.batch,
        "BLOCK_T": block_t,
        "ROUTE_EXPERTS": 1 if tiles.route_experts == 1 else 16,
        "ROUTE_TOKENS": route_tokens,
        "ROUTE_H": min(route_h, max(16, next_power_of_2(sizes.H))),
        "GATE_UP_ROWS": config.gate_up_rows,
        "DOWN_ROWS": config.down_rows,
        "COMBINE_COLUMNS": tiles.combine_columns,
        "COMBINE_TOKENS": tiles.combine_tokens,
        # Whole, however few columns there are: for a single step of 32 columns of 16 bits ptxas 12.8 makes an operand's
        # address from a register that nothing was written to. To be dropped when Triton ships a newer one.
        "BLOCK_H": config.block_h,
        "BLOCK_I": config.block_i,
        "STAGES": config.stages,
        "BLOCK_E": block_e,
        "RANK_BLOCK": max(1, min(block_e, RANK_COMPARISONS // block_e)),
    }  # fmt: skip


def scale_kind(scale: Tensor | None) -> str:
    if scale is None:
        return "none"
    return "block" if scale.dim() == 3 else "row"
