"""What the decompose passes share: putting an elastic layer in a candidate's place."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from t3c_compile.passes.base import LayerRecord, erase_dead_attrs, get_attr, report_of
from t3c_compile.passes.elastic import ElasticLayer
from t3c_compile.passes.find_elastic_layers import Candidate, op_name

Builder = Callable[[GraphModule, Candidate, Tensor, Tensor | None], nn.Module]


def candidates(gm: GraphModule, kind: str) -> list[tuple[Node, Candidate]]:
    """The marked nodes of one kind (``linear`` or ``conv2d``), in graph order."""
    marked = [(node, node.meta.get("t3c_candidate")) for node in gm.graph.nodes]
    return [(node, c) for node, c in marked if isinstance(c, Candidate) and c.kind == kind]


def moments_of(gm: GraphModule, layer: str) -> Tensor | None:
    """Second moment of a layer's inputs as ``record-moments`` left it."""
    moments: dict[str, Tensor] = gm.meta.get("t3c_moments", {})
    return moments.get(layer)


@torch.no_grad()
def replace_with_elastic(gm: GraphModule, node: Node, candidate: Candidate, build: Builder) -> None:
    """Put the elastic layer at ``candidate.layer`` and call it instead of ``node``.

    When the other graph over the same module tree has already put it there, it is used as it stands.
    """
    layer = get_attr(gm, candidate.layer)
    if not isinstance(layer, ElasticLayer):
        weight = get_attr(gm, candidate.weight)
        bias = get_attr(gm, candidate.bias) if candidate.bias else None
        layer = build(gm, candidate, weight, bias)
        assert isinstance(layer, ElasticLayer)
        layer.train(gm.training)
        batch = batch_hint(gm)
        layer.rows_in = rows(node.args[0], candidate.kind, batch)
        layer.rows_out = rows(node, candidate.kind, batch)
        report_of(gm).elastic[candidate.layer] = LayerRecord(
            candidate.layer, op_name(node), layer.form, tuple(weight.shape), layer.max_rank, candidate.reason
        )
        for target in (candidate.weight, candidate.bias):
            if target:
                _drop_attr(gm, target)
        gm.add_submodule(candidate.layer, layer)
    with gm.graph.inserting_before(node):
        call = gm.graph.call_module(candidate.layer, (node.args[0],))
    call.meta = {**node.meta, "t3c_pass": f"decompose-{candidate.kind.removesuffix('2d')}"}
    call.meta.pop("t3c_candidate")
    node.replace_all_uses_with(call)
    gm.graph.erase_node(node)
    erase_dead_attrs(gm)


def rows(node: Any, kind: str, batch: int) -> int:
    """Positions of one sample at a node (tokens of a linear, pixels of a convolution), captured at ``batch``."""
    value = node.meta.get("val")
    if value is None:
        return 1
    features = 1 if kind == "conv2d" else len(value.shape) - 1
    return max(1, math.prod(_hint(size) for i, size in enumerate(value.shape) if i != features) // batch)


def batch_hint(gm: GraphModule) -> int:
    """Dimension 0 of the first input at capture."""
    first = next(node for node in gm.graph.nodes if node.op == "placeholder")
    value = first.meta.get("val")
    return _hint(value.shape[0]) if isinstance(value, Tensor) and value.dim() else 1


def _hint(size: Any) -> int:
    """A size as a number; a symbolic one by the size it was captured with."""
    return int(size) if isinstance(size, int) else int(size.node.hint)


def _drop_attr(gm: GraphModule, target: str) -> None:
    owner, _, leaf = target.rpartition(".")
    delattr(gm.get_submodule(owner), leaf)
