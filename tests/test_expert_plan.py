"""The choice among the variants of an expert pass: against measured rows, and that it holds what it promises."""

import json
import threading
from math import inf
from pathlib import Path

import pytest
import torch

from flash_moe.bench.cases import ANCHORS
from flash_moe.bench.timing import count_launches
from flash_moe.ops.flash_expert import flash_expert
from flash_moe.testing import make_expert_inputs

plan = pytest.importorskip("flash_moe.ops._triton.expert_plan", reason="there is triton for Linux only")

ROWS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "variants"
MAX_LOSS = 1.1
Key = tuple[str, str, plan.Sizes]


def read_rows() -> dict[Key, tuple[plan.Machine, dict[str, float]]]:
    """Of each GPU, pass and case the GPU's sizes and the median time of every variant; the last row counts."""
    found: dict[Key, tuple[plan.Machine, dict[str, float]]] = {}
    for path in sorted(ROWS.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            key = (row["gpu"], row["pass"], tuple(row["sizes"][letter] for letter in "THEK"))
            _, times = found.setdefault(key, (plan.Machine(**row["machine"]), {}))
            times[row["variant"]] = row["time_us"][1]
    return found


def test_every_anchor_is_measured():
    measured = {(which, sizes) for _, which, sizes in read_rows()}
    assert measured >= {(which, sizes) for which in plan.VARIANTS for sizes in ANCHORS["expert"]}


def test_the_choice_loses_little_wherever_it_was_measured():
    losses = {}
    for (gpu, which, sizes), (machine, times) in read_rows().items():
        chosen = plan.choose(which, sizes, 2, machine)
        loss = times.get(chosen, inf) / min(times.values())
        if loss > MAX_LOSS:
            losses[gpu, which, sizes] = (chosen, loss, times)
    assert not losses


def test_each_variant_is_chosen_somewhere():
    for which, variants in plan.VARIANTS.items():
        cases = [(T, 1024, E, 64) for T in (1, 4096) for E in (1024, 2**20)]
        assert {plan.choose(which, sizes, 2, plan.H200) for sizes in cases} == set(variants)


@pytest.mark.parametrize("T", range(1, 17))
def test_a_few_tokens_take_one_launch(T):
    assert plan.choose(plan.FORWARD, (T, 1024, 16384, 64), 2, plan.H200) == plan.FUSED


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 5, 16])
def test_launches_of_a_few_tokens(T, device):
    if plan.machine_of(device.index or 0).multiprocessors < T * plan.FUSED_PROGRAMS_A_TOKEN:
        pytest.skip("a smaller GPU takes several launches")
    inputs, _ = make_expert_inputs(T, 1024, 16384, 64, torch.bfloat16, device)
    flash_expert(*inputs)
    assert count_launches(lambda: flash_expert(*inputs)) == 1


@pytest.mark.parametrize("which", plan.VARIANTS)
def test_tensor_cores_only_where_they_can_run(which):
    sizes = (4096, 1024, 1024, 64)
    small = plan.H200._replace(shared_nbytes=100 * 1024)
    assert plan.choose(which, sizes, 2, plan.H200) == plan.DENSE
    assert plan.choose(which, sizes, 4, plan.H200) != plan.DENSE
    assert plan.choose(which, sizes, 2, small) != plan.DENSE
    assert plan.choose(which, (4096, 1032, 1024, 64), 2, plan.H200) != plan.DENSE
    for empty in ((0, 1024, 1024, 64), (4096, 1024, 1024, 0)):
        assert plan.choose(which, empty, 2, plan.H200) != plan.DENSE


def test_a_variant_asked_for_holds_on_every_thread_where_a_pass_has_it():
    rows, indices = torch.zeros(2, 16), torch.zeros(2, 3, dtype=torch.long)

    def chosen():
        return {which: plan.variant_for(which, rows, indices, 9) for which in plan.VARIANTS}

    by_model = chosen()
    seen = []
    with plan.use_variant("dense"):
        thread = threading.Thread(target=lambda: seen.append(chosen()))
        thread.start()
        thread.join()
        with plan.use_variant("fused"):
            assert chosen() == {**by_model, "forward": "fused"}
            with plan.use_variant(None):
                assert chosen()["forward"] == "fused"
        assert chosen() == dict.fromkeys(plan.VARIANTS, "dense")
    assert seen == [dict.fromkeys(plan.VARIANTS, "dense")]
    assert chosen() == by_model
