"""Float32 arithmetic with one meaning on every target: fused multiply-adds, fixed polynomials, sums in a fixed order.

The functions of one element are written once, over :class:`Arithmetic`: torch runs them as the reference, a back end
emits them as code, and both do the same roundings. Nothing may be reassociated, and no product may be joined with a
sum but by ``fma``.
"""

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

# A sum along an axis is kept as this many partial sums, whatever the width of a target's vectors.
PARTIAL_SUMS = 16

# exp(r) = 1 + r + r^2 P(r), |r| <= ln(2) / 2, to 3e-9; tanh(x) = x + x^3 P(x^2), |x| <= 0.55, to 1e-9 (least squares,
# reweighted to even out the error). Highest power first.
_EXP = (0.00138146046, 0.00836871099, 0.0416683890, 0.166665211, 0.499999940, 1.0, 1.0)
_TANH = (-0.00627421355, 0.0210716594, -0.0538523048, 0.133325860, -0.333333164)
_NEAR = 0.3025  # 0.55 squared
_LOG2E, _LN2_HIGH, _LN2_LOW = 1.44269504, 0.693147182, -1.90465421e-9
# erf(x) = x P(x^2) / Q(x^2), |x| <= 4: the rational minimax of Eigen's ``generic_fast_erf``.
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
# erf(x / sqrt(2)) = x P(2 (x / 5.375)^2 - 1), |x| <= 5.375, to 5e-8 (least squares as above), and 1 at the end.
_GELU_END = 5.375
_GELU = (
    7.250365e-04,
    -1.9117345e-03,
    1.676784e-03,
    -2.3346925e-03,
    7.0459913e-03,
    -1.2981125e-02,
    1.8891089e-02,
    -2.754957e-02,
    3.894473e-02,
    -5.128465e-02,
    6.422879e-02,
    -7.861232e-02,
    9.738143e-02,
    -1.312448e-01,
    2.6307154e-01,
)


class Arithmetic(Protocol):
    """What torch tensors and a back end's expressions have in common, beside ``+ - * /``, ``<`` and ``<=``."""

    def number(self, value: float) -> Any:
        """``value`` rounded once to float32."""

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """``a * b + c`` rounded once."""

    def rint(self, x: Any) -> Any:
        """The nearest whole number, ties to even."""

    def clamp(self, x: Any, low: float, high: float) -> Any:
        """``x`` within the two; NaN stays."""

    def select(self, condition: Any, a: Any, b: Any) -> Any:
        """``a`` where ``condition`` holds, else ``b``."""

    def power_of_two(self, n: Any) -> Any:
        """2 to the whole number ``n`` in [-127, 128], by its bits: 0 and infinity at the ends."""

    def half(self, n: Any) -> Any:
        """Whole ``n / 2`` rounded down."""


def _polynomial(m: Arithmetic, x: Any, coefficients: tuple[float, ...]) -> Any:
    value = m.number(coefficients[0])
    for c in coefficients[1:]:
        value = m.fma(value, x, m.number(c))
    return value


def _exp_parts(m: Arithmetic, x: Any) -> tuple[Any, Any]:
    """``p`` in [0.7, 1.42] and whole ``n`` with e to the x = p 2^n."""
    n = m.rint(x * m.number(_LOG2E))
    r = m.fma(n, m.number(-_LN2_LOW), m.fma(n, m.number(-_LN2_HIGH), x))
    return _polynomial(m, r, _EXP), n


def exp(m: Arithmetic, x: Any) -> Any:
    """e to the x over the whole range, denormal results too."""
    p, n = _exp_parts(m, m.clamp(x, -105.0, 89.0))
    low = m.half(n)
    return p * m.power_of_two(low) * m.power_of_two(n - low)


def fast_exp(m: Arithmetic, x: Any) -> Any:
    """e to the x: 0 below -87.3 (denormal results are left out) and infinity above 88.37."""
    p, n = _exp_parts(m, m.clamp(x, -88.0, 89.0))
    return p * m.power_of_two(n)


def erf(m: Arithmetic, x: Any) -> Any:
    """The error function."""
    x = m.clamp(x, -4.0, 4.0)
    square = x * x
    return x * _polynomial(m, square, _ERF_P) / _polynomial(m, square, _ERF_Q)


def tanh(m: Arithmetic, x: Any) -> Any:
    """By a polynomial near zero, where the exponential form cancels."""
    square = x * x
    near = m.fma(x * square, _polynomial(m, square, _TANH), x)
    far = m.number(1.0) - m.number(2.0) / (m.number(1.0) + fast_exp(m, x * m.number(2.0)))
    return m.select(square < m.number(_NEAR), near, far)


