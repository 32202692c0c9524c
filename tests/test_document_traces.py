"""What draws the document's traces: that it takes the launches it names, and every file that the document links."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs triton, which there is for Linux only")

from flash_moe import flash_decode
from flash_moe._moe_layer import Routing
from flash_moe.bench.tracing import find_sizes, simulate
from flash_moe.ops._triton import decode
from flash_moe.testing import decode_arguments, make_decode_inputs

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "flash_decode.md"


@pytest.fixture
def script(load_benchmark):
    return load_benchmark("document_traces")


def test_every_trace_of_the_document_is_written(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "trace_kernel", lambda sizes, policy, seed: simulate(sizes, policy, 8, seed))
    monkeypatch.setattr(script, "find_sizes", lambda model, tokens: find_sizes("8x8x4x2", 2))
    fields = dict.fromkeys(("gpu", "torch", "triton", "commit", "date"), "of a test")
    monkeypatch.setattr(script, "describe_machine", lambda device, commit: fields)
    monkeypatch.setattr("sys.argv", ["document_traces.py", "--out", str(tmp_path)])
    script.main()
    linked = re.findall(r"\(images/(decode_trace_\w+\.\w+)\)", DOCUMENT.read_text(encoding="utf-8"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(linked)
    assert (
        (tmp_path / "decode_trace_actor.txt").read_text().splitlines()[-1].startswith("gpu of a test, torch of a test")
    )


def test_a_launch_is_changed_for_its_trace_alone(script, device):
    x, layer = make_decode_inputs(2, 16, 8, 6, Routing(2), torch.float32, device)
    given = decode_arguments(layer)
    want = flash_decode(x, **given, backend="triton", policy="actor")
    with script.launched_with({"schedulers": 2, "batch": 1}):
        assert torch.equal(flash_decode(x, **given, backend="triton", policy="actor"), want)
        (prepared,) = decode._prepared.values()
        assert (prepared.config.schedulers, prepared.config.batch) == (2, 1)
    assert all(each.config.batch > 1 for each in decode._prepared.values() if isinstance(each, decode.Prepared))
