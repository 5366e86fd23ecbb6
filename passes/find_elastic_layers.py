"""Find the linear and convolution nodes that can be elastic; refuse the others with the reason."""

from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from t3c_compile.passes.base import LayerRecord, Pass, get_attr, report_of
from t3c_compile.passes.elastic.conv import ConvGeometry

aten = torch.ops.aten

_NOT_DECOMPOSED = {
    aten.conv1d.default: "1-d convolutions are not decomposed yet",
    aten.conv1d.padding: "1-d convolutions are not decomposed yet",
    aten.conv3d.default: "3-d convolutions are not decomposed yet",
    aten.conv3d.padding: "3-d convolutions are not decomposed yet",
    aten.conv_transpose1d.default: "transposed convolutions are not decomposed yet",
    aten.conv_transpose2d.input: "transposed convolutions are not decomposed yet",
    aten.conv_transpose3d.input: "transposed convolutions are not decomposed yet",
    aten.embedding.default: "an embedding is a table look-up, not a product",
    aten.lstm.input: "recurrent layers stay whole",
    aten.gru.input: "recurrent layers stay whole",
    aten.bilinear.default: "a bilinear product has two inputs",
}


@dataclass(frozen=True)
class Candidate:
    """What the decompose passes need to know of one node; kept in ``node.meta["t3c_candidate"]``."""

    layer: str
    kind: str
    form: str
    weight: str
    bias: str | None
    conv: ConvGeometry = field(default_factory=ConvGeometry)
    groups: int = 1
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
        uses = Counter(
            id(get_attr(gm, str(node.target))) for node in gm.graph.nodes if node.op == "get_attr" for _ in node.users
        )
        report = report_of(gm)
        for node in gm.graph.nodes:
            if node.op != "call_function":
                continue
            if node.target in (aten.linear.default, aten.conv2d.default, aten.conv2d.padding):
                found = self._candidate(gm, node, uses)
            elif node.target in _NOT_DECOMPOSED:
                found = _NOT_DECOMPOSED[node.target]
            else:
                continue
            if isinstance(found, str):
                layer = layer_name(node)
                report.kept[layer] = LayerRecord(layer, op_name(node), reason=found)
            else:
                node.meta["t3c_candidate"] = found
        return False

    def _candidate(self, gm: GraphModule, node: Node, uses: Counter[int]) -> Candidate | str:
        weight_node, bias_node = node.args[1], node.args[2] if len(node.args) > 2 else None
        if not isinstance(weight_node, Node) or weight_node.op != "get_attr":
            return "the weight is computed in the graph (parametrized or generated), not a parameter"
        if isinstance(bias_node, Node) and bias_node.op != "get_attr":
            return "the bias is computed in the graph, not a parameter"
        weight = get_attr(gm, str(weight_node.target))
        if not isinstance(weight, Tensor) or weight.dtype != torch.float32:
            return f"the weight is {getattr(weight, 'dtype', type(weight).__name__)}, not float32"
        if uses[id(weight)] > 1:
            return f"the weight {weight_node.target} is shared by {uses[id(weight)]} nodes"
        layer = elastic_name(str(weight_node.target))
        for pattern in self.keep.split():
            if fnmatch(layer, pattern):
                return f"kept by request (pattern {pattern!r})"
        bias = str(bias_node.target) if isinstance(bias_node, Node) else None
        if node.target == aten.linear.default:
            form, reason = self._linear_form(weight)
            return Candidate(layer, "linear", form, str(weight_node.target), bias, reason=reason)
        return self._conv_candidate(node, weight, layer, str(weight_node.target), bias)

    def _linear_form(self, weight: Tensor) -> tuple[str, str]:
        m, n = weight.shape
        if self.rank_multiple * (m + n) >= m * n:
            return "dense", f"rank {self.rank_multiple} already costs more than the dense product"
        return "svd", ""

    def _conv_candidate(self, node: Node, weight: Tensor, layer: str, target: str, bias: str | None) -> Candidate | str:
        stride, padding, dilation, groups = conv_arguments(node)
        size = (weight.shape[2], weight.shape[3])
        if isinstance(padding, str):
            resolved = _resolve_padding(padding, size, dilation)
            if resolved is None:
                return f"padding={padding!r} of an even kernel {size} is not symmetric"
            padding = resolved
        conv = ConvGeometry(stride, padding, dilation)
        form, reason = self._conv_form(weight, groups, conv)
        return Candidate(layer, "conv2d", form, target, bias, conv, groups, reason)

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


def conv_arguments(node: Node) -> tuple[tuple[int, int], Any, tuple[int, int], int]:
    """Stride, padding (a pair or a word), dilation and groups of an ATen conv2d node, defaults filled in."""
    args: list[Any] = [*node.args[3:], *[None] * (7 - max(3, len(node.args)))]
    padding = args[1] if isinstance(args[1], str) else _pair(args[1], 0)
    return _pair(args[0], 1), padding, _pair(args[2], 1), int(args[3] or 1)


def _pair(value: Any, default: int) -> tuple[int, int]:
    values = [default] if value is None else list(value) if isinstance(value, list | tuple) else [value]
    return (int(values[0]), int(values[-1]))


def _resolve_padding(word: str, kernel: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int] | None:
    if word == "valid":
        return (0, 0)
    total = [dilation[i] * (kernel[i] - 1) for i in range(2)]
    return None if any(t % 2 for t in total) else (total[0] // 2, total[1] // 2)


def elastic_name(weight: str) -> str:
    """Qualified name of the elastic layer that owns ``weight``: the owner of ``.weight``, else the name without it."""
    if weight.endswith(".weight"):
        return weight.removesuffix(".weight")
    return weight.removesuffix("_weight") if weight.endswith("_weight") else f"{weight}_elastic"


def layer_name(node: Node) -> str:
    """The user's name for a node: its weight's owner, else its innermost module, else the node's own name."""
    for arg in node.args:
        if isinstance(arg, Node) and arg.op == "get_attr" and str(arg.target).endswith("weight"):
            return elastic_name(str(arg.target))
    stack = node.meta.get("nn_module_stack") or {}
    names = [name for name, _ in stack.values() if name]
    return names[-1] if names else node.name


def op_name(node: Node) -> str:
    """``aten.conv2d`` and the like."""
    return str(node.target).rsplit(".", 1)[0]
