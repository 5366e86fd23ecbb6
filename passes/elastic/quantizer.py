"""What sits beside an elastic layer's factors: the controller's gate and the activation quantizers."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from t3c_compile.passes.ops import fake_quantize
from t3c_compile.passes.ops.fake_quantize import is_known, rounded_on_cpu

_MOMENTUM = 0.1

Gates = Mapping[str, tuple[Tensor, Tensor]]
"""By elastic layer: its prefix mask (float32 [max_rank], empty for a dense layer) and its width (0-d float32)."""


class Gate(nn.Module):
    """The controller hook of one layer: a prefix mask over its components and its weight width.

    Both are buffers, so one captured or compiled graph serves every rank and width; training replaces them by
    differentiable tensors with ``torch.func.functional_call``.
    """

    mask: Tensor
    bits: Tensor

    def __init__(self, max_rank: int) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(max_rank))
        self.register_buffer("bits", torch.tensor(32.0))

    def set(self, rank: int, bits: int) -> None:
        """Open the first ``rank`` components at width ``bits`` (in place)."""
        self.mask.copy_(torch.arange(len(self.mask)) < rank)
        self.bits.fill_(bits)

    def open(self) -> None:
        """Full rank, floating point: the layer computes what the original did."""
        self.set(len(self.mask), 32)


class ActivationQuantizer(nn.Module):
    """Per-tensor int8 fake quantization with a moving-average min/max observer.

    In training mode the range follows the data; in eval mode ``scale`` and ``zero_point`` (float32 buffers [calls], one
    range for each call of the layer) are used as they stand. ``symmetric`` fixes the zero point at 0 and the range at
    [-127, 127].
    """

    scale: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, symmetric: bool, calls: int = 1) -> None:
        super().__init__()
        self.symmetric = symmetric
        # Several processes that train together see one range; the trainer sets it for as long as they do.
        self.join: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
        self.register_buffer("scale", torch.ones(calls))
        self.register_buffer("zero_point", torch.zeros(calls))
        self.register_buffer("low", torch.full((calls,), float("inf")))
        self.register_buffer("high", torch.full((calls,), float("-inf")))

    def forward(self, x: Tensor, bits: Tensor, call: int = 0) -> Tensor:
        if is_known(x):
            return self._of_numbers(x, float(bits.detach()), call)
        if self.training:
            self._observe(x.detach(), call)
        scale, zero_point = self.scale[call], self.zero_point[call]
        if self.training:
            # Copies: the next call moves the range, and the backward of this one needs its own.
            scale, zero_point = scale.clone(), zero_point.clone()
        quantized: Tensor = fake_quantize(x, scale, zero_point, bits, self._qmin)
        return quantized

    @property
    def _qmin(self) -> int:
        return -127 if self.symmetric else -128

    def _ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = torch.aminmax(x)
        return (low, high) if self.join is None else self.join(low, high)

    def _observe(self, x: Tensor, call: int) -> None:
        low, high = self._ends(x)
        first = torch.isinf(self.low[call])
        low = torch.where(first, low, self.low[call] + _MOMENTUM * (low - self.low[call]))
        high = torch.where(first, high, self.high[call] + _MOMENTUM * (high - self.high[call]))
        self.low[call], self.high[call] = low, high
        self.set_range(low, high, call)

    def _of_numbers(self, x: Tensor, bits: float, call: int) -> Tensor:
        """The same in numbers of Python: thirty operations on single numbers cost more as tensors than the rounding."""
        scale, zero_point = self.scale.numpy(), self.zero_point.numpy()
        if self.training:
            low, high = map(float, self._ends(x.detach()))
            if not math.isfinite(high - low):
                # The trainer says so.
                return x
            lowest, highest = self.low.numpy(), self.high.numpy()
            if math.isfinite(lowest[call]):
                low = float(lowest[call]) + _MOMENTUM * (low - float(lowest[call]))
                high = float(highest[call]) + _MOMENTUM * (high - float(highest[call]))
            lowest[call], highest[call] = low, high
            if self.symmetric:
                scale[call] = max(-low, high, 127e-8) / 127
            else:
                low = min(low, 0.0)
                scale[call] = max((max(high, 0.0) - low) / 255, 1e-8)
                zero_point[call] = min(max(round(-128 - low / float(scale[call])), -128), 127)
        return x if bits >= 32 else rounded_on_cpu(x, float(scale[call]), float(zero_point[call]), self._qmin)

    def set_range(self, low: Tensor, high: Tensor, call: int = 0) -> None:
        """Scale and zero point for values in [``low``, ``high``] (0-d tensors); zero is always representable."""
        if self.symmetric:
            self.scale[call] = (torch.maximum(-low, high) / 127).clamp_min(1e-8)
        else:
            low, high = low.clamp(max=0.0), high.clamp(min=0.0)
            scale = ((high - low) / 255).clamp_min(1e-8)
            self.scale[call] = scale
            self.zero_point[call] = torch.clamp(torch.round(-128 - low / scale), -128, 127)

    def reset(self) -> None:
        """Forget the observed range; the next batch in training mode sets it anew."""
        self.low.fill_(float("inf"))
        self.high.fill_(float("-inf"))
