"""Float32 reductions with one order of operations: layer norm, RMS norm, softmax and mean.

Every sum is that of :func:`float_math.row_sum`: sixteen partial sums, then halves.
"""

import torch
from torch import Tensor

from t3c_compile.passes.ops.float_math import TORCH, fast_exp, fma, row_sum, sqrt


@torch.library.custom_op("t3c::layer_norm_f32", mutates_args=())
def layer_norm_f32(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm over the last axis: float32 ``x`` [..., n], ``weight``/``bias`` [n] or None -> [..., n].

    ::

        d = x - sum(x) / n
        y = d * (1 / sqrt(sum(d * d) / n + eps)) * weight + bias

    The last multiplication is fused with the addition where there is a bias.
    """
    count = x.shape[-1]
    y = x - row_sum(x) / count
    gain = 1.0 / sqrt(row_sum(y, squares=True) / count + eps)
    if weight is not None:
        y, gain = y * gain, weight
    return y * gain if bias is None else fma(y, gain, bias)


@layer_norm_f32.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def layer_norm_aten(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``t3c::layer_norm_f32`` in ATen ops."""
    y: Tensor = torch.ops.aten.layer_norm.default(x, [x.shape[-1]], weight, bias, eps)
    return y


@torch.library.custom_op("t3c::rms_norm_f32", mutates_args=())
def rms_norm_f32(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``x * (1 / sqrt(sum(x * x) / n + eps)) * weight``: float32 ``x`` [..., n], ``weight`` [n] or None -> [..., n]."""
    y = x * (1.0 / sqrt(row_sum(x, squares=True) / x.shape[-1] + eps))
    return y if weight is None else y * weight


@rms_norm_f32.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def rms_norm_aten(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``t3c::rms_norm_f32`` in ATen ops."""
    y = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


@torch.library.custom_op("t3c::softmax_f32", mutates_args=())
def softmax_f32(x: Tensor) -> Tensor:
    """Softmax over the last axis of a float32 tensor; ``e * (1 / sum(e))`` with ``e = exp(x - max)``.

    Terms below 2**-126 are 0. A row of -inf gives NaN, as in torch.
    """
    e = fast_exp(TORCH, x - x.amax(-1, keepdim=True))
    return e * (1.0 / row_sum(e))  # type: ignore[no-any-return]


@softmax_f32.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def softmax_aten(x: Tensor) -> Tensor:
    """``t3c::softmax_f32`` in ATen ops."""
    y: Tensor = torch.ops.aten.softmax.int(x, -1)
    return y


@torch.library.custom_op("t3c::mean_f32", mutates_args=())
def mean_f32(x: Tensor, dim: list[int], keepdim: bool) -> Tensor:
    """Mean of a float32 tensor over the dimensions ``dim`` (ascending, not negative), whose elements are summed as
    one row in the order in which ``x`` holds them."""
    count = len(dim)
    rows = x.movedim(dim, list(range(-count, 0))).flatten(-count)
    y = (row_sum(rows) / rows.shape[-1]).squeeze(-1)
    for d in dim if keepdim else []:
        y = y.unsqueeze(d)
    return y.contiguous()


@mean_f32.register_fake
def _(x: Tensor, dim: list[int], keepdim: bool) -> Tensor:
    shape = [1 if d in dim else size for d, size in enumerate(x.shape) if keepdim or d not in dim]
    return x.new_empty(shape)


def mean_aten(x: Tensor, dim: list[int], keepdim: bool) -> Tensor:
    """``t3c::mean_f32`` in ATen ops."""
    y: Tensor = torch.ops.aten.mean.dim(x, dim, keepdim)
    return y
