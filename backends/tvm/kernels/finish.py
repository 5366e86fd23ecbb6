"""How a kernel ends: what becomes of each float32 result before it is written, so that it is written once.

Other tensors are added and activation functions applied in registers; what is written is float32, int8 for the layers
that read it, or both.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels import vmath
from t3c_compile.backends.tvm.kernels.emit import (
    Buffer,
    Index,
    Shape,
    fill,
    load_partial,
    store_partial,
    vec,
)
from t3c_compile.backends.tvm.kernels.side_by_side import SideBySide, Vectors
from t3c_compile.passes.ops.elementwise import FUNCTIONS

ADD, ADD_INT8 = "add", "add int8"


def _relu(x: Expr, lanes: int) -> Expr:
    return T.max(x, fill(T.float32(0), lanes))


def _of_float_math(function: Callable[[Any, Any], Any], x: Expr, lanes: int) -> Expr:
    value: Expr = function(vmath.Lanes(lanes), x)
    return value


# By the name of the ATen or t3c op.
ACTIVATIONS: Mapping[str, Callable[[Expr, int], Expr]] = {
    "relu": _relu,
    "hardswish": vmath.hardswish,
    **{name: partial(_of_float_math, FUNCTIONS[name]) for name in FUNCTIONS if name not in ("exp_f32", "erf_f32")},
}


@dataclass(frozen=True)
class Finish:
    """``steps`` in order, each :data:`ADD` or :data:`ADD_INT8` (of a tensor of the result's shape) or a name in
    :data:`ACTIVATIONS`.

    ``floats``: the float32 result is written. ``quantized``: how many int8 forms of it are, each with its own scale.
    ``offset``: added to those forms for a dot product that wants them as uint8, else 0.
    """

    steps: tuple[str, ...] = ()
    floats: bool = True
    quantized: int = 0
    offset: int = 0

    @property
    def added(self) -> list[str]:
        """The steps that add a tensor."""
        return [step for step in self.steps if step in (ADD, ADD_INT8)]

    @property
    def form_dtype(self) -> str:
        return "uint8" if self.offset else "int8"

    def arguments(self, shape: Shape, dtype: str = "float32") -> dict[str, tuple[Shape, str] | None]:
        """What a kernel takes after its own arguments: tensors to add, 1 / scale and zero point of each int8 form and
        scale and zero point of each int8 tensor to add (float32), and the results, of ``dtype`` where nothing is left
        to do with them."""
        dtypes = ["float32" if kind == ADD else self.form_dtype for kind in self.added]
        added = {f"added{i}": (shape, dtype) for i, dtype in enumerate(dtypes)}
        numbers = 2 * (self.quantized + self.added.count(ADD_INT8))
        forms = {f"q{i}": (shape, self.form_dtype) for i in range(self.quantized)}
        return {
            **added,
            "forms": ((numbers,), "float32") if numbers else None,
            "y": (shape, dtype) if self.floats else None,
            **forms,
        }


PLAIN = Finish()


class Writer:
    """Ends a kernel as ``finish`` says; ``buffers`` are those of its arguments."""

    def __init__(self, finish: Finish, buffers: Sequence[Buffer]) -> None:
        count = len(finish.added)
        self._finish, self._added = finish, buffers[:count]
        numbers, self._y = buffers[count], buffers[count + 1]
        pairs = [
            (T.bind(numbers[2 * i]), T.bind(numbers[2 * i + 1]))
            for i in range(finish.quantized + finish.added.count(ADD_INT8))
        ]
        self._forms = [(q, *pair) for q, pair in zip(buffers[count + 2 :], pairs, strict=False)]
        self._added_scales = pairs[finish.quantized :]

    @property
    def has_function(self) -> bool:
        """Whether results go through a function of many steps."""
        return any(step in FUNCTIONS for step in self._finish.steps)

    def put(self, index: Index, value: Expr, lanes: int, valid: int | None = None) -> None:
        """Write the first ``valid`` (all) of ``lanes`` results that lie from element ``index`` on."""
        self.put_all([index], [value], lanes, lanes if valid is None else valid)

    def put_all(self, places: Sequence[Index], values: Sequence[Expr], lanes: int, valid: int) -> None:
        """The same of several vectors of results side by side, each from its place on."""
        added, scales = iter(self._added), iter(self._added_scales)
        for step in self._finish.steps:
            if step == ADD:
                tensor = next(added)
                others = [load_partial(tensor, at, lanes, valid) for at in places]
                # Never one operation with a product before it: the reference rounds both.
                values = [vmath.rounded(value, lanes) + other for value, other in zip(values, others, strict=True)]
            elif step == ADD_INT8:
                tensor, (scale, zero_point) = next(added), next(scales)
                wholes = [_whole(load_partial(tensor, at, lanes, valid), zero_point, lanes) for at in places]
                values = [
                    vmath.rounded(value, lanes) + vmath.rounded(whole * fill(scale, lanes), lanes)
                    for value, whole in zip(values, wholes, strict=True)
                ]
            elif len(values) > 1 and step in FUNCTIONS:
                values = FUNCTIONS[step](SideBySide(lanes), Vectors(values)).each
            else:
                values = [ACTIVATIONS[step](T.bind(value), lanes) for value in values]
        values = [T.bind(value) for value in values]
        positive = self._finish.steps[-1:] == ("relu",)
        for at, value in zip(places, values, strict=True):
            if self._y is not None:
                store_partial(self._y, at, value, lanes, valid)
            for q, inverse, zero_point in self._forms:
                form = quantized_int32(value, inverse, zero_point, lanes, self._finish.offset, positive)
                store_partial(q, at, narrowed(form, self._finish.offset, lanes), lanes, valid)


def _whole(form: Expr, zero_point: Expr, lanes: int) -> Expr:
    """int8 ``form`` without its zero point, float32."""
    return T.cast(T.cast(form, vec("int32", lanes)), vec("float32", lanes)) - fill(zero_point, lanes)


def quantized(value: Expr, inverse: Expr, zero_point: Expr, lanes: int) -> Expr:
    """``t3c::quantize_int8`` of float32 ``value``; ``inverse`` (1 / scale) and ``zero_point`` are float32 scalars."""
    # By way of int32 the cast vectorizes.
    return narrowed(quantized_int32(value, inverse, zero_point, lanes), 0, lanes)


def quantized_int32(
    value: Expr, inverse: Expr, zero_point: Expr, lanes: int, offset: int = 0, positive: bool = False
) -> Expr:
    """The same in int32; with an ``offset``, that is added, and ``narrowed`` has yet to bound it from above.

    A ``positive`` value needs no lower bound: no zero point is below the least int8.
    """
    # The bounds are whole numbers, so a value may meet them before it is rounded.
    scaled = value * fill(inverse, lanes)
    low = None if positive else T.float32(-128) - zero_point
    high = None if offset else T.float32(127) - zero_point
    return bounded_int32(scaled, low, high, lanes) + fill(T.cast(zero_point, "int32") + T.int32(offset), lanes)


def bounded_int32(value: Expr, low: Expr | None, high: Expr | None, lanes: int) -> Expr:
    """The int32 nearest to float32 ``value``, within bounds that are whole numbers."""
    if high is not None:
        value = T.min(value, fill(high, lanes))
    if low is not None:
        value = T.max(value, fill(low, lanes))
    return vmath.nearest(value, lanes)


def narrowed(form: Expr, offset: int, lanes: int) -> Expr:
    """int32 ``form`` as int8, or with an ``offset`` as uint8, where any value past 255 becomes 255.

    That bound and the cast are one instruction; what x86 makes of a float past int32's range is past 255, too.
    """
    if not offset:
        return T.cast(form, vec("int8", lanes))
    return T.cast(T.min(T.reinterpret(vec("uint32", lanes), form), fill(T.uint32(255), lanes)), vec("uint8", lanes))
