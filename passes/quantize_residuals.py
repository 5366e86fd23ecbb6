"""Residuals in int8: what a convolution reads as int8 is added as that int8, too."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from t3c_compile.passes.base import Pass
from t3c_compile.passes.elastic.conv import DenseConv2d, SvdConv2d, ThreeFactorConv2d
from t3c_compile.passes.elastic.layer import Activation, of_call
from t3c_compile.passes.option import Option

aten, t3c = torch.ops.aten, torch.ops.t3c

# The first operand that may be another tensor: a sum in place is written to its first.
_FIRST_OPERAND: Mapping[Any, int] = {aten.add.Tensor: 0, aten.add_.Tensor: 1}
_META = "t3c_residual"


@dataclass(frozen=True)
class QuantizeResiduals(Pass):
    """Rounds an image before it is added, where an elastic convolution reads it, with that layer's range and width.

    Then an image between two blocks is written once, as int8, instead of as float32 beside it.
    """

    name: ClassVar[str] = "quantize-residuals"

    def apply(self, gm: GraphModule) -> bool:
        order = {node: number for number, node in enumerate(gm.graph.nodes)}
        changed = False
        for node in order:
            if node.op != "call_function" or node.target not in _FIRST_OPERAND:
                continue
            for place in range(_FIRST_OPERAND[node.target], 2):
                image = node.args[place]
                # The layer's range is that of this call, once the layer has run.
                readers = [user for user in _convolutions(gm, image) if order[user] < order[node]]
                if readers:
                    with gm.graph.inserting_before(node):
                        node.update_arg(place, self._rounded(gm, image, min(readers, key=lambda user: order[user])))
                    changed = True
        return changed

    def _rounded(self, gm: GraphModule, image: Any, reader: Node) -> Node:
        call: Any = reader.kwargs.get("call", 0)
        name, graph = str(reader.target), gm.graph
        # Copies: the layer's next run moves its range, and the backward of this one needs its own.
        scale, zero_point = (
            graph.call_function(
                aten.clone.default,
                (graph.call_function(aten.select.int, (graph.get_attr(f"{name}.x_quant.{number}"), 0, call)),),
            )
            for number in ("scale", "zero_point")
        )
        bits = graph.get_attr(f"{name}.gate.bits")
        rounded = graph.call_function(t3c.fake_quantize.default, (image, scale, zero_point, bits, -128))
        rounded.meta = {**image.meta, "t3c_pass": self.name, _META: (name, call)}
        return rounded


@dataclass(frozen=True)
class FloatResiduals(Pass):
    """Takes what :class:`QuantizeResiduals` put away again."""

    name: ClassVar[str] = "float-residuals"

    def apply(self, gm: GraphModule) -> bool:
        found = _rounding(gm)
        for node in found:
            _replace(node, node.args[0])
        return bool(found)


def deploy_residuals(
    gm: GraphModule, options: Mapping[str, Option], activations: Mapping[str, Mapping[str, Activation]]
) -> None:
    """The rounding as the ops it is deployed as, at ``options``: none for a layer at 32 bits."""
    for node in _rounding(gm):
        (name, call), image = node.meta[_META], node.args[0]
        if options[name].bits != 32:
            layer: Any = gm.get_submodule(name)
            scale, zero_point = (activations.get(name) or layer.activations())[of_call("x", call)]
            with gm.graph.inserting_before(node):
                q = gm.graph.call_function(t3c.quantize_int8.default, (image, scale, zero_point))
                image = gm.graph.call_function(t3c.dequantize_int8.default, (q, scale, zero_point))
            q.meta = image.meta = dict(node.meta)
        _replace(node, image)


def _convolutions(gm: GraphModule, image: Any) -> list[Node]:
    """The calls of elastic convolutions that read ``image``."""
    users = [user for user in image.users if user.op == "call_module"] if isinstance(image, Node) else []
    found = [(user, gm.get_submodule(str(user.target))) for user in users]
    return [user for user, layer in found if isinstance(layer, SvdConv2d | ThreeFactorConv2d | DenseConv2d)]


def _rounding(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if _META in node.meta and node.target == t3c.fake_quantize.default]


def _replace(node: Node, image: Any) -> None:
    node.replace_all_uses_with(image)
    numbers = [number for number in node.all_input_nodes if number is not node.args[0]]
    node.graph.erase_node(node)
    # What only the rounding read.
    while numbers:
        number = numbers.pop()
        if not number.users and number.op in ("get_attr", "call_function"):
            numbers += number.all_input_nodes
            number.graph.erase_node(number)
