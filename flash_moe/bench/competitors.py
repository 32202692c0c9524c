"""Who is measured: our backends, PyTorch as it is first written, PyTorch written with care, torch.compile, and peers.

A competitor binds a case's inputs to a call of no arguments, so that nothing but the call is timed.
"""

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_moe._backend import why_not_triton
from flash_moe.bench.cases import ANCHORS, LAYER_PARAMETERS, Case, Inputs, dense_case, layer_config
from flash_moe.bench.work import BACKWARD, BOTH, FORWARD
from flash_moe.modules.flash_moe import FlashMoE
from flash_moe.ops.flash_expert import flash_expert
from flash_moe.ops.flash_mlp import flash_mlp
from flash_moe.ops.flash_router import flash_router

OURS = ("triton", "torch")
# Ours as well, beside a layer: flash_mlp with as many multiplications a token, which computes another function.
DENSE_MLP = "dense_mlp"
# And beside the experts' backward the kernels with row-sparse gradients of the tables.
SPARSE_GRAD = "triton_sparse_grad"
# "reference" is PyTorch eager, the specification: it gathers [T, K, H] and sorts every candidate.
NAMES = (*OURS, "reference", "pytorch_smart", "torch_compile", "liger", DENSE_MLP, SPARSE_GRAD)
# Compiling takes longer than all else, so by default only these are compiled; --backend torch_compile compiles any.
COMPILED = {op: tuple("x".join(map(str, sizes)) for sizes in cases) for op, cases in ANCHORS.items()}
# A layer takes the longest, and compiled it changes little from one T to the next.
COMPILED["layer"] = tuple(f"{16**i}x1024x4096x16384x64" for i in range(5))
# By default; --backend triton_sparse_grad measures any: 4096x1024x1048576x64 differs from the first in E alone.
ROW_SPARSE = ("4096x1024x16384x64", "8192x2048x1048576x64")
COMPILER = "inductor"
PUBLIC_OPS: dict[str, Callable[..., Any]] = {"router": flash_router, "expert": flash_expert, "mlp": flash_mlp}

Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Bound:
    """One competitor at one case: what a pass calls, and what its backward differentiates by."""

    function: Callable[[], Any]
    leaves: tuple[Tensor, ...]
    dout: Tensor

    def prepare(self, which: str) -> Callable[[], Any]:
        """The call of pass ``which``; to be made and called in grad mode unless that is the forward."""
        if which == FORWARD:
            return self.function
        if which == BOTH:
            return self._forward_backward
        out = _first(self.function())
        return partial(torch.autograd.grad, out, self.leaves, self.dout, retain_graph=True)

    def results(self, which: str, dout: Tensor | None = None) -> Results:
        """What the function returns and, unless ``which`` is the forward, the gradient of every leaf."""
        with torch.set_grad_enabled(which != FORWARD):
            out = self.function()
            outs = out if isinstance(out, tuple) else (out,)
            if which == FORWARD:
                return outs
            dout = self.dout if dout is None else dout
            return (*(each.detach() for each in outs), *torch.autograd.grad(outs[0], self.leaves, dout))

    def _forward_backward(self) -> Results:
        return torch.autograd.grad(_first(self.function()), self.leaves, self.dout)


@dataclass(frozen=True)
class Competitor:
    name: str
    bind: Callable[[Inputs, str], Bound]
    """Takes the inputs and the pass."""
    captured: tuple[str, ...] = ()
    """The passes that a CUDA graph can hold: those without a synchronisation."""
    computes: Case | None = None
    """Of what computes something else than the case it stands beside: what it is checked, counted and bounded as."""
    passes: tuple[str, ...] = (FORWARD, BACKWARD, BOTH)
    """In which it has something of its own to show."""

    @property
    def is_ours(self) -> bool:
        return self.name in (*OURS, DENSE_MLP, SPARSE_GRAD)


