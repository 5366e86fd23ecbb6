"""Expand the ``t3c::`` nodes of an ONNX model into standard ops: int8 weights and activations in QDQ form.

A product of int8 tensors is a float MatMul or Conv with DequantizeLinear on both inputs, and QuantizeLinear behind it
where the result is a middle: the form in which ONNX Runtime, TensorRT and others find their int8 kernels. A component's
scale is the DequantizeLinear scale of its channel.

Activations are uint8, 128 above the int8 of the ops: on x86-64, ONNX Runtime has no kernel for int8 ones, and makes
uint8 of them only where one layer reads them.

Weights keep the store's layout, and what brings them into the operator's (transposition, the cut of a core's columns,
rounding to fewer bits) are nodes on constants, which runtimes fold when they load. So profiles at 5 to 8 bits read the
same int8 bytes. 4-bit weights are INT4 initializers of their own, half the size; they go through a Cast to int8,
because ONNX Runtime has no integer kernel behind a DequantizeLinear of INT4 (it multiplies in float32, 4 times slower).

Weight-only products are a float MatMul of a dequantized weight. Of those ONNX Runtime makes MatMulNBits, which by
default rounds their activations to int8; with the session option ``session.qdq_matmulnbits_accuracy_level`` at 1 it
does not.

Two things differ from the meaning of the ops: QuantizeLinear divides by the scale where they multiply by its
reciprocal, and it clamps middles at -128 where they clamp at -127. Either moves a value by one int8 step.
"""

from collections.abc import Sequence
from functools import partialmethod
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tape import Tape

from t3c_compile.backends.onnx.keep_ops import DOMAIN, is_tensor
from t3c_compile.backends.onnx.shared_data import Array, SharedData

# Smaller tensors stay in the ONNX file.
_LEAST_EXTERNAL_BYTES = 256
# Runtimes make a convolution's bias an int32 in units of its product's scale.
_BIAS_MAX = 2**30

Value: TypeAlias = Any  # onnx_ir.Value, which mypy does not see


