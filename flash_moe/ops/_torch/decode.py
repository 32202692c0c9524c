"""A gated-FFN MoE layer in PyTorch: the schedule interpreted, task by task, and a path without a schedule for GPUs.

T tokens, H hidden size, I intermediate size, E experts, K experts a token, P = T * K pairs, S slots. Pair t * K + k is
the k-th expert of token t, in ascending order of ids. What is rounded to 16 bits is what the reference rounds.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_moe._activations import ACTIVATIONS
from flash_moe._moe_layer import SCALE_BLOCK, TINY, MoELayer, Routing
from flash_moe.schedule.decode import Schedule, build_schedule
from flash_moe.schedule.machine import Slots
from flash_moe.schedule.policies import run_policy
from flash_moe.schedule.tasks import SHARED, Kind, Tiles, sizes_of
from flash_moe.schedule.trace import Trace

# The interpreter's grid, and tiles that are few, since each costs a few PyTorch calls, but several a slot.
NUM_PROGRAMS = 8
CPU_TILES = Tiles(
    route_experts=32, route_tokens=128, select_tokens=16, gate_up_columns=256, down_columns=512, combine_tokens=64,
    combine_columns=1024, lead=2,
)  # fmt: skip
# Elements of the weights that are gathered or widened at a time on a GPU, 512 MiB of float32.
CUDA_CHUNK = 2**27
# Fewer pairs than this share of the experts: their weights are gathered. A gathered expert is read twice and written
# once, so that beyond a third of the experts reading all of them moves less.
GATHERED_SHARE = 3
# Of ``grouped_mm`` on a GPU.
MAX_GROUPS = 1024


def decode_forward(hidden_states: Tensor, layer: MoELayer, policy: str) -> tuple[Tensor, Tensor]:
    """``out [T, H]`` and the router's logits ``[T, E]``."""
    if hidden_states.device.type == "cpu":
        return decode_traced(hidden_states, layer, policy, Trace())
    return decode_on_device(hidden_states, layer)


def decode_traced(
    hidden_states: Tensor, layer: MoELayer, policy: str, trace: Trace, tiles: Tiles = CPU_TILES
) -> tuple[Tensor, Tensor]:
    """Run the schedule's tasks one by one, in the order that ``policy`` gives, and fill ``trace``."""
    schedule = build_schedule(sizes_of(hidden_states, layer), tiles, NUM_PROGRAMS)
    interpreter = Interpreter(schedule, hidden_states, layer)
    run_policy(schedule, policy, interpreter.find_slots, interpreter.execute, trace)
    return interpreter.out, interpreter.logits


