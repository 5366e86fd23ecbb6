"""Factorized quantized convolutions: SVD (1x1), Tucker-2 and CP chains.

All factors are stored rank-major at their greatest rank; a chain at ``rank`` k reads the prefix. Every stage between
two factors is requantized to symmetric int8.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from t3c_compile.passes.ops.int8_conv import conv_output_size, exact_conv2d, per_channel
from t3c_compile.passes.ops.int8_linear import finish, requantize
from t3c_compile.passes.ops.nested import keep_top_bits

_ONE = (1, 1)
_NONE = (0, 0)


def _pointwise(x: Tensor, weight: Tensor, stride: Sequence[int] = _ONE) -> Tensor:
    return exact_conv2d(x, weight[:, :, None, None], stride, _NONE, _ONE)


def _finish(h: Tensor, u: Tensor, h_scale: float, out_gain: Tensor | None, bias: Tensor | None) -> Tensor:
    gain, shift = (None if values is None else per_channel(values) for values in (out_gain, bias))
    return finish(_pointwise(h, u.T), h_scale, gain, shift)


@torch.library.custom_op("t3c::svd_conv2d", mutates_args=())
def svd_conv2d(
    x: Tensor,
    v: Tensor,
    u: Tensor,
    mid_scale: Tensor,
    out_gain: Tensor | None,
    bias: Tensor | None,
    x_scale: float,
    x_zero_point: int,
    h_scale: float,
    stride: Sequence[int],
    rank: int,
    bits: int,
) -> Tensor:
    """1x1 convolution (no padding) as two factors; the meaning of ``svd_linear`` at each output pixel.

    int8 ``x`` [N, C, H, W], int8 ``v`` [R, C], int8 ``u`` [R, O], float32 ``mid_scale`` [R], ``out_gain``/``bias`` [O]
    or None -> float32 [N, O, H', W'].
    """
    acc = _pointwise(x.to(torch.float64) - x_zero_point, keep_top_bits(v[:rank], bits), stride)
    h = requantize(acc, per_channel(mid_scale[:rank] * (x_scale / h_scale)))
    return _finish(h, keep_top_bits(u[:rank], bits), h_scale, out_gain, bias)


@svd_conv2d.register_fake
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
    stride: Sequence[int],
    rank: int,
    bits: int,
) -> Tensor:
    size = conv_output_size(x.shape[2:], _ONE, stride, _NONE, _ONE)
    return x.new_empty((x.shape[0], u.shape[1], *size), dtype=torch.float32)


@torch.library.custom_op("t3c::tucker2_conv2d", mutates_args=())
def tucker2_conv2d(
    x: Tensor,
    v: Tensor,
    core: Tensor,
    u: Tensor,
    mid_scale: Tensor,
    core_scale: Tensor,
    out_gain: Tensor | None,
    bias: Tensor | None,
    x_scale: float,
    x_zero_point: int,
    h_scale: float,
    g_scale: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    rank: int,
    bits: int,
) -> Tensor:
    """Tucker-2 convolution at ``rank`` k: 1x1 to ``ki = min(k, Ri)``, kh x kw core, 1x1 from ``ko = min(k, Ro)``.

    int8 ``x`` [N, C, H, W], int8 ``v`` [Ri, C], int8 ``core`` [Ro, Ri, kh, kw], int8 ``u`` [Ro, O], float32
    ``mid_scale`` [Ri], ``core_scale`` [Ro], ``out_gain``/``bias`` [O] or None -> float32 [N, O, H', W']::

        h = requantize(v[:ki] (x - x_zero_point), mid_scale[:ki] * (x_scale / h_scale))
        g = requantize(conv(h, core[:ko, :ki]),   core_scale[:ko] * (h_scale / g_scale))
        y = (u[:ko].T g) * g_scale * out_gain + bias
    """
    ki, ko = min(rank, v.shape[0]), min(rank, u.shape[0])
    acc = _pointwise(x.to(torch.float64) - x_zero_point, keep_top_bits(v[:ki], bits))
    h = requantize(acc, per_channel(mid_scale[:ki] * (x_scale / h_scale)))
    acc = exact_conv2d(h, keep_top_bits(core[:ko, :ki], bits), stride, padding, dilation)
    g = requantize(acc, per_channel(core_scale[:ko] * (h_scale / g_scale)))
    return _finish(g, keep_top_bits(u[:ko], bits), g_scale, out_gain, bias)


@tucker2_conv2d.register_fake
def _(
    x: Tensor,
    v: Tensor,
    core: Tensor,
    u: Tensor,
    mid_scale: Tensor,
    core_scale: Tensor,
    out_gain: Tensor | None,
    bias: Tensor | None,
    x_scale: float,
    x_zero_point: int,
    h_scale: float,
    g_scale: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    rank: int,
    bits: int,
) -> Tensor:
    size = conv_output_size(x.shape[2:], core.shape[2:], stride, padding, dilation)
    return x.new_empty((x.shape[0], u.shape[1], *size), dtype=torch.float32)


@torch.library.custom_op("t3c::cp_conv2d", mutates_args=())
def cp_conv2d(
    x: Tensor,
    v: Tensor,
    core: Tensor,
    u: Tensor,
    mid_scale: Tensor,
    core_scale: Tensor,
    out_gain: Tensor | None,
    bias: Tensor | None,
    x_scale: float,
    x_zero_point: int,
    h_scale: float,
    g_scale: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    rank: int,
    bits: int,
) -> Tensor:
    """CP convolution at ``rank`` k: 1x1 to k channels, depthwise kh x kw, 1x1 to O channels.

    As ``tucker2_conv2d`` with int8 ``core`` [R, kh, kw] applied to each channel alone.
    """
    acc = _pointwise(x.to(torch.float64) - x_zero_point, keep_top_bits(v[:rank], bits))
    h = requantize(acc, per_channel(mid_scale[:rank] * (x_scale / h_scale)))
    acc = exact_conv2d(h, keep_top_bits(core[:rank, None], bits), stride, padding, dilation, groups=rank)
    g = requantize(acc, per_channel(core_scale[:rank] * (h_scale / g_scale)))
    return _finish(g, keep_top_bits(u[:rank], bits), g_scale, out_gain, bias)


@cp_conv2d.register_fake
def _(
    x: Tensor,
    v: Tensor,
    core: Tensor,
    u: Tensor,
    mid_scale: Tensor,
    core_scale: Tensor,
    out_gain: Tensor | None,
    bias: Tensor | None,
    x_scale: float,
    x_zero_point: int,
    h_scale: float,
    g_scale: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    rank: int,
    bits: int,
) -> Tensor:
    size = conv_output_size(x.shape[2:], core.shape[1:], stride, padding, dilation)
    return x.new_empty((x.shape[0], u.shape[1], *size), dtype=torch.float32)
