"""Quantization as training sees it: the deployed rounding forward, straight-through backward.

These are ``torch.library`` custom ops rather than ``autograd.Function``: export inlines the latter and silently drops
its backward, a custom op's autograd formula survives export, compile and DDP.
Straight-through estimator: Bengio et al., https://arxiv.org/abs/1308.3432.
"""

from typing import Any

import torch
from torch import Tensor

from t3c_compile.passes.ops.nested import WEIGHT_QMAX, keep_top_bits, quantize_weight


def is_float(bits: Tensor) -> bool:
    """Whether nothing is rounded, where asking does not wait for a GPU."""
    return bits.device.type == "cpu" and bool(bits >= 32)


@torch.library.custom_op("t3c::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: Tensor, qmin: int) -> Tensor:
    """Quantize ``x`` to int8 and back, as :func:`quantize_int8` then :func:`dequantize_int8` do.

    ``scale`` and ``zero_point`` are 0-d float32 tensors; ``qmin`` is the least integer: -128, or -127 for the symmetric
    middle of a factor chain; ``bits`` is the layer's 0-d width: at 32 the layer runs in
    floating point and ``x`` comes back unchanged. Gradient: one inside the int8 range, zero outside.
    """
    if is_float(bits):
        return x.clone()
    q = torch.clamp(torch.round(x * (1.0 / scale)) + zero_point, qmin, 127)
    return torch.where(bits >= 32, x, (q - zero_point) * scale)


@fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, bits: Tensor, qmin: int) -> Tensor:
    return torch.empty_like(x)


def _save_activation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.qmin = inputs[4]


def _activation_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    x, scale, zero_point, bits = ctx.saved_tensors
    low, high = (ctx.qmin - 0.5 - zero_point) * scale, (127.5 - zero_point) * scale
    inside = ((x >= low) & (x <= high)) | (bits >= 32)
    return grad * inside, None, None, None, None


fake_quantize.register_autograd(_activation_backward, setup_context=_save_activation)


@torch.library.custom_op("t3c::fake_quantize_weight", mutates_args=())
def fake_quantize_weight(weight: Tensor, scale: Tensor, bits: Tensor) -> Tensor:
    """Round ``weight`` to the nested integers of width ``bits`` and back to float32, same shape.

    ``scale`` broadcasts to ``weight`` (see :func:`weight_scale`); ``bits`` is a 0-d tensor, 4 to 8, or 32 for no
    rounding. Gradient: one where the integer is not clamped, zero elsewhere; none for ``scale`` and ``bits``.
    """
    if is_float(bits):
        return weight.clone()
    rounded = keep_top_bits(quantize_weight(weight, scale), bits.clamp(max=8)) * scale
    return torch.where(bits >= 32, weight, rounded)


@fake_quantize_weight.register_fake
def _(weight: Tensor, scale: Tensor, bits: Tensor) -> Tensor:
    return torch.empty_like(weight)


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _weight_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    weight, scale, bits = ctx.saved_tensors
    inside = (weight.abs() <= (WEIGHT_QMAX + 0.5) * scale) | (bits >= 32)
    return grad * inside, None, None


fake_quantize_weight.register_autograd(_weight_backward, setup_context=_save_weight)
