"""Pin float stages: ATen's float functions, norms and products between int8 layers become ``t3c::`` ops of one meaning.

Each library sums and rounds these in its own way; a tie that falls the other way moves an int8 step of the next layer.
"""

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from t3c_compile.passes.base import Pass, bound

aten = torch.ops.aten
t3c = torch.ops.t3c

Arguments = dict[str, Any]
Rule = Callable[[Graph, Node, Arguments], Node | None]


@dataclass(frozen=True)
class PinFloatStages(Pass):
    """Replaces float32 layer norm, RMS norm, softmax, attention, products of two activations, means and the usual
    activation functions. What has another dtype, or a form the ops do not have, stays as it is.

    ``integer_attention``: names of the attention nodes that become ``t3c::attention_int8``.
    """

    name: ClassVar[str] = "pin-float-stages"
    integer_attention: Container[str] = frozenset()

    def apply(self, gm: GraphModule) -> bool:
        changed = False
        for node in list(gm.graph.nodes):
            rule = _RULES.get(node.target) if node.op == "call_function" else None
            if rule is None or not _is_float32(node) or not all(map(_is_float32, _float_inputs(node))):
                continue
            with gm.graph.inserting_before(node):
                pinned = rule(gm.graph, node, bound(node))
            if pinned is not None:
                if node.name in self.integer_attention:
                    _in_integers(pinned)
                pinned.meta = {**node.meta, "t3c_pass": self.name}
                node.replace_all_uses_with(pinned)
                gm.graph.erase_node(node)
                changed = True
        return changed


def _is_float32(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor) and node.meta["val"].dtype == torch.float32


def _float_inputs(node: Node) -> list[Node]:
    """Inputs but masks: those that must be float32."""
    mask = bound(node).get("attn_mask")
    return [value for value in node.all_input_nodes if value is not mask and value.op != "get_attr"]


def _rank(node: Node) -> int:
    return int(node.meta["val"].dim())


def _is_stored(node: Node) -> bool:
    """Whether ``node`` is a parameter or made of parameters alone."""
    sources = node.all_input_nodes
    return node.op == "get_attr" or (node.op == "call_function" and bool(sources) and all(map(_is_stored, sources)))


def _call(graph: Graph, like: Node, op: Any, *args: Any) -> Node:
    """A call whose value is worked out from its arguments' values."""
    node = graph.call_function(op, args)
    values = [a.meta["val"] if isinstance(a, Node) else a for a in args]
    node.meta = {**like.meta, "val": op(*values)}
    return node


def _function(op: Any) -> Rule:
    return lambda graph, node, a: graph.call_function(op, (a["self"],))


def _in_place(op: Any) -> Rule:
    """For a tensor that nobody else reads, under this name or another."""

    def rule(graph: Graph, node: Node, a: Arguments) -> Node | None:
        x = a["self"]
        fresh = x.op == "call_function" and all(r.alias_info is None for r in x.target._schema.returns)
        return graph.call_function(op, (x,)) if fresh and len(x.users) == 1 else None

    return rule


def _gelu(graph: Graph, node: Node, a: Arguments) -> Node:
    op = t3c.gelu_tanh_f32.default if a["approximate"] == "tanh" else t3c.gelu_f32.default
    return graph.call_function(op, (a["self"],))


def _layer_norm(graph: Graph, node: Node, a: Arguments) -> Node | None:
    if len(a["normalized_shape"]) != 1:
        return None
    return graph.call_function(t3c.layer_norm_f32.default, (a["input"], a["weight"], a["bias"], a["eps"]))


def _rms_norm(graph: Graph, node: Node, a: Arguments) -> Node | None:
    if len(a["normalized_shape"]) != 1:
        return None
    eps = torch.finfo(torch.float32).eps if a["eps"] is None else a["eps"]
    return graph.call_function(t3c.rms_norm_f32.default, (a["input"], a["weight"], eps))


