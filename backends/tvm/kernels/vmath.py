"""Exponential, error function and hyperbolic tangent in plain arithmetic, on scalars or vectors of float32.

libm is called once an element; these vectorize. exp: range reduction and a degree-6 Taylor polynomial of the
remainder. erf: the rational minimax of Eigen's ``generic_fast_erf``.
"""

from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels.emit import fill, vec

_LOG2E, _LN2_HIGH, _LN2_LOW = 1.4426950408889634, 0.693359375, -2.12194440e-4
_EXP = (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0)
_ERF_P = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
_ERF_Q = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)


def _polynomial(x: Expr, coefficients: tuple[float, ...], lanes: int) -> Expr:
    value = fill(T.float32(coefficients[0]), lanes)
    for c in coefficients[1:]:
        value = value * x + fill(T.float32(c), lanes)
    return value


def exp(x: Expr, lanes: int = 1) -> Expr:
    """e to the x; 0 below -87.3, and at most e to the 88."""

    def number(v: float) -> Expr:
        return fill(T.float32(v), lanes)

    clamped = T.max(T.min(x, number(88.0)), number(-87.3))
    n = T.nearbyint(clamped * number(_LOG2E))
    r = clamped - n * number(_LN2_HIGH) - n * number(_LN2_LOW)
    bits = (T.cast(n, vec("int32", lanes)) + fill(T.int32(127), lanes)) << fill(T.int32(23), lanes)
    value = _polynomial(r, _EXP, lanes) * T.reinterpret(vec("float32", lanes), bits)
    return T.Select(x < number(-87.3), number(0.0), value)


def erf(x: Expr) -> Expr:
    """The error function of a scalar."""
    x = T.max(T.min(x, T.float32(4.0)), T.float32(-4.0))
    square = x * x
    return x * _polynomial(square, _ERF_P, 1) / _polynomial(square, _ERF_Q, 1)


def sigmoid(x: Expr) -> Expr:
    return T.float32(1.0) / (T.float32(1.0) + exp(-x))


def tanh(x: Expr) -> Expr:
    """By a series near zero, where the exponential form cancels."""
    square = x * x
    near = x * _polynomial(square, (2 / 15, -1 / 3, 1.0), 1)
    far = T.float32(1.0) - T.float32(2.0) / (T.float32(1.0) + exp(x * T.float32(2.0)))
    return T.Select(square < T.float32(0.01), near, far)


def gelu(x: Expr) -> Expr:
    """x times the normal distribution function."""
    half = T.float32(0.5) * x
    return half + half * erf(x * T.float32(0.7071067811865476))


def gelu_tanh(x: Expr) -> Expr:
    inner = T.float32(0.7978845608028654) * (x + T.float32(0.044715) * x * x * x)
    half = T.float32(0.5) * x
    return half + half * tanh(inner)


def silu(x: Expr) -> Expr:
    return x * sigmoid(x)
