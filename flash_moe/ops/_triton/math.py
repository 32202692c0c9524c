"""What kernels share: products, activations and their derivatives in float32, and the way back to a tensor's dtype."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 ``x`` in ``dtype``, rounded to nearest even, for a store.

    On a GPU a store rounds so by itself; the interpreter of triton 3.7.1 cuts bfloat16 off. Drop when it rounds:
    https://github.com/triton-lang/triton/pull/3811
    """
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def round_for(ptr, x):
    """``rounded`` in the dtype that ``ptr`` points to."""
    return rounded(x, ptr.dtype.element_ty)


@triton.jit
def table_float(x):
    """float32 of what a table holds, exactly."""
    if x.dtype == tl.int8:
        # Put into the low bits of 1.5 * 2^23: two additions run at a higher rate than one conversion of an integer.
        return (x.to(tl.int32) + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0
    return x.to(tl.float32)


@triton.jit
def dot(a, b, acc):
    """float32 acc + a @ b, of float32 operands without a detour through tf32.

    The product of bfloat16 operands is garbage in the interpreter of triton 3.7.1; drop when it is not.
    """
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def dot_apart(a, b):
    """a @ b of float32 operands, as a sum of its own even if it is then added to another.

    Triton adds the terms to the other one by one, unless told of a limit to inexact sums, which float32 ignores.
    """
    return tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=1)


@triton.jit
def widen(weights, dtype: tl.constexpr):
    """float8 to a float of 16 or 32 bits, all of which hold it exactly; what has that dtype already stays."""
    if weights.dtype == tl.float8e4nv and dtype == tl.bfloat16:
        # In one step it takes a conversion at a quarter of the rate of these three together.
        return weights.to(tl.float16).to(tl.float32).to(tl.bfloat16)
    return weights.to(dtype)


@triton.jit
def accurate_exp(x):
    """exp to about one unit in the last place; ``tl.exp`` rounds x * log2(e), and so is off by |x| units."""
    x = tl.maximum(x, -150.0, propagate_nan=tl.PropagateNan.ALL)  # the rest is 0, and -inf would become a NaN
    y = x * 1.4426950408889634
    # What y lost in rounding, and what log2(e) did.
    rest = tl.fma(x, 1.4426950216293335, -y) + x * 1.9259629911266175e-08
    return tl.exp2(y) * (1.0 + 0.6931471805599453 * rest)


@triton.jit
def reciprocal_root(x):
    """1 / sqrt(x) to about half a unit in the last place, without the branches of an exact root and division."""
    root = tl.rsqrt(x)
    rest = tl.fma(-x * root, root, 1.0)
    return tl.where(rest == rest, tl.fma(0.5 * root, rest, root), root)  # of 0 and of infinity the rest is no number


@triton.jit
def normal_cdf(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh_gate(x):
    """The factor of x in tanh-GELU, (1 + tanh(u)) / 2 = sigmoid(2u) with u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    return tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))


@triton.jit
def activation(x, HIDDEN_ACT: tl.constexpr):
    if HIDDEN_ACT == "silu":
        return x * tl.sigmoid(x)
    elif HIDDEN_ACT == "gelu":
        return x * normal_cdf(x)
    elif HIDDEN_ACT == "gelu_pytorch_tanh":
        return x * gelu_tanh_gate(x)
    elif HIDDEN_ACT == "relu":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif HIDDEN_ACT == "relu2":
        positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return positive * positive
    else:
        tl.static_assert(HIDDEN_ACT == "identity", "unknown activation")
        return x


@triton.jit
def activation_grad(x, HIDDEN_ACT: tl.constexpr):
    """d activation(x) / dx; relu has derivative 0 at 0, as PyTorch has it."""
    if HIDDEN_ACT == "silu":
        gate = tl.sigmoid(x)
        return gate * (1.0 + x * (1.0 - gate))
    elif HIDDEN_ACT == "gelu":
        return normal_cdf(x) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif HIDDEN_ACT == "gelu_pytorch_tanh":
        gate = gelu_tanh_gate(x)
        return gate + x * gate * (1.0 - gate) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif HIDDEN_ACT == "relu":
        return tl.where(x > 0.0, 1.0, 0.0)
    elif HIDDEN_ACT == "relu2":
        return 2.0 * tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        tl.static_assert(HIDDEN_ACT == "identity", "unknown activation")
        return tl.full(x.shape, 1.0, tl.float32)
