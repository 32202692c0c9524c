"""The cases for compute-sanitizer, without it: that they run and can fail."""

import pytest
import torch

from flash_moe._moe_layer import Routing

pytest.importorskip("triton", reason="needs triton, which there is for Linux only")


@pytest.fixture
def sanitize(load_benchmark):
    return load_benchmark("sanitize")


@pytest.mark.parametrize("name", ["mlp-few", "quantized"])
def test_a_family_runs(name, sanitize, capsys):
    assert sanitize.main([name]) == 0
    assert capsys.readouterr().out == f"done {name}\n"


def test_names_are_listed(sanitize, capsys):
    assert sanitize.main(["--list"]) == 0
    assert capsys.readouterr().out.split() == list(sanitize.FAMILIES)


def test_an_unknown_name_is_refused(sanitize, capsys):
    with pytest.raises(SystemExit) as end:
        sanitize.main(["everything"])
    assert end.value.code == 2
    assert "invalid choice: 'everything'" in capsys.readouterr().err


def test_different_bits_are_told(sanitize, monkeypatch):
    outputs = iter([torch.zeros(2), torch.ones(2)])
    monkeypatch.setattr(sanitize, "flash_decode", lambda *_, **__: next(outputs))
    with pytest.raises(ValueError, match="flash_decode of 1 tokens: expected the same bits in every call; got others"):
        sanitize._decode("auto", 1, (8, 4, 2), Routing(1), torch.float32, torch.device("cpu"))
