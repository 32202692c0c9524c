"""What the tests of an op share: random inputs, gradients of every input, a computed error budget, poisoned memory.

T tokens, H hidden size, I intermediate size, E experts, K experts a token, N expert keys a half (E = N * N).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from flash_moe._moe_layer import SCALE_BLOCK, MoELayer, Routing, SharedExpert

# Router logits are multiples of 2^-16 below 2^6, so that float32 adds two of them exactly and float32 and float64 agree
# on every order and every tie.
_LOGIT_STEP = 2.0**-16
# Elements before and after every poisoned buffer. 512 elements keep the buffer as aligned as the allocator had it.
_GUARD = 512


def make_router_inputs(
    T: int, N: int, K: int, dtype: torch.dtype, device: str | torch.device, seed: int = 0
) -> tuple[tuple[Tensor, int, int], Tensor]:
    """``(router_logits [2, T, N], N, K)`` and ``dscores [T, K]``; every sum of two logits is exact in float32."""
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.randn(2, T, N, generator=generator, device=device)
    logits = (logits / _LOGIT_STEP).round() * _LOGIT_STEP
    return (logits.to(dtype), N, K), torch.randn(T, K, generator=generator, device=device).to(dtype)


def make_expert_inputs(
    T: int,
    H: int,
    E: int,
    K: int,
    dtype: torch.dtype,
    device: str | torch.device,
    seed: int = 0,
    *,
    indices_dtype: torch.dtype = torch.int64,
    weights_dtype: torch.dtype | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The five tensors of ``flash_expert`` and ``dout [T, H]``; uniform ids, pre-activations of unit variance."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    hidden_states, up_weights, dout = randn(T, H).to(dtype), randn(E, H).to(dtype), randn(T, H).to(dtype)
    down_weights = (randn(E, H) / math.sqrt(H)).to(dtype)
    indices = torch.randint(E, (T, K), generator=generator, device=device, dtype=indices_dtype)
    routing_weights = torch.rand(T, K, generator=generator, device=device).to(weights_dtype or dtype)
    return (hidden_states, down_weights, up_weights, indices, routing_weights), dout


def make_mlp_inputs(
    T: int, H: int, I: int, dtype: torch.dtype, device: str | torch.device, seed: int = 0
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The four tensors of ``flash_mlp`` and ``dout [T, H]``; gate, up and output of about unit variance."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    hidden_states, dout = randn(T, H).to(dtype), randn(T, H).to(dtype)
    gate_proj, up_proj = ((randn(I, H) / math.sqrt(H)).to(dtype) for _ in range(2))
    return (hidden_states, gate_proj, up_proj, (randn(H, I) / math.sqrt(I)).to(dtype)), dout


def make_decode_inputs(
    T: int,
    H: int,
    I: int,
    E: int,
    routing: Routing,
    dtype: torch.dtype,
    device: str | torch.device,
    seed: int = 0,
    *,
    shared_intermediate_size: int = 0,
    has_shared_gate: bool = False,
    scale: str = "none",
) -> tuple[Tensor, MoELayer]:
    """``hidden_states [T, H]`` and a layer; ``scale`` is "none", "row" or "block" for float8 weights with scales.

    Tokens and router weights are small multiples of a power of two, so that float32 adds up every logit exactly, in
    whatever order: all backends round the same logits and choose the same experts, and ties are frequent.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device) / math.sqrt(shape[-1])

    def multiples(*shape: int, of: float, up_to: int) -> Tensor:
        return torch.randint(-up_to, up_to + 1, shape, generator=generator, device=device).mul(of).to(dtype)

    shared = None
    if Is := shared_intermediate_size:
        gate = randn(1, H).to(dtype) if has_shared_gate else None
        shared = SharedExpert(randn(Is, H).to(dtype), randn(Is, H).to(dtype), randn(H, Is).to(dtype), gate)
    gate_up_proj, gate_up_scale = _quantize(randn(E, 2 * I, H), dtype, scale)
    down_proj, down_scale = _quantize(randn(E, H, I), dtype, scale)
    layer = MoELayer(
        multiples(E, H, of=2**-6, up_to=12), gate_up_proj, down_proj, routing, "silu", shared, gate_up_scale, down_scale
    )
    return multiples(T, H, of=2**-4, up_to=48), layer


