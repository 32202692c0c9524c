"""No row without right numbers: every output and gradient against float64, on as much of the case as that allows.

Outputs are checked on a sample of tokens, table and weight gradients on a sample of their rows, each computed from all
that it depends on. The call that is checked is the one that is timed, at full size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_moe.bench.cases import LAYER_PARAMETERS, Case, Inputs
from flash_moe.bench.competitors import Bound, Results
from flash_moe.bench.work import FORWARD
from flash_moe.ops._reference.expert import expert_reference
from flash_moe.ops._reference.mlp import mlp_reference
from flash_moe.ops._reference.router import router_reference
from flash_moe.testing import assert_no_worse_than, run_rounded_once, run_with_grads, to_float64

# Of a float64 gather: 2^22 elements are 32 MB.
SAMPLE_ELEMENTS = 2**22
SAMPLE_TOKENS = 256
SAMPLE_ROWS = 64
# Relative RMS error up to which a competitor computes the same thing. Ours keep the budget of flash_moe.testing; others
# may sum thousands of gradients of one expert in 16 bits. A graph's replay has to agree with the plain call.
COMPETITOR_BOUND = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.1}
REPLAY_BOUND = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.02}


class MismatchError(ValueError):
    """A competitor's numbers are wrong: it gets no row."""


@dataclass
class Comparison:
    """What came beside the float64 truth and an honest computation in the case's dtype."""

    names: Sequence[str]
    low: Results
    exact: Results
    actual: Results


def check(case: Case, inputs: Inputs, bound: Bound, which: str, is_ours: bool) -> float:
    """The worst relative RMS error among the results of pass ``which``. Raises ``MismatchError``."""
    compare = {"router": _router, "expert": _expert, "mlp": _mlp, "layer": _layer}[case.op]
    comparison = compare(case, inputs, bound, which, is_ours)
    if is_ours:
        try:
            assert_no_worse_than(comparison.low, comparison.exact, comparison.actual, comparison.names)
        except AssertionError as error:
            raise MismatchError(str(error)) from None
    return worst_error(comparison.names, comparison.actual, comparison.exact, COMPETITOR_BOUND[case.dtype])


def check_replay(case: Case, bound: Bound, which: str, replayed: object) -> None:
    """Raise ``MismatchError`` unless a graph's replay left what the plain call gives."""
    with torch.set_grad_enabled(which != FORWARD):
        expected, got = (_floating(each) for each in (bound.prepare(which)(), replayed))
    names = [f"replayed result {i}" for i in range(len(expected))]
    worst_error(names, got, expected, REPLAY_BOUND[case.dtype])


