"""Launch tables: what a look-up finds, how tuning writes them, and that every shipped config computes the same."""

import json
import sys
import timeit

import pytest
import torch

from flash_moe import cli
from flash_moe._backend import why_not_triton
from flash_moe.bench import competitors, tune
from flash_moe.bench.timing import Replayed
from flash_moe.bench.tune import TUNABLES, Tunable, Tuned
from flash_moe.bench.work import FORWARD
from flash_moe.ops._triton import launch
from flash_moe.ops._triton.launch import launch_config, read_table, table_name, use_config

CPU = torch.device("cpu")


def write(folder, name, **kernels):
    """A table in which each kernel has entries ``{sizes: config}``."""
    fields = {
        kernel: {"entries": [{"sizes": list(sizes), "config": config} for sizes, config in entries.items()]}
        for kernel, entries in kernels.items()
    }
    (folder / f"{name}.json").write_text(json.dumps({"gpu": name, "kernels": fields}))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Tables of the test's own, and nothing remembered of others before or after."""
    monkeypatch.setattr(launch, "FOLDER", tmp_path)
    caches = (launch._nearest, launch._table_of, launch._shipped)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


# Look-up


@pytest.mark.parametrize(
    "sizes, expected",
    [
        ((16, 8), 1),
        ((16, 11), 1),  # 8 is nearer than 64 in the logarithm
        ((16, 23), 2),
        ((1, 8), 1),
        ((0, 1), 1),
        ((4096, 8), 3),
        ((400, 8), 3),
        ((300, 8), 1),  # 256, as far from 16 as from 4096: the first
        ((4096, 10**9), 3),
    ],
)
def test_nearest_sizes_win_and_the_first_of_equals(folder, sizes, expected):
    write(folder, "default", k={(16, 8): {"A": 1}, (16, 64): {"A": 2}, (4096, 8): {"A": 3}})
    assert launch_config("k", CPU, sizes) == {"A": expected}


def test_configs_cannot_be_changed(folder):
    write(folder, "default", k={(4,): {"A": 1}})
    with pytest.raises(TypeError):
        launch_config("k", CPU, (4,))["A"] = 2


def test_a_gpu_has_its_own_table_and_else_the_default(folder, monkeypatch):
    write(folder, "default", k={(4,): {"A": 1}}, only_here={(4,): {"A": 2}})
    write(folder, "nvidia_h200", k={(4,): {"A": 3}})
    names = {0: "NVIDIA H200", 1: "NVIDIA Unheard-of 9000 (PCIe)"}
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: asked.append(index) or names[index])
    for _ in range(3):
        assert launch_config("k", torch.device("cuda", 0), (4,)) == {"A": 3}
        assert launch_config("only_here", torch.device("cuda", 0), (4,)) == {"A": 2}
        assert launch_config("k", torch.device("cuda", 1), (4,)) == {"A": 1}
        assert launch_config("k", CPU, (4,)) == {"A": 1}
    assert asked == [0, 1]
    assert table_name(names[1]) == "nvidia_unheard_of_9000_pcie"


def test_numbers_of_tokens_share_what_is_remembered(folder):
    write(folder, "default", k={(4, 8): {"A": 1}})
    for T in range(1, 5000):
        launch_config("k", CPU, (T, 8))
    assert launch._nearest.cache_info().currsize <= 14


def test_a_look_up_is_cheap():
    """About half a microsecond; the bound leaves room for a busy machine."""
    call = lambda: launch_config("dots", CPU, (4096, 1024, 16384, 64))  # noqa: E731
    assert min(timeit.repeat(call, number=2000, repeat=20)) / 2000 < 5e-6


