"""Dense quantized 2-d convolution, grouped and depthwise included."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from t3c_compile.passes.ops.int8_linear import affine
from t3c_compile.passes.ops.nested import keep_top_bits


def exact_conv2d(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:
    """Convolution of whole numbers (zero padding), as float32 rounded once from the exact integer."""
    y = F.conv2d(
        x.to(torch.float64), weight.to(torch.float64), None, list(stride), list(padding), list(dilation), groups
    )
    return y.to(torch.float32)


def per_channel(values: Tensor) -> Tensor:
    """[C] -> [C, 1, 1], to broadcast over NCHW."""
    return values[:, None, None]


def conv_output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Spatial output size of a 2-d convolution."""
    return [(size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)]


@torch.library.custom_op("t3c::int8_conv2d", mutates_args=())
def int8_conv2d(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_scale: float,
    x_zero_point: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bits: int,
) -> Tensor:
    """int8 ``x`` [N, C, H, W], int8 ``weight`` [O, C/groups, kh, kw], float32 ``scale``/``bias`` [O] -> float32 NCHW.

    Padding adds real zeros (that is, ``x_zero_point`` in the integers). ``y = conv(x - x_zero_point, top_bits(weight))
    * (scale * x_scale) + bias``.
    """
    acc = exact_conv2d(
        x.to(torch.float64) - x_zero_point, keep_top_bits(weight, bits), stride, padding, dilation, groups
    )
    return affine(acc, per_channel(scale * x_scale), None if bias is None else per_channel(bias))


@int8_conv2d.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_scale: float,
    x_zero_point: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bits: int,
) -> Tensor:
    size = conv_output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    return x.new_empty((x.shape[0], weight.shape[0], *size), dtype=torch.float32)
