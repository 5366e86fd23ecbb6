"""Attention for an NPU: ``t3c::attention_int8`` taken apart, so that its two products of integers can go there.

What is float32 stays the host's, op for op and in the order of the reference, so the parts give its bits.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import GraphModule, Node

from t3c_compile.passes.base import bound
from t3c_compile.passes.ops.attention import exponentials
from t3c_compile.passes.ops.int8_attention import integer_rows

aten, t3c = torch.ops.aten, torch.ops.t3c


@torch.library.custom_op("t3c::integer_rows", mutates_args=())
def int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of float32 ``x`` [..., n] as int8, each by its greatest number, and what one is worth, float32 [..., 1]."""
    whole, step = integer_rows(x)
    return whole.to(torch.int8), step


@int8_rows.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1))


@torch.library.custom_op("t3c::exponentials", mutates_args=())
def row_exponentials(scores: Tensor) -> tuple[Tensor, Tensor]:
    """``exp(s - max(s))`` of every row of float32 ``scores`` [..., n], and one over their sum, [..., 1]."""
    return exponentials(scores)


@row_exponentials.register_fake
def _(scores: Tensor) -> tuple[Tensor, Tensor]:
    return scores.new_empty(scores.shape), scores.new_empty((*scores.shape[:-1], 1))


@torch.library.custom_op("t3c::matmul_int8", mutates_args=())
def matmul_int8(a: Tensor, b: Tensor) -> Tensor:
    """int8 ``a`` [..., n, k] times ``b`` [..., k, m], leading dimensions alike -> int32 [..., n, m]."""
    return (a.double() @ b.double()).to(torch.int32)  # exact: sums stay far below 2**53


@matmul_int8.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[-1]), dtype=torch.int32)


def take_attention_apart(gm: GraphModule) -> None:
    """Replace every ``t3c::attention_int8`` whose mask, if it has one, is no sum: that is fused with a product."""
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target == t3c.attention_int8.default:
            mask = bound(node)["attn_mask"]
            if mask is None or mask.meta["val"].dtype == torch.bool:
                with gm.graph.inserting_before(node):
                    node.replace_all_uses_with(_parts(gm, node))
                gm.graph.erase_node(node)


def _parts(gm: GraphModule, node: Node) -> Node:
    graph, a = gm.graph, bound(node)

    def call(op: Any, *arguments: Any) -> Node:
        made = graph.call_function(op, arguments)
        made.meta = {name: node.meta[name] for name in ("t3c_layer",) if name in node.meta}
        return made

    def both(op: Any, x: Node) -> tuple[Node, Node]:
        pair = call(op, x)
        return call(operator.getitem, pair, 0), call(operator.getitem, pair, 1)

    def turned(x: Node) -> Node:
        return call(aten.transpose.int, x, -2, -1)

    heads, rows = _sizes(a["query"])[1:3]
    groups, keys = _sizes(a["key"])[1:3]
    # The query heads of a group are more rows of its product.
    together = [-1, groups, heads // groups * rows]
    query = call(aten.reshape.default, a["query"], [*together, _sizes(a["query"])[3]])
    (q, q_step), (k, k_step), (v, v_step) = (both(t3c.integer_rows.default, x) for x in (query, a["key"], a["value"]))
    s = call(aten.to.dtype, call(t3c.matmul_int8.default, q, turned(k)), torch.float32)
    s = call(aten.mul.Tensor, s, turned(k_step))
    s = call(aten.mul.Tensor, s, call(aten.mul.Tensor, q_step, a["scale"]))
    if a["attn_mask"] is not None or a["is_causal"]:
        s = call(aten.reshape.default, s, [-1, heads, rows, keys])
        for mask in (a["attn_mask"], _causal(gm, rows, keys) if a["is_causal"] else None):
            s = s if mask is None else call(aten.where.ScalarOther, mask, s, -torch.inf)
        s = call(aten.reshape.default, s, [*together, keys])
    e, inverse = both(t3c.exponentials.default, s)
    p, p_step = both(t3c.integer_rows.default, call(aten.mul.Tensor, e, turned(v_step)))
    y = call(aten.to.dtype, call(t3c.matmul_int8.default, p, v), torch.float32)
    y = call(aten.mul.Tensor, y, call(aten.mul.Tensor, p_step, inverse))
    return call(aten.reshape.default, y, [-1, heads, rows, _sizes(a["value"])[3]])


def _sizes(x: Node) -> list[Any]:
    return list(x.meta["val"].shape)


def _causal(gm: GraphModule, rows: int, keys: int) -> fx.Node:
    name = f"npu_causal_{rows}_{keys}"
    if not hasattr(gm, name):
        gm.register_buffer(name, torch.ones(rows, keys, dtype=torch.bool).tril())
    return gm.graph.get_attr(name)
