"""Find the linears, convolutions and embeddings that can be elastic; refuse the others with the reason."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from t3c_compile.passes.base import LayerRecord, Pass, get_attr, report_of
from t3c_compile.passes.elastic.conv import ConvGeometry
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.normalize_conv import Geometry
from t3c_compile.passes.parameter_view import ParameterView, overlap, parameter_view, readers, same_region

aten = torch.ops.aten

# Where the weight is among a node's arguments.
_WEIGHT: dict[Any, int] = {
    aten.linear.default: 1,
    aten.conv2d.default: 1,
    aten.conv2d.padding: 1,
    aten.embedding.default: 0,
}

_RECURRENT = "a recurrent layer stays whole, in float"

_PRODUCT = (
    "the parameter is not a matrix that multiplies rows of activations (a batch of matrices, a vector, or scaled)"
)

_COMPUTED = "the weight is computed in the graph (parametrized or generated), not a parameter"
_CONV1D = "a 1-d convolution stays whole until normalize-conv has written it as a 2-d one"
_CONV3D = "a 3-d convolution stays whole, in float, unless its kernel is 1x1x1 and its image size fixed"
_BAG = "a bag of embeddings (sums of rows) stays whole, in float"
_TRANSPOSED = "a transposed convolution stays whole, in float"

_KEPT_WHOLE: dict[Any, str] = {
    **dict.fromkeys((aten.mm.default, aten.bmm.default, aten.matmul.default, aten.addmm.default), _PRODUCT),
    **dict.fromkeys((aten.baddbmm.default, aten.einsum.default, aten.mv.default, aten.dot.default), _PRODUCT),
    **dict.fromkeys((aten.conv1d.default, aten.conv1d.padding), _CONV1D),
    **dict.fromkeys((aten.conv3d.default, aten.conv3d.padding), _CONV3D),
    **dict.fromkeys((aten.convolution.default, aten.conv_transpose1d.default), _TRANSPOSED),
    **dict.fromkeys((aten.conv_transpose2d.input, aten.conv_transpose3d.input), _TRANSPOSED),
    **dict.fromkeys((aten.embedding_bag.default, aten.embedding_bag.padding_idx), _BAG),
    **dict.fromkeys((aten.lstm.input, aten.lstm.data, aten.gru.input, aten.gru.data), _RECURRENT),
    **dict.fromkeys((aten.rnn_tanh.input, aten.rnn_relu.input, aten.rnn_tanh.data, aten.rnn_relu.data), _RECURRENT),
    aten.bilinear.default: "a bilinear product has two inputs",
}


@dataclass(frozen=True)
class Candidate:
    """What the decompose passes need to know of one node; kept in ``node.meta["t3c_candidate"]``.

    ``kind`` is ``linear``, ``conv2d`` or ``table``; ``look_up`` marks the nodes that read rows of a table, the others
    multiply by it. ``bias`` is None also where the layer cannot own the bias of its node, which is then added after it.
    """

    layer: str
    kind: str
    form: str
    weight: ParameterView
    bias: ParameterView | None
    conv: ConvGeometry = field(default_factory=ConvGeometry)
    groups: int = 1
    look_up: bool = False
    padding_idx: int = -1
    reason: str = ""


@dataclass(frozen=True)
class FindElasticLayers(Pass):
    """Marks candidates and writes the report.

    ``conv`` is the form of k x k convolutions (``tucker2`` or ``cp``); a layer whose factors would cost more
    multiply-adds than the dense product even at rank ``rank_multiple`` stays dense and is elastic in width only.
    ``keep`` holds glob patterns of layer names to leave alone, separated by spaces.
    """

    name: ClassVar[str] = "find-elastic-layers"
    conv: str = "tucker2"
    rank_multiple: int = 8
    keep: str = ""

    def requires(self, gm: GraphModule) -> None:
        if self.conv not in ("tucker2", "cp"):
            raise self.fail(f"conv form {self.conv!r} is not tucker2 or cp")
        if self.rank_multiple < 1:
            raise self.fail(f"rank_multiple {self.rank_multiple} must be positive")

    def apply(self, gm: GraphModule) -> bool:
        found: dict[Node, Candidate] = {}
        for node in gm.graph.nodes:
            if node.op != "call_function":
                continue
            if node.target in _WEIGHT:
                result = self._candidate(gm, node)
            elif node.target in _KEPT_WHOLE:
                result = _KEPT_WHOLE[node.target]
                if result is _PRODUCT and all(parameter_view(source) is None for source in node.all_input_nodes):
                    continue  # of two activations
                if result is _CONV1D and parameter_view(node.args[1]) is None:
                    result = _COMPUTED
            else:
                continue
            if isinstance(result, str):
                _keep(gm, node, layer_name(node), result)
            else:
                found[node] = result
        for node, candidate in join_shared(gm, found).items():
            node.meta["t3c_candidate"] = candidate
        if isinstance(gm, ElasticGraphModule) and gm.graph is gm.train_graph:
            _agree(gm)
        return False

    def _candidate(self, gm: GraphModule, node: Node) -> Candidate | str:
        view = parameter_view(node.args[_WEIGHT[node.target]])
        if view is None:
            return _COMPUTED
        weight = view.of(gm)
        if weight.dtype != torch.float32:
            return f"the weight is {weight.dtype}, not float32"
        layer = elastic_name(view.target)
        for pattern in self.keep.split():
            if fnmatch(layer, pattern):
                return f"kept by request (pattern {pattern!r})"
        if node.target == aten.embedding.default:
            return _table(node, layer, view)
        bias = parameter_view(node.args[2]) if len(node.args) > 2 else None
        if node.target == aten.linear.default:
            form, reason = self._linear_form(weight)
            return Candidate(layer, "linear", form, view, bias, reason=reason)
        geometry = Geometry.of(node, 2)
        pads = geometry.pads(weight.shape[2:])
        if any(before != after for before, after in pads):
            return f"padding={geometry.padding!r} differs before and after: run normalize-conv first"
        conv = ConvGeometry(_pair(geometry.stride), (pads[0][0], pads[1][0]), _pair(geometry.dilation))
        form, reason = self._conv_form(weight, geometry.groups, conv)
        return Candidate(layer, "conv2d", form, view, bias, conv, geometry.groups, reason=reason)

    def _linear_form(self, weight: Tensor) -> tuple[str, str]:
        m, n = weight.shape
        if self.rank_multiple * (m + n) >= m * n:
            return "dense", f"rank {self.rank_multiple} already costs more than the dense product"
        return "svd", ""

    def _conv_form(self, weight: Tensor, groups: int, conv: ConvGeometry) -> tuple[str, str]:
        out, inner, kh, kw = weight.shape
        if groups > 1:
            return "dense", f"{groups} groups: kept whole, elastic in width"
        ki, ko = min(self.rank_multiple, inner), min(self.rank_multiple, out)
        pointwise = (kh, kw) == (1, 1) and conv.padding == (0, 0)
        spatial = 0 if pointwise else ki * ko * kh * kw if self.conv == "tucker2" else self.rank_multiple * kh * kw
        if ki * inner + spatial + ko * out >= out * inner * kh * kw:
            return "dense", f"rank {self.rank_multiple} already costs more than the dense product"
        return "svd" if pointwise else self.conv, ""


def _table(node: Node, layer: str, view: ParameterView) -> Candidate | str:
    given: list[Any] = [*node.args[2:], *(-1, False, False)[len(node.args) - 2 :]]
    padding_idx, scaled, sparse = given
    if scaled or sparse:
        return "an embedding with scale_grad_by_freq or sparse gradients stays whole, in float"
    reason = "a table of rows: kept whole, elastic in width"
    return Candidate(layer, "table", "dense", view, None, look_up=True, padding_idx=padding_idx, reason=reason)


def _keep(gm: GraphModule, node: Node, layer: str, reason: str) -> None:
    report_of(gm).kept[layer] = LayerRecord(layer, op_name(node), reason=reason)


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    return values[0], values[1]


def join_shared(gm: GraphModule, found: Mapping[Node, Candidate]) -> dict[Node, Candidate]:
    """``found`` with the nodes that read one weight joined in one layer; those that cannot be are refused.

    A weight that an embedding and linears share becomes a table, whole, so that rows and products read one stored
    tensor; slices of one packed parameter become layers of their own.
    """
    reads: dict[int, list[tuple[Tensor, Node]]] = {}
    for tensor, view, user in readers(gm, gm.graph):
        node_view = parameter_view(view)
        # A part with a symbolic size may be any part.
        part = tensor if node_view is None else node_view.of(gm)
        reads.setdefault(tensor.untyped_storage().data_ptr(), []).append((part, user))
    weights = {node: candidate.weight.of(gm) for node, candidate in found.items()}
    joined: dict[Node, Candidate] = {}
    for node, candidate in found.items():
        weight = weights[node]
        others = [(part, user) for part, user in reads[weight.untyped_storage().data_ptr()] if overlap(part, weight)]
        strangers = [user for part, user in others if user not in found or not same_region(weights[user], weight)]
        readings = {user for _, user in others}
        sharing = [other for other in found if other in readings]
        reason = _refusal(candidate, [found[other] for other in sharing], strangers)
        if reason:
            _keep(gm, node, layer_name(node), reason)
        else:
            bias = _own_bias(gm, sharing, found, reads)
            first = found[sharing[0]]
            layer = _place(gm, first.layer + _part(weight, weights), first.weight, bias)
            joined[node] = _as_one(candidate, [found[other] for other in sharing], bias, layer)
    return joined


def _agree(gm: ElasticGraphModule) -> None:
    """Unmark what only one of the two graphs can have elastic while the other reads the weight in another way."""
    graphs = (gm.eval_graph, gm.train_graph)
    marked = [{n: n.meta["t3c_candidate"] for n in graph.nodes if "t3c_candidate" in n.meta} for graph in graphs]
    for mine, other in ((0, 1), (1, 0)):
        layers = {candidate.layer for candidate in marked[other].values()}
        read = {id(tensor) for tensor, _, _ in readers(gm, graphs[other])}
        for node, candidate in marked[mine].items():
            if candidate.layer not in layers and id(get_attr(gm, candidate.weight.target)) in read:
                reason = f"the weight {candidate.weight.target} is read differently in training and in evaluation"
                _keep(gm, node, layer_name(node), reason)
                del node.meta["t3c_candidate"]


def _refusal(mine: Candidate, sharing: list[Candidate], strangers: list[Node]) -> str:
    if strangers:
        names = ", ".join(sorted({f"{op_name(node)} ({node.name})" for node in strangers}))
        return f"the weight {mine.weight.target} is also read by {names}"
    if len({(candidate.conv, candidate.groups) for candidate in sharing}) > 1:
        return f"the weight {mine.weight.target} is shared by convolutions that differ in stride, padding or dilation"
    return ""


def _place(gm: GraphModule, layer: str, *owned: ParameterView | None) -> str:
    """``layer``, or a name within it where the module there holds more than what the layer will own."""
    module = get_attr(gm, layer)
    if not isinstance(module, nn.Module):
        return layer
    own = {id(get_attr(gm, view.target)) for view in owned if view is not None}
    held = [*module.parameters(), *module.buffers()]
    return layer if all(id(tensor) in own for tensor in held) else f"{layer}.elastic"


def _as_one(mine: Candidate, sharing: list[Candidate], bias: ParameterView | None, layer: str) -> Candidate:
    """``mine`` as one call of the layer that all ``sharing`` are."""
    one = replace(mine, layer=layer, weight=sharing[0].weight, bias=bias)
    look_ups = [candidate for candidate in sharing if candidate.look_up]
    if not look_ups:
        return replace(one, reason=_joined(mine.reason, f"shared by {len(sharing)} calls" if len(sharing) > 1 else ""))
    tied = "tied to a linear, which reads the same rows" if len(look_ups) < len(sharing) else ""
    padding_idx = look_ups[0].padding_idx
    return replace(one, kind="table", form="dense", padding_idx=padding_idx, reason=_joined(look_ups[0].reason, tied))


def _joined(*reasons: str) -> str:
    return "; ".join(reason for reason in reasons if reason)


def _part(weight: Tensor, weights: Mapping[Node, Tensor]) -> str:
    """What tells the layer of one slice of a packed parameter from those of its other slices."""
    storage = weight.untyped_storage().data_ptr()
    starts = sorted({other.data_ptr() for other in weights.values() if other.untyped_storage().data_ptr() == storage})
    return f"_{starts.index(weight.data_ptr())}" if len(starts) > 1 else ""


def _own_bias(
    gm: GraphModule,
    sharing: list[Node],
    found: Mapping[Node, Candidate],
    reads: Mapping[int, list[tuple[Tensor, Node]]],
) -> ParameterView | None:
    """The one bias of the products in ``sharing``; None where there is none, or anything else reads it or differs."""
    products = [node for node in sharing if not found[node].look_up]
    biases = [found[node].bias for node in products]
    if not biases or any(bias is None for bias in biases):
        return None
    values = [bias.of(gm) for bias in biases if bias is not None]
    first = values[0]
    parts = [(part, user) for part, user in reads[first.untyped_storage().data_ptr()] if overlap(part, first)]
    own = all(same_region(value, first) for value in values) and all(
        user in products and same_region(part, first) for part, user in parts
    )
    return biases[0] if own else None


def elastic_name(weight: str) -> str:
    """Qualified name of the elastic layer that owns ``weight``: the owner of ``.weight``, else the name without it."""
    if weight.endswith(".weight"):
        return weight.removesuffix(".weight")
    return weight.removesuffix("_weight") if weight.endswith("_weight") else f"{weight}_elastic"


def layer_name(node: Node) -> str:
    """The user's name for a node: its weight's owner, else its innermost module, else the node's own name."""
    if node.target in _WEIGHT:
        views = [parameter_view(node.args[_WEIGHT[node.target]])]
    else:
        views = [parameter_view(source) for source in node.all_input_nodes]
    targets = [view.target for view in views if view is not None]
    owners = [elastic_name(target) for target in targets if target.endswith("weight")]
    products = node.target in _WEIGHT or _KEPT_WHOLE.get(node.target) is _PRODUCT
    if owners or (products and targets):
        return (owners or targets)[-1]
    stack = node.meta.get("nn_module_stack") or {}
    names = [name for name, _ in stack.values() if name]
    return names[-1] if names else node.name


def op_name(node: Node) -> str:
    """``aten.conv2d`` and the like."""
    return str(node.target).rsplit(".", 1)[0]
