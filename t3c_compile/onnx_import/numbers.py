"""What ONNX operators are on numbers; those a model computes its shapes with.

A function gives ``NotImplemented`` where the result is data rather than a few numbers; the operator is then evaluated
on tensors.
"""

import math
import operator
from typing import Any

import numpy as np

from t3c_compile.onnx_import.node import Function, Numbers, OnnxNode, is_static, to_list, to_numbers

_MOST = 64
_INTEGERS, _FLOATS, _BOOL = (2, 3, 5, 6, 7), (1, 10, 11), 9


def _elementwise(function: Any, count: int) -> Function:
    apply = np.frompyfunc(function, count, 1)
    return lambda node, *values: to_numbers(apply(*values))


def _folded(function: Any) -> Function:
    apply = np.frompyfunc(function, 2, 1)

    def fold(node: OnnxNode, first: Numbers, *rest: Numbers) -> Any:
        for value in rest:
            first = apply(first, value)
        return to_numbers(first)

    return fold


def _cast(node: OnnxNode, x: Numbers) -> Any:
    to = node.get("to")
    if not is_static(x):
        return x if to in _INTEGERS else NotImplemented
    kind: type | None = int if to in _INTEGERS else float if to in _FLOATS else bool if to == _BOOL else None
    return NotImplemented if kind is None else to_numbers(np.frompyfunc(kind, 1, 1)(x))


def _shape(node: OnnxNode, x: Numbers) -> Numbers:
    return to_numbers(list(x.shape)[node.get("start", 0) : node.get("end")])


def _axes(node: OnnxNode, axes: Numbers | None) -> tuple[int, ...]:
    return tuple(node.get("axes", ())) if axes is None else tuple(to_list(axes))


def _unsqueeze(node: OnnxNode, x: Numbers, axes: Numbers | None = None) -> Numbers:
    return np.expand_dims(x, _axes(node, axes))


def _squeeze(node: OnnxNode, x: Numbers, axes: Numbers | None = None) -> Numbers:
    return to_numbers(np.squeeze(x, _axes(node, axes) or None))


def _gather(node: OnnxNode, x: Numbers, indices: Numbers) -> Any:
    if not is_static(indices):
        return NotImplemented
    return to_numbers(np.take(x, indices.astype(np.int64), axis=node.get("axis", 0)))


def _concat(node: OnnxNode, *values: Numbers) -> Numbers:
    return np.concatenate(values, axis=node.get("axis"))


def _slice(node: OnnxNode, x: Numbers, *bounds: Numbers | None) -> Any:
    if not all(is_static(bound) for bound in bounds):
        return NotImplemented
    if not bounds:
        bounds = tuple(to_numbers(list(node.get(name, ()))) for name in ("starts", "ends", "axes"))
    starts, ends, axes, steps = [*(to_list(bound) for bound in bounds), [], []][:4]
    index = [slice(None)] * x.ndim
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        index[axes[i] if axes else i] = slice(start, end, steps[i] if steps else 1)
    return x[tuple(index)]


def _reshape(node: OnnxNode, x: Numbers, shape: Numbers) -> Any:
    return x.reshape(to_list(shape)) if is_static(shape) else NotImplemented


def _expand(node: OnnxNode, x: Numbers, shape: Numbers) -> Any:
    if not is_static(shape) or math.prod(to_list(shape)) > _MOST:
        return NotImplemented
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(to_list(shape)))).copy()


def _constant_of_shape(node: OnnxNode, shape: Numbers) -> Any:
    if not is_static(shape) or math.prod(to_list(shape)) > _MOST:
        return NotImplemented
    value = node.get("value")
    return np.full(to_list(shape), 0.0 if value is None else value.numpy().item(), object)


def _range(node: OnnxNode, start: Numbers, limit: Numbers, step: Numbers) -> Any:
    bounds = [start.item(), limit.item(), step.item()]
    if not all(type(bound) is int for bound in bounds) or len(range(*bounds)) > _MOST:
        return NotImplemented
    return to_numbers(list(range(*bounds)))


def _reduce(function: Any) -> Function:
    apply = np.frompyfunc(function, 2, 1)

    def reduce(node: OnnxNode, x: Numbers, axes: Numbers | None = None) -> Numbers:
        axis = _axes(node, axes) or None
        return to_numbers(apply.reduce(x, axis=axis, keepdims=bool(node.get("keepdims", 1))))

    return reduce


def _pick(condition: Any, a: Any, b: Any) -> Any:
    return a if condition else b


NUMBERS: dict[str, Function] = {
    "Identity": lambda node, x: x,
    "Cast": _cast,
    "Shape": _shape,
    "Size": lambda node, x: to_numbers(x.size),
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Gather": _gather,
    "Concat": _concat,
    "Slice": _slice,
    "Reshape": _reshape,
    "Expand": _expand,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "Add": _elementwise(operator.add, 2),
    "Sub": _elementwise(operator.sub, 2),
    "Mul": _elementwise(operator.mul, 2),
    "Div": _elementwise(lambda a, b: a / b if isinstance(a, float) else a // b, 2),
    "Mod": _elementwise(operator.mod, 2),
    "Neg": _elementwise(operator.neg, 1),
    "Floor": _elementwise(math.floor, 1),
    "Ceil": _elementwise(math.ceil, 1),
    "Sqrt": _elementwise(math.sqrt, 1),
    "Max": _folded(max),
    "Min": _folded(min),
    "Equal": _elementwise(operator.eq, 2),
    "Greater": _elementwise(operator.gt, 2),
    "Less": _elementwise(operator.lt, 2),
    "And": _elementwise(operator.and_, 2),
    "Or": _elementwise(operator.or_, 2),
    "Not": _elementwise(operator.not_, 1),
    "Where": _elementwise(_pick, 3),
    "ReduceProd": _reduce(operator.mul),
    "ReduceSum": _reduce(operator.add),
    "ReduceMax": _reduce(max),
    "ReduceMin": _reduce(min),
}
