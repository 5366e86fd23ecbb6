"""Ops that work row by row take their rows in the order in which these lie in memory.

A model may move tokens before the batch, as torch's ``MultiheadAttention`` does, and back again: copies of all
activations, which also keep a kernel from taking over what comes after it. To move rows and then work on each is to
work on each and then move them; what undoes the move then makes it nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from t3c_compile.backends.op_name import op_name
from t3c_compile.backends.tvm.kernels.finish import ACTIVATIONS
from t3c_compile.backends.tvm.strides import Axis, Size, lying, shape_of, whole

aten = torch.ops.aten

_ROW_WISE = {
    *("quantize_int8", "dequantize_int8", "int8_linear", "svd_linear", "weight_only_linear", "svd_weight_only_linear"),
    *("layer_norm_f32", "rms_norm_f32"),
    *ACTIVATIONS,
}
_GENERIC = 1009  # what a size may be that is not known


def order_rows(graph: fx.Graph) -> None:
    """Rewrite ``graph``, of a decomposed program, in place; the results are the same bits."""
    sizes: dict[Size, fx.Node] = {}
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            sizes.setdefault(value.node.expr, node)
        elif isinstance(value, torch.Tensor) and not any(user.op == "output" for user in node.users):
            if op_name(node) in _ROW_WISE:
                _order(node, _Before(node, sizes))
            else:
                _undo(node)
    graph.eliminate_dead_code()


@dataclass(frozen=True)
class _Before:
    """Makes nodes before ``node``; ``sizes``: nodes of the sizes that are known at run time alone."""

    node: fx.Node
    sizes: dict[Size, fx.Node]

    def call(self, target: Callable[..., torch.Tensor], *args: object, **kwargs: object) -> fx.Node:
        graph = self.node.graph
        with graph.inserting_before(self.node):
            made = graph.call_function(target, args, kwargs)  # type: ignore[arg-type]
        given = fx.node.map_arg(made.args, lambda n: n.meta["val"])
        made.meta["val"] = target(*given, **kwargs)
        return made

    def moved(self, x: fx.Node, axes: list[Size], order: list[int], shape: list[Size]) -> fx.Node:
        """``x`` as a tensor of ``axes``, these in another ``order``, in ``shape``."""
        x = self._viewed(x, axes)
        if order != sorted(order):
            permuted = self.call(aten.permute.default, x, order)
            x = self.call(aten.clone.default, permuted, memory_format=torch.contiguous_format)
        return self._viewed(x, shape)

    def _viewed(self, x: fx.Node, shape: list[Size]) -> fx.Node:
        if shape_of(x) == shape:
            return x
        return self.call(aten.view.default, x, [int(s) if s.is_Integer else self.sizes[s] for s in shape])


def _order(node: fx.Node, before: _Before) -> None:
    """Let ``node`` take its rows as they lie, and move its results as its rows were moved."""
    view = lying(node.args[0], lambda _: True)  # type: ignore[arg-type]
    lead, last = [axis for axes in view.dims[:-1] for axis in axes], list(view.dims[-1])
    ordered, every = _by_place(lead), _by_place(lead + last)
    sizes = [axis.size for axis in ordered]
    shape, width = shape_of(node), sympy.Mul(*(axis.size for axis in last))
    asked = {size for size in (*(axis.size for axis in every), *shape, width) if not size.is_Integer}
    if ordered == lead or not _covers(every, shape_of(view.base)) or asked - before.sizes.keys():
        return
    order = [every.index(axis) for axis in ordered + last]
    rows = before.moved(view.base, [axis.size for axis in every], order, [*sizes, width])
    result = before.call(node.target, rows, *node.args[1:])  # type: ignore[arg-type]
    order = [*(ordered.index(axis) for axis in lead), len(lead)]
    node.replace_all_uses_with(before.moved(result, [*sizes, shape[-1]], order, shape))


def _undo(node: fx.Node) -> None:
    """Where ``node`` is a view of another tensor that is all of it, as it lies: that tensor."""
    view = lying(node, lambda _: True)
    alike = view.base is not node and view.start == 0 and shape_of(view.base) == shape_of(node)
    if alike and view.steps() == whole(node).steps():
        node.replace_all_uses_with(view.base)


def _by_place(axes: list[Axis]) -> list[Axis]:
    """Outer ones first."""
    return sorted(axes, key=lambda axis: -axis.step.subs(dict.fromkeys(axis.step.free_symbols, _GENERIC)))


def _covers(axes: list[Axis], shape: list[Size]) -> bool:
    """Whether ``axes``, outer ones first, are those of a tensor of ``shape`` as a whole."""
    step = sympy.Integer(1)
    for axis in reversed(axes):
        if sympy.expand(axis.step - step) != 0:
            return False
        step *= axis.size
    return bool(sympy.expand(step - sympy.Mul(*shape)) == 0)
