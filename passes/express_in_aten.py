"""Express in ATen: every ``t3c::`` op of a deployed graph as ordinary ATen ops, for compilers that know no other.

:func:`decompositions` is the table, for ``exported_program.run_decompositions(table)``; :class:`ExpressInAten` is the
same as a pass over a graph. Weights stay int8 and are widened in the graph. Results are equal to the bit:

- Integer products are summed in float32 where no sum can reach 2**24, below which float32 holds every integer, else in
  float64. A library that lets float32 lose bits in a product (TF32, Winograd) breaks the first.
- The epilogue's fused multiply-add is a float64 product and sum, rounded once.

For compilers that have no float64, ``float64=False`` sums in int32 instead, and writes the epilogue in float32 with its
two roundings: outputs then differ in the last place and, where one lies on a tie, by an int8 step of the next layer.

Weight-only linears and the float stages (:data:`FLOAT_OPS`) work on real numbers: their ATen ops are equal as far as
the library's float32 functions are. The former leave out the rounding of activations to 24 bits.
"""

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.fx import GraphModule, Node

from t3c_compile.passes.base import Pass, erase_dead_attrs, get_attr
from t3c_compile.passes.ops import FLOAT_ATEN

aten = torch.ops.aten
t3c = torch.ops.t3c

# A tensor, or a node of a graph that is being written.
Value = Any
Decomposition = Callable[..., Value]

# Rounding 119 to fewer bits reaches 120; a middle is an integer in [-127, 127].
_WEIGHT_MAX, _MIDDLE_MAX = 120, 127
_FLOAT32_EXACT = 2**24


def _float32(x: Value) -> Value:
    return aten.to.dtype(x, torch.float32)


def _first(tensor: Value, count: int, dim: int = 0) -> Value:
    return tensor if tensor.shape[dim] == count else aten.slice.Tensor(tensor, dim, 0, count)