def test_a_forced_config_holds_until_the_end_and_says_who_asked():
    shipped = launch_config("dots", CPU, (4, 8, 16, 2))
    with use_config("dots", {"A": 1}) as asked:
        assert not asked
        assert launch_config("dots", CPU, (4, 8, 16, 2)) == {"A": 1}
        with use_config("dots", {"A": 2}):
            assert launch_config("dots", CPU, (5, 8, 16, 2)) == {"A": 2}
        assert launch_config("dots", CPU, (6, 8, 16, 2)) == {"A": 1}
        assert launch_config("token_sums", CPU, (6, 8, 16, 2)) != {"A": 1}
        assert asked == {(4, 8, 16, 2), (6, 8, 16, 2)}
    with pytest.raises(ZeroDivisionError), use_config("dots", {"A": 1}):
        raise ZeroDivisionError
    assert launch_config("dots", CPU, (4, 8, 16, 2)) == shipped


# What is wrong is named


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", r"default.json: expected a JSON file; got .*line 1"),
        ("[]", r"default.json: kernels: expected an object; got None"),
        ('{"kernels": []}', r"default.json: kernels: expected an object; got \[\]"),
        ('{"kernels": {"k": 3}}', r"default.json: kernels.k: expected an object with entries; got 3"),
        ('{"kernels": {"k": {"entries": {}}}}', r"default.json: kernels.k.entries: expected a list; got {}"),
        ('{"kernels": {"k": {"entries": []}}}', r"kernels.k.entries: expected one entry or more; got \[\]"),
        ('{"kernels": {"k": {"entries": [1]}}}', r"kernels.k.entries\[0\]: expected an object with sizes"),
        ('{"kernels": {"k": {"entries": [{"sizes": 4}]}}}', r"entries\[0\].sizes: expected a list; got 4"),
        ('{"kernels": {"k": {"entries": [{"sizes": []}]}}}', r"entries\[0\].config: expected an object; got None"),
        ('{"kernels": {"k": {"entries": [{"sizes": [], "config": {}}]}}}', r"sizes: expected one size or more"),
        ('{"kernels": {"k": {"entries": [{"sizes": [0], "config": {}}]}}}', r"sizes\[0\]: .* above 0; got 0"),
        (
            '{"kernels": {"k": {"entries": [{"sizes": [4], "config": {"A": true}}]}}}',
            r"kernels.k.entries\[0\].config.A: expected an integer, 0 or more; got True",
        ),
        (
            '{"kernels": {"k": {"entries": [{"sizes": [4], "config": {}}, {"sizes": [4, 5], "config": {}}]}}}',
            r"kernels.k.entries: expected as many sizes in every entry; got \[1, 2\]",
        ),
    ],
)
def test_malformed_tables_name_the_file_and_the_field(folder, text, message):
    (folder / "default.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        launch_config("k", CPU, (4,))


def test_missing_tables_and_kernels_are_named(folder):
    with pytest.raises(ValueError, match=r"launch table default.json: expected a JSON file; got .*No such file"):
        launch_config("k", CPU, (4,))
    write(folder, "default", dots={(4,): {}}, sums={(4,): {}})
    with pytest.raises(ValueError, match=r"default.json: expected entries of kernel 'k'; got those of dots, sums"):
        launch_config("k", CPU, (4,))
    with pytest.raises(ValueError, match=r"sizes: expected 1 of kernel 'dots'; got 2"):
        launch_config("dots", CPU, (4, 5))


# The shipped tables


def shipped_tables():
    return {path.stem: read_table(path) for path in sorted(launch.FOLDER.glob("*.json"))}


def test_every_tunable_kernel_has_a_safe_config_with_the_same_parameters():
    tables = shipped_tables()
    assert set(tables["default"]) == set(TUNABLES)
    for kernel, tunable in TUNABLES.items():
        parameters = {frozenset(config) for config in tunable.candidates}
        for table in tables.values():
            for entry in table.get(kernel, ()):
                assert len(entry.sizes) == len(tunable.letters)
                assert {frozenset(entry.config)} == parameters


def test_shipped_tables_are_written_as_tuning_writes_them():
    for path in launch.FOLDER.glob("*.json"):
        data = json.loads(path.read_text())
        assert tune.format_table(data) == path.read_text(), path.name
        assert path.stem in ("default", table_name(data["gpu"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", TUNABLES)
def test_every_shipped_config_computes_the_same(kernel, dtype, device):
    if reason := why_not_triton(device.type):
        pytest.skip(reason)
    configs = {tuple(entry.config.items()) for table in shipped_tables().values() for entry in table.get(kernel, ())}
    for case in TUNABLES[kernel].tiny:
        bound = tune.bind(kernel, case, dtype, device)
        assert tune.sizes_of(kernel, bound), f"{case}: expected the launcher to ask launch_config"
        expected = bound.results(TUNABLES[kernel].which)
        for config in configs:
            tune.require_same(expected, tune.run_with_config(kernel, dict(config), bound))


# Tuning


class FakeTimer:
    """A config takes as many microseconds as it says; ``calls`` counts."""

    def __init__(self):
        self.calls = 0

    def time_graph(self, prepare):
        self.calls += 1
        (call,) = (each() for each in prepare)
        call()
        return Replayed([float(launch_config("fake", CPU, (3,))["TIME"])] * 5, None, 0)

    def free(self):
        pass


class RunsTwice(torch.autograd.Function):
    """Another last bit at each call."""

    count = 0

    @staticmethod
    def forward(ctx, x):
        RunsTwice.count += 1
        return x * (1 + RunsTwice.count * 2.0**-23)


FAULTS = ["none", "2 %", "unwritten", "raises", "other bits", "shape"]


def fake_mlp(x, gate, up, down, backend):
    """An op whose launcher looks up the kernel "fake"; parameter FAULT says what is wrong with its result."""
    config = launch_config("fake", x.device, (len(x),))
    out = x * config["SCALE"] / config["SCALE"]
    fault = FAULTS[config["FAULT"]]
    if fault == "2 %":
        return out * 1.02
    if fault == "unwritten":
        partial = torch.empty_like(out)
        partial[1:] = out[1:]
        return partial
    if fault == "raises":
        raise RuntimeError("out of resource\nand more lines")
    if fault == "other bits":
        return RunsTwice.apply(out)
    return out[:, :-1] if fault == "shape" else out


@pytest.fixture
def fake(folder, monkeypatch, device):
    if reason := why_not_triton(device.type):
        pytest.skip(reason)
    times = {"none": 20, "2 %": 1, "unwritten": 2, "raises": 3, "other bits": 4, "shape": 5}
    candidates = [{"SCALE": 2, "FAULT": FAULTS.index(fault), "TIME": time} for fault, time in times.items()]
    default = {"SCALE": 1, "FAULT": 0, "TIME": 30}
    write(folder, "default", fake={(3,): default})
    tunable = Tunable("mlp", FORWARD, ("T",), (*candidates, default), ((3, 8, 4), (6, 8, 4)), ())
    monkeypatch.setattr(tune, "TUNABLES", {"fake": tunable})
    monkeypatch.setitem(competitors.PUBLIC_OPS, "mlp", fake_mlp)
    return tunable


def test_the_fastest_right_config_wins_and_wrong_ones_are_refused(fake, device):
    timer = FakeTimer()
    found = tune.tune_kernel("fake", (3, 8, 4), torch.float32, device, timer)
    assert (found.config, found.time_us, found.default_us) == ({"SCALE": 2, "FAULT": 0, "TIME": 20}, 20.0, 30.0)
    assert (found.sizes, found.num_timed, timer.calls) == (((3,),), 2, 2)
    reasons = {FAULTS[config["FAULT"]]: reason for config, reason in found.refused}
    assert set(reasons) == set(FAULTS[1:])
    assert reasons["raises"] == "RuntimeError: out of resource"
    assert "the same bits in every call" in reasons["other bits"]
    assert "(3, 8); got torch.float32 (3, 7)" in reasons["shape"]
    for fault in ("2 %", "unwritten"):
        assert "to rounding" in reasons[fault]


def test_the_default_stays_unless_another_is_clearly_faster(fake, device, monkeypatch):
    close = {"SCALE": 2, "FAULT": 0, "TIME": 30}
    monkeypatch.setattr(tune, "TUNABLES", {"fake": Tunable("mlp", FORWARD, ("T",), (close,), (), ())})
    found = tune.tune_kernel("fake", (3, 8, 4), torch.float32, device, FakeTimer())
    assert found.config["SCALE"] == 1


def test_a_kernel_that_is_not_launched_is_left_out(fake, device, monkeypatch):
    monkeypatch.setitem(competitors.PUBLIC_OPS, "mlp", lambda x, *_, backend: x)
    assert tune.tune_kernel("fake", (3, 8, 4), torch.float32, device, FakeTimer()) is None


def test_roundings_of_16_bits_are_the_same_and_wrong_integers_are_not():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    tune.require_same((x,), (x * (1 + 2**-8),))
    with pytest.raises(ValueError, match="result 1"):
        tune.require_same((x, x), (x, x.clone().index_fill_(0, torch.tensor([5]), 0.0) if x[5] else x + 1))
    with pytest.raises(ValueError, match="integers"):
        tune.require_same((torch.arange(3),), (torch.tensor([0, 2, 1]),))


FIELDS = {"gpu": "A GPU 1", "driver": "1", "torch": "2", "triton": "3", "commit": "abc", "date": "today", "cuda": "13"}


def test_a_table_keeps_what_was_not_tuned_again_and_is_read_back(tmp_path, fake):
    path = tmp_path / "tables" / "a_gpu_1.json"
    config = {"TIME": 2, "SCALE": 1}
    tune.write_table(path, [Tuned("fake", (3, 8, 4), ((64,), (3,)), config, 12.3456, 20.0, 2, ())], FIELDS)
    tune.write_table(path, [Tuned("fake", (3, 8, 4), ((3,),), {"TIME": 5}, 1.0, 2.0, 2, ())], FIELDS)
    assert (
        path.read_text()
        == """{
  "gpu": "A GPU 1",
  "kernels": {
    "fake": {
      "letters": ["T"],
      "measured": {"commit": "abc", "date": "today", "driver": "1", "torch": "2", "triton": "3"},
      "entries": [
        {"sizes": [3], "config": {"TIME": 5}, "time_us": 1.0},
        {"sizes": [64], "config": {"SCALE": 1, "TIME": 2}, "time_us": 12.35}
      ]
    }
  }
}
"""
    )
    entries = read_table(path)["fake"]
    assert [(entry.sizes, dict(entry.config)) for entry in entries] == [((3,), {"TIME": 5}), ((64,), config)]
    with pytest.raises(ValueError, match="out: expected a table of Another; got one of A GPU 1"):
        tune.write_table(path, [], {**FIELDS, "gpu": "Another"})


def test_what_is_tuned_can_be_chosen(fake):
    assert tune.find_jobs((), ()) == [("fake", (3, 8, 4)), ("fake", (6, 8, 4))]
    assert tune.find_jobs(("fake",), ("5x6x7", "small")) == [("fake", (5, 6, 7)), ("fake", (64, 64, 96))]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "tune: expected a CUDA GPU to time the kernels on; got none"),
        (["dots", "--case", "4x8x16x2"], "tune: expected a CUDA GPU"),
        (["dots", "--seconds", "0"], "seconds: expected a number above 0"),
        (["coffee"], "kernel: expected one of dots, token_sums,"),
        (["dots", "--case", "4x8"], "case: expected one of anchors, sweep, small, or sizes TxHxExK of expert"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["flash-moe", "tune", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.startswith("flash-moe: error: " + message)
    assert error.count("\n") == 1


@pytest.mark.gpu
def test_a_kernel_is_tuned_on_a_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(tune, "TUNABLES", {"gated_forward": TUNABLES["gated_forward"]})
    out = tmp_path / "table.json"
    options = ["--case", "64x64x96", "--out", str(out), "--seconds", "0.005", "--commit", "abc"]
    monkeypatch.setattr(sys, "argv", ["flash-moe", "tune", *options])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code, capsys.readouterr()
    assert "refused" in capsys.readouterr().out
    (entry,) = read_table(out)["gated_forward"]
    assert entry.sizes == (64 * 96,)
