"""The table from ops to Relax: the ``t3c::`` ops, and the ATen ops that have a kernel of their own.

A converter takes (lowering, arguments by schema name) and gives the Relax expression of the result.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import tvm
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from tvm import relax, te
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.convert_convs import CONV_CONVERTERS
from t3c_compile.backends.tvm.convert_floats import FLOAT_CONVERTERS, Attend, attention_f32, one_kernel
from t3c_compile.backends.tvm.kernels import floats, linear, pack, quantize, rows, vmath, weight_only
from t3c_compile.backends.tvm.kernels.table import Kernel
from t3c_compile.backends.tvm.lowering import Arguments, Converter, Lowering, UnsupportedOpError, scalars
from t3c_compile.backends.tvm.relax_shapes import dims, shape_of


def _quantize(lower: Lowering, a: Arguments) -> relax.Var:
    return lower.expression(quantize.quantize, lower.value(a["x"]), scalars(1 / a["scale"], a["zero_point"]))


def _dequantize(lower: Lowering, a: Arguments) -> relax.Var:
    return lower.expression(quantize.dequantize, lower.value(a["q"]), scalars(a["scale"], a["zero_point"]))


def _int8_embedding(lower: Lowering, a: Arguments) -> relax.Var:
    indices, weight, scale = (lower.value(a[name]) for name in ("indices", "weight", "scale"))
    return lower.expression(quantize.embedding, indices, weight, scale, a["bits"])


def _int8_linear(lower: Lowering, a: Arguments) -> relax.Var | None:
    # Sizes of layers are those of their weights: where a graph is dynamic throughout, x's last one is a symbol.
    x, (outputs, inputs) = lower.value(a["x"]), shape_of(lower.value(a["weight"]))
    lead = shape_of(x)[:-1]
    weight = lower.weights(a["weight"], pack.words_of_matrix(lower.isa, (outputs, inputs)), a["bits"])
    spec = linear.LinearSpec(dims(lead), inputs, outputs, a["bits"], bias=a["bias"] is not None, finish=lower.finish)
    args = [x, scalars(a["x_scale"], a["x_zero_point"]), weight, lower.value(a["scale"]), lower.optional(a["bias"])]
    return lower.call_fused(lower.kernel(spec), args, [*lead, outputs])


def _svd_linear(lower: Lowering, a: Arguments) -> relax.Var | None:
    x, (max_rank, inputs), (_, outputs) = (lower.value(a["x"]), *(shape_of(lower.value(a[name])) for name in "vu"))
    lead = shape_of(x)[:-1]
    v = lower.weights(a["v"], pack.words_of_matrix(lower.isa, (max_rank, inputs)), a["bits"])
    u = lower.weights(a["u"], pack.words_of_matrix(lower.isa, (max_rank, outputs), transposed=True), a["bits"])
    spec = linear.LinearSpec(
        dims(lead),
        inputs,
        outputs,
        a["bits"],
        gain=a["out_gain"] is not None,
        bias=a["bias"] is not None,
        max_rank=max_rank,
        rank=a["rank"],
        finish=lower.finish,
    )
    numbers = scalars(a["x_scale"] / a["h_scale"], a["x_zero_point"], a["h_scale"])
    args = [x, numbers, v, u, lower.value(a["mid_scale"]), lower.optional(a["out_gain"]), lower.optional(a["bias"])]
    return lower.call_fused(lower.kernel(spec), args, [*lead, outputs])


def _require_inputs(lower: Lowering, *sizes: int) -> None:
    if max(sizes) > weight_only.MOST_INPUTS:
        raise UnsupportedOpError(
            f"{lower.node.name}: a weight-only layer of {max(sizes)} inputs may overflow its sums, which hold "
            f"{weight_only.MOST_INPUTS}; give the model int8 activations"
        )


def _weight_only_linear(lower: Lowering, a: Arguments) -> relax.Var | None:
    x, (outputs, inputs) = lower.value(a["x"]), shape_of(lower.value(a["weight"]))
    lead = shape_of(x)[:-1]
    _require_inputs(lower, inputs)
    weight = lower.packed(a["weight"], weight_only.weight_packing((outputs, inputs), a["bits"]))
    spec = weight_only.WeightOnlySpec(
        dims(lead), inputs, outputs, a["bits"], bias=a["bias"] is not None, finish=lower.finish
    )
    args = [x, weight, lower.value(a["scale"]), lower.optional(a["bias"])]
    return lower.call_fused(weight_only.weight_only_linear(lower.isa, spec), args, [*lead, outputs])


def _svd_weight_only_linear(lower: Lowering, a: Arguments) -> relax.Var | None:
    x, (max_rank, inputs), (_, outputs) = (lower.value(a["x"]), *(shape_of(lower.value(a[name])) for name in "vu"))
    lead = shape_of(x)[:-1]
    _require_inputs(lower, inputs, max_rank)
    v = lower.packed(a["v"], weight_only.weight_packing((max_rank, inputs), a["bits"]))
    u = lower.packed(a["u"], weight_only.weight_packing((max_rank, outputs), a["bits"], transposed=True))
    spec = weight_only.WeightOnlySpec(
        dims(lead), inputs, outputs, a["bits"], a["bias"] is not None, max_rank, a["rank"], lower.finish
    )
    args = [x, v, u, lower.value(a["mid_scale"]), lower.optional(a["bias"])]
    return lower.call_fused(weight_only.svd_weight_only_linear(lower.isa, spec), args, [*lead, outputs])


def _linear(lower: Lowering, a: Arguments) -> relax.Var:
    x, weight = lower.value(a["input"]), a["weight"]
    if weight.name in lower.names:
        lead, (outputs, inputs) = shape_of(x)[:-1], shape_of(lower.value(weight))
        packed = lower.packed(weight, pack.lanes_of_matrix((outputs, inputs), "float32"))
        kernel = floats.float_linear(lower.isa, dims(lead), inputs, outputs, a["bias"] is not None)
        return lower.call(kernel, [x, packed, lower.optional(a["bias"])], [*lead, outputs], "float32")
    if weight.target == torch.ops.aten.permute.default and weight.args[0].name in lower.names:
        # Stored as [inputs, outputs]: the product reads it as it lies.
        y = lower.emit(relax.op.matmul(x, lower.value(weight.args[0])))
    else:
        y = lower.emit(relax.op.linear(x, lower.value(weight)))
    return y if a["bias"] is None else lower.emit(relax.op.add(y, lower.value(a["bias"])))


def _conv_transpose3d(lower: Lowering, a: Arguments) -> relax.Var:
    """The one transposed convolution that the importer does not know."""
    names = ("stride", "padding", "output_padding", "dilation")
    stride, padding, output_padding, dilation = (list(a[n]) * (3 if len(a[n]) == 1 else 1) for n in names)
    x, weight = lower.value(a["input"]), lower.value(a["weight"])
    y = lower.emit(
        relax.op.nn.conv3d_transpose(
            x,
            weight,
            strides=stride,
            padding=padding,
            output_padding=output_padding,
            dilation=dilation,
            groups=a["groups"],
        )
    )
    if a["bias"] is None:
        return y
    return lower.emit(relax.op.add(y, lower.emit(relax.op.reshape(lower.value(a["bias"]), [-1, 1, 1, 1]))))


def attention(lower: Lowering, a: Arguments, attend: Attend = one_kernel) -> relax.Var | None:
    query = lower.value(a["query"])
    if str(query.ty.dtype) != "float32" or len(shape_of(query)) not in (3, 4) or a["dropout_p"]:
        return lower.default()
    return attention_f32(lower, a, attend=attend)


def _slice(lower: Lowering, a: Arguments) -> relax.Var:
    """A part of an axis. TVM clips a symbolic end to the axis, and no kernel matches a length that is a minimum; export
    has shown which of the two it is."""
    x, length = lower.value(a["self"]), lower.node.meta["val"].shape[a["dim"]]
    shape, dim = shape_of(x), a["dim"] % len(shape_of(x))
    size = a["self"].meta["val"].shape[dim], shape[dim]

    def place(value: Any) -> tuple[Any, Any]:
        """A place on the axis as torch and as TVM have it."""
        known = value.meta["val"] if isinstance(value, fx.Node) else value
        tir = lower.value(value) if isinstance(value, fx.Node) else value
        return (known + size[0], tir + size[1]) if statically_known_true(known < 0) else (known, tir)

    start, end = place(a["start"] or 0), size if a["end"] is None else place(a["end"])
    stop = next((tir for known, tir in (end, size) if statically_known_true(known - start[0] == length)), None)
    if stop is None or a["step"] != 1:
        return lower.default()

    def part(data: te.Tensor) -> te.Tensor:
        out = [*shape[:dim], stop - start[1], *shape[dim + 1 :]]
        return te.compute(out, lambda *i: data(*i[:dim], i[dim] + start[1], *i[dim + 1 :]), name="slice")

    return x if statically_known_true(length == size[0]) else lower.expression(part, x)


def _select(lower: Lowering, a: Arguments) -> relax.Var:
    """One place of an axis; TVM would look it up in a table of one index.

    Of a permuted tensor it is taken before the permutation, so that each place (query, key, value) is moved alone.
    """
    source, index = a["self"], a["index"]
    if not isinstance(index, int):
        return lower.default()
    dim, left = a["dim"] % source.meta["val"].dim(), None
    if source.target == torch.ops.aten.permute.default:
        order = [d % len(source.args[1]) for d in source.args[1]]
        source, axis = source.args[0], order.pop(dim)
        dim, left = axis, [d - (d > axis) for d in order]
    x = lower.value(source)
    shape = shape_of(x)
    place = index if index >= 0 else shape[dim] + index

    def select(data: te.Tensor) -> te.Tensor:
        out = [*shape[:dim], *shape[dim + 1 :]]
        return te.compute(out, lambda *i: data(*i[:dim], place, *i[dim:]), name="select")

    y = lower.expression(select, x)
    return y if left is None or left == sorted(left) else lower.emit(relax.op.permute_dims(y, left))


def _cumsum(lower: Lowering, a: Arguments) -> relax.Var:
    x = lower.value(a["self"])
    dtype = str(lower.node.meta["val"].dtype).removeprefix("torch.")
    if str(x.ty.dtype) != dtype:
        x = lower.emit(relax.op.astype(x, dtype))
    shape = shape_of(x)
    sizes, dim = dims(shape), a["dim"] % len(shape)
    kernel = lower.kernels.cumsum(sizes[:dim], sizes[dim], sizes[dim + 1 :], dtype)
    return lower.call(kernel, [x], shape, dtype)


def _extreme(operation: Callable[..., relax.Expr], lower: Lowering, a: Arguments) -> relax.Var:
    """The greatest or least element along dimensions; along all of them where none is named."""
    x = lower.value(a["self"])
    axes = [dim % len(shape_of(x)) for dim in a["dim"]] or None
    return lower.emit(operation(x, axes, a["keepdim"]))


def _extreme_and_place(
    extreme: Callable[..., relax.Expr], place: Callable[..., relax.Expr], lower: Lowering, a: Arguments
) -> relax.Var:
    """The greatest or least elements along one dimension, and where they are: the first where several are equal."""
    x = lower.value(a["self"])
    found = [operation(x, a["dim"] % len(shape_of(x)), a["keepdim"]) for operation in (extreme, place)]
    return lower.emit(relax.Tuple([lower.emit(expression) for expression in found]))


def _index_copy(lower: Lowering, a: Arguments) -> relax.Var:
    x, index, source = (lower.value(a[name]) for name in ("self", "index", "source"))
    shape, dtype = shape_of(x), str(x.ty.dtype)
    sizes, dim = dims(shape), a["dim"] % len(shape)
    (written,) = dims(shape_of(index))
    kernel = lower.kernels.index_copy(sizes[:dim], sizes[dim], written, sizes[dim + 1 :], dtype)
    return lower.call(kernel, [x, index, source], shape, dtype)


def _hardsigmoid(x: te.Tensor) -> te.Tensor:
    return te.compute(x.shape, lambda *i: vmath.hard(x(*i)) / T.float32(6), name="hardsigmoid")


def _hardswish(x: te.Tensor) -> te.Tensor:
    return te.compute(x.shape, lambda *i: vmath.hardswish(x(*i)), name="hardswish")


def _float_expression(function: Callable[[te.Tensor], te.Tensor], lower: Lowering, a: Arguments) -> relax.Var:
    x = lower.value(a["self"])
    return lower.expression(function, x) if str(x.ty.dtype) == "float32" else lower.default()


def _npu(lower: Lowering, a: Arguments) -> relax.Var:
    """A call of what runs an NPU's partitions, by the partition's name; it writes what it gives."""
    inputs = [lower.value(node) for node in a["inputs"]]
    results = [
        relax.TensorType(tuple(value.shape), str(value.dtype).removeprefix("torch."))
        for value in lower.node.meta["val"]
    ]
    arguments = relax.Tuple([tvm.ir.StringImm(a["name"]), *inputs])
    return lower.emit(relax.call_dps_packed("t3c.npu.run", arguments, results))


def _affine(lower: Lowering, a: Arguments) -> relax.Var:
    def affine(x: te.Tensor, gain: te.Tensor, bias: te.Tensor) -> te.Tensor:
        def element(*index: Expr) -> Expr:
            # Of each channel: those of images are [channels, 1, 1].
            channel = (index[-len(gain.shape)], *[0] * (len(gain.shape) - 1))
            return T.fma(x(*index), gain(*channel), bias(*channel))

        return te.compute(x.shape, element, name="affine")

    return lower.expression(affine, *(lower.value(a[name]) for name in ("x", "gain", "bias")))


def _of_rows(kernel: Kernel, dtype: str, lower: Lowering, a: Arguments) -> relax.Var:
    """A kernel that gives every row, as ``dtype``, and a number of it."""
    (x,) = (lower.value(node) for node in a.values())
    *lead, count = shape_of(x)
    made = kernel(lower.isa, dims(lead), dims([count])[0])
    return relax.Tuple(lower.call_several(made, [x], [([*lead, count], dtype), ([*lead, 1], "float32")]))


CONVERTERS: dict[str, Converter] = {
    "quantize_int8.default": _quantize,
    "dequantize_int8.default": _dequantize,
    "int8_linear.default": _int8_linear,
    "int8_embedding.default": _int8_embedding,
    "svd_linear.default": _svd_linear,
    "weight_only_linear.default": _weight_only_linear,
    "svd_weight_only_linear.default": _svd_weight_only_linear,
    "linear.default": _linear,
    "conv_transpose3d.input": _conv_transpose3d,
    "slice.Tensor": _slice,
    "select.int": _select,
    "cumsum.default": _cumsum,
    "amax.default": partial(_extreme, relax.op.max),
    "amin.default": partial(_extreme, relax.op.min),
    "max.dim": partial(_extreme_and_place, relax.op.max, relax.op.argmax),
    "min.dim": partial(_extreme_and_place, relax.op.min, relax.op.argmin),
    "index_copy.default": _index_copy,
    "scaled_dot_product_attention.default": attention,
    "npu.default": _npu,
    "affine.default": _affine,
    "integer_rows.default": partial(_of_rows, rows.integer_rows, "int8"),
    "exponentials.default": partial(_of_rows, rows.exponential_rows, "float32"),
    "hardsigmoid.default": partial(_float_expression, _hardsigmoid),
    "hardswish.default": partial(_float_expression, _hardswish),
    **CONV_CONVERTERS,
    **FLOAT_CONVERTERS,
}