def _router(case: Case, inputs: Inputs, bound: Bound, which: str, is_ours: bool) -> Comparison:
    """Scores are exact. A competitor may order equal scores as it likes, and its gradient follows its order."""
    (logits, N, K), dscores = inputs
    scores, ids, *grads = bound.results(which)
    tokens = _spread(case.T, SAMPLE_TOKENS, scores.device)
    expected_scores, expected_ids = router_reference(logits[:, tokens], N, K)
    scores, ids = scores[tokens], ids[tokens]
    require(torch.equal(scores, expected_scores), "scores differ from the reference's")
    if is_ours:
        require(torch.equal(ids, expected_ids), "ids differ from the reference's")
    else:
        require(bool(((ids >= 0) & (ids < N * N)).all()), "ids are out of range")
        sums = logits[0, tokens].float().gather(1, ids // N) + logits[1, tokens].float().gather(1, ids % N)
        require(torch.equal(sums.to(scores.dtype), scores), "ids do not have the scores beside them")
        ordered = ids.sort(dim=-1).values
        require(bool((ordered[:, 1:] != ordered[:, :-1]).all()), "an id occurs twice in a row")
    results = [(expected_scores, expected_scores.double(), scores)]
    if grads:
        exact = _scattered(dscores[tokens].double(), ids, N)
        low = _scattered(dscores[tokens].float(), ids, N).to(logits.dtype)
        results.append((low, exact, grads[0][:, tokens]))
    return _comparison(("scores", "dlogits"), results)


def _scattered(dscores: Tensor, ids: Tensor, N: int) -> Tensor:
    grad = dscores.new_zeros(2, ids.shape[0], N)
    return torch.stack(
        [half.scatter_add(1, keys, dscores) for half, keys in zip(grad, (ids // N, ids % N), strict=True)]
    )


def _expert(case: Case, inputs: Inputs, bound: Bound, which: str, is_ours: bool) -> Comparison:
    T, H, E, K = case.sizes
    x, down, up, ids, weights = inputs.args
    out, *grads = bound.results(which)
    tokens = _spread(T, _sample_tokens(K * H), ids.device)
    some_ids = ids[tokens]
    rows, local = torch.unique(some_ids, return_inverse=True)
    low, exact = _both(expert_reference, (x[tokens], down[rows], up[rows], local, weights[tokens]), inputs.dout[tokens])
    results = [(low[0], exact[0], out[tokens])]
    if grads:
        dx, dweights = grads[0], grads[3]
        ddown, dup = (grad.to_dense() if grad.is_sparse else grad for grad in grads[1:3])
        results += [(low[1], exact[1], dx[tokens]), (low[4], exact[4], dweights[tokens])]
        taken = some_ids.flatten()[_spread(some_ids.numel(), SAMPLE_ROWS, ids.device)]
        experts = torch.unique(torch.cat([taken, taken.new_tensor([0, E - 1])]))
        low, exact = _pairs_of(experts, inputs)
        results += [(low[2], exact[2], ddown[experts]), (low[3], exact[3], dup[experts])]
    return _comparison(("out", "dx", "dweights", "ddown", "dup"), results)


def _pairs_of(experts: Tensor, inputs: Inputs) -> tuple[Results, Results]:
    """The experts' own problem: all their pairs, each as a token with one expert. Its table gradients are theirs."""
    x, down, up, ids, weights = inputs.args
    t, k = torch.isin(ids, experts).nonzero(as_tuple=True)
    local = torch.searchsorted(experts, ids[t, k])[:, None]
    args = (x[t], down[experts], up[experts], local, weights[t, k][:, None])
    return _both(expert_reference, args, inputs.dout[t])


def _mlp(case: Case, inputs: Inputs, bound: Bound, which: str, is_ours: bool) -> Comparison:
    T, _, I = case.sizes
    x, gate, up, down = inputs.args
    out, *grads = bound.results(which)
    tokens = _spread(T, SAMPLE_TOKENS, x.device)
    low, exact = _both(mlp_reference, (x[tokens], gate, up, down), inputs.dout[tokens], rounds_once=False)
    results = [(low[0], exact[0], out[tokens])]
    if grads:
        dx, dgate, dup, ddown = grads
        results.append((low[1], exact[1], dx[tokens]))
        # A neuron's own problem: its two rows and its column, all tokens. Its weight gradients are theirs.
        neurons = _spread(I, SAMPLE_ROWS, x.device)
        args = (x, gate[neurons], up[neurons], down[:, neurons])
        low, exact = _both(mlp_reference, args, inputs.dout, rounds_once=False)
        results += zip(low[2:], exact[2:], (dgate[neurons], dup[neurons], ddown[:, neurons]), strict=True)
    return _comparison(("out", "dx", "dgate", "dup", "ddown"), results)


def _layer(case: Case, inputs: Inputs, bound: Bound, which: str, is_ours: bool) -> Comparison:
    """With an upstream gradient on a few tokens only, all parameter gradients come from those tokens.

    The logits are compared with float64's, and all that follows from them is computed from the logits that came: a
    16-bit logit decides which experts a token takes.
    """
    (x, *dense, down, up), dout = inputs
    y, logits = bound.results(FORWARD)
    tokens, ids = _decided_tokens(case, logits)
    rows, local = torch.unique(ids, return_inverse=True)
    twin = _LayerTwin(tokens, ids, local, logits[:, tokens], is_training=which != FORWARD)
    exact_logits, low_logits = (twin.compute_logits(*each) for each in (to_float64((x, dense[3])), (x, dense[3])))
    low, exact = _both(twin, (x, *dense, down[rows], up[rows]), dout[tokens], rounds_once=False)
    results = [(low_logits, exact_logits, logits[:, tokens]), (low[0], exact[0], y[tokens])]
    if which != FORWARD:
        sparse = torch.zeros_like(dout).index_copy_(0, tokens, dout[tokens])
        _, _, dx, *grads, ddown, dup = bound.results(which, sparse)
        for full in (ddown, dup):
            require(not full.index_fill(0, rows, 0.0).any().item(), "an expert that took no part has a gradient")
        sampled = (dx, *grads, ddown[rows], dup[rows])
        results += zip(low[1:], exact[1:], sampled, strict=True)
    return _comparison(("router_logits", "y", "dx", *LAYER_PARAMETERS), results)


def _decided_tokens(case: Case, logits: Tensor) -> tuple[Tensor, Tensor]:
    """A few tokens and their experts: those whose K-th and next scores are furthest apart, since between near ties
    rounding decides.
    """
    _, H, _, E, K = case.sizes
    candidates = _spread(case.T, SAMPLE_TOKENS, logits.device)
    scores, ids = router_reference(logits[:, candidates].float(), logits.shape[2], min(K + 1, E))
    gaps = scores[:, K - 1] - scores[:, -1]
    chosen = gaps.topk(min(len(candidates), _sample_tokens(K * H))).indices.sort().values
    return candidates[chosen], ids[chosen, :K]


@dataclass
class _LayerTwin:
    """The layer's arithmetic for ``tokens``, given which experts they took and, to start from, their logits' values."""

    tokens: Tensor
    ids: Tensor
    local: Tensor
    logits: Tensor
    is_training: bool

    def compute_logits(self, x: Tensor, router_gate: Tensor) -> Tensor:
        mean, variance = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
        normed = F.batch_norm(x, mean, variance, training=self.is_training)[self.tokens]
        return F.linear(normed, router_gate).view(len(self.tokens), 2, -1).transpose(0, 1)

    def __call__(self, x: Tensor, *parameters: Tensor) -> Tensor:
        gate, up, down, router_gate, down_rows, up_rows = parameters
        logits = self.compute_logits(x, router_gate)
        logits = self.logits.to(logits.dtype) + (logits - logits.detach())
        log_probs = F.log_softmax(logits, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
        N, x = logits.shape[2], x[self.tokens]
        scores = log_probs[0].gather(1, self.ids // N) + log_probs[1].gather(1, self.ids % N)
        return expert_reference(x, down_rows, up_rows, self.local, scores.exp()) + mlp_reference(x, gate, up, down)


def _both(
    function: Callable[..., Tensor], args: tuple[Tensor, ...], dout: Tensor, rounds_once: bool = True
) -> tuple[Results, Results]:
    """Output and gradients of ``function`` as honest arithmetic in the case's dtype has them, and in float64."""
    low = run_rounded_once if rounds_once else run_with_grads
    return low(function, args, dout), run_with_grads(function, to_float64(args), dout.double())


def _comparison(names: Sequence[str], results: Sequence[Results]) -> Comparison:
    low, exact, actual = zip(*results, strict=True)
    return Comparison(names[: len(results)], low, exact, actual)


def worst_error(names: Sequence[str], actual: Results, exact: Results, limit: float) -> float:
    worst = 0.0
    for name, x, exact_x in zip(names, actual, exact, strict=True):
        require(x.shape == exact_x.shape, f"{name}: expected shape {tuple(exact_x.shape)}; got {tuple(x.shape)}")
        difference, scale = (x.double() - exact_x.double()).norm().item(), exact_x.double().norm().item()
        error = difference / scale if scale else difference
        require(error <= limit, f"{name}: relative RMS error {error:.2e}, at most {limit:.0e} expected")  # NaN fails
        worst = max(worst, error)
    return worst


def require(condition: bool, message: str) -> None:
    if not condition:
        raise MismatchError(message)


def _sample_tokens(elements_per_token: int) -> int:
    return max(1, min(64, SAMPLE_ELEMENTS // elements_per_token))


def _spread(length: int, count: int, device: torch.device) -> Tensor:
    """Up to ``count`` different positions, the first and the last among them."""
    return torch.linspace(0, length - 1, min(count, length), dtype=torch.float64, device=device).round().long()


def _floating(results: object) -> Results:
    results = results if isinstance(results, tuple) else (results,)
    return tuple(x.detach() for x in results if isinstance(x, Tensor) and x.is_floating_point())