class Interpreter:
    """The tasks' bodies. Each writes its own tile of one array, so their order cannot change a bit of the result."""

    def __init__(self, schedule: Schedule, hidden_states: Tensor, layer: MoELayer) -> None:
        self.schedule, self.layer = schedule, layer
        sizes = schedule.sizes
        T, P, shared = sizes.T, sizes.T * sizes.K, sizes.shared_intermediate_size
        self.hidden_states, self.x = hidden_states, hidden_states.float()
        self.logits = layer.router_weight.new_empty(T, sizes.E)
        self.indices = torch.empty(T, sizes.K, dtype=torch.int64)
        self.weights = torch.empty(T, sizes.K)
        self.activated = hidden_states.new_empty(P, sizes.I)
        self.shared_activated = hidden_states.new_empty(T if shared else 0, shared)
        self.products = torch.empty(P, sizes.H)
        self.shared_products = torch.empty(T if shared else 0, sizes.H)
        self.out = torch.empty_like(hidden_states)
        self.slots = Slots((), ())
        self._pairs: list[Tensor] = []
        self._bodies = {
            Kind.ROUTE: self._route, Kind.SELECT: self._select, Kind.GATE_UP: self._gate_up, Kind.DOWN: self._down,
            Kind.COMBINE: self._combine,
        }  # fmt: skip

    def execute(self, index: int) -> None:
        task = self.schedule.tasks[index]
        columns, tokens = slice(task.begin, task.end), slice(task.first_token, task.end_token)
        self._bodies[task.kind](task.slot, columns, tokens)

    def find_slots(self) -> Slots:
        """Every program can do this for itself, from the indices of all tokens."""
        experts = self.indices.unique().tolist()
        flat = self.indices.flatten()
        self._pairs = [(flat == e).nonzero().flatten() for e in experts]
        self.slots = Slots(tuple(experts), tuple(len(pairs) for pairs in self._pairs))
        return self.slots

    def _route(self, slot: int, experts: slice, tokens: slice) -> None:
        logits = F.linear(self.x[tokens], self.layer.router_weight[experts].float())
        self.logits[tokens, experts] = logits.to(self.logits.dtype)

    def _select(self, slot: int, columns: slice, tokens: slice) -> None:
        self.weights[tokens], self.indices[tokens] = select_experts(self.logits[tokens], self.layer.routing)

    def _gate_up(self, slot: int, columns: slice, tokens: slice) -> None:
        layer, sizes = self.layer, self.schedule.sizes
        if slot == SHARED:
            assert layer.shared is not None
            gate, up = (F.linear(self.x, w[columns].float()) for w in (layer.shared.gate_proj, layer.shared.up_proj))
            self.shared_activated[:, columns] = self._activate(gate, up)
        else:
            e, pairs = self.slots.experts[slot], self._pairs[slot]
            x, up_rows = self.x[pairs // sizes.K], slice(sizes.I + columns.start, sizes.I + columns.stop)
            gate, up = (
                F.linear(x, weight_rows(layer.gate_up_proj, layer.gate_up_scale, e, rows))
                for rows in (columns, up_rows)
            )
            self.activated[pairs, columns] = self._activate(gate, up)

    def _activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return (ACTIVATIONS[self.layer.hidden_act](gate) * up).to(self.activated.dtype)

    def _down(self, slot: int, columns: slice, tokens: slice) -> None:
        layer = self.layer
        if slot == SHARED:
            assert layer.shared is not None
            down_proj = layer.shared.down_proj[columns].float()
            self.shared_products[:, columns] = F.linear(self.shared_activated.float(), down_proj)
        else:
            down_proj = weight_rows(layer.down_proj, layer.down_scale, self.slots.experts[slot], columns)
            pairs = self._pairs[slot]
            self.products[pairs, columns] = F.linear(self.activated[pairs].float(), down_proj)

    def _combine(self, slot: int, columns: slice, tokens: slice) -> None:
        T, K = self.weights.shape
        products, weights = self.products.view(T, K, -1)[tokens, :, columns], self.weights[tokens]
        out = products[:, 0] * weights[:, :1]
        for k in range(1, K):
            out += products[:, k] * weights[:, k : k + 1]
        if (shared := self.layer.shared) is not None:
            by_token = self.shared_products[tokens, columns]
            if shared.gate is not None:
                by_token = by_token * F.linear(self.x[tokens], shared.gate.float()).sigmoid()
            out += by_token
        self.out[tokens, columns] = out.to(self.out.dtype)


def select_experts(router_logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """``weights [T, K]``, float32, and ``indices [T, K]``, each row in ascending order of ids.

    Ranks are integers, as in a kernel: the bits of a float32, made to sort as it does, above those of the id, so that
    no two are equal and a tie is the lowest id's.
    """
    logits = router_logits.float()
    scores = logits.softmax(dim=-1) if routing.scoring == "softmax" else logits.sigmoid()
    biased = scores if routing.correction_bias is None else scores + routing.correction_bias.float()
    keys = _rank_keys(logits if routing.ranks_by_logits else biased)
    if routing.num_expert_groups > 1:
        keys = keys.masked_fill(~_in_best_groups(biased, routing), torch.iinfo(torch.int64).min)
    indices = keys.topk(routing.num_experts_per_tok, dim=-1).indices.sort(dim=-1).values
    if routing.norm_topk_prob and routing.scoring == "softmax":
        weights = logits.gather(1, indices).softmax(dim=-1)
    else:
        weights = scores.gather(1, indices)
        if routing.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + TINY)
    return weights * routing.routed_scaling_factor, indices


def _rank_keys(values: Tensor) -> Tensor:
    """Distinct int64 that sort as ``values [T, E]`` do, equal ones by descending id; NaN is the largest."""
    bits = (values + 0.0).view(torch.int32).long()  # -0.0 + 0.0 is 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = ordered.masked_fill(values.isnan(), torch.iinfo(torch.int32).max)
    return ordered * 2**32 - torch.arange(values.shape[1], device=values.device)


def _in_best_groups(biased: Tensor, routing: Routing) -> Tensor:
    grouped = biased.unflatten(-1, (routing.num_expert_groups, -1))
    sums = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
    best = _rank_keys(sums).topk(routing.topk_groups, dim=-1).indices
    chosen = torch.zeros_like(sums, dtype=torch.bool).scatter(1, best, True)
    return chosen.repeat_interleave(grouped.shape[-1], dim=1)


def weight_rows(weights: Tensor, scale: Tensor | None, experts: int | slice | Tensor, rows: slice) -> Tensor:
    """Rows of some experts' matrices ``[E, R, C]``, in float32 and times their scale."""
    found = weights[experts, rows].float()
    if scale is None:
        return found
    if scale.dim() == 2:
        return found * scale[experts, rows, None]
    row_blocks = torch.arange(rows.start, rows.stop, device=weights.device) // SCALE_BLOCK
    column_blocks = torch.arange(weights.shape[2], device=weights.device) // SCALE_BLOCK
    return found * scale[experts][..., row_blocks, :][..., column_blocks]


def decode_on_device(hidden_states: Tensor, layer: MoELayer) -> tuple[Tensor, Tensor]:
    """The layer without a schedule, for GPUs: nothing waits for the device, whichever experts are hit."""
    x = hidden_states.float()
    logits = F.linear(x, layer.router_weight.float()).to(layer.router_weight.dtype)
    weights, indices = select_experts(logits, layer.routing)
    T, K, E = *indices.shape, layer.down_proj.shape[0]
    if T == 0:
        return torch.empty_like(hidden_states), logits
    if fits_grouped_products(hidden_states, layer):
        out = _weighted_sum(_grouped_products(hidden_states, layer, indices), weights)
    elif T * K * GATHERED_SHARE <= E:
        out = _weighted_sum(_gathered_products(hidden_states, layer, indices), weights)
    else:
        out = _dense_sum(hidden_states, layer, weights, indices)
    if (shared := layer.shared) is not None:
        gate, up = F.linear(x, shared.gate_proj.float()), F.linear(x, shared.up_proj.float())
        by_token = F.linear(_activate(gate, up, hidden_states, layer), shared.down_proj.float())
        out += by_token if shared.gate is None else by_token * F.linear(x, shared.gate.float()).sigmoid()
    return out.to(hidden_states.dtype), logits


def _activate(gate: Tensor, up: Tensor, hidden_states: Tensor, layer: MoELayer) -> Tensor:
    return (ACTIVATIONS[layer.hidden_act](gate) * up).to(hidden_states.dtype).float()


def _weighted_sum(products: Tensor, weights: Tensor) -> Tensor:
    T, K = weights.shape
    return torch.bmm(weights[:, None], products.view(T, K, -1).float())[:, 0]


def fits_grouped_products(hidden_states: Tensor, layer: MoELayer) -> bool:
    """``grouped_mm`` has kernels for bfloat16 rows of whole 16-byte vectors, on Hopper and Blackwell.

    Elsewhere it reads the groups' sizes on the host, which would wait for the device.
    """
    E, H, I = layer.down_proj.shape
    if hidden_states.is_cuda and torch.cuda.get_device_capability(hidden_states.device)[0] not in (9, 10):
        return False
    dtypes = {hidden_states.dtype, layer.gate_up_proj.dtype, layer.down_proj.dtype}
    return dtypes == {torch.bfloat16} and H % 8 == I % 8 == 0 and E <= MAX_GROUPS


def _grouped_products(hidden_states: Tensor, layer: MoELayer, indices: Tensor) -> Tensor:
    """``[P, H]``, bfloat16: the pairs, sorted by expert, in two products."""
    K, E = indices.shape[1], layer.down_proj.shape[0]
    experts, order = indices.flatten().sort(stable=True)
    ends = torch.searchsorted(experts, torch.arange(E, device=experts.device), right=True).int()
    gate_up = F.grouped_mm(hidden_states[order // K], layer.gate_up_proj.transpose(1, 2), offs=ends)
    gate, up = gate_up.float().chunk(2, dim=-1)
    activated = _activate(gate, up, hidden_states, layer).to(hidden_states.dtype)
    products = F.grouped_mm(activated, layer.down_proj.transpose(1, 2), offs=ends)
    return torch.empty_like(products).index_copy(0, order, products)


def _gathered_products(hidden_states: Tensor, layer: MoELayer, indices: Tensor) -> Tensor:
    """``[P, H]``, float32: each pair with a copy of its expert's weights."""
    K, (H, I) = indices.shape[1], layer.down_proj.shape[1:]
    pairs = torch.arange(indices.numel(), device=indices.device)
    products = []
    for some in pairs.split(max(1, CUDA_CHUNK // (2 * I * H))):
        experts, x = indices.flatten()[some], hidden_states[some // K].float()
        gate_up = weight_rows(layer.gate_up_proj, layer.gate_up_scale, experts, slice(0, 2 * I))
        gate, up = torch.bmm(gate_up, x[..., None])[..., 0].chunk(2, dim=-1)
        down = weight_rows(layer.down_proj, layer.down_scale, experts, slice(0, H))
        products.append(torch.bmm(down, _activate(gate, up, hidden_states, layer)[..., None])[..., 0])
    return torch.cat(products)


def _dense_sum(hidden_states: Tensor, layer: MoELayer, weights: Tensor, indices: Tensor) -> Tensor:
    """``[T, H]``, float32: every expert for every token, a few experts at a time; what was not chosen is left out."""
    T, (E, H, I) = len(hidden_states), layer.down_proj.shape
    x, out = hidden_states.float(), hidden_states.new_zeros(T, H, dtype=torch.float32)
    chosen = weights.new_zeros(T, E, dtype=torch.bool).scatter(1, indices, True)
    coefficients = weights.new_zeros(T, E).scatter(1, indices, weights)
    at_once = max(1, CUDA_CHUNK // max(2 * I * H, 2 * T * I, T * H))
    for experts in (slice(begin, min(begin + at_once, E)) for begin in range(0, E, at_once)):
        gate_up = weight_rows(layer.gate_up_proj, layer.gate_up_scale, experts, slice(0, 2 * I))
        gate, up = torch.matmul(x, gate_up.transpose(1, 2)).chunk(2, dim=-1)
        down = weight_rows(layer.down_proj, layer.down_scale, experts, slice(0, H))
        products = torch.matmul(_activate(gate, up, hidden_states, layer), down.transpose(1, 2))
        terms = products * coefficients[:, experts].t()[..., None]
        out += terms.masked_fill(~chosen[:, experts].t()[..., None], 0.0).sum(dim=0)
    return out
