"""A TOSA 1.0 graph as data: what a partition of a profile is before it is serialized.

Tensors are int8, int16 or int32; images lie as [1, height, width, channels], matrices as [1, rows, rows, columns], and
those of a product of two tensors as [count, rows, columns].
Operators mean what the TOSA specification says (https://www.mlplatform.org/tosa/tosa_spec_1_0_0.html);
``reference.py`` states it in torch, ``serialize.py`` writes the flatbuffer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Pair = tuple[int, int]

RANGES = {"int8": (-128, 127), "int16": (-32768, 32767), "int32": (-(2**31), 2**31 - 1)}


@dataclass(frozen=True)
class Tensor:
    """A tensor of a program: its place among all, shape and dtype (``int8``, ``int16`` or ``int32``)."""

    index: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def name(self) -> str:
        return f"t{self.index}"


@dataclass(frozen=True)
class Operator:
    """One operator: TOSA's name, inputs, output, and its attributes by TOSA's names (constants are inputs there)."""

    kind: str
    inputs: tuple[Tensor, ...]
    output: Tensor
    attributes: dict[str, Any]


@dataclass
class Program:
    """A partition. ``inputs`` and ``outputs`` are in the order of the call."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    operators: list[Operator] = field(default_factory=list)
    _count: int = 0

    def tensor(self, shape: Sequence[int], dtype: str) -> Tensor:
        self._count += 1
        return Tensor(self._count, tuple(int(size) for size in shape), dtype)

    def input(self, shape: Sequence[int], dtype: str) -> Tensor:
        self.inputs.append(self.tensor(shape, dtype))
        return self.inputs[-1]

    def _add(self, kind: str, inputs: Sequence[Tensor], shape: Sequence[int], dtype: str, **attributes: Any) -> Tensor:
        output = self.tensor(shape, dtype)
        self.operators.append(Operator(kind, tuple(inputs), output, attributes))
        return output

    # -- operators ------------------------------------------------------------------------------------------------

    def conv2d(
        self,
        x: Tensor,
        weight: Array,
        bias: Array,
        zero_point: int,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        depthwise: bool = False,
    ) -> Tensor:
        """int8 ``x`` and ``weight`` [out, kh, kw, in] (depthwise: [kh, kw, channels, 1]), int32 ``bias`` [out] -> int32
        sums."""
        kernel = weight.shape[:2] if depthwise else weight.shape[1:3]
        reach = tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
        x, pad, size = self._window(x, reach, stride, padding)
        return self._add(
            "DEPTHWISE_CONV2D" if depthwise else "CONV2D",
            [x],
            (1, *size, len(bias)),
            "int32",
            weight=weight.astype(np.int8),
            bias=bias.astype(np.int32),
            input_zp=zero_point,
            pad=pad,
            stride=tuple(stride),
            dilation=tuple(dilation),
        )

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """int8 ``a`` [count, n, k] times int8 ``b`` [count, k, m] -> int32."""
        return self._add("MATMUL", [a, b], (*a.shape[:2], b.shape[2]), "int32")

    def max_pool(self, x: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
        x, pad, size = self._window(x, kernel, stride, padding)
        shape = (1, *size, x.shape[3])
        return self._add("MAX_POOL2D", [x], shape, x.dtype, kernel=tuple(kernel), stride=tuple(stride), pad=pad)

    def _window(
        self, x: Tensor, reach: Pair, stride: Pair, padding: Pair
    ) -> tuple[Tensor, tuple[int, int, int, int], Pair]:
        """``x``, the padding (top, bottom, left, right) and the output size of windows that go up in ``x`` exactly,
        which TOSA asks for; rows and columns that no window reaches are cut away."""
        sizes, pads, kept = [], [], []
        for size, k, s, p in zip(x.shape[1:3], reach, stride, padding, strict=True):
            sizes.append((size + 2 * p - k) // s + 1)
            after = (sizes[-1] - 1) * s + k - p - size
            pads += [p, max(0, after)]
            kept.append(size + min(0, after))
        if tuple(kept) != x.shape[1:3]:
            x = self._add("SLICE", [x], (1, *kept, x.shape[3]), x.dtype, start=(0, 0, 0, 0))
        return x, (pads[0], pads[1], pads[2], pads[3]), (sizes[0], sizes[1])

    def rescale(
        self, x: Tensor, gain: Array | float, dtype: str, zero_point: int = 0, input_zero_point: int = 0
    ) -> Tensor:
        """``round_half_up((x - input_zero_point) * gain) + zero_point``, clamped to ``dtype``;
        ``gain`` [1] or [channels], not negative.

        A gain is ``multiplier / 2**shift`` with a multiplier of 31 bits: 2**-31 from what was asked for.
        """
        multiplier, shift = _multipliers(np.atleast_1d(np.asarray(gain, np.float64)))
        zero_points = {"input_zp": input_zero_point, "output_zp": zero_point}
        return self._add("RESCALE", [x], x.shape, dtype, multiplier=multiplier, shift=shift, **zero_points)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return self._add("ADD", [a, b], np.broadcast_shapes(a.shape, b.shape), "int32")

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """int16 times int16 -> int32."""
        return self._add("MUL", [a, b], np.broadcast_shapes(a.shape, b.shape), "int32")

    def clamp(self, x: Tensor, low: int, high: int) -> Tensor:
        """int8 or int16; int32 by MAXIMUM and MINIMUM, as TOSA's CLAMP does not take it."""
        least, greatest = RANGES[x.dtype]
        if x.dtype != "int32":
            return self._add("CLAMP", [x], x.shape, x.dtype, low=max(low, least), high=min(high, greatest))
        for kind, limit, idle in (("MAXIMUM", low, low <= least), ("MINIMUM", high, high >= greatest)):
            x = x if idle else self._add(kind, [x], x.shape, x.dtype, limit=limit)
        return x

    def table(self, x: Tensor, table: Array) -> Tensor:
        """int16 ``x``, int16 ``table`` [513] -> int32, 128 times the entries, interpolated; int8 ``x``, int8 ``table``
        [256] -> int8."""
        return self._add("TABLE", [x], x.shape, "int32" if x.dtype == "int16" else "int8", table=table.astype(x.dtype))

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        return self._add("RESHAPE", [x], shape, x.dtype)

    def reduce_sum(self, x: Tensor, axis: int) -> Tensor:
        shape = (*x.shape[:axis], 1, *x.shape[axis + 1 :])
        return self._add("REDUCE_SUM", [x], shape, "int32", axis=axis)


def _multipliers(gain: Array) -> tuple[Array, Array]:
    """(int32 in [2**30, 2**31), shift in [2, 62]) of each gain; one too small for that is (0, 62)."""
    if not (np.isfinite(gain).all() and (gain >= 0).all()):
        raise ValueError("a gain is negative or not finite")
    fraction, exponent = np.frexp(gain)
    multiplier = np.rint(fraction * 2.0**31).astype(np.int64)
    shift = 31 - exponent.astype(np.int64)
    full = multiplier == 2**31
    multiplier, shift = np.where(full, 2**30, multiplier), np.where(full, shift - 1, shift)
    # A smaller multiplier at the greatest shift.
    over = np.maximum(0, shift - 62)
    multiplier, shift = multiplier >> np.minimum(over, 62), shift - over
    if (shift < 2).any():
        raise ValueError(f"a gain of {gain.max():g} is beyond RESCALE's 2**29")
    return multiplier.astype(np.int32), shift.astype(np.int8)