def decode_arguments(layer: MoELayer) -> dict[str, Any]:
    """``layer`` as ``flash_decode`` takes it."""
    shared = layer.shared or (None, None, None, None)
    names = ("shared_gate_proj", "shared_up_proj", "shared_down_proj", "shared_expert_gate")
    others = {name: value for name, value in layer._asdict().items() if name not in ("routing", "shared")}
    return {**others, **layer.routing._asdict(), **dict(zip(names, shared, strict=True))}


def _quantize(weights: Tensor, dtype: torch.dtype, scale: str) -> tuple[Tensor, Tensor | None]:
    """Rounded to ``dtype``; or to float8, with a scale a row or a block that brings the largest element to 448."""
    if scale == "none":
        return weights.to(dtype), None
    E, R, C = weights.shape
    size = (1, C) if scale == "row" else (SCALE_BLOCK, SCALE_BLOCK)
    rows, columns = -(-R // size[0]), -(-C // size[1])
    padded = weights.new_zeros(E, rows * size[0], columns * size[1])
    padded[:, :R, :C] = weights
    blocks = padded.view(E, rows, size[0], columns, size[1])
    scales = blocks.abs().amax(dim=(2, 4), keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    quantized = (blocks / scales).view_as(padded)[:, :R, :C].to(torch.float8_e4m3fn)
    return quantized, scales[:, :, 0, 0, 0] if scale == "row" else scales[:, :, 0, :, 0]


def run_with_grads(
    function: Callable[..., Any], inputs: Sequence[Any], dout: Tensor, **kwargs: Any
) -> tuple[Tensor, ...]:
    """The first output of ``function(*inputs, **kwargs)``, then the gradient of every floating-point tensor in it."""
    arguments = [x.detach().requires_grad_() if _is_floating(x) else x for x in inputs]
    out = function(*arguments, **kwargs)
    out = out[0] if isinstance(out, tuple) else out
    grads = torch.autograd.grad(out, [x for x in arguments if _is_floating(x)], dout)
    return (out.detach(), *grads)


def run_rounded_once(
    function: Callable[..., Any], inputs: Sequence[Any], dout: Tensor, **kwargs: Any
) -> tuple[Tensor, ...]:
    """``run_with_grads`` in float32, each result rounded once to its input's dtype.

    The yardstick for an op that accumulates in float32: run in bfloat16, a reference that adds a thousand gradients
    into one row is so inexact that a budget computed from it catches nothing.
    """
    out, *grads = run_with_grads(function, _to_dtype(inputs, torch.float32), dout.float(), **kwargs)
    dtypes = [x.dtype for x in inputs if _is_floating(x)]
    return (out.to(dout.dtype), *(grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)))


def to_float64(values: Any) -> Any:
    """A tensor, or a sequence of arguments, with the floating-point tensors in float64 and the rest as it was."""
    return _to_dtype(values, torch.float64)


def assert_no_worse_than(
    low: Sequence[Tensor], exact: Sequence[Tensor], actual: Sequence[Tensor], names: Sequence[str]
) -> None:
    """Fail unless the error of ``actual`` is about that of ``low``, both measured against the float64 ``exact``.

    For every result: the largest error at most 2 times that of ``low`` plus 4 eps of the largest exact value, and the
    root-mean-square error at most 1.25 times that of ``low`` plus eps / 2 of the exact root mean square, 4 eps in
    float32, where two equally good orders of a sum differ by that; eps is the result dtype's. Shapes and dtypes must
    be those of ``low``.
    """
    for name, low_x, exact_x, x in zip(names, low, exact, actual, strict=True):
        assert x.dtype == low_x.dtype, f"{name}: expected {low_x.dtype}; got {x.dtype}"
        assert x.shape == exact_x.shape, f"{name}: expected shape {tuple(exact_x.shape)}; got {tuple(x.shape)}"
        if x.numel() == 0:
            continue
        eps = torch.finfo(x.dtype).eps
        max_error, rms_error, max_scale, rms_scale = *_max_and_rms(x - exact_x), *_max_and_rms(exact_x)
        low_max, low_rms = _max_and_rms(low_x - exact_x)
        rms_eps = 4 * eps if x.dtype == torch.float32 else eps / 2
        max_budget, rms_budget = 2 * low_max + 4 * eps * max_scale, 1.25 * low_rms + rms_eps * rms_scale
        # Written so that a NaN fails.
        assert max_error <= max_budget, f"{name}: largest error {max_error:.3e}, budget {max_budget:.3e}"
        assert rms_error <= rms_budget, f"{name}: RMS error {rms_error:.3e}, budget {rms_budget:.3e}"


@contextmanager
def poison_memory() -> Iterator[None]:
    """Hand out memory that is full of NaN (-1 where integer), and fail if anything writes outside what it asked for.

    Replaces ``torch.empty`` and its relatives, so a caller that imported one of them by name escapes.
    """
    buffers: list[tuple[Tensor, Tensor]] = []
    relatives: list[tuple[Any, str]] = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided")]
    relatives += [(Tensor, "new_empty"), (Tensor, "new_empty_strided")]
    patches = [patch.object(owner, name, _poisoned(getattr(owner, name), buffers)) for owner, name in relatives]
    try:
        for each in patches:
            each.start()
        yield
    finally:
        for each in patches:
            each.stop()
    for storage, guards in buffers:
        now = torch.cat([storage[:_GUARD], storage[-_GUARD:]])
        assert torch.equal(now.view(torch.uint8), guards.view(torch.uint8)), "something wrote outside its buffer"


def _poisoned(allocate: Callable[..., Tensor], buffers: list[tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        out = allocate(*args, **kwargs)
        if type(out) is not Tensor or out.device.type == "meta" or "out" in kwargs:
            return out
        storage = torch.full((out.numel() + 2 * _GUARD,), _poison(out.dtype), dtype=out.dtype, device=out.device)
        buffers.append((storage, torch.cat([storage[:_GUARD], storage[-_GUARD:]])))
        shaped = storage.new_tensor([]).set_(storage.untyped_storage(), _GUARD, out.size(), out.stride())
        return shaped.requires_grad_(out.requires_grad)

    return poisoned


def surround_with_nan(tensor: Tensor) -> Tensor:
    """A contiguous copy of ``tensor`` amid NaN (-1 where integer): a kernel that reads outside its input meets it."""
    size = tensor.numel()
    storage = torch.full((size + 2 * _GUARD,), _poison(tensor.dtype), dtype=tensor.dtype, device=tensor.device)
    return storage[_GUARD : _GUARD + size].view(tensor.shape).copy_(tensor)


def peak_nbytes(function: Callable[[], Any], device: str | torch.device) -> int:
    """The most memory that ``function`` held at any one time beyond what was there before it, its results included."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = function()
    del result
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def _is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _to_dtype(values: Any, dtype: torch.dtype) -> Any:
    if isinstance(values, (tuple, list)):
        return tuple(_to_dtype(value, dtype) for value in values)
    return values.to(dtype) if _is_floating(values) else values


def _poison(dtype: torch.dtype) -> float | int:
    return math.nan if dtype.is_floating_point else 255 if dtype == torch.uint8 else -1


def _max_and_rms(x: Tensor) -> tuple[float, float]:
    x = x.double()
    return x.abs().max().item(), x.square().mean().sqrt().item()
