"""Launches past Triton's binder: what is remembered, what goes through Triton again, and that both do the same."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

relaunch = pytest.importorskip("flash_moe.ops._triton.relaunch")
mlp = pytest.importorskip("flash_moe.ops._triton.mlp")


class FakeKernel:
    """Like a Triton kernel, compiled by the launch; notes what was launched through Triton, and what past it."""

    arg_names = ("x_ptr", "y_ptr", "T", "eps", "WIDTH", "SIZE")

    def __init__(self):
        self.through_triton, self.past_triton = [], []
        self.function, self.packed_metadata = "function", "metadata"

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.through_triton.append((grid, args, kwargs)) or self

    def run(self, *args):
        self.past_triton.append(args)

    def counts(self):
        return len(self.through_triton), len(self.past_triton)


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(relaunch, "_remembered", {})
    return FakeKernel()


ALIGNED = torch.zeros(64)[:8]  # of 64 bytes' alignment, as every allocation of torch


def launch(kernel, *, grid=(3,), x=ALIGNED, y=None, T=7, eps=0.5, width=5, **named):
    relaunch.launch(kernel, grid, (x, y), (T, eps), width, **{"SIZE": 9, "num_warps": 4, **named})


def test_second_launch_takes_its_own_addresses_numbers_and_grid(kernel):
    launch(kernel)
    assert kernel.through_triton == [((3,), (ALIGNED, None, 7, 0.5, 5), {"SIZE": 9, "num_warps": 4})]
    other = torch.zeros(4)
    for grid, programs in (((3,), (3, 1, 1)), ((2, 4), (2, 4, 1))):
        launch(kernel, grid=grid, x=other, T=11, eps=0.25)
        expected = (*programs, 0, "function", "metadata", None, None, None, other.data_ptr(), None, 11, 0.25, 5, 9)
        assert kernel.past_triton[-1] == expected
    assert kernel.counts() == (1, 2)


def test_descriptors_go_to_tritons_launcher_as_they_are(kernel):
    """It encodes them. Another dtype compiles to other code, other sizes do not."""
    for i, (tensor, width) in enumerate(((ALIGNED, 8), (ALIGNED, 8), (ALIGNED[:4], 4), (ALIGNED.half(), 8))):
        descriptor = relaunch.TensorDescriptor(tensor, [1, width], [8, 1], [1, 8])
        relaunch.launch(kernel, (3,), (descriptor, None), (7, 0.5), 5, SIZE=9)
        assert kernel.counts() == ((1, i) if i < 3 else (2, 2))
        last = kernel.past_triton[-1] if 0 < i < 3 else kernel.through_triton[-1][1]
        assert any(argument is descriptor for argument in last)


@pytest.mark.parametrize(
    "change",
    [
        {"x": ALIGNED.half()},
        {"y": ALIGNED},
        {"T": 1},
        {"T": 32},
        {"T": 2**31 + 1},
        {"T": 2**63 + 1},
        {"T": 7.0},
        {"T": True},
        {"eps": 16},
        {"width": 6},
        {"SIZE": 10},
        {"num_warps": 8},
        {"num_stages": 2},
    ],
    ids=str,
)
def test_what_compiles_to_other_code_goes_through_triton_once(kernel, change):
    launch(kernel)
    launch(kernel, **change)
    assert kernel.counts() == (2, 0)
    for _ in range(2):
        launch(kernel)
        launch(kernel, **change)
    assert kernel.counts() == (2, 4)


def test_constants_go_by_name_not_by_order(kernel):
    launch(kernel, SIZE=4, num_warps=9)
    relaunch.launch(kernel, (3,), (ALIGNED, None), (7, 0.5), 5, num_warps=4, SIZE=9)
    assert kernel.counts() == (2, 0)


def test_another_kernel_is_not_taken_for_one_that_is_gone(kernel):
    for _ in range(20):
        short_lived = FakeKernel()
        launch(short_lived)
        launch(short_lived)
        assert short_lived.counts() == (1, 1)
        del short_lived


def test_misaligned_tensors_always_go_through_triton(kernel):
    for _ in range(2):
        launch(kernel, x=ALIGNED[1:])
        launch(kernel, y=ALIGNED[2:])
    assert kernel.counts() == (4, 0)
    launch(kernel)
    launch(kernel, x=ALIGNED[4:])
    assert kernel.counts() == (5, 1)


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profilers_hook_sees_every_launch(kernel, name):
    launch(kernel)
    hooks = getattr(relaunch.triton.knobs.runtime, name)
    hooks.add(print)
    try:
        launch(kernel)
    finally:
        hooks.remove(print)
    assert kernel.counts() == (2, 0)
    launch(kernel)
    assert kernel.counts() == (2, 1)


def test_what_is_remembered_is_bounded(kernel, monkeypatch):
    monkeypatch.setattr(relaunch, "MAX_REMEMBERED", 3)
    for size in range(10):
        for _ in range(2):
            launch(kernel, SIZE=size)
        assert kernel.counts() == (size + 1, size + 1)
        assert len(relaunch._remembered) <= 3
    for T in range(2, 10_000, 2):
        launch(kernel, T=T)
    assert len(relaunch._remembered) <= 3
    assert relaunch._kinds.cache_info().maxsize == 4096


def test_launches_of_several_threads(kernel, monkeypatch):
    monkeypatch.setattr(relaunch, "MAX_REMEMBERED", 5)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda i: launch(kernel, T=3 + 16 * i, SIZE=i % 7), range(2000)))
    assert sum(kernel.counts()) == 2000
    launched = sorted((args[9 + 2], args[-1]) for args in kernel.past_triton)
    launched += [(args[2], named["SIZE"]) for _, args, named in kernel.through_triton]
    assert sorted(launched) == [(3 + 16 * i, i % 7) for i in range(2000)]


def test_the_interpreter_is_never_passed_by(kernel, monkeypatch):
    monkeypatch.setattr(FakeKernel, "__getitem__", lambda self, grid: lambda *args, **_: self.past_triton.append(args))
    for _ in range(3):
        launch(kernel)
    assert not relaunch._remembered
    assert kernel.counts() == (0, 3)


def test_numbers_of_a_kind_are_the_same_to_triton():
    jit = pytest.importorskip("triton.runtime.jit")
    compiler = pytest.importorskip("triton.compiler.compiler")
    targets = pytest.importorskip("triton.backends.compiler")
    backend = compiler.make_backend(targets.GPUTarget("cuda", 90, 32))
    numbers = [0, 1, 2, 15, 16, -16, -1, 1.0, 0.0, 16.0, 1e300, True, False]
    numbers += [sign * 2**bits + more for sign in (1, -1) for bits in (30, 31, 32, 62) for more in (-16, -1, 0, 1)]
    numbers += [2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1, -(2**63)]
    for number, other in itertools.product(numbers, repeat=2):
        if relaunch._kinds(number) == relaunch._kinds(other):
            kinds = [jit.native_specialize_impl(backend, each, False, True, True) for each in (number, other)]
            assert kinds[0] == kinds[1], (number, other)


def test_relaunch_passes_by_triton_but_where_that_would_compile_again(kernel):
    launch = relaunch.Relaunch(kernel, 3, (7, 0.5), {"WIDTH": 5, "SIZE": 9}, num_warps=4)
    y = torch.zeros(16)
    kept = relaunch.Kept.of(y)
    launch((ALIGNED,), 11, kept)
    named = {"WIDTH": 5, "SIZE": 9, "num_warps": 4}
    assert kernel.through_triton == [((3,), (ALIGNED, y, 7, 0.5), named)]
    launch((ALIGNED,), 11, kept)
    addresses = (ALIGNED.data_ptr(), y.data_ptr())
    assert kernel.past_triton == [(3, 1, 1, 11, "function", "metadata", None, None, None, *addresses, 7, 0.5, 5, 9)]
    launch((ALIGNED[1:],), 11, kept)
    assert kernel.counts() == (2, 1)
    hooks = relaunch.triton.knobs.runtime.launch_enter_hook
    hooks.add(print)
    try:
        launch((ALIGNED,), 11, kept)
    finally:
        hooks.remove(print)
    assert kernel.counts() == (3, 1)
    launch((ALIGNED,), 11, kept)
    assert kernel.counts() == (3, 2)


def make_rows(numel, offset, device, seed):
    """``gate`` and ``up``, which begin ``offset`` elements behind an aligned address."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(numel + offset, generator=generator).to(device)[offset:] for _ in range(2)]


