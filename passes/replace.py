"""What the decompose passes share: putting an elastic layer in a candidate's place."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from t3c_compile.passes.base import LayerRecord, add_call, erase_dead_attrs, get_attr, report_of
from t3c_compile.passes.elastic import ElasticLayer
from t3c_compile.passes.errors import PassConditionError
from t3c_compile.passes.find_elastic_layers import Candidate, op_name
from t3c_compile.passes.low_rank import svd_factors
from t3c_compile.passes.parameter_view import parameter_view
from t3c_compile.passes.record_moments import InputMoments
from t3c_compile.passes.resume import Factors, kept_factors
from t3c_compile.passes.state import named_tensors
from t3c_compile.passes.to_dense import Source

_PASSES = {"linear": "decompose-linear", "conv2d": "decompose-conv", "table": "replace-table"}

Builder = Callable[[GraphModule, Candidate, Tensor, Tensor | None], nn.Module]


def candidates(gm: GraphModule, kind: str) -> list[tuple[Node, Candidate]]:
    """The marked nodes of one kind (``linear``, ``conv2d`` or ``table``), in graph order."""
    marked = [(node, node.meta.get("t3c_candidate")) for node in gm.graph.nodes]
    return [(node, c) for node, c in marked if isinstance(c, Candidate) and c.kind == kind]


def restored_layer(gm: GraphModule, layer: str, weight: Tensor) -> ElasticLayer | None:
    """The layer as a checkpoint has it, where the graph is being rewritten to fit one; None where it is not."""
    restored: dict[str, ElasticLayer] | None = gm.meta.get("t3c_restored")
    if restored is None:
        return None
    if layer not in restored:
        raise PassConditionError(f"layer {layer} is elastic in this model and not in the checkpoint")
    shape = restored[layer].dense_shape()
    if shape != tuple(weight.shape):
        raise PassConditionError(f"layer {layer} is {tuple(weight.shape)} in this model, {shape} in the checkpoint")
    # Its calls are counted anew.
    restored[layer].calls = min(restored[layer].calls, 1)
    return restored[layer]


def kept_svd(gm: GraphModule, layer: str, weight: Tensor, damping: float) -> Factors:
    """:func:`svd_factors` of a layer, whitened by what ``record_moments`` left, from the folder to resume from."""
    moments: InputMoments | None = gm.meta.get("t3c_moments")
    moment = None if moments is None else moments.get(layer)
    options = f"svd damping={damping}"
    return kept_factors(gm, layer, options, [weight, moment], lambda: svd_factors(weight, moment, damping))


@torch.no_grad()
def replace_with_elastic(gm: GraphModule, node: Node, candidate: Candidate, build: Builder) -> None:
    """Put the elastic layer at ``candidate.layer`` and call it instead of ``node``.

    When another call, or the other graph over the same module tree, has already put it there, it is used as it stands.
    """
    # Found now: the layer may take the parameter's own name.
    replaced = [get_attr(gm, view.target) for view in (candidate.weight, candidate.bias) if view]
    if not isinstance(get_attr(gm, candidate.layer), ElasticLayer):
        weight = candidate.weight.of(gm)
        bias = candidate.bias.of(gm) if candidate.bias else None
        layer = restored_layer(gm, candidate.layer, weight) or build(gm, candidate, weight, bias)
        assert isinstance(layer, ElasticLayer)
        layer.train(gm.training)
        report_of(gm).elastic[candidate.layer] = LayerRecord(
            candidate.layer, op_name(node), layer.form, tuple(weight.shape), layer.max_rank, candidate.reason
        )
        views = {"weight": candidate.weight} | ({"bias": candidate.bias} if candidate.bias else {})
        sources = gm.meta.setdefault("t3c_sources", {})
        sources[candidate.layer] = {leaf: Source.of(gm, view) for leaf, view in views.items()}
        gm.add_submodule(candidate.layer, layer)
        gm.meta.get("t3c_layer_done", lambda candidate: None)(candidate)
    layer = gm.get_submodule(candidate.layer)
    assert isinstance(layer, ElasticLayer)
    with gm.graph.inserting_before(node):
        if candidate.look_up:
            call = gm.graph.call_module(candidate.layer, (node.args[1],))
        else:
            call = gm.graph.call_module(candidate.layer, (node.args[0],), _numbered(gm, node, candidate, layer))
        call.meta = {**node.meta, "t3c_pass": _PASSES[candidate.kind]}
        call.meta.pop("t3c_candidate")
        result = call if candidate.look_up or candidate.bias else _add_bias(node, call)
    node.replace_all_uses_with(result)
    read = node.all_input_nodes
    gm.graph.erase_node(node)
    for source in read:
        _erase_unread(source)
    erase_dead_attrs(gm)
    for tensor in replaced:
        _drop_unread(gm, tensor)


def _numbered(gm: GraphModule, node: Node, candidate: Candidate, layer: ElasticLayer) -> dict[str, Any]:
    """The call's keyword arguments: which of the layer's products it is, and that it is one where rows are read too."""
    calls = [other for other in gm.graph.nodes if other.op == "call_module" and other.target == candidate.layer]
    if candidate.kind == "table":
        calls = [other for other in calls if "product" in other.kwargs]
    batch = batch_hint(gm)
    layer.add_call(len(calls), rows(node.args[0], candidate.kind, batch), rows(node, candidate.kind, batch))
    kwargs: dict[str, Any] = {"call": len(calls)} if calls else {}
    return kwargs | ({"product": True} if candidate.kind == "table" else {})


def _add_bias(node: Node, call: Node) -> Node:
    """``call`` plus the bias of ``node`` that the layer does not own."""
    bias = node.args[2] if len(node.args) > 2 else None
    if bias is None:
        return call
    if node.target != torch.ops.aten.linear.default:
        for _ in range(2):
            bias = add_call(node, torch.ops.aten.unsqueeze.default, bias, -1)
    return add_call(node, torch.ops.aten.add.Tensor, call, bias)


def _erase_unread(node: Node) -> None:
    """Erase a parameter, or a chain of views of one, that nothing reads any more."""
    if not node.users and parameter_view(node) is not None:
        sources = node.all_input_nodes
        node.graph.erase_node(node)
        for source in sources:
            _erase_unread(source)


def _drop_unread(gm: GraphModule, tensor: Tensor | None) -> None:
    """Delete a parameter under all its names, unless the graph still reads it or an elastic layer owns it."""
    read = {id(get_attr(gm, str(node.target))) for node in gm.graph.nodes if node.op == "get_attr"}
    if tensor is None or id(tensor) in read:
        return
    for name in [name for name, other in named_tensors(gm) if other is tensor]:
        owner, _, leaf = name.rpartition(".")
        if not isinstance(gm.get_submodule(owner), ElasticLayer):
            delattr(gm.get_submodule(owner), leaf)


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
