"""How a tensor that is a view of another lies in it: a start, and sizes and steps that views split, join and move."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

aten = torch.ops.aten

Size = Any  # a sympy expression in the program's sizes

# What is the same tensor, whatever its shape says.
_RESHAPED = {
    op.default
    for op in (aten.view, aten.reshape, aten._unsafe_view, aten.unsqueeze, aten.clone, aten.contiguous, aten.alias)
} | {aten.squeeze.dim, aten.squeeze.dims, aten.unflatten.int, aten.flatten.using_ints}


@dataclass(frozen=True)
class Axis:
    """``size`` places, ``step`` elements apart."""

    size: Size
    step: Size


@dataclass(frozen=True)
class Lying:
    """``base`` and, of each dimension of the view, the axes of ``base`` it walks along, outer first; ``start`` in
    elements."""

    base: fx.Node
    dims: tuple[tuple[Axis, ...], ...]
    start: Size

    def steps(self) -> list[Size] | None:
        """The step of every dimension; None where one has none."""
        joined = [_joined(axes) for axes in self.dims]
        return None if any(len(axes) > 1 for axes in joined) else [axes[0].step if axes else 0 for axes in joined]


def lying(node: fx.Node, exists: Callable[[fx.Node], bool]) -> Lying:
    """``node`` as a view of the first tensor before it that is none, among those that exist: itself, at the least."""
    source = node.args[0] if node.op == "call_function" and node.args else None
    if isinstance(source, fx.Node) and isinstance(source.meta.get("val"), torch.Tensor) and exists(source):
        before = lying(source, exists)
        dims, start = before.dims, before.start
        found: tuple[tuple[Axis, ...], ...] | None = None
        if node.target in (aten.permute.default, aten.transpose.int):
            found = tuple(dims[i] for i in _order(node, len(dims)))
        elif node.target == aten.select.int:
            dim, index = (int(number) for number in node.args[1:3])  # type: ignore[arg-type]
            axes = _joined(dims[dim])
            if len(axes) == 1 and index >= 0:
                start = start + index * axes[0].step
                found = tuple(axes for i, axes in enumerate(dims) if i != dim % len(dims))
        elif node.target in _RESHAPED:
            found = _reshaped([axis for axes in dims for axis in axes], shape_of(node))
        if found is not None:
            return Lying(before.base, found, start)
    return whole(node)


def _order(node: fx.Node, count: int) -> list[int]:
    if node.target == aten.permute.default:
        return [int(d) % count for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    order = list(range(count))
    i, j = (int(d) % count for d in node.args[1:3])  # type: ignore[arg-type]
    order[i], order[j] = j, i
    return order


def shape_of(node: fx.Node) -> list[Size]:
    return [d.node.expr if isinstance(d, torch.SymInt) else sympy.Integer(d) for d in node.meta["val"].shape]


def whole(node: fx.Node) -> Lying:
    """``node`` as a tensor of its own, rows one after the other."""
    dims, step = [], sympy.Integer(1)
    for size in reversed(shape_of(node)):
        dims.append(() if size == 1 else (Axis(size, step),))
        step = step * size
    return Lying(node, tuple(reversed(dims)), sympy.Integer(0))


def _reshaped(axes: list[Axis], shape: list[Size]) -> tuple[tuple[Axis, ...], ...] | None:
    """The same elements in order under another shape; None where an axis does not split as the shape asks."""
    left, dims = list(axes), []
    for size in shape:
        taken = []
        while size != 1:
            if not left:
                return None
            axis = left.pop(0)
            if (rest := _quotient(size, axis.size)) is not None:
                taken.append(axis)
                size = rest
            elif (inner := _quotient(axis.size, size)) is not None:
                taken.append(Axis(size, axis.step * inner))
                left.insert(0, Axis(inner, axis.step))
                size = sympy.Integer(1)
            else:
                return None
        dims.append(tuple(taken))
    return None if left else tuple(dims)


def _quotient(size: Size, part: Size) -> Size | None:
    """``size / part`` where it is whole whatever the sizes."""
    ratio = sympy.cancel(size / part)
    whole = sympy.fraction(ratio)[1] == 1 and (ratio.is_Integer or ratio.free_symbols)
    return ratio if whole else None


def _joined(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """Neighbours that are one run of elements as one axis."""
    found: list[Axis] = []
    for axis in axes:
        if found and sympy.expand(found[-1].step - axis.step * axis.size) == 0:
            found[-1] = Axis(found[-1].size * axis.size, axis.step)
        else:
            found.append(axis)
    return tuple(found)