@pytest.mark.gpu
def test_same_values_past_triton(device, monkeypatch):
    """Other addresses, sizes of every kind, and views that begin anywhere."""
    calls = list(itertools.product((1, 7, 16, 1000, 4096, 1, 7, 48, 1001), (0, 1, 4, 0, 3)))

    def check():
        for seed, (numel, offset) in enumerate(calls):
            gate, up = make_rows(numel, offset, device, seed)
            actual = mlp.gated_activation_forward(gate, up, "silu")
            torch.testing.assert_close(actual, torch.nn.functional.silu(gate) * up, rtol=1e-5, atol=1e-6)

    check()
    through_triton, run = [], type(mlp._gated_fwd_kernel).run
    monkeypatch.setattr(
        type(mlp._gated_fwd_kernel),
        "run",
        lambda self, *args, **kw: through_triton.append(args) or run(self, *args, **kw),
    )
    check()
    assert len(through_triton) == sum(offset % 4 > 0 for _, offset in calls)
    assert all(gate.data_ptr() % relaunch.ALIGNMENT for gate, *_ in through_triton)


@pytest.mark.gpu
def test_current_stream_and_graphs(device):
    gate, up = make_rows(4096, 0, device, 0)
    want = mlp.gated_activation_forward(gate, up, "silu")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # clocks; on another stream the kernel would read what is not there yet
        later = mlp.gated_activation_forward(gate + 0, up + 0, "silu")
    stream.synchronize()
    assert torch.equal(later, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = mlp.gated_activation_forward(gate, up, "silu")
    gate.neg_()
    graph.replay()
    assert torch.equal(captured, mlp.gated_activation_forward(gate, up, "silu"))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_that_is_not_the_current_one():
    want = None
    for index in (0, 1, 0, 1, 1):
        gate, up = make_rows(1000, 0, f"cuda:{index}", 0)
        actual = mlp.gated_activation_forward(gate, up, "silu").cpu()
        want = actual if want is None else want
        assert torch.equal(actual, want)
    assert torch.cuda.current_device() == 0
