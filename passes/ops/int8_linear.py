"""Quantized linear layers: dense, and two-factor (SVD) chain.

Sums are exact integers (the reference works in float64, exact below 2**53); each rescaling is one float32
multiplication or fused multiply-add, so a backend that accumulates in int32 reproduces every number to the bit.
"""

import torch
from torch import Tensor

from t3c_compile.passes.ops.float_math import fma
from t3c_compile.passes.ops.nested import keep_top_bits


def exact_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` of whole numbers, as float32 rounded once from the exact integer."""
    return (x.to(torch.float64) @ weight.to(torch.float64).T).to(torch.float32)


def requantize(acc: Tensor, multiplier: Tensor) -> Tensor:
    """Symmetric int8 of ``acc * multiplier`` as float32 whole numbers in [-127, 127]."""
    return torch.clamp(torch.round(acc * multiplier), -127, 127)


def affine(x: Tensor, gain: Tensor | float, bias: Tensor | None) -> Tensor:
    """``x * gain + bias`` in float32, rounded once where there is a bias: the fused multiply-add every target has.

    A second rounding would differ in the last place, and with it, now and then, an int8 step of the next layer.
    """
    if bias is None:
        return x * gain
    return fma(x, torch.tensor(gain) if isinstance(gain, float) else gain, bias)


def finish(y: Tensor, h_scale: float, out_gain: Tensor | None, bias: Tensor | None) -> Tensor:
    """The end of every chain: sums of the last middle's integers to float32 outputs."""
    return affine(y, h_scale, bias) if out_gain is None else affine(y * h_scale, out_gain, bias)


@torch.library.custom_op("t3c::int8_linear", mutates_args=())
def int8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_scale: float,
    x_zero_point: int,
    bits: int,
) -> Tensor:
    """Dense linear: int8 ``x`` [..., n], int8 ``weight`` [m, n], float32 ``scale``/``bias`` [m] -> float32 [..., m].

    ``y = (sum_n (x - x_zero_point) * top_bits(weight)) * (scale * x_scale) + bias``.
    """
    acc = exact_matmul(x.to(torch.float64) - x_zero_point, keep_top_bits(weight, bits))
    return affine(acc, scale * x_scale, bias)


@int8_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_scale: float,
    x_zero_point: int,
    bits: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=torch.float32)


@torch.library.custom_op("t3c::svd_linear", mutates_args=())
def svd_linear(
    x: Tensor,
    v: Tensor,
    u: Tensor,
    mid_scale: Tensor,
    out_gain: Tensor | None,
    bias: Tensor | None,
    x_scale: float,
    x_zero_point: int,
    h_scale: float,
    rank: int,
    bits: int,
) -> Tensor:
    """Two-factor linear at ``rank`` k, both factors stored rank-major at their greatest rank R >= k.

    int8 ``x`` [..., n], int8 ``v`` [R, n], int8 ``u`` [R, m], float32 ``mid_scale`` [R], ``out_gain`` [m] or None,
    ``bias`` [m] or None -> float32 [..., m]::

        h = clamp(rint(((x - x_zero_point) @ v[:k].T) * (mid_scale[:k] * (x_scale / h_scale))), -127, 127)
        y = (h @ u[:k]) * h_scale * out_gain + bias
    """
    acc = exact_matmul(x.to(torch.float64) - x_zero_point, keep_top_bits(v[:rank], bits))
    h = requantize(acc, mid_scale[:rank] * (x_scale / h_scale))
    return finish(exact_matmul(h, keep_top_bits(u[:rank], bits).T), h_scale, out_gain, bias)


@svd_linear.register_fake
def _(
    x: Tensor,
    v: Tensor,
    u: Tensor,
    mid_scale: Tensor,
    out_gain: Tensor | None,
    bias: Tensor | None,
    x_scale: float,
    x_zero_point: int,
    h_scale: float,
    rank: int,
    bits: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], u.shape[1]), dtype=torch.float32)