def _softmax(graph: Graph, node: Node, a: Arguments) -> Node | None:
    x, dim, last = a["self"], a["dim"] % max(1, _rank(a["self"])), _rank(a["self"]) - 1
    if last < 0:
        return None
    if dim == last:
        return graph.call_function(t3c.softmax_f32.default, (x,))
    turned = _call(graph, node, aten.transpose.int, x, dim, last)
    y = graph.call_function(t3c.softmax_f32.default, (turned,))
    y.meta = dict(turned.meta)
    return graph.call_function(aten.transpose.int, (y, dim, last))


def _attention(graph: Graph, node: Node, a: Arguments) -> Node | None:
    query, key, value, mask = (a[name] for name in ("query", "key", "value", "attn_mask"))
    if _rank(query) not in (3, 4) or a["dropout_p"] or {_rank(key), _rank(value)} != {_rank(query)}:
        return None
    if mask is not None and _is_float32(mask) is (mask.meta["val"].dtype == torch.bool):
        return None
    width = query.meta["val"].shape[-1]
    if not isinstance(width, int) or not isinstance(value.meta["val"].shape[-1], int):
        return None
    scale = float(a["scale"] or width**-0.5)
    three = _rank(query) == 3
    if three:
        query, key, value = (_call(graph, node, aten.unsqueeze.default, x, 1) for x in (query, key, value))
        if mask is not None and _rank(mask) == 3:
            mask = _call(graph, node, aten.unsqueeze.default, mask, 1)
    elif key.meta["val"].shape[:1] != query.meta["val"].shape[:1]:
        return None
    arguments = (query, key, value, mask, a["is_causal"], scale)
    y = graph.call_function(t3c.attention_f32.default, arguments)
    if not three:
        return y
    y.meta = {**node.meta, "val": node.meta["val"].unsqueeze(1)}
    return graph.call_function(aten.squeeze.dim, (y, 1))


def _in_integers(pinned: Node) -> None:
    """Make pinned attention, or the one behind the squeeze that three dimensions need, one of integers."""
    attention: Any = pinned if pinned.target == t3c.attention_f32.default else pinned.args[0]
    attention.target = t3c.attention_int8.default


def _matmul(graph: Graph, node: Node, a: Arguments) -> Node | None:
    left, right = a["self"], a["other"] if "other" in a else a["mat2"]
    if _is_stored(left) or _is_stored(right) or min(_rank(left), _rank(right)) < 2:
        return None
    return graph.call_function(t3c.matmul_f32.default, (left, right))


def _mean(graph: Graph, node: Node, a: Arguments) -> Node | None:
    rank = _rank(a["self"])
    over = sorted(d % rank for d in a.get("dim") or range(rank)) if rank else []
    if not over:
        return None
    return graph.call_function(t3c.mean_f32.default, (a["self"], over, a.get("keepdim", False)))


def _global_pool(graph: Graph, node: Node, a: Arguments) -> Node | None:
    rank, sizes = _rank(a["self"]), list(a["output_size"])
    if any(size != 1 for size in sizes):
        return None
    over = list(range(rank - len(sizes), rank))
    return graph.call_function(t3c.mean_f32.default, (a["self"], over, True))


_RULES: dict[Any, Rule] = {
    aten.exp.default: _function(t3c.exp_f32.default),
    aten.erf.default: _function(t3c.erf_f32.default),
    aten.tanh.default: _function(t3c.tanh_f32.default),
    aten.sigmoid.default: _function(t3c.sigmoid_f32.default),
    aten.silu.default: _function(t3c.silu_f32.default),
    aten.tanh_.default: _in_place(t3c.tanh_f32.default),
    aten.sigmoid_.default: _in_place(t3c.sigmoid_f32.default),
    aten.silu_.default: _in_place(t3c.silu_f32.default),
    aten.gelu.default: _gelu,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.softmax.int: _softmax,
    aten.scaled_dot_product_attention.default: _attention,
    aten.matmul.default: _matmul,
    aten.bmm.default: _matmul,
    aten.mean.default: _mean,
    aten.mean.dim: _mean,
    aten.adaptive_avg_pool1d.default: _global_pool,
    aten.adaptive_avg_pool2d.default: _global_pool,
    aten.adaptive_avg_pool3d.default: _global_pool,
}
