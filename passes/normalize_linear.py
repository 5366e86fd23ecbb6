"""Linear layers in other words (``addmm``, ``mm``, ``matmul``, ``einsum`` with a parameter) become ``aten.linear``."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from t3c_compile.passes.base import Pass, add_call
from t3c_compile.passes.parameter_view import parameter_view

aten = torch.ops.aten

_TRANSPOSES = (aten.t.default, aten.numpy_T.default, aten.mT.default)


@dataclass(frozen=True)
class NormalizeLinear(Pass):
    """A product of activations [..., n] with a parameter [n, m] becomes ``linear(x, parameter.t())``.

    A parameter [m, n] on the left of activations [..., n, columns] becomes a linear of their transpose. The parameter
    itself keeps its layout.
    """

    name: ClassVar[str] = "normalize-linear"

    def apply(self, gm: GraphModule) -> bool:
        changed = False
        for node in list(gm.graph.nodes):
            if node.op == "call_function" and (made := _linear(gm, node)) is not None:
                node.replace_all_uses_with(made)
                gm.graph.erase_node(node)
                changed = True
        if changed:
            # A transpose that only the old call read would hold on to the parameter.
            gm.graph.eliminate_dead_code()
        return changed


def _linear(gm: GraphModule, node: Node) -> Node | None:
    """The linear that computes ``node``; None where it is not one in other words."""
    with gm.graph.inserting_before(node):
        if node.target == aten.addmm.default and not node.kwargs:
            bias, x, matrix = node.args
            if not _is_matrix(gm, matrix):
                return None
            weight = _transposed(node, matrix)
            shift = parameter_view(bias)
            if shift is not None and shift.of(gm).shape == node.meta["val"].shape[1:]:
                return add_call(node, aten.linear.default, x, weight, bias)
            return add_call(node, aten.add.Tensor, add_call(node, aten.linear.default, x, weight), bias)
        if node.target == aten.einsum.default:
            return _of_einsum(gm, node)
        if node.target not in (aten.mm.default, aten.matmul.default):
            return None
        left, right = node.args
        if _is_matrix(gm, right) and _dims(left) > 1:
            return add_call(node, aten.linear.default, left, _transposed(node, right))
        if _is_matrix(gm, left) and _dims(right) > 1:
            columns = add_call(node, aten.mT.default, right)
            return add_call(node, aten.mT.default, add_call(node, aten.linear.default, columns, left))
    return None


def _of_einsum(gm: GraphModule, node: Node) -> Node | None:
    """``...n,nm->...m`` and ``...n,mn->...m``, by any letters."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    terms, arrow, out = equation.partition("->")
    if not arrow or not isinstance(operands, list | tuple) or len(operands) != 2 or not _is_matrix(gm, operands[1]):
        return None
    (rows, matrix), (x, weight) = terms.split(","), operands
    if _dims(x) < 2 or rows[-1] not in matrix or out[:-1] != rows[:-1] or {rows[-1], out[-1]} != set(matrix):
        return None
    return add_call(node, aten.linear.default, x, weight if matrix[1] == rows[-1] else _transposed(node, weight))


def _is_matrix(gm: GraphModule, value: object) -> bool:
    view = parameter_view(value)
    return view is not None and view.of(gm).dim() == 2


def _dims(value: object) -> int:
    """Dimensions of an activation; 0 for a parameter."""
    found = value.meta.get("val") if isinstance(value, Node) and parameter_view(value) is None else None
    return found.dim() if isinstance(found, Tensor) else 0


def _transposed(node: Node, matrix: object) -> Node:
    """``matrix.t()``, or what ``matrix`` is the transpose of."""
    assert isinstance(matrix, Node)
    if matrix.target in _TRANSPOSES:
        (source,) = matrix.args
        assert isinstance(source, Node)
        return source
    return add_call(node, aten.t.default, matrix)
