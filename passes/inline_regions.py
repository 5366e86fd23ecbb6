"""Regions that export keeps apart (``torch.no_grad()``, autocast turned off) become part of the graph around them."""

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from t3c_compile.passes.base import erase_dead_attrs, get_attr
from t3c_compile.passes.errors import CaptureError

_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast


def inline_regions(gm: GraphModule) -> None:
    """Inline every region of ``gm``; what a ``no_grad`` one gives is detached, so that gradients stay what they were.

    Raises:
        CaptureError: a region turns autocast on; its casts would be lost.
    """
    regions = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in (_GRAD, _AUTOCAST)]
    for node in regions:
        enabled, region, inputs = _parts(node)
        body = get_attr(gm, str(region.target))
        inline_regions(body)
        with gm.graph.inserting_before(node):
            results = _copy(gm.graph, body.graph, inputs)
            if node.target is _GRAD and not enabled:
                results = [_detached(gm.graph, result) for result in results]
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(results[user.args[1]])
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)
    if regions:
        erase_dead_attrs(gm)
        gm.delete_all_unused_submodules()
        gm.recompile()


def _parts(node: Node) -> tuple[bool, Node, tuple[Node, ...]]:
    """Whether ``node`` turns its mode on, the node of its body, and the body's inputs."""
    args: tuple[Any, ...] = node.args
    if node.target is _GRAD:
        return args[0], args[1], args[2:]
    if args[2]:
        raise CaptureError(
            f"forward turns on autocast (device {args[0]}, {args[1]}): take it out and wrap the call of the model in it"
        )
    return args[2], args[4], args[5:]


def _copy(graph: Graph, body: Graph, inputs: tuple[Node, ...]) -> list[Node]:
    places = [node for node in body.nodes if node.op == "placeholder"]
    outputs = graph.graph_copy(body, dict(zip(places, inputs, strict=True)))
    return list(outputs)  # type: ignore[arg-type]


def _detached(graph: Graph, result: Node) -> Node:
    value = result.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return result
    detached = graph.call_function(torch.ops.aten.detach.default, (result,))
    detached.meta = dict(result.meta)
    return detached