def _top_bits(q: Value, bits: int) -> Value:
    """``keep_top_bits`` of int8; in int32, which every compiler adds."""
    step = 2 ** (8 - bits)
    if step == 1:
        return q
    q = aten.to.dtype(q, torch.int32)
    # Half a step more, but where that would be a tie rounded to an odd multiple.
    tie = aten.to.dtype(aten.eq.Scalar(aten.bitwise_and.Scalar(q, 2 * step - 1), step // 2), torch.int32)
    return aten.bitwise_and.Scalar(aten.sub.Tensor(aten.add.Scalar(q, step // 2), tie), -step)


def _centred(x: Value, zero_point: int) -> tuple[Value, int]:
    """An int8 tensor less its zero point, and the largest magnitude that can have."""
    x = _float32(x)
    return (aten.sub.Scalar(x, zero_point) if zero_point else x), max(127 - zero_point, 128 + zero_point)


def _requantize(sums: Value, multiplier: Value) -> Value:
    return aten.clamp.default(aten.round.default(aten.mul.Tensor(sums, multiplier)), -127, 127)


def _per_channel(values: Value | None) -> Any:
    return None if values is None else aten.unsqueeze.default(aten.unsqueeze.default(values, -1), -1)


def _quantize_int8(x: Value, scale: float, zero_point: int) -> Value:
    q = aten.round.default(aten.mul.Scalar(x, 1.0 / scale))
    q = aten.clamp.default(aten.add.Scalar(q, zero_point) if zero_point else q, -128, 127)
    return aten.to.dtype(q, torch.int8)


def _dequantize_int8(q: Value, scale: float, zero_point: int) -> Value:
    return aten.mul.Scalar(_centred(q, zero_point)[0], scale)


def _int8_embedding(indices: Value, weight: Value, scale: Value, bits: int) -> Value:
    rows = _float32(_top_bits(aten.embedding.default(weight, indices), bits))
    return aten.mul.Tensor(rows, aten.embedding.default(aten.unsqueeze.default(scale, -1), indices))


@dataclass(frozen=True)
class _Sums:
    """The ops that sum products; each takes what its op takes."""

    float64: bool

    def _sums(self, product: Callable[[Value, Value], Value], x: Value, most: int, weight: Value) -> Value:
        """``product(x, weight)`` of whole numbers as float32, rounded once; ``weight`` is int8 or int32 [O, ...]."""
        wide = torch.float64 if self.float64 else torch.int32
        dtype = torch.float32 if most * _WEIGHT_MAX * math.prod(weight.shape[1:]) < _FLOAT32_EXACT else wide
        return _float32(product(aten.to.dtype(x, dtype), aten.to.dtype(weight, dtype)))

    def _matmul(self, x: Value, most: int, weight: Value) -> Value:
        return self._sums(aten.linear.default, x, most, weight)

    def _conv(
        self,
        x: Value,
        most: int,
        weight: Value,
        stride: Sequence[int],
        padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1),
        groups: int = 1,
    ) -> Value:
        def product(x: Value, weight: Value) -> Value:
            return aten.conv2d.default(x, weight, None, list(stride), list(padding), list(dilation), groups)

        return self._sums(product, x, most, weight)

    def _pointwise(self, x: Value, most: int, weight: Value, stride: Sequence[int] = (1, 1)) -> Value:
        return self._conv(x, most, aten.unsqueeze.default(aten.unsqueeze.default(weight, -1), -1), stride)

    def _affine(self, x: Value, gain: Value | float, bias: Value | None) -> Value:
        """``x * gain + bias``."""
        dtype = torch.float64 if self.float64 and bias is not None else torch.float32
        y = aten.to.dtype(x, dtype)
        if isinstance(gain, float):
            y = aten.mul.Scalar(y, struct.unpack("f", struct.pack("f", gain))[0])
        else:
            y = aten.mul.Tensor(y, aten.to.dtype(gain, dtype))
        return _float32(y if bias is None else aten.add.Tensor(y, aten.to.dtype(bias, dtype)))

    def _finish(self, y: Value, scale: float, out_gain: Value | None, bias: Value | None) -> Value:
        if out_gain is None:
            return self._affine(y, scale, bias)
        return self._affine(aten.mul.Scalar(y, scale), out_gain, bias)

    def int8_linear(
        self,
        x: Value,
        weight: Value,
        scale: Value,
        bias: Value | None,
        x_scale: float,
        x_zero_point: int,
        bits: int,
    ) -> Value:
        sums = self._matmul(*_centred(x, x_zero_point), _top_bits(weight, bits))
        return self._affine(sums, aten.mul.Scalar(scale, x_scale), bias)

    def svd_linear(
        self,
        x: Value,
        v: Value,
        u: Value,
        mid_scale: Value,
        out_gain: Value | None,
        bias: Value | None,
        x_scale: float,
        x_zero_point: int,
        h_scale: float,
        rank: int,
        bits: int,
    ) -> Value:
        sums = self._matmul(*_centred(x, x_zero_point), _top_bits(_first(v, rank), bits))
        h = _requantize(sums, aten.mul.Scalar(_first(mid_scale, rank), x_scale / h_scale))
        sums = self._matmul(h, _MIDDLE_MAX, aten.t.default(_top_bits(_first(u, rank), bits)))
        return self._finish(sums, h_scale, out_gain, bias)

    def weight_only_linear(self, x: Value, weight: Value, scale: Value, bias: Value | None, bits: int) -> Value:
        return self._affine(aten.linear.default(x, _float32(_top_bits(weight, bits))), scale, bias)

    def svd_weight_only_linear(
        self, x: Value, v: Value, u: Value, mid_scale: Value, bias: Value | None, rank: int, bits: int
    ) -> Value:
        h = aten.linear.default(x, _float32(_top_bits(_first(v, rank), bits)))
        h = aten.mul.Tensor(h, _first(mid_scale, rank))
        y = aten.linear.default(h, aten.t.default(_float32(_top_bits(_first(u, rank), bits))))
        return y if bias is None else aten.add.Tensor(y, bias)

    def int8_conv2d(
        self,
        x: Value,
        weight: Value,
        scale: Value,
        bias: Value | None,
        x_scale: float,
        x_zero_point: int,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        bits: int,
    ) -> Value:
        sums = self._conv(*_centred(x, x_zero_point), _top_bits(weight, bits), stride, padding, dilation, groups)
        return self._affine(sums, _per_channel(aten.mul.Scalar(scale, x_scale)), _per_channel(bias))

    def _conv_inwards(
        self,
        x: Value,
        v: Value,
        mid_scale: Value,
        x_scale: float,
        x_zero_point: int,
        h_scale: float,
        stride: Sequence[int],
        rank: int,
        bits: int,
    ) -> Value:
        """The first factor of a convolution chain: int8 inputs to the middle ``h``."""
        sums = self._pointwise(*_centred(x, x_zero_point), _top_bits(_first(v, rank), bits), stride)
        return _requantize(sums, _per_channel(aten.mul.Scalar(_first(mid_scale, rank), x_scale / h_scale)))

    def _conv_outwards(
        self,
        h: Value,
        u: Value,
        h_scale: float,
        out_gain: Value | None,
        bias: Value | None,
        rank: int,
        bits: int,
    ) -> Value:
        """The last factor of a convolution chain: the last middle to float32 outputs."""
        sums = self._pointwise(h, _MIDDLE_MAX, aten.t.default(_top_bits(_first(u, rank), bits)))
        return self._finish(sums, h_scale, _per_channel(out_gain), _per_channel(bias))

    def svd_conv2d(
        self,
        x: Value,
        v: Value,
        u: Value,
        mid_scale: Value,
        out_gain: Value | None,
        bias: Value | None,
        x_scale: float,
        x_zero_point: int,
        h_scale: float,
        stride: Sequence[int],
        rank: int,
        bits: int,
    ) -> Value:
        h = self._conv_inwards(x, v, mid_scale, x_scale, x_zero_point, h_scale, stride, rank, bits)
        return self._conv_outwards(h, u, h_scale, out_gain, bias, rank, bits)

    def three_factors(
        self,
        depthwise: bool,
        x: Value,
        v: Value,
        core: Value,
        u: Value,
        mid_scale: Value,
        core_scale: Value,
        out_gain: Value | None,
        bias: Value | None,
        x_scale: float,
        x_zero_point: int,
        h_scale: float,
        g_scale: float,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        rank: int,
        bits: int,
    ) -> Value:
        """Tucker-2, and CP where the core is ``depthwise``."""
        inner, outer = min(rank, v.shape[0]), min(rank, u.shape[0])
        h = self._conv_inwards(x, v, mid_scale, x_scale, x_zero_point, h_scale, (1, 1), inner, bits)
        core = _first(core, outer)
        core = _top_bits(aten.unsqueeze.default(core, 1) if depthwise else _first(core, inner, 1), bits)
        sums = self._conv(h, _MIDDLE_MAX, core, stride, padding, dilation, rank if depthwise else 1)
        g = _requantize(sums, _per_channel(aten.mul.Scalar(_first(core_scale, outer), h_scale / g_scale)))
        return self._conv_outwards(g, u, g_scale, out_gain, bias, outer, bits)


def decompositions(float64: bool = True) -> dict[torch._ops.OpOverload, Decomposition]:
    """Every deployment op and what it is in ATen; see the module's docstring for ``float64``.

    Of an int8 op's arguments the functions read the shapes of the weights alone, so any input may be symbolic.
    """
    sums = _Sums(float64)
    return {
        **FLOAT_ATEN,
        t3c.quantize_int8.default: _quantize_int8,
        t3c.dequantize_int8.default: _dequantize_int8,
        t3c.int8_embedding.default: _int8_embedding,
        t3c.int8_linear.default: sums.int8_linear,
        t3c.svd_linear.default: sums.svd_linear,
        t3c.weight_only_linear.default: sums.weight_only_linear,
        t3c.svd_weight_only_linear.default: sums.svd_weight_only_linear,
        t3c.int8_conv2d.default: sums.int8_conv2d,
        t3c.svd_conv2d.default: sums.svd_conv2d,
        t3c.tucker2_conv2d.default: partial(sums.three_factors, False),
        t3c.cp_conv2d.default: partial(sums.three_factors, True),
    }


class _Value(fx.Proxy):
    """A node as a decomposition sees it: shape and dtype where they follow from stored tensors alone, or are known."""

    @property
    def shape(self) -> torch.Size:
        return self._known.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._known.dtype

    @property
    def _known(self) -> Tensor:
        tracer = self.tracer
        assert isinstance(tracer, _Tracer)
        value: Tensor = tracer.stored[self.node] if self.node in tracer.stored else self.node.meta["val"]
        return value


class _Tracer(fx.proxy.GraphAppendingTracer):
    """Writes a decomposition before the node ``source``, which it stands for; ``stored`` has shapes, not data."""

    def __init__(self, gm: GraphModule, source: Node) -> None:
        super().__init__(source.graph)
        self.source = source
        read = [node for node in source.all_input_nodes if node.op == "get_attr"]
        self.stored: dict[Node, Tensor] = {node: get_attr(gm, str(node.target)).to("meta") for node in read}

    def proxy(self, node: Node) -> fx.Proxy:
        return _Value(node, self)

    def create_node(self, kind: str, target: Any, *rest: Any, **options: Any) -> Node:
        with self.graph.inserting_before(self.source):
            node = super().create_node(kind, target, *rest, **options)
        node.meta = {key: value for key, value in self.source.meta.items() if key != "val"}
        if all(argument in self.stored for argument in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.stored.__getitem__)
            self.stored[node] = target(*args, **kwargs)
        return node


@dataclass(frozen=True)
class ExpressInAten(Pass):
    """Replaces every ``t3c::`` deployment op by its ATen ops, for a pipeline that goes on with a plain graph.

    New nodes have the metadata of the node they stand for.
    """

    name: ClassVar[str] = "express-in-aten"
    float64: bool = True

    def apply(self, gm: GraphModule) -> bool:
        table = decompositions(self.float64)
        nodes = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in table]
        for node in nodes:
            as_value: Any = _Tracer(gm, node).proxy
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), as_value)
            node.replace_all_uses_with(table[node.target](*args, **kwargs).node)
            gm.graph.erase_node(node)
        erase_dead_attrs(gm)
        return bool(nodes)

    def ensures(self, gm: GraphModule) -> None:
        left = {str(node.target) for node in gm.graph.nodes if str(node.target).startswith("t3c.")}
        if left:
            raise self.fail(f"no ATen form of {', '.join(sorted(left))}")
