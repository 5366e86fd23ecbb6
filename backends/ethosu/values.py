"""float32 values of a graph as the NPU holds them: whole numbers and their scale, made when a reader asks for a form.

The NPU has no floats, so what lies between two int8 layers in float32 is held as integers: int8 exactly as
``t3c::quantize_int8`` would have it, or wider. A value that one reader takes in one form is made in that form straight
from the sums before it, with one rounding. One that several forms are taken of is held once, as int16 or int32, and
each form is made of that; its scale comes from bounds of what the layers before it can give, by interval arithmetic, so
nothing saturates that float32 would not.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from t3c_compile.backends.ethosu.program import Array, Pair, Program, Tensor

# An int16 that is held for several readers is at least this much finer than the int8 steps they round to.
_FINER = 4.0
# The largest value of an int32 that is held: sums of two, and RESCALE's 31 bits, keep their room.
_WIDE = float(2**24)

Bounds = tuple[float, float]


def quantized(value: float, scale: float, zero_point: int) -> int:
    """``value`` (infinite where there is no limit) as ``t3c::quantize_int8`` has it, but clamped to 32 bits."""
    return int(np.clip(np.rint(value / scale) + zero_point, -(2.0**31), 2.0**31 - 1))


@dataclass
class Value:
    """One float32 value. ``shared``: more than one form is asked for. ``step``: the finest int8 step that it or what is
    made of it is rounded to, 0 where that is not known."""

    program: Program
    shape: tuple[int, ...]
    bounds: Bounds
    shared: bool = False
    step: float = 0.0
    _forms: dict[tuple[float, int, str], Tensor] = field(default_factory=dict)

    @property
    def magnitude(self) -> float:
        return max(abs(self.bounds[0]), abs(self.bounds[1]), 1e-30)

    def int8(self, scale: float, zero_point: int) -> Tensor:
        """``quantize_int8`` of the value."""
        return self._form(scale, zero_point, "int8")

    def fixed(self, scale: float, dtype: str) -> Tensor:
        """The value in units of ``scale``, as int16 or int32."""
        return self._form(scale, 0, dtype)

    def int16(self) -> tuple[Tensor, float]:
        """The value as int16, and the scale: the finest that its bounds allow."""
        scale = self.magnitude / 32767
        return self.fixed(scale, "int16"), scale

    def for_host(self) -> tuple[Tensor, Array]:
        """What the host reads: integers, and the scale of each channel or one for all."""
        tensor, scale = self.held()
        return tensor, np.array([scale])

    def held(self) -> tuple[Tensor, float]:
        """The one form that all others are made of."""
        narrow = self.magnitude / 32767
        if self.step and narrow * _FINER <= self.step:
            return self._made(narrow, 0, "int16"), narrow
        wide = self.magnitude / _WIDE
        return self._made(wide, 0, "int32"), wide

    def _form(self, scale: float, zero_point: int, dtype: str) -> Tensor:
        if not self.shared:
            return self._made(scale, zero_point, dtype)
        source, unit = self.held()
        if (unit, 0, source.dtype) == (scale, zero_point, dtype):
            return source
        key = (scale, zero_point, dtype)
        if key not in self._forms:
            self._forms[key] = self.program.rescale(source, unit / scale, dtype, zero_point)
        return self._forms[key]

    def _made(self, scale: float, zero_point: int, dtype: str) -> Tensor:
        key = (scale, zero_point, dtype)
        if key not in self._forms:
            self._forms[key] = self._make(scale, zero_point, dtype)
        return self._forms[key]

    def _make(self, scale: float, zero_point: int, dtype: str) -> Tensor:
        raise NotImplementedError


@dataclass(kw_only=True)
class Sums(Value):
    """int32 sums and what one of each channel is worth; ``compute`` adds them to the program when first asked.

    ``for_host_too``: the host reads them, as they are, and so do all others.
    """

    compute: Callable[[], Tensor]
    scales: Array
    for_host_too: bool = False
    _sums: Tensor | None = None

    def _computed(self) -> Tensor:
        if self._sums is None:
            self._sums = self.compute()
        return self._sums

    def for_host(self) -> tuple[Tensor, Array]:
        return self._computed(), self.scales

    def _form(self, scale: float, zero_point: int, dtype: str) -> Tensor:
        if self.for_host_too:
            return self._made(scale, zero_point, dtype)
        return super()._form(scale, zero_point, dtype)

    def _make(self, scale: float, zero_point: int, dtype: str) -> Tensor:
        return self.program.rescale(self._computed(), self.scales / scale, dtype, zero_point)


@dataclass(kw_only=True)
class Dequantized(Value):
    """What an int8 tensor stands for."""

    tensor: Tensor
    scale: float
    zero_point: int

    def _make(self, scale: float, zero_point: int, dtype: str) -> Tensor:
        return self.program.rescale(self.tensor, self.scale / scale, dtype, zero_point, self.zero_point)


@dataclass(kw_only=True)
class Clamped(Value):
    """A value clamped, as relu does: rounding is monotone, so the rounded value is clamped at the rounded limits."""

    source: Value
    limits: Bounds

    def _make(self, scale: float, zero_point: int, dtype: str) -> Tensor:
        x = self.source._form(scale, zero_point, dtype)
        return self.program.clamp(x, *(quantized(limit, scale, zero_point) for limit in self.limits))


@dataclass(kw_only=True)
class Pooled(Value):
    """The greatest of each window (kernel, stride, padding): rounding is monotone, so rounded values are pooled."""

    source: Value
    window: tuple[Pair, Pair, Pair]

    def _make(self, scale: float, zero_point: int, dtype: str) -> Tensor:
        if dtype == "int32":
            # TOSA pools no int32.
            narrow = self.magnitude / 32767
            return self.program.rescale(self._made(narrow, 0, "int16"), narrow / scale, "int32")
        return self.program.max_pool(self.source._form(scale, zero_point, dtype), *self.window)


def interval(weight: Array, low: float, high: float) -> tuple[Array, Array]:
    """Bounds of ``weight @ x`` for whole ``x`` in [low, high]; ``weight`` [out, ...]."""
    rows = weight.reshape(len(weight), -1).astype(np.float64)
    up, down = np.maximum(rows, 0).sum(1), np.minimum(rows, 0).sum(1)
    return up * low + down * high, up * high + down * low
