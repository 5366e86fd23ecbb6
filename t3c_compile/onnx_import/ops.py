"""What ONNX operators are in torch: of single elements, of shapes, and reductions (https://onnx.ai/onnx/operators)."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from t3c_compile.onnx_import.layers import LAYERS
from t3c_compile.onnx_import.node import Function, Numbers, OnnxNode, to_list, to_numbers

_DTYPES = {1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64}
_DTYPES |= {9: torch.bool, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16}


# -- single elements ------------------------------------------------------------------------------------------------


def _unary(function: Function) -> Function:
    return lambda node, x: function(x)


def _with(function: Function, **defaults: float) -> Function:
    """A function whose further arguments are attributes of the node, in the order of ``defaults``."""
    return lambda node, x: function(x, *(node.get(name, default) for name, default in defaults.items()))


def _binary(function: Function) -> Function:
    return lambda node, a, b: function(a, b)


def _folded(function: Function) -> Function:
    """A function of two tensors over any number of them."""

    def fold(node: OnnxNode, first: Tensor, *rest: Tensor) -> Tensor:
        for value in rest:
            first = function(first, value)
        return first

    return fold


def _divide(node: OnnxNode, a: Any, b: Any) -> Any:
    whole = not (a if isinstance(a, Tensor) else b).is_floating_point()
    return torch.div(a, b, rounding_mode="trunc") if whole else a / b


def _modulo(node: OnnxNode, a: Tensor, b: Tensor) -> Tensor:
    return torch.fmod(a, b) if node.get("fmod") else torch.remainder(a, b)


def _clip(node: OnnxNode, x: Tensor, low: Numbers | None = None, high: Numbers | None = None) -> Tensor:
    least = node.get("min") if low is None else low.item()
    most = node.get("max") if high is None else high.item()
    return x if least is None and most is None else torch.clamp(x, least, most)


def _softmax(function: Function) -> Function:
    def apply(node: OnnxNode, x: Tensor) -> Tensor:
        if node.opset >= 13:
            return function(x, dim=node.get("axis", -1))  # type: ignore[no-any-return]
        axis = node.get("axis", 1) % x.dim()
        return function(x.flatten(axis), dim=axis).reshape(x.shape)  # type: ignore[no-any-return]

    return apply


def _cast(node: OnnxNode, x: Tensor) -> Tensor:
    if node.get("to") not in _DTYPES:
        raise node.refusal(f"type {node.get('to')}")
    return x.to(_DTYPES[node.get("to")])


def _hard_sigmoid(x: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.clamp(alpha * x + beta, 0.0, 1.0)


# -- shapes ---------------------------------------------------------------------------------------------------------


def _shape(node: OnnxNode, x: Tensor) -> Numbers:
    return to_numbers(list(x.shape)[node.get("start", 0) : node.get("end")])


def _reshape(node: OnnxNode, x: Tensor, shape: Numbers) -> Tensor:
    sizes = to_list(shape)
    if not node.get("allowzero"):
        sizes = [x.shape[i] if type(size) is int and size == 0 else size for i, size in enumerate(sizes)]
    return x.reshape(sizes)


def _flatten(node: OnnxNode, x: Tensor) -> Tensor:
    axis = node.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    x = x.flatten(axis) if axis < x.dim() else x.unsqueeze(-1)
    return x.flatten(0, axis - 1) if axis else x.unsqueeze(0)


def _transpose(node: OnnxNode, x: Tensor) -> Tensor:
    return x.permute(node.get("perm") or tuple(reversed(range(x.dim()))))


def _axes(node: OnnxNode, axes: Numbers | None) -> list[int]:
    """Axes are an input, and were an attribute in earlier opsets."""
    return list(node.get("axes", ())) if axes is None else to_list(axes)


def _squeeze(node: OnnxNode, x: Tensor, axes: Numbers | None = None) -> Tensor:
    along = _axes(node, axes)
    return x.squeeze(tuple(along)) if along else x.squeeze()


def _unsqueeze(node: OnnxNode, x: Tensor, axes: Numbers | None = None) -> Tensor:
    along = _axes(node, axes)
    dims = x.dim() + len(along)
    for axis in sorted(axis % dims for axis in along):
        x = x.unsqueeze(axis)
    return x


def _split(node: OnnxNode, x: Tensor, sizes: Numbers | None = None) -> tuple[Tensor, ...]:
    axis = node.get("axis", 0)
    given = list(node.get("split", ())) if sizes is None else to_list(sizes)
    count = len(node.outputs)
    size = -(-x.shape[axis] // count)
    return torch.split(x, given or [*[size] * (count - 1), x.shape[axis] - size * (count - 1)], dim=axis)


def _slice(node: OnnxNode, x: Tensor, *bounds: Numbers | None) -> Tensor:
    if not bounds:
        bounds = tuple(to_numbers(list(node.get(name, ()))) for name in ("starts", "ends", "axes"))
    starts, ends, axes, steps = [*(to_list(bound) for bound in bounds), [], []][:4]
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        step = steps[i] if steps else 1
        if step < 0:
            raise node.refusal("a slice with a negative step")
        x = torch.ops.aten.slice.Tensor(x, axes[i] if axes else i, start, end, step)
    return x


def _expand(node: OnnxNode, x: Tensor, shape: Numbers) -> Tensor:
    wanted, own = to_list(shape), list(x.shape)
    dims = max(len(wanted), len(own))
    wanted, own = [1] * (dims - len(wanted)) + wanted, [1] * (dims - len(own)) + own
    return x.expand([b if type(a) is int and a == 1 else a for a, b in zip(wanted, own, strict=True)])


def _gather(node: OnnxNode, x: Tensor, indices: Any) -> Tensor:
    axis = node.get("axis", 0) % x.dim()
    if not isinstance(indices, Tensor):
        return x.select(axis, indices)
    if axis == 0 and x.dim() == 2 and x.is_floating_point():
        # A table of rows; torch refuses negative indices, which no exporter writes for one.
        return F.embedding(indices, x)
    indices = torch.where(indices < 0, indices + x.shape[axis], indices)
    picked = x.index_select(axis, indices.reshape(-1))
    return picked.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _gather_elements(node: OnnxNode, x: Tensor, indices: Tensor) -> Tensor:
    axis = node.get("axis", 0)
    return x.gather(axis, torch.where(indices < 0, indices + x.shape[axis], indices))


def _gather_nd(node: OnnxNode, x: Tensor, indices: Tensor) -> Tensor:
    if node.get("batch_dims"):
        raise node.refusal("batch_dims")
    return x[indices.unbind(-1)]


def _pad(
    node: OnnxNode, x: Tensor, pads: Numbers | None = None, value: Numbers | None = None, axes: Numbers | None = None
) -> Tensor:
    amounts = list(node.get("pads", ())) if pads is None else to_list(pads)
    along = [axis % x.dim() for axis in to_list(axes)] or list(range(x.dim()))
    begin, end = [0] * x.dim(), [0] * x.dim()
    for i, axis in enumerate(along):
        begin[axis], end[axis] = amounts[i], amounts[i + len(along)]
    if node.get("mode", "constant") not in ("constant", b"constant"):
        raise node.refusal(f"padding of mode {node.get('mode')}")
    widths = [width for pair in zip(reversed(begin), reversed(end), strict=True) for width in pair]
    return F.pad(x, widths, value=node.get("value", 0.0) if value is None else value.item())


def _constant_of_shape(node: OnnxNode, shape: Numbers) -> Tensor:
    value = node.get("value")
    fill = torch.zeros(1) if value is None else torch.from_numpy(np.array(value.numpy()))
    return torch.full(to_list(shape), fill.item(), dtype=fill.dtype)


def _trilu(node: OnnxNode, x: Tensor, diagonal: Numbers | None = None) -> Tensor:
    offset = 0 if diagonal is None else diagonal.item()
    return x.triu(offset) if node.get("upper", 1) else x.tril(offset)


# -- reductions -----------------------------------------------------------------------------------------------------


def _reduce(function: Function) -> Function:
    def apply(node: OnnxNode, x: Tensor, axes: Numbers | None = None) -> Tensor:
        found = _axes(node, axes)
        if not found and node.get("noop_with_empty_axes"):
            return x
        along = tuple(axis % x.dim() for axis in found) or tuple(range(x.dim()))
        return function(x, dim=along, keepdim=bool(node.get("keepdims", 1)))  # type: ignore[no-any-return]

    return apply


def _arg(function: Function) -> Function:
    def apply(node: OnnxNode, x: Tensor) -> Tensor:
        if node.get("select_last_index"):
            raise node.refusal("select_last_index")
        y: Tensor = function(x, dim=node.get("axis", 0), keepdim=bool(node.get("keepdims", 1)))
        return y

    return apply


def _cumsum(node: OnnxNode, x: Tensor, axis: Numbers) -> Tensor:
    if node.get("exclusive") or node.get("reverse"):
        raise node.refusal("an exclusive or reverse running sum")
    return x.cumsum(axis.item())


_ELEMENTS: dict[str, Function] = {
    "Identity": _unary(lambda x: x),
    "Dropout": lambda node, x, *rest: x,
    "Abs": _unary(torch.abs),
    "Ceil": _unary(torch.ceil),
    "Cos": _unary(torch.cos),
    "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp),
    "Floor": _unary(torch.floor),
    "HardSwish": _unary(F.hardswish),
    "IsNaN": _unary(torch.isnan),
    "Log": _unary(torch.log),
    "Mish": _unary(F.mish),
    "Neg": _unary(torch.neg),
    "Not": _unary(torch.logical_not),
    "Reciprocal": _unary(torch.reciprocal),
    "Relu": _unary(F.relu),
    "Round": _unary(torch.round),
    "Sigmoid": _unary(torch.sigmoid),
    "Sign": _unary(torch.sign),
    "Sin": _unary(torch.sin),
    "Softplus": _unary(F.softplus),
    "Softsign": _unary(F.softsign),
    "Sqrt": _unary(torch.sqrt),
    "Tan": _unary(torch.tan),
    "Tanh": _unary(torch.tanh),
    "Elu": _with(F.elu, alpha=1.0),
    "HardSigmoid": _with(_hard_sigmoid, alpha=0.2, beta=0.5),
    "LeakyRelu": _with(F.leaky_relu, alpha=0.01),
    "Gelu": lambda node, x: F.gelu(x, approximate=node.get("approximate", "none")),
    "PRelu": lambda node, x, slope: torch.where(x < 0, x * slope, x),
    "Softmax": _softmax(torch.softmax),
    "LogSoftmax": _softmax(torch.log_softmax),
    "Cast": _cast,
    "CastLike": lambda node, x, like: x.to(like.dtype),
    "Max": _folded(torch.maximum),
    "Min": _folded(torch.minimum),
    "Sum": _folded(torch.add),
    "Where": lambda node, condition, a, b: torch.where(condition, a, b),
    "And": _binary(torch.logical_and),
    "Or": _binary(torch.logical_or),
    "Xor": _binary(torch.logical_xor),
}
_ARITHMETIC: dict[str, Function] = {
    "Add": _binary(lambda a, b: a + b),
    "Sub": _binary(lambda a, b: a - b),
    "Mul": _binary(lambda a, b: a * b),
    "Div": _divide,
    "Mod": _modulo,
    "Pow": _binary(lambda a, b: a**b),
    "Equal": _binary(lambda a, b: a == b),
    "Greater": _binary(lambda a, b: a > b),
    "GreaterOrEqual": _binary(lambda a, b: a >= b),
    "Less": _binary(lambda a, b: a < b),
    "LessOrEqual": _binary(lambda a, b: a <= b),
}
_SHAPES: dict[str, Function] = {
    "Shape": _shape,
    "Size": lambda node, x: to_numbers(x.numel()),
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Concat": lambda node, *tensors: torch.cat(tensors, dim=node.get("axis")),
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
}

_WITH_NUMBERS: dict[str, tuple[Function, set[int]]] = {
    "Clip": (_clip, {1, 2}),
    "Reshape": (_reshape, {1}),
    "Squeeze": (_squeeze, {1}),
    "Unsqueeze": (_unsqueeze, {1}),
    "Split": (_split, {1}),
    "Slice": (_slice, {1, 2, 3, 4}),
    "Expand": (_expand, {1}),
    "Tile": (lambda node, x, repeats: x.repeat(to_list(repeats)), {1}),
    "Pad": (_pad, {1, 2, 3}),
    "Range": (lambda node, *bounds: torch.arange(*(bound.item() for bound in bounds)), {0, 1, 2}),
    "ConstantOfShape": (_constant_of_shape, {0}),
    "Trilu": (_trilu, {1}),
    "CumSum": (_cumsum, {1}),
    "ReduceMean": (_reduce(torch.mean), {1}),
    "ReduceSum": (_reduce(torch.sum), {1}),
    "ReduceMax": (_reduce(torch.amax), {1}),
    "ReduceMin": (_reduce(torch.amin), {1}),
    "ReduceL2": (_reduce(torch.linalg.vector_norm), {1}),
    "ReduceSumSquare": (_reduce(lambda x, dim, keepdim: (x * x).sum(dim, keepdim)), {1}),
    "ReduceLogSumExp": (_reduce(torch.logsumexp), {1}),
}

TENSORS: dict[str, tuple[Function, set[int]]] = {
    name: (function, set()) for name, function in (_ELEMENTS | _ARITHMETIC | _SHAPES | LAYERS).items()
} | _WITH_NUMBERS
"""By operator: its function, and which of its inputs are numbers rather than tensors."""

SCALARS = {**dict.fromkeys(_ARITHMETIC, 1), "Gather": 0}
"""Operators whose functions take one number as it is where they else take a tensor, and the dimensions it may have."""
