"""Products for an NPU whose results are to be those of every other target: whole sums there, all rounding on the host.

Every ``t3c::`` product becomes its factors, each an ``int8_linear`` or ``int8_conv2d`` of scale 1, with the float32
operations of the reference between and after them, in its order. So the parts give its bits.
"""

import hashlib
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from t3c_compile.backends.op_name import op_name
from t3c_compile.passes.base import bound
from t3c_compile.passes.ops.int8_conv import per_channel
from t3c_compile.passes.ops.int8_linear import affine
from t3c_compile.passes.ops.nested import keep_top_bits

aten, t3c = torch.ops.aten, torch.ops.t3c


@torch.library.custom_op("t3c::affine", mutates_args=())
def affine_f32(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """``x * gain + bias`` of float32 tensors, which broadcast to ``x``, rounded once."""
    return affine(x, gain, bias)


@affine_f32.register_fake
def _(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def take_products_apart(gm: GraphModule) -> None:
    """Replace every ``t3c::`` product by its factors; ``gm`` is a specialized graph."""
    for node in list(gm.graph.nodes):
        parts = _PARTS.get(node.target) if node.op == "call_function" else None
        if parts is not None:
            with gm.graph.inserting_before(node):
                node.replace_all_uses_with(parts(_Parts(gm, node)))
            gm.graph.erase_node(node)


class _Parts:
    """The nodes that take the place of one product."""

    def __init__(self, gm: GraphModule, node: Node) -> None:
        self.gm, self.a = gm, bound(node)
        self.meta = {name: node.meta[name] for name in ("t3c_layer",) if name in node.meta}
        self.spatial = op_name(node).endswith("conv2d")

    def tensor(self, name: str) -> Tensor:
        """A stored argument."""
        found: Tensor = operator.attrgetter(str(self.a[name].target))(self.gm)
        return found.detach()

    def call(self, op: Any, *arguments: Any) -> Node:
        node = self.gm.graph.call_function(op, arguments)
        node.meta = dict(self.meta)
        return node

    def stored(self, values: Tensor) -> Node:
        """A tensor as a buffer, named by content: profiles share a store."""
        values = values.contiguous()
        name = f"npu_{hashlib.sha256(repr(values.shape).encode() + values.numpy().tobytes()).hexdigest()[:16]}"
        if not hasattr(self.gm, name):
            self.gm.register_buffer(name, values)
        return self.gm.graph.get_attr(name)

    def channels(self, values: Tensor) -> Node:
        """Values of each channel, stored so that they broadcast over the result."""
        return self.stored(per_channel(values) if self.spatial else values)

    def sums(self, x: Node, weight: Tensor, zero_point: int = 0, **geometry: Any) -> Node:
        """float32 whole numbers: ``weight`` [out, in] or, of a convolution with ``geometry``, [out, in, kh, kw]."""
        top = keep_top_bits(weight, self.a["bits"])
        if self.spatial and top.dim() == 2:
            top = top[:, :, None, None]
        one = torch.ones(len(top))
        if not self.spatial:
            return self.call(t3c.int8_linear.default, x, self.stored(top), self.stored(one), None, 1.0, zero_point, 8)
        placed = [geometry.get(name, default) for name, default in _GEOMETRY.items()]
        return self.call(
            t3c.int8_conv2d.default, x, self.stored(top), self.stored(one), None, 1.0, zero_point, *placed, 8
        )

    def requantized(self, sums: Node, multiplier: Tensor) -> Node:
        """A chain's middle: ``clamp(rint(sums * multiplier), -127, 127)`` as int8."""
        y = self.call(aten.mul.Tensor, sums, self.channels(multiplier))
        return self.call(t3c.quantize_int8.default, self.call(aten.clamp.default, y, -127, 127), 1.0, 0)

    def affine(self, x: Node, gain: Tensor) -> Node:
        if self.a["bias"] is None:
            return self.call(aten.mul.Tensor, x, self.channels(gain))
        return self.call(t3c.affine.default, x, self.channels(gain), self.channels(self.tensor("bias")))

    def finish(self, sums: Node, scale: float) -> Node:
        """The end of a chain."""
        if self.a["out_gain"] is None:
            return self.affine(sums, torch.full((self.tensor("u").shape[1],), scale))
        return self.affine(self.call(aten.mul.Tensor, sums, scale), self.tensor("out_gain"))


_GEOMETRY = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}


def _dense(p: _Parts) -> Node:
    geometry = {name: p.a[name] for name in _GEOMETRY if name in p.a}
    sums = p.sums(p.a["x"], p.tensor("weight"), p.a["x_zero_point"], **geometry)
    return p.affine(sums, p.tensor("scale") * p.a["x_scale"])


def _first(p: _Parts, rank: int, **geometry: Any) -> Node:
    sums = p.sums(p.a["x"], p.tensor("v")[:rank], p.a["x_zero_point"], **geometry)
    return p.requantized(sums, p.tensor("mid_scale")[:rank] * (p.a["x_scale"] / p.a["h_scale"]))


def _svd(p: _Parts) -> Node:
    rank = p.a["rank"]
    h = _first(p, rank, **({"stride": p.a["stride"]} if p.spatial else {}))
    return p.finish(p.sums(h, p.tensor("u")[:rank].T), p.a["h_scale"])


def _three_factors(p: _Parts, depthwise: bool) -> Node:
    core = p.tensor("core")
    inner, outer = min(p.a["rank"], len(p.tensor("v"))), min(p.a["rank"], len(core))
    core = core[:outer, None] if depthwise else core[:outer, :inner]
    geometry = {name: p.a[name] for name in ("stride", "padding", "dilation")}
    sums = p.sums(_first(p, inner), core, groups=outer if depthwise else 1, **geometry)
    g = p.requantized(sums, p.tensor("core_scale")[:outer] * (p.a["h_scale"] / p.a["g_scale"]))
    return p.finish(p.sums(g, p.tensor("u")[:outer].T), p.a["g_scale"])


_PARTS: dict[Any, Callable[[_Parts], Node]] = {
    t3c.int8_linear.default: _dense,
    t3c.int8_conv2d.default: _dense,
    t3c.svd_linear.default: _svd,
    t3c.svd_conv2d.default: _svd,
    t3c.tucker2_conv2d.default: lambda p: _three_factors(p, False),
    t3c.cp_conv2d.default: lambda p: _three_factors(p, True),
}