def find_competitors(case: Case, device: torch.device, names: tuple[str, ...]) -> list[Competitor]:
    """Those of ``names`` that ``case`` has, or by default all that can run here.

    Raises:
        ValueError: one that was asked for is unknown, or cannot run here; the message says why.
    """
    for name in names:
        if name not in NAMES:
            raise ValueError(f"backend: expected one of {', '.join(NAMES)}; got {name!r}")
        if reason := why_not(name, device):
            raise ValueError(f"backend: {name} cannot run here: {reason}")
    functions = _functions(case, device)
    if not names:
        names = tuple(name for name in NAMES if why_not(name, device) is None)
        if case.name not in COMPILED[case.op]:
            names = tuple(name for name in names if name != "torch_compile")
        if case.name not in ROW_SPARSE:
            names = tuple(name for name in names if name != SPARSE_GRAD)
    return [_competitor(case, name, functions[name]) for name in names if name in functions]


def why_not(name: str, device: torch.device) -> str | None:
    """None where ``name`` can run on ``device``, else the reason."""
    if name in ("triton", SPARSE_GRAD):
        return why_not_triton(device.type)
    if name == "torch_compile":
        return _why_not_compile(device.type)
    if name == "liger":
        if device.type != "cuda":
            return "its kernels need a CUDA GPU"
        return None if find_spec("liger_kernel") else "liger_kernel is not installed"
    return None


def free_competitor(name: str) -> None:
    """Drop what compiling has left behind."""
    if name == "torch_compile":
        torch.compiler.reset()


def _competitor(case: Case, name: str, function: Callable[..., Any]) -> Competitor:
    if name == DENSE_MLP:
        dense = dense_case(case)
        return Competitor(name, partial(_bind_op, dense, function), (FORWARD, BOTH), dense)
    if name == SPARSE_GRAD:
        sparse = replace(case, sparse_grad=True)
        return Competitor(name, partial(_bind_op, sparse, function), (BACKWARD,), sparse, (BACKWARD,))
    captured: tuple[str, ...] = ()
    if name in OURS:
        captured = (FORWARD, BACKWARD, BOTH)
    elif case.op == "mlp":
        captured = (FORWARD, BACKWARD)
    elif name == "pytorch_smart" or (name == "reference" and case.op == "expert"):
        captured = (FORWARD,)  # the router's reference, and the backward of a gather, synchronise
    bind = _bind_layer if case.op == "layer" else _bind_op
    return Competitor(name, partial(bind, case, function), captured)


def _bind_op(case: Case, function: Callable[..., Any], inputs: Inputs, which: str) -> Bound:
    args = [x.detach().requires_grad_() if _is_floating(x) else x for x in inputs.args]
    return Bound(partial(function, *args), tuple(x for x in args if _is_floating(x)), inputs.dout)


def _bind_layer(case: Case, make: Callable[[], nn.Module], inputs: Inputs, which: str) -> Bound:
    """The forward as at inference, BatchNorm with its running statistics; with the backward as in training."""
    x = inputs.args[0].detach().requires_grad_()
    module = make().to(case.dtype)
    for name, tensor in zip(LAYER_PARAMETERS, inputs.args[1:], strict=True):
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, nn.Parameter(tensor))
    module.train(which != FORWARD)
    parameters = dict(module.named_parameters())
    return Bound(partial(module, x), (x, *(parameters[name] for name in LAYER_PARAMETERS)), inputs.dout)


def _functions(case: Case, device: torch.device) -> dict[str, Callable[..., Any]]:
    """Of the ops a function of the case's arguments, of the layer one that makes a module."""
    if case.op == "layer":
        functions: dict[str, Callable[..., Any]] = {
            name: partial(_make_layer, case, name, device) for name in (*OURS, "reference")
        }
        functions[DENSE_MLP] = PUBLIC_OPS["mlp"]
        return functions | {"torch_compile": partial(_make_compiled_layer, case, device)}
    functions = {name: partial(PUBLIC_OPS[case.op], backend=name) for name in (*OURS, "reference")}
    if case.op == "router":
        _, N, K = case.sizes
        functions["pytorch_smart"] = _smart_router(N, K, device)
        # The reference finds its candidates on the device, which breaks the graph of torch.compile.
        functions["torch_compile"] = Lazy(partial(compile_function, functions["pytorch_smart"]))
        return functions
    functions["torch_compile"] = Lazy(partial(compile_function, functions["reference"]))
    if case.op == "expert":
        functions[SPARSE_GRAD] = partial(PUBLIC_OPS["expert"], backend="triton", sparse_grad=True)
        return functions | {"pytorch_smart": _smart_expert}
    del functions["torch"]  # the reference itself
    return functions | {"liger": _liger_mlp}


