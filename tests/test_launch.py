"""Launch tables: what a look-up finds, what a bad table is told, and that every shipped config computes the same."""

import json
import timeit

import pytest
import torch

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


def test_shipped_tables_can_be_read():
    tables = {path.stem: read_table(path) for path in launch.FOLDER.glob("*.json")}
    for table in tables.values():
        assert set(table) <= set(tables["default"]), "a kernel without a safe config"
