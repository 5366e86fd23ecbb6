"""Convolutions become batched ``aten.conv2d`` with numbers for padding: 1-d, 1x1x1, unbatched, ``padding="same"``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from t3c_compile.passes.base import Pass, add_call
from t3c_compile.passes.parameter_view import parameter_view

aten = torch.ops.aten

_CONVOLUTIONS = {
    aten.conv1d.default: 1,
    aten.conv1d.padding: 1,
    aten.conv2d.default: 2,
    aten.conv2d.padding: 2,
    aten.conv3d.default: 3,
    aten.conv3d.padding: 3,
}


@dataclass(frozen=True)
class Geometry:
    """What an ATen convolution node says beside its tensors, one number a dimension; ``padding`` may be a word."""

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int

    @staticmethod
    def of(node: Node, dims: int) -> "Geometry":
        """Of a ``convNd`` node, defaults filled in."""
        given: list[Any] = [*node.args[3:], *[None] * (7 - max(3, len(node.args)))]
        stride, padding, dilation, groups = given
        word = padding if isinstance(padding, str) else _each(padding, dims, 0)
        return Geometry(_each(stride, dims, 1), word, _each(dilation, dims, 1), int(groups or 1))

    def pads(self, kernel: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """(before, after) for each dimension; ``same`` puts the odd one after, as torch does."""
        if self.padding == "valid":
            return ((0, 0),) * len(kernel)
        if self.padding == "same":
            totals = [d * (k - 1) for d, k in zip(self.dilation, kernel, strict=True)]
            return tuple((total // 2, total - total // 2) for total in totals)
        return tuple((int(p), int(p)) for p in self.padding)


def _each(value: Any, dims: int, default: int) -> tuple[int, ...]:
    values = [default] if value is None else list(value) if isinstance(value, list | tuple) else [value]
    return tuple(int(v) for v in (values * dims if len(values) == 1 else values))


@dataclass(frozen=True)
class NormalizeConv(Pass):
    """Rewrites convolutions by a parameter; results are equal.

    A 1-d convolution becomes a 2-d one over images of height 1; a 1x1x1 convolution one over a row of all positions,
    where their number is fixed. Padding that differs before and after becomes a node of its own.
    """

    name: ClassVar[str] = "normalize-conv"

    def apply(self, gm: GraphModule) -> bool:
        changed = False
        for node in list(gm.graph.nodes):
            if node.op != "call_function":
                continue
            dims = 0
            if node.target == aten.convolution.default:
                dims = _from_general(node)
                changed |= bool(dims)
            dims = _CONVOLUTIONS.get(node.target, dims)
            view = parameter_view(node.args[1]) if dims else None
            if view is not None and (made := _conv2d(gm, node, view.of(gm), dims)) is not None:
                node.replace_all_uses_with(made)
                gm.graph.erase_node(node)
                _after_norm(made)
                changed = True
        return changed


def _after_norm(view: Node) -> None:
    """Move a view of a convolution's result behind the batch norm that reads it, which is then seen to follow it."""
    (norm, *others), conv = view.users, view.all_input_nodes[0]
    if others or norm.target != aten.batch_norm.default or conv.target != aten.conv2d.default:
        return
    norm.replace_input_with(view, conv)
    norm.replace_all_uses_with(view)
    view.replace_input_with(conv, norm)
    norm.append(view)
    norm.meta["val"] = conv.meta["val"]


def _from_general(node: Node) -> int:
    """``aten.convolution`` as ``convNd``, in place; its dimensions, 0 where it is transposed."""
    x, weight, bias, stride, padding, dilation, transposed, _, groups = node.args
    dims = len(stride)  # type: ignore[arg-type]
    if transposed or dims not in (1, 2, 3):
        return 0
    node.target = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}[dims]
    node.args = (x, weight, bias, stride, padding, dilation, groups)
    return dims


def _conv2d(gm: GraphModule, node: Node, weight: Tensor, dims: int) -> Node | None:
    """The same as a conv2d between views; None where ``node`` is one already, or cannot be one."""
    given: list[Any] = [*node.args[:3], None]
    x, w, bias, *_ = given
    value = x.meta["val"]
    geometry = Geometry.of(node, dims)
    pads = geometry.pads(weight.shape[2:])
    unbatched, asymmetric = value.dim() == dims + 1, any(before != after for before, after in pads)
    size = value.shape[-dims:]
    pointwise = dims == 3 and (*weight.shape[2:], *geometry.stride) == (1,) * 6 and not any(sum(p) for p in pads)
    pointwise = pointwise and all(isinstance(s, int) for s in size)
    if not asymmetric and ((dims == 3 and not pointwise) or (dims == 2 and not unbatched)):
        return None
    with gm.graph.inserting_before(node):
        if unbatched:
            x = add_call(node, aten.unsqueeze.default, x, 0)
        if asymmetric:
            x = add_call(node, aten.constant_pad_nd.default, x, [p for pair in reversed(pads) for p in pair])
            pads = ((0, 0),) * dims
        stride, padding, dilation = list(geometry.stride), [before for before, _ in pads], list(geometry.dilation)
        if pointwise:
            # One row of all positions, as a 1-d convolution has.
            x = add_call(node, aten.flatten.using_ints, x, 2)
            w = add_call(node, aten.squeeze.dim, add_call(node, aten.squeeze.dim, w, -1), -1)
            stride, padding, dilation = [1], [0], [1]
        if dims == 1 or pointwise:
            x, w = add_call(node, aten.unsqueeze.default, x, 2), add_call(node, aten.unsqueeze.default, w, 2)
            stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
        target = aten.conv3d.default if dims == 3 and not pointwise else aten.conv2d.default
        y = add_call(node, target, x, w, bias, stride, padding, dilation, geometry.groups)
        if dims == 1 or pointwise:
            y = add_call(node, aten.squeeze.dim, y, 2)
        if pointwise:
            y = add_call(node, aten.unflatten.int, y, 2, list(size))
        return add_call(node, aten.squeeze.dim, y, 0) if unbatched else y