class Expansion:
    """Rewrites one model in place; its constants go to ``data``."""

    def __init__(self, model: ir.Model, data: SharedData) -> None:
        self._graph = model.graph
        self._data = data
        self._constants: dict[Any, Value] = {}
        self._tape = Tape()
        self._unsigned: set[Value] = set()

    def run(self) -> None:
        for node in list(self._graph):
            if node.domain == DOMAIN:
                self._tape = Tape()
                unsigned = node.op_type == "quantize_int8" and _is_read_by_kept_ops(node.outputs[0])
                arguments = _arguments(node)
                result = self._quantize(**arguments) if unsigned else getattr(self, node.op_type)(**arguments)
                ir.convenience.replace_nodes_and_values(
                    self._graph, node, [node], self._tape.nodes, node.outputs, [result]
                )
                if unsigned:
                    result.type = ir.TensorType(ir.DataType.UINT8)
                    self._unsigned.add(result)
        for name, value in list(self._graph.initializers.items()):
            if not value.uses():
                del self._graph.initializers[name]
            elif value.const_value is not None and not isinstance(value.const_value, ir.ExternalTensor):
                self._store(value)

    # -- the ops, with the arguments of their torch schemas -------------------------------------------------------

    def quantize_int8(self, x: Value, scale: float, zero_point: int) -> Value:
        return self._op("QuantizeLinear", x, self._scalar(scale, np.float32), self._scalar(zero_point, np.int8))

    def dequantize_int8(self, q: Value, scale: float, zero_point: int) -> Value:
        if q in self._unsigned:
            return self._dequantize(q, scale, zero_point)
        return self._op("DequantizeLinear", q, self._scalar(scale, np.float32), self._scalar(zero_point, np.int8))

    def int8_linear(
        self, x: Value, weight: Value, scale: Value, bias: Value | None, x_scale: float, x_zero_point: int, bits: int
    ) -> Value:
        flat = _is_flat(x)
        x = self.dequantize_int8(x, x_scale, x_zero_point)
        y = self._matmul(x, self._transposed(self._weight(weight, bits)), self._scale(scale, bits))
        return self._plus(y, bias, flat)

    def weight_only_linear(self, x: Value, weight: Value, scale: Value, bias: Value | None, bits: int) -> Value:
        y = self._matmul(x, self._transposed(self._weight(weight, bits)), self._scale(scale, bits))
        return self._plus(y, bias, flat=False)

    def svd_weight_only_linear(
        self, x: Value, v: Value, u: Value, mid_scale: Value, bias: Value | None, rank: int, bits: int
    ) -> Value:
        h = self._matmul(x, self._transposed(self._weight(v, bits, rank)), self._scale(mid_scale, bits, rank))
        y = self._matmul(h, self._weight(u, bits, rank), self._scale(None, bits))
        return self._plus(y, bias, flat=False)

    def int8_embedding(self, indices: Value, weight: Value, scale: Value, bits: int) -> Value:
        rows = self._op("Cast", self._op("Gather", self._weight(weight, bits), indices, axis=0), to=ir.DataType.FLOAT)
        scales = self._op("Gather", self._scale(scale, bits), indices, axis=0)
        return self._op("Mul", rows, self._op("Unsqueeze", scales, self._integers([-1])))

    def svd_linear(
        self,
        x: Value,
        v: Value,
        u: Value,
        mid_scale: Value,
        out_gain: Value | None,
        bias: Value | None,
        x_scale: float,
        x_zero_point: int,
        h_scale: float,
        rank: int,
        bits: int,
    ) -> Value:
        flat = _is_flat(x)
        x = self.dequantize_int8(x, x_scale, x_zero_point)
        h = self._matmul(x, self._transposed(self._weight(v, bits, rank)), self._scale(mid_scale, bits, rank))
        h = self._requantized(h, h_scale)
        y = self._matmul(h, self._weight(u, bits, rank), self._scale(out_gain, bits))
        return self._plus(y, bias, flat)

    def int8_conv2d(
        self,
        x: Value,
        weight: Value,
        scale: Value,
        bias: Value | None,
        x_scale: float,
        x_zero_point: int,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        bits: int,
    ) -> Value:
        x = self.dequantize_int8(x, x_scale, x_zero_point)
        y = self._conv(x, self._weight(weight, bits), self._scale(scale, bits), stride, padding, dilation, groups)
        return self._biased(y, bias, x_scale, scale)

    def svd_conv2d(
        self,
        x: Value,
        v: Value,
        u: Value,
        mid_scale: Value,
        out_gain: Value | None,
        bias: Value | None,
        x_scale: float,
        x_zero_point: int,
        h_scale: float,
        stride: Sequence[int],
        rank: int,
        bits: int,
    ) -> Value:
        x = self.dequantize_int8(x, x_scale, x_zero_point)
        h = self._conv(x, self._pixelwise(self._weight(v, bits, rank)), self._scale(mid_scale, bits, rank), stride)
        return self._conv_outwards(self._requantized(h, h_scale), u, h_scale, out_gain, bias, rank, bits)

    def _three_factors(
        self,
        depthwise: bool,
        x: Value,
        v: Value,
        core: Value,
        u: Value,
        mid_scale: Value,
        core_scale: Value,
        out_gain: Value | None,
        bias: Value | None,
        x_scale: float,
        x_zero_point: int,
        h_scale: float,
        g_scale: float,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        rank: int,
        bits: int,
    ) -> Value:
        """Tucker-2, and CP where the core is ``depthwise``."""
        inner, outer = min(rank, _sizes(v)[0]), min(rank, _sizes(u)[0])
        x = self.dequantize_int8(x, x_scale, x_zero_point)
        h = self._conv(x, self._pixelwise(self._weight(v, bits, inner)), self._scale(mid_scale, bits, inner))
        weight = self._weight(core, bits, outer)
        if depthwise:
            weight = self._op("Unsqueeze", weight, self._integers([1]))
        elif inner < _sizes(core)[1]:
            weight = self._op("Slice", weight, self._integers([0]), self._integers([inner]), self._integers([1]))
        scale = self._scale(core_scale, bits, outer)
        groups = outer if depthwise else 1
        g = self._conv(self._requantized(h, h_scale), weight, scale, stride, padding, dilation, groups)
        return self._conv_outwards(self._requantized(g, g_scale), u, g_scale, out_gain, bias, outer, bits)

    tucker2_conv2d = partialmethod(_three_factors, False)
    cp_conv2d = partialmethod(_three_factors, True)

    # -- what they are made of --------------------------------------------------------------------------------------

    def _conv_outwards(
        self,
        h: Value,
        u: Value,
        h_scale: float,
        out_gain: Value | None,
        bias: Value | None,
        rank: int,
        bits: int,
    ) -> Value:
        """The last factor of a convolution chain."""
        weight = self._pixelwise(self._transposed(self._weight(u, bits, rank)))
        return self._biased(self._conv(h, weight, self._scale(out_gain, bits)), bias, h_scale, out_gain)

    def _matmul(self, x: Value, weight: Value, scale: Value) -> Value:
        """``x`` [..., n] times int8 ``weight`` [n, m]."""
        return self._op("MatMul", x, self._op("DequantizeLinear", weight, scale, axis=1))

    def _conv(
        self,
        x: Value,
        weight: Value,
        scale: Value,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1),
        groups: int = 1,
    ) -> Value:
        weight = self._op("DequantizeLinear", weight, scale, axis=0)
        return self._op(
            "Conv", x, weight, strides=[*stride], pads=[*padding, *padding], dilations=[*dilation], group=groups
        )

    def _plus(self, y: Value, bias: Value | None, flat: bool) -> Value:
        """A matrix product and its bias. Of a ``flat`` (two-dimensional) MatMul and an Add ONNX Runtime makes a Gemm,
        which it runs in float32; a Sum it leaves alone, and the MatMul is int8."""
        return y if bias is None else self._op("Sum" if flat else "Add", y, bias)

    def _biased(self, y: Value, bias: Value | None, x_scale: float, gain: Value | None) -> Value:
        """A convolution and its bias: an input of the node where an int32 can hold it, else an addition."""
        if bias is None:
            return y
        conv = y.producer()
        unit = np.abs(np.float32(x_scale) * (np.float32(1) if gain is None else _array(gain)))
        if np.all(np.abs(_array(bias)) <= _BIAS_MAX * unit):
            conv.resize_inputs(3)
            conv.replace_input_with(2, bias)
            return y
        return self._op("Add", y, self._constant((bias.name, "pixels"), _array(bias)[:, None, None]))

    def _requantized(self, h: Value, scale: float) -> Value:
        return self._dequantize(self._quantize(h, scale, 0), scale, 0)

    def _quantize(self, x: Value, scale: float, zero_point: int) -> Value:
        """As uint8, 128 more than the int8 it stands for."""
        return self._op("QuantizeLinear", x, self._scalar(scale, np.float32), self._scalar(zero_point + 128, np.uint8))

    def _dequantize(self, q: Value, scale: float, zero_point: int) -> Value:
        return self._op(
            "DequantizeLinear", q, self._scalar(scale, np.float32), self._scalar(zero_point + 128, np.uint8)
        )

    def _transposed(self, weight: Value) -> Value:
        return self._op("Transpose", weight, perm=[1, 0])

    def _pixelwise(self, weight: Value) -> Value:
        """[O, I] -> [O, I, 1, 1]."""
        return self._op("Unsqueeze", weight, self._integers([2, 3]))

    def _op(self, op_type: str, *inputs: Value, **attributes: Any) -> Value:
        return self._tape.op(op_type, inputs, attributes)

    # -- constants --------------------------------------------------------------------------------------------------

    def _weight(self, value: Value, bits: int, rows: int | None = None) -> Value:
        """The first ``rows`` of an int8 factor at width ``bits``, as int8; at 4 bits divided by 16."""
        array = _array(value)[:rows]
        if bits == 4:
            narrow = np.rint(array / 16).astype(np.int8)
            weight = self._external(f"{value.name}.int4", narrow, bits)
            return self._op("Cast", weight, to=ir.DataType.INT8)
        weight = self._external(f"{value.name}.int8", array, bits)
        if bits == 8:
            return weight
        step = 2 ** (8 - bits)
        wide = self._op("Cast", weight, to=ir.DataType.INT32)
        # Half a step more, but where that would be a tie rounded to an odd multiple.
        last = self._op("BitwiseAnd", wide, self._scalar(2 * step - 1, np.int32))
        tie = self._op("Cast", self._op("Equal", last, self._scalar(step // 2, np.int32)), to=ir.DataType.INT32)
        wide = self._op("Sub", self._op("Add", wide, self._scalar(step // 2, np.int32)), tie)
        wide = self._op("BitwiseAnd", wide, self._scalar(-step, np.int32))
        return self._op("Cast", wide, to=ir.DataType.INT8)

    def _scale(self, value: Value | None, bits: int, rows: int | None = None) -> Value:
        """The first ``rows`` of a scale vector (1 where there is none), in units of what :meth:`_weight` gives."""
        unit = np.float32(16 if bits == 4 else 1)
        if value is None:
            return self._scalar(float(unit), np.float32)
        return self._external(f"{value.name}.x{unit:.0f}", _array(value)[:rows] * unit)

    def _external(self, name: str, array: Array, bits: int = 8) -> Value:
        key = (name, array.shape)
        if key not in self._constants:
            tensor = self._data.rows(name, np.ascontiguousarray(array), bits)
            self._constants[key] = self._initializer(name, tensor)
        return self._constants[key]

    def _scalar(self, number: float, dtype: Any) -> Value:
        return self._constant((number, np.dtype(dtype).name), np.array(number, dtype))

    def _integers(self, numbers: list[int]) -> Value:
        return self._constant(tuple(numbers), np.array(numbers, np.int64))

    def _constant(self, key: Any, array: Array) -> Value:
        if key not in self._constants:
            self._constants[key] = self._initializer("constant", ir.tensor(array))
        return self._constants[key]

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> Value:
        unique, count = name, 0
        while unique in self._graph.initializers:
            count += 1
            unique = f"{name}_{count}"
        value = ir.Value(
            name=unique, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape), const_value=tensor
        )
        self._graph.register_initializer(value)
        return value

    def _store(self, value: Value) -> None:
        array = np.ascontiguousarray(_array(value))
        if array.nbytes >= _LEAST_EXTERNAL_BYTES:
            value.const_value = self._data.whole(array)


def _arguments(node: ir.Node) -> dict[str, Any]:
    """A kept node's inputs and attributes by the names of its torch schema."""
    schema = getattr(torch.ops.t3c, node.op_type).default._schema
    names = [argument.name for argument in schema.arguments if is_tensor(argument)]
    inputs = [*node.inputs, *[None] * len(names)]
    values = dict(zip(names, inputs, strict=False))
    return values | {name: attribute.value for name, attribute in node.attributes.items()}


def _is_read_by_kept_ops(value: Value) -> bool:
    """Whether only ops that are expanded here see the dtype."""
    return not value.is_graph_output() and all(use.node.domain == DOMAIN for use in value.uses())


def _is_flat(x: Value) -> bool:
    return x.shape is not None and len(x.shape) == 2


def _array(value: Value) -> Array:
    assert value.const_value is not None, f"{value.name} is not a constant"
    return value.const_value.numpy()  # type: ignore[no-any-return]


def _sizes(value: Value) -> tuple[int, ...]:
    return tuple(_array(value).shape)
