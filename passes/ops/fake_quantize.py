"""Quantization as training sees it: the deployed rounding forward, straight-through backward.

These are composite ops: autograd, export and compile see the ATen ops inside, so gradients need no code of their own
(but on the CPU, where ATen's kernel takes ten times as long as what is here). Straight-through estimator: Bengio et
al., https://arxiv.org/abs/1308.3432.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t3c_compile.passes.ops.nested import WEIGHT_QMAX

_LIBRARY = torch.library.Library("t3c", "FRAGMENT")  # type: ignore[no-untyped-call]


def composite(function: Callable[..., Tensor], schema: str) -> None:
    """Give ``function`` a name among the ``t3c::`` ops, so that graphs can call it, print it and be pickled."""
    _LIBRARY.define(function.__name__ + schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(function.__name__, function, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]


def is_traced(x: Tensor) -> bool:
    """Whether a graph is being made of what is done to ``x``, by export, compile or fake tensors."""
    return type(x) not in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling()


def is_known(x: Tensor) -> bool:
    """Whether asking for the numbers in ``x`` neither waits for a GPU nor ties a traced graph to them."""
    return x.device.type == "cpu" and not is_traced(x)


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """``rounded``, bit for bit, with the gradient of ``x``."""
    return rounded + (x - x.detach()) if torch.is_grad_enabled() and x.requires_grad else rounded


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: Tensor, qmin: int) -> Tensor:
    """Quantize ``x`` to int8 and back, as :func:`quantize_int8` then :func:`dequantize_int8` do.

    ``scale`` and ``zero_point`` are 0-d float32 tensors; ``qmin`` is the least integer: -128, or -127 for the symmetric
    middle of a factor chain; ``bits`` is the layer's 0-d width: at 32 the layer runs in
    floating point and ``x`` comes back unchanged. Gradient: one inside the int8 range, zero outside.
    """
    if is_traced(x):
        # Ops that every compiler has and fuses.
        q = torch.clamp(torch.round(x * (1.0 / scale)) + zero_point, qmin, 127)
        low, high = (qmin - 0.5 - zero_point) * scale, (127.5 - zero_point) * scale
        inside = torch.clamp(x, low, high)
        return torch.where(bits >= 32, x, straight_through(inside, (q - zero_point) * scale))
    if is_known(x):
        return x if float(bits.detach()) >= 32 else rounded_on_cpu(x, float(scale), float(zero_point), qmin)
    # ATen's kernel rounds alike, in one pass, and keeps one byte a number for the gradient.
    rounded: Tensor = torch.ops.aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams(
        x, scale, zero_point.int(), (bits < 32).long(), qmin, 127
    )[0]
    return rounded


def rounded_on_cpu(x: Tensor, scale: float, zero_point: float, qmin: int) -> Tensor:
    """:func:`fake_quantize` of float32 ``x`` in vectorized passes, which want their bounds as numbers."""
    parts = (float(np.float32(1.0) / np.float32(scale)), scale, qmin - zero_point, 127.0 - zero_point)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rounding.apply(x, *parts)  # type: ignore[no-any-return, no-untyped-call]
    return _round(x, *parts)


def _round(x: Tensor, per_unit: float, unit: float, least: float, greatest: float) -> Tensor:
    return (x * per_unit).round_().clamp_(least, greatest).mul_(unit)


class _Rounding(torch.autograd.Function):
    """The rounding on the CPU, with a gradient of one inside the range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, per_unit: float, unit: float, least: float, greatest: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.ends = (least - 0.5) * unit, (greatest + 0.5) * unit
        return _round(x, per_unit, unit, least, greatest)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradients[0], x, *ctx.ends), None, None, None, None


def fake_quantize_weight(weight: Tensor, scale: Tensor, bits: Tensor) -> Tensor:
    """Round ``weight`` to the nested integers of width ``bits`` and back to float32, same shape.

    ``scale`` broadcasts to ``weight`` (see :func:`weight_scale`); ``bits`` is a 0-d tensor, 4 to 8, or 32 for no
    rounding. Gradient: one, as nothing is clamped at a weight's own scale; none for ``scale`` and ``bits``.
    """
    # Both are asked, for where tensors are faked a buffer may still be real.
    if is_known(scale) and is_known(bits):
        width = float(bits.detach())
        return weight if width >= 32 else passed_through(weight, _round_weight(weight.detach(), scale, width))
    with torch.no_grad():
        # keep_top_bits(quantize_weight(weight, scale)) * scale in fewer passes: steps are powers of two, so exact.
        step = torch.exp2(8 - bits.clamp(max=8))
        q = (weight / scale).round_().clamp_(-WEIGHT_QMAX, WEIGHT_QMAX)
        rounded = torch.where(bits >= 32, weight, q.div_(step).round_().mul_(step * scale))
    return straight_through(weight, rounded)


def _round_weight(weight: Tensor, scale: Tensor, bits: float) -> Tensor:
    q = (weight / scale).round_().clamp_(-WEIGHT_QMAX, WEIGHT_QMAX)
    step = 2.0 ** (8 - bits)
    return q.mul_(scale) if step == 1 else q.mul_(1 / step).round_().mul_(step * scale)


class _PassedThrough(torch.autograd.Function):
    """:func:`straight_through` without its two passes, where no graph is made."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        return gradients[0], None


def passed_through(x: Tensor, rounded: Tensor) -> Tensor:
    """:func:`straight_through` of a ``rounded`` that nobody else holds, where no graph is made."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return rounded
    return _PassedThrough.apply(x, rounded)  # type: ignore[no-any-return, no-untyped-call]


composite(fake_quantize, "(Tensor x, Tensor scale, Tensor zero_point, Tensor bits, int qmin) -> Tensor")
composite(fake_quantize_weight, "(Tensor weight, Tensor scale, Tensor bits) -> Tensor")
