"""ONNX operators with weights or windows, in torch."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from t3c_compile.onnx_import.node import Function, OnnxNode


def _gemm(node: OnnxNode, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a = a.t() if node.get("transA") else a
    weight = b if node.get("transB") else b.t()
    if node.get("alpha", 1.0) == 1.0 and node.get("beta", 1.0) == 1.0 and (c is None or c.dim() == 1):
        return F.linear(a, weight, c)
    y: Tensor = node.get("alpha", 1.0) * F.linear(a, weight)
    return y if c is None else y + node.get("beta", 1.0) * c


def _conv(node: OnnxNode, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kernel = list(weight.shape[2:])
    stride, dilation = _each(node, "strides", len(kernel)), _each(node, "dilations", len(kernel))
    begin, end = _padding(node, x, kernel, stride, dilation)
    if begin != end:
        x, begin = _padded(x, begin, end, 0.0), [0] * len(kernel)
    function: Function = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
    return function(x, weight, bias, stride, begin, dilation, node.get("group", 1))  # type: ignore[no-any-return]


def _conv_transpose(node: OnnxNode, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kernel = list(weight.shape[2:])
    stride, dilation = _each(node, "strides", len(kernel)), _each(node, "dilations", len(kernel))
    begin, end = _padding(node, x, kernel, stride, dilation)
    if begin != end or node.get("output_shape") or node.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise node.refusal("a transposed convolution with unequal padding")
    extra = list(node.get("output_padding") or [0] * len(kernel))
    function: Function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(kernel) - 1]
    y: Tensor = function(x, weight, bias, stride, begin, extra, node.get("group", 1), dilation)
    return y


def _max_pool(node: OnnxNode, x: Tensor) -> Tensor:
    kernel = list(node.get("kernel_shape"))
    if len(node.outputs) > 1 and node.outputs[1]:
        raise node.refusal("the indices of a pooling")
    stride, dilation = _each(node, "strides", len(kernel)), _each(node, "dilations", len(kernel))
    begin, end = _padding(node, x, kernel, stride, dilation)
    if begin != end:
        x, begin = _padded(x, begin, end, float("-inf")), [0] * len(kernel)
    function: Function = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
    return function(x, kernel, stride, begin, dilation, bool(node.get("ceil_mode")))  # type: ignore[no-any-return]


def _average_pool(node: OnnxNode, x: Tensor) -> Tensor:
    kernel = list(node.get("kernel_shape"))
    stride, dilation = _each(node, "strides", len(kernel)), _each(node, "dilations", len(kernel))
    begin, end = _padding(node, x, kernel, stride, dilation)
    counts = bool(node.get("count_include_pad"))
    if any(step != 1 for step in dilation) or (begin != end and not counts):
        raise node.refusal("an average pooling with dilation or unequal padding")
    if begin != end:
        x, begin = _padded(x, begin, end, 0.0), [0] * len(kernel)
    function: Function = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel) - 1]
    return function(x, kernel, stride, begin, bool(node.get("ceil_mode")), counts)  # type: ignore[no-any-return]


def _each(node: OnnxNode, name: str, dims: int) -> list[int]:
    return list(node.get(name) or [1] * dims)


def _padding(
    node: OnnxNode, x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Padding before and behind every spatial dimension."""
    how, dims = node.get("auto_pad", "NOTSET"), len(kernel)
    if how == "VALID":
        return [0] * dims, [0] * dims
    if how == "NOTSET":
        pads = list(node.get("pads") or [0] * 2 * dims)
        return pads[:dims], pads[dims:]
    begin, end = [], []
    for size, width, step, spread in zip(x.shape[2:], kernel, stride, dilation, strict=True):
        reach = spread * (width - 1) + 1
        total = reach - 1 if step == 1 else max((-(-size // step) - 1) * step + reach - size, 0)
        less, more = total // 2, total - total // 2
        begin.append(less if how == "SAME_UPPER" else more)
        end.append(more if how == "SAME_UPPER" else less)
    return begin, end


def _padded(x: Tensor, begin: Sequence[int], end: Sequence[int], value: float) -> Tensor:
    widths = [width for pair in zip(reversed(begin), reversed(end), strict=True) for width in pair]
    return F.pad(x, widths, value=value)


def _spatial(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.dim()))


def _batch_norm(node: OnnxNode, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    if node.get("training_mode"):
        raise node.refusal("a batch norm in training mode")
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, node.get("epsilon", 1e-5))


def _layer_norm(node: OnnxNode, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.layer_norm(x, x.shape[node.get("axis", -1) :], weight, bias, node.get("epsilon", 1e-5))


def _rms_norm(node: OnnxNode, x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, list(x.shape[node.get("axis", -1) :]), weight, node.get("epsilon", 1e-5))


def _instance_norm(node: OnnxNode, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.instance_norm(x, None, None, weight, bias, True, 0.0, node.get("epsilon", 1e-5))


def _group_norm(node: OnnxNode, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    groups = node.get("num_groups")
    if node.opset < 21:
        # One scale and shift a group, rather than a channel.
        weight, bias = (values.repeat_interleave(x.shape[1] // groups) for values in (weight, bias))
    return F.group_norm(x, groups, weight, bias, node.get("epsilon", 1e-5))


LAYERS: dict[str, Any] = {
    "Gemm": _gemm,
    "MatMul": lambda node, a, b: torch.matmul(a, b),
    "Einsum": lambda node, *tensors: torch.einsum(node.get("equation"), *tensors),
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": lambda node, x: x.mean(_spatial(x), keepdim=True),
    "GlobalMaxPool": lambda node, x: x.amax(_spatial(x), keepdim=True),
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "InstanceNormalization": _instance_norm,
    "GroupNormalization": _group_norm,
}
