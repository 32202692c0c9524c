"""The benchmark of what traces cost: that its copy of the kernel is one without them, and else the same."""

import pytest
import torch

pytest.importorskip("triton", reason="needs triton, which there is for Linux only")

from flash_moe.ops._triton import decode


@pytest.fixture
def benchmark_module(load_benchmark):
    return load_benchmark("trace_cost")


@pytest.mark.parametrize("policy", ["static", "queue"])
def test_the_copy_gives_the_same_bits(policy, benchmark_module, device, tmp_path):
    benchmark_module.NUM_LAYERS = 1
    copy = benchmark_module.without_traces(tmp_path).decode_kernel
    assert copy is not decode.decode_kernel
    text = (tmp_path / "decode_kernel_without_traces.py").read_text()
    assert "now(TRACE)" not in text
    assert "record(" not in text
    call = benchmark_module.make_call(2, (24, 20, 6, 2), policy, device)

    def kernels_launched():
        call()
        return {prepared._launch._kernel for prepared in decode._prepared.values()}

    assert benchmark_module.run_with(copy, kernels_launched) == {copy}
    assert kernels_launched() == {decode.decode_kernel}
    benchmark_module.check_same_bits(call, copy)


def test_another_kernel_is_found_out(benchmark_module, device, monkeypatch):
    benchmark_module.NUM_LAYERS = 1
    call = benchmark_module.make_call(1, (24, 20, 6, 2), "static", device)
    monkeypatch.setattr(benchmark_module, "run_with", lambda kernel, call: [torch.zeros_like(x) for x in call()])
    with pytest.raises(ValueError, match="expected the same bits"):
        benchmark_module.check_same_bits(call, None)


def test_lines_that_are_not_found_are_told(benchmark_module, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark_module, "TRACES", r"no such line\n")
    with pytest.raises(ValueError, match="expected 8 lines that trace; got 0"):
        benchmark_module.without_traces(tmp_path)