def sigmoid(m: Arithmetic, x: Any) -> Any:
    return m.number(1.0) / (m.number(1.0) + fast_exp(m, m.number(0.0) - x))


def silu(m: Arithmetic, x: Any) -> Any:
    return x / (m.number(1.0) + fast_exp(m, m.number(0.0) - x))


def gelu(m: Arithmetic, x: Any) -> Any:
    """x times the normal distribution function, without the division in ``erf``."""
    half, near = x * m.number(0.5), m.clamp(x, -_GELU_END, _GELU_END)
    place = m.fma(near * near, m.number(2 / _GELU_END**2), m.number(-1.0))
    return m.fma(half, near * _polynomial(m, place, _GELU), half)


def gelu_tanh(m: Arithmetic, x: Any) -> Any:
    """GELU's approximation by the hyperbolic tangent."""
    inner = x * m.fma(x * x, m.number(0.044715 * 0.7978845608), m.number(0.7978845608))
    half = x * m.number(0.5)
    return m.fma(half, tanh(m, inner), half)


class TorchArithmetic:
    """:class:`Arithmetic` on float32 tensors."""

    def number(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float32)

    def fma(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return fma(a, b, c)

    def rint(self, x: Tensor) -> Tensor:
        return torch.round(x)

    def clamp(self, x: Tensor, low: float, high: float) -> Tensor:
        return torch.clamp(x, low, high)

    def select(self, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.where(condition, a, b)

    def power_of_two(self, n: Tensor) -> Tensor:
        return ((n.to(torch.int32) + 127) << 23).view(torch.float32)

    def half(self, n: Tensor) -> Tensor:
        return torch.floor(n * 0.5)


TORCH = TorchArithmetic()


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c`` of float32 tensors (broadcast), rounded once to float32."""
    left, right = a.to(torch.float64), b.to(torch.float64)
    total = torch.addcmul(c.to(torch.float64), left, right)
    return _round_once(total, left, right, c)


_INEXACT = (1 << 28) - 1


def _round_once(total: Tensor, left: Tensor, right: Tensor, added: Tensor) -> Tensor:
    """Float32 of the exact ``left * right + added``, given that sum in float64.

    The product is exact in float64 and the sum rounded, so rounding again goes wrong only where the float64 sum lies
    midway between two float32; there the error of the sum says which way.
    """
    rounded = total.to(torch.float32)
    # numpy finds the few candidates several times faster than torch.
    found = np.flatnonzero((total.view(torch.int64) & _INEXACT).numpy().ravel() == 0)
    if found.size:
        places = np.unravel_index(found, total.shape)
        where = tuple(torch.from_numpy(place) for place in places)
        s = total[where]
        product = left.expand(total.shape)[where] * right.expand(total.shape)[where]
        c = added.expand(total.shape)[where].to(torch.float64)
        back = s - product
        error = (product - (s - back)) + (c - back)
        aside = torch.nextafter(s, torch.where(error > 0, torch.inf, -torch.inf).to(torch.float64))
        rounded[where] = torch.where(error == 0, s, aside).to(torch.float32)
    return rounded


def sqrt(x: Tensor) -> Tensor:
    """The square root, rounded correctly (torch's own is off by one in the last place now and then)."""
    return torch.sqrt(x.to(torch.float64)).to(torch.float32)


def row_sum(x: Tensor, squares: bool = False) -> Tensor:
    """Sum of ``x`` (or of its squares) over the last axis, kept with one element.

    Partial sum i takes elements i, i + 16, i + 32, ... in turn; the sixteen are added in halves (8, 4, 2, 1).
    """
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % PARTIAL_SUMS))
    padded = padded.reshape(*x.shape[:-1], -1, PARTIAL_SUMS)
    sums = x.new_zeros((*x.shape[:-1], PARTIAL_SUMS))
    for part in padded.unbind(-2):
        sums = fma(part, part, sums) if squares else sums + part
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    return sums


# Elements of a product that are summed at once, so that they stay in cache.
_BLOCK = 1 << 16


def chain_matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a [n, i, k] @ b [n, k, j]``: every output one chain of fused multiply-adds over k, from zero."""
    n, rows, columns = a.shape[0], a.shape[1], b.shape[2]
    out = a.new_empty((n, rows, columns))
    step = max(1, _BLOCK // max(1, rows * columns))
    for first in range(0, n, step):
        left = a[first : first + step].to(torch.float64).transpose(1, 2).contiguous()
        right = b[first : first + step].to(torch.float64)
        sums = torch.zeros((left.shape[0], rows, columns), dtype=torch.float32)
        for k in range(left.shape[1]):
            x, y, before = left[:, k, :, None], right[:, k, None, :], sums
            sums = _round_once(torch.addcmul(before.to(torch.float64), x, y), x, y, before)
        out[first : first + step] = sums
    return out
