"""A program as a TOSA 1.0 flatbuffer, by the TOSA project's own serializer."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tosa_serializer as tosa

from t3c_compile.backends.ethosu.program import Operator, Program, Tensor

# vela reads 1.0, not the 1.1 draft that the serializer writes by default.
_VERSION = (1, 0, 0, False)

_DTYPES = {"int8": tosa.DType.INT8, "int16": tosa.DType.INT16, "int32": tosa.DType.INT32}
_NAN = tosa.NanPropagationMode.PROPAGATE


def serialize(program: Program) -> bytes:
    """The flatbuffer of ``program``."""
    writer = _Writer()
    for tensor in program.inputs:
        writer.graph.addInputTensor(_described(tensor))
    for operator in program.operators:
        writer.write(operator)
    for tensor in program.outputs:
        writer.graph.addOutputTensor(_described(tensor))
    return bytes(writer.graph.serialize())


def _described(tensor: Tensor) -> Any:
    return tosa.TosaSerializerTensor(tensor.name, list(tensor.shape), _DTYPES[tensor.dtype])


class _Writer:
    def __init__(self) -> None:
        self.graph = tosa.TosaSerializer("", tosa.ConstMode.EMBED, *_VERSION)

    def constant(self, values: Any, dtype: str) -> str:
        array = np.asarray(values, dtype)
        return str(self.graph.addConst(list(array.shape), _DTYPES[dtype], array).name)

    def shape(self, sizes: Sequence[int]) -> str:
        return str(self.graph.addConst([len(sizes)], tosa.DType.SHAPE, list(sizes)).name)

    def write(self, operator: Operator) -> None:
        attribute = tosa.TosaSerializerAttribute()
        constants = _ATTRIBUTES[operator.kind](self, attribute, operator, **operator.attributes)
        output = operator.output
        self.graph.currRegion.currBasicBlock.addTensor(output.name, list(output.shape), _DTYPES[output.dtype])
        inputs = [*(x.name for x in operator.inputs), *constants]
        self.graph.addOperator(getattr(tosa.Op, operator.kind), inputs, [output.name], attribute)


# Each sets the attribute and gives the names of the constants that follow the operator's inputs.


def _convolution(
    w: _Writer, attribute: Any, op: Operator, weight: Any, bias: Any, input_zp: int, **a: Any
) -> list[str]:
    make = attribute.Conv2dAttribute if op.kind == "CONV2D" else attribute.DepthwiseConv2dAttribute
    make(list(a["pad"]), list(a["stride"]), list(a["dilation"]), False, tosa.DType.INT32)
    zero_points = [w.constant([input_zp], "int8"), w.constant([0], "int8")]
    return [w.constant(weight, "int8"), w.constant(bias, "int32"), *zero_points]


def _matmul(w: _Writer, attribute: Any, op: Operator) -> list[str]:
    attribute.MatMulAttribute()
    return [w.constant([0], "int8") for _ in op.inputs]


def _rescale(w: _Writer, attribute: Any, op: Operator, multiplier: Any, shift: Any, **zero: int) -> list[str]:
    attribute.RescaleAttribute(True, tosa.RoundingMode.SINGLE_ROUND, len(multiplier) > 1, False, False)
    zero_points = [w.constant([zero["input_zp"]], op.inputs[0].dtype), w.constant([zero["output_zp"]], op.output.dtype)]
    return [w.constant(multiplier, "int32"), w.constant(shift, "int8"), *zero_points]


def _add(w: _Writer, attribute: Any, op: Operator) -> list[str]:
    attribute.AddAttribute()
    return []


def _multiply(w: _Writer, attribute: Any, op: Operator) -> list[str]:
    attribute.MulAttribute()
    return [w.constant([0], "int8")]


def _clamp(w: _Writer, attribute: Any, op: Operator, low: int, high: int) -> list[str]:
    limits = (list(np.array([limit], op.output.dtype).tobytes()) for limit in (low, high))
    attribute.ClampAttribute(*limits, _NAN)
    return []


def _limit(w: _Writer, attribute: Any, op: Operator, limit: int) -> list[str]:
    (attribute.MaximumAttribute if op.kind == "MAXIMUM" else attribute.MinimumAttribute)(_NAN)
    return [w.constant(np.full([1] * len(op.output.shape), limit), "int32")]


def _table(w: _Writer, attribute: Any, op: Operator, table: Any) -> list[str]:
    attribute.TableAttribute()
    return [w.constant(table, op.inputs[0].dtype)]


def _max_pool(w: _Writer, attribute: Any, op: Operator, kernel: Any, stride: Any, pad: Any) -> list[str]:
    attribute.MaxPool2dAttribute(list(kernel), list(stride), list(pad), _NAN)
    return []


def _reduce_sum(w: _Writer, attribute: Any, op: Operator, axis: int) -> list[str]:
    attribute.ReduceSumAttribute(axis)
    return []


def _reshape(w: _Writer, attribute: Any, op: Operator) -> list[str]:
    attribute.ReshapeAttribute()
    return [w.shape(op.output.shape)]


def _slice(w: _Writer, attribute: Any, op: Operator, start: Any) -> list[str]:
    attribute.SliceAttribute()
    return [w.shape(start), w.shape(op.output.shape)]


_ATTRIBUTES: dict[str, Callable[..., list[str]]] = {
    "CONV2D": _convolution,
    "DEPTHWISE_CONV2D": _convolution,
    "MATMUL": _matmul,
    "RESCALE": _rescale,
    "ADD": _add,
    "MUL": _multiply,
    "CLAMP": _clamp,
    "MAXIMUM": _limit,
    "MINIMUM": _limit,
    "TABLE": _table,
    "MAX_POOL2D": _max_pool,
    "RESHAPE": _reshape,
    "REDUCE_SUM": _reduce_sum,
    "SLICE": _slice,
}
