"""Attention in integers: rows of query, key and value are rounded as the deployed ``t3c::attention_int8`` does."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from t3c_compile.passes.base import Pass, erase_dead_attrs, report_of
from t3c_compile.passes.elastic import ElasticLayer
from t3c_compile.passes.option import Option

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_ROUND = torch.ops.t3c.fake_quantize_rows.default
_BITS = ".gate.bits"
_WIDTH_MULTIPLE = 16


@dataclass(frozen=True)
class QuantizeAttention(Pass):
    """Puts ``t3c::fake_quantize_rows`` before the query, key and value of every scaled dot-product attention.

    It rounds where the elastic layer nearest before the query has less than 32 bits, so the full model stays as it is.
    What cannot be rounded stays in floats, and a note in the report says why. Shapes must be known (``infer_values``).
    """

    name: ClassVar[str] = "quantize-attention"

    def apply(self, gm: GraphModule) -> bool:
        notes, changed = report_of(gm).notes, False
        for node in _attentions(gm):
            if _is_rounded(node):
                continue
            layer = _layer_before(gm, node)
            if reason := _refusal(node, layer):
                note = f"attention {node.name} stays in floats: {reason}"
                notes.extend([note] if note not in notes else [])
                continue
            with gm.graph.inserting_before(node):
                bits = gm.graph.get_attr(f"{layer}{_BITS}")
                for i, x in enumerate(_tensors(node)):
                    rounded = gm.graph.call_function(_ROUND, (x, bits))
                    rounded.meta = {**x.meta, "t3c_pass": self.name}
                    node.update_arg(i, rounded)
            changed = True
        return changed


@dataclass(frozen=True)
class FloatAttention(Pass):
    """Takes what :class:`QuantizeAttention` put away again."""

    name: ClassVar[str] = "float-attention"

    def apply(self, gm: GraphModule) -> bool:
        rounded = [node for node in _attentions(gm) if _is_rounded(node)]
        for node in rounded:
            _unround(node)
        erase_dead_attrs(gm)
        return bool(rounded)


def take_integer_attention(gm: GraphModule, options: Mapping[str, Option]) -> frozenset[str]:
    """Take the rounding away, and name the attentions that ``options`` deploy in integers."""
    found = set()
    for node in _attentions(gm):
        if _is_rounded(node):
            bits = _tensors(node)[0].args[1]
            assert isinstance(bits, Node)
            if options[str(bits.target).removesuffix(_BITS)].bits != 32:
                found.add(node.name)
            _unround(node)
    erase_dead_attrs(gm)
    return frozenset(found)


def _attentions(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if node.op == "call_function" and node.target == _ATTENTION]


def _is_rounded(node: Node) -> bool:
    return _tensors(node)[0].target == _ROUND


def _tensors(node: Node) -> list[Node]:
    """Query, key and value."""
    return list(node.args[:3])  # type: ignore[arg-type]


def _unround(node: Node) -> None:
    for i, rounded in enumerate(_tensors(node)):
        source: Any = rounded.args[0]
        node.update_arg(i, source)
        if not rounded.users:
            rounded.graph.erase_node(rounded)


def _refusal(node: Node, layer: str | None) -> str | None:
    if layer is None:
        return "no elastic layer stands before its query"
    query, _, value = (x.meta["val"] for x in _tensors(node))
    for x, what in ((query, "queries"), (value, "values")):
        if x.dtype != torch.float32:
            return f"its {what} are {x.dtype}"
        if not isinstance(x.shape[-1], int) or x.shape[-1] % _WIDTH_MULTIPLE:
            return f"its {what} are {x.shape[-1]} wide, which is no multiple of {_WIDTH_MULTIPLE}"
    return None


def _layer_before(gm: GraphModule, node: Node) -> str | None:
    """The elastic layer nearest before an attention's query."""
    near, seen = [_tensors(node)[0]], set()
    while near:
        for found in near:
            if found.op == "call_module":
                layer = gm.get_submodule(str(found.target))
                if isinstance(layer, ElasticLayer) and layer.gate is not None:
                    return str(found.target)
        seen.update(near)
        near = [source for found in near for source in found.all_input_nodes if source not in seen]
    return None