class Lazy:
    """A function that is made when it is first called, so that nobody pays for a competitor that does not run."""

    def __init__(self, make: Callable[[], Callable[..., Any]]) -> None:
        self._make = make
        self._function: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        if self._function is None:
            self._function = self._make()
        return self._function(*args)


def compile_function(function: Callable[..., Any]) -> Any:
    import torch._functorch.config as functorch_config

    functorch_config.donated_buffer = False  # a backward that is timed runs many times over one forward
    return torch.compile(function, dynamic=False, backend=COMPILER)


def _make_layer(case: Case, backend: str, device: torch.device) -> FlashMoE:
    with torch.device(device):
        return FlashMoE(layer_config(case, backend))


def _make_compiled_layer(case: Case, device: torch.device) -> nn.Module:
    module = _make_layer(case, "reference", device)
    # Of the routing step's sorts of hundreds of candidates Inductor makes Triton code that takes minutes to compile.
    module._choose = torch.compiler.disable(module._choose)  # type: ignore[method-assign]
    module.forward = compile_function(module.forward)  # type: ignore[method-assign] # parameter names stay as they are
    return module


def _smart_router(num_expert_keys: int, num_experts_per_tok: int, device: torch.device) -> Callable[..., Any]:
    """The candidate pairs alone, known before the call; ties fall as ``topk`` lets them."""
    N, K = num_expert_keys, num_experts_per_tok
    rank = torch.arange(1, min(N, K) + 1)
    i, j = (each.to(device) for each in (rank[:, None] * rank[None, :] <= K).nonzero(as_tuple=True))

    def smart_router(router_logits: Tensor, num_expert_keys: int, num_experts_per_tok: int) -> tuple[Tensor, Tensor]:
        values, ids = router_logits.float().topk(min(N, K), dim=-1)
        scores, best = (values[0][:, i] + values[1][:, j]).topk(K, dim=-1)
        pairs = ids[0].gather(1, i[best]) * N + ids[1].gather(1, j[best])
        return scores.to(router_logits.dtype), pairs

    return smart_router


def _smart_expert(
    hidden_states: Tensor, down_weights: Tensor, up_weights: Tensor, indices: Tensor, routing_weights: Tensor
) -> Tensor:
    """Gathers ``[T, K, H]`` once, and the weighted sum is ``embedding_bag``.

    That has no backward in 16 bits on a GPU: where a gradient is asked for, the sum is another gather and a product.
    """
    pre_activations = torch.bmm(F.embedding(indices, down_weights), hidden_states[:, :, None])[:, :, 0]
    coefficients = F.silu(pre_activations) * routing_weights.to(hidden_states.dtype)
    if torch.is_grad_enabled():
        return torch.bmm(coefficients[:, None, :], F.embedding(indices, up_weights))[:, 0]
    return F.embedding_bag(indices, up_weights, mode="sum", per_sample_weights=coefficients)


def _liger_mlp(hidden_states: Tensor, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor) -> Tensor:
    silu_mul = import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
    return F.linear(silu_mul.apply(F.linear(hidden_states, gate_proj), F.linear(hidden_states, up_proj)), down_proj)


def _why_not_compile(device_type: str) -> str | None:
    if COMPILER != "inductor":
        return None
    if device_type == "cuda":
        return why_not_triton("cuda")
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None or not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "torch.compile needs a C++ compiler and Python's headers"
    return None


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
