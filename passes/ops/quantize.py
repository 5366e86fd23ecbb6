"""Per-tensor affine int8 quantization of activations.

``q = clamp(rint(x * float32(1 / scale)) + zero_point, -128, 127)``; the multiplication by a rounded reciprocal (not a
division) is part of the meaning, so that every backend can reproduce it exactly.
"""

import torch
from torch import Tensor


@torch.library.custom_op("t3c::quantize_int8", mutates_args=())
def quantize_int8(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """float32 tensor of any shape -> int8 tensor of that shape; ``zero_point`` in [-128, 127]."""
    return torch.clamp(torch.round(x * (1.0 / scale)) + zero_point, -128, 127).to(torch.int8)


@quantize_int8.register_fake
def _(x: Tensor, scale: float, zero_point: int) -> Tensor:
    return torch.empty_like(x, dtype=torch.int8)


@torch.library.custom_op("t3c::dequantize_int8", mutates_args=())
def dequantize_int8(q: Tensor, scale: float, zero_point: int) -> Tensor:
    """int8 tensor -> float32 tensor ``(q - zero_point) * scale`` of the same shape."""
    return (q.to(torch.float32) - zero_point) * scale


@dequantize_int8.register_fake
def _(q: Tensor, scale: float, zero_point: int) -> Tensor:
    return torch.empty_like(q, dtype=torch.float32)
