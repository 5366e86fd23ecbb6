"""Partition: which nodes of a profile's graph the NPU runs, and the graph its host runs around them.

Quantized products go to the NPU, and what lies between them as far as it has a form in whole numbers. Nodes are put
into partitions by how often the way to them changes between host and NPU, so no partition waits for itself.
"""

import hashlib
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx import GraphModule, Node

from t3c_compile.backends.ethosu.call import Signature, register_program
from t3c_compile.backends.ethosu.convert import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    CLAMPS,
    MATRICES,
    TABLES,
    VIEWS,
    Conversion,
    npu_shape,
    pool_window,
    shape_of,
)
from t3c_compile.backends.ethosu.program import Array, Program
from t3c_compile.backends.ethosu.serialize import serialize
from t3c_compile.backends.ethosu.stages import CannotRunError, Stage, stages_of
from t3c_compile.backends.op_name import op_name
from t3c_compile.passes.base import bound

aten = torch.ops.aten

_CONVOLUTIONS = ("int8_conv2d", "svd_conv2d", "tucker2_conv2d", "cp_conv2d")
_PRODUCTS = ("int8_linear", "svd_linear", *_CONVOLUTIONS)
_MATMUL = "matmul_int8"
# Products that only the host has, whose multiply-adds count too.
_ATTENTION = ("attention_f32", "attention_int8")
_HOST_PRODUCTS = ("weight_only_linear", "svd_weight_only_linear", *_ATTENTION, "matmul_f32", "linear", "conv2d")
_PAIRS = ("add", "add_", "mul", "mul_")
_BETWEEN = (*_PAIRS, "dequantize_int8", "mean_f32", "max_pool2d", *VIEWS, *CLAMPS, *TABLES)
# Of these the NPU has views of single pixels alone.
_MOVING = frozenset(
    {"permute", "transpose", "cat", "select", "slice", "expand", "unsqueeze", "unflatten", "pixel_unshuffle"}
)
_EXACT = "an exact NPU only multiplies and sums; what float32 rounds is the host's"
_MOVES = "it only moves numbers"
_NO_NEIGHBOUR = "nothing on the NPU reads it"


@dataclass(frozen=True)
class Fallback:
    """An op the host runs: its layer, how many multiply-adds a sample takes in it, and why the NPU does not run it."""

    op: str
    layer: str
    reason: str
    macs: int


@dataclass
class Split:
    """A profile for an NPU and its host.

    ``host``: the graph, in which ``t3c::npu`` calls a partition by name. ``macs`` and ``npu_macs``: multiply-adds of
    one sample in all products, and in those on the NPU.
    """

    host: GraphModule
    programs: dict[str, Program] = field(default_factory=dict)
    flatbuffers: dict[str, bytes] = field(default_factory=dict)
    fallbacks: list[Fallback] = field(default_factory=list)
    macs: int = 0
    npu_macs: int = 0


def split(gm: GraphModule, exact: bool = False) -> Split:
    """``gm``, a specialized graph whose values' sizes are all numbers and whose batch is 1, as NPU and host share it.

    ``exact``: the NPU has the products alone. ``gm`` is used up.
    """
    choice = Choice(gm, exact)
    result = _rewritten(gm, choice)
    macs = {node: _macs(node, choice.stages.get(node)) for node in (*choice.chosen, *choice.reasons)}
    result.macs, result.npu_macs = sum(macs.values()), sum(macs[node] for node in choice.chosen)
    for node, reason in choice.reasons.items():
        result.fallbacks.append(Fallback(op_name(node), str(node.meta.get("t3c_layer", "")), reason, macs[node]))
    return result


class Choice:
    """The nodes of the NPU, the depth and layout of each, and why the others are the host's."""

    def __init__(self, gm: GraphModule, exact: bool = False) -> None:
        self.exact = exact
        self.stages: dict[Node, list[Stage]] = {}
        self.layouts: dict[Node, str] = {}
        self.reasons: dict[Node, str] = {}
        self.chosen: set[Node] = set()
        for node in gm.graph.nodes:
            if node.op == "call_function" and op_name(node):
                self._consider(gm, node)
        while self._evict(gm):
            pass
        self.depths = self._depths(gm)

    def _consider(self, gm: GraphModule, node: Node) -> None:
        name = op_name(node)
        try:
            if name in _PRODUCTS:
                self.stages[node] = stages_of(name, _with_tensors(gm, bound(node)))
                self.layouts[node] = CHANNELS_FIRST if name in _CONVOLUTIONS else CHANNELS_LAST
            elif name == _MATMUL:
                self.layouts[node] = MATRICES
            elif self.exact and name == "quantize_int8":
                return
            elif self.exact and name in _BETWEEN:
                raise CannotRunError(_EXACT)
            elif name == "quantize_int8":
                source = node.args[0]
                if source not in self.chosen:
                    return
                self.layouts[node] = self.layouts[source]  # type: ignore[index]
            elif name in _BETWEEN:
                self.layouts[node] = self._layout(node, name)
            elif name in _MOVING:
                raise CannotRunError(_MOVES)
            else:
                stages_of(name, {})
            self.chosen.add(node)
        except CannotRunError as error:
            self.reasons[node] = str(error)

    def _layout(self, node: Node, name: str) -> str:
        """The layout of an op between products. Raises :class:`CannotRunError` where the NPU does not run it."""
        sources = [source for source in node.args if isinstance(source, Node)]
        if len(sources) != (2 if name in _PAIRS else 1) or not all(s in self.chosen for s in sources):
            raise CannotRunError("its operand is the host's")
        if name.endswith("_") and len(sources[0].users) > 1:
            raise CannotRunError("it changes a tensor that others read")
        layout, shape = self.layouts[sources[0]], shape_of(node)
        inner = npu_shape(shape_of(sources[0]), layout)
        if name in _PAIRS:
            if node.kwargs or {self.layouts[s] for s in sources} != {layout}:
                raise CannotRunError("its operands lie differently")
            if name in ("add", "add_") and shape_of(sources[0]) != shape_of(sources[1]):
                raise CannotRunError("its operands differ in size")
        elif name == "mean_f32":
            dims = tuple(bound(node)["dim"])
            rank = len(shape_of(sources[0]))
            whole = (2, 3) if layout == CHANNELS_FIRST else tuple(range(1, rank - 1))
            if dims != whole:
                raise CannotRunError("its mean is not over all pixels")
            return layout if layout == CHANNELS_LAST or bound(node)["keepdim"] else CHANNELS_LAST
        elif name in VIEWS:
            if inner[1:3] != (1, 1) or prod(shape) != shape[-1] or inner[3] != shape[-1]:
                raise CannotRunError(_MOVES)
            return CHANNELS_LAST
        elif name == "max_pool2d":
            a = bound(node)
            if layout != CHANNELS_FIRST or a["ceil_mode"] or set(a["dilation"]) != {1}:
                raise CannotRunError("its windows are dilated or cut at the edge")
            pool_window(a)
        return layout

    def _evict(self, gm: GraphModule) -> bool:
        """Give the host what the NPU cannot or need not run, once; whether there was anything."""
        depths = self._depths(gm)
        before = len(self.chosen)
        for node in reversed(gm.graph.nodes):
            if self._is_between(node) and not any(u in self.chosen for u in node.users):
                self._leave(node, _NO_NEIGHBOUR)
        for node in gm.graph.nodes:
            if self._is_between(node):
                for source in node.all_input_nodes:
                    if source not in self.chosen or depths[source] != depths[node]:
                        self._leave(node, "its operand is of an earlier partition")
                        break
        return len(self.chosen) < before

    def _is_between(self, node: Node) -> bool:
        """Whether it is the NPU's for its neighbours' sake."""
        return node in self.chosen and node not in self.stages and op_name(node) != _MATMUL

    def _leave(self, node: Node, reason: str) -> None:
        self.chosen.discard(node)
        if op_name(node) != "quantize_int8":
            self.reasons[node] = reason

    def _depths(self, gm: GraphModule) -> dict[Node, int]:
        """How often the longest way to each node changes between host (even) and NPU (odd)."""
        depths: dict[Node, int] = {}
        for node in gm.graph.nodes:
            mine = node in self.chosen
            depth = 1 if mine else 0
            for source in node.all_input_nodes:
                if source.op != "get_attr" or not mine:
                    depth = max(depth, depths[source] + ((source in self.chosen) != mine))
            depths[node] = depth
        return depths


def _with_tensors(gm: GraphModule, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with stored tensors in the place of the nodes that name them."""
    owners = dict(gm.named_parameters()) | dict(gm.named_buffers())
    return {
        name: owners[str(value.target)].detach() if isinstance(value, Node) and value.op == "get_attr" else value
        for name, value in arguments.items()
    }


def _macs(node: Node, stages: list[Stage] | None) -> int:
    """Multiply-adds of one sample; ``stages``: of a product with stored weights on the NPU."""
    name, result = op_name(node), node.meta.get("val")
    if stages is not None:
        return _stage_macs(node, stages)
    if name not in (_MATMUL, *_HOST_PRODUCTS) or not isinstance(result, Tensor):
        return 0
    a, size = bound(node), prod(shape_of(node))
    if name in _ATTENTION:
        *batch, queries, width = shape_of(a["query"])
        keys, values = shape_of(a["key"])[-2], shape_of(a["value"])[-1]
        return prod(batch) * queries * keys * (width + values)
    if name in (_MATMUL, "matmul_f32"):
        return size * shape_of(node.args[0])[-1]  # type: ignore[arg-type]
    if name == "svd_weight_only_linear":
        rank = int(a["rank"])
        return size // shape_of(node)[-1] * rank * (shape_of(a["x"])[-1] + shape_of(node)[-1])
    weight = shape_of(a["weight"])
    return size * prod(weight[1:])


def _stage_macs(node: Node, stages: list[Stage]) -> int:
    total, (x, y) = 0, (shape_of(node.args[0]), shape_of(node))  # type: ignore[arg-type]
    spatial = op_name(node) in _CONVOLUTIONS
    pixels, after = (prod(x[2:]), prod(y[2:])) if spatial else (prod(x[:-1]), prod(y[:-1]))
    for index, stage in enumerate(stages):
        # Of a chain of three, the first works on the pixels that come in.
        rows = pixels if len(stages) == 3 and index == 0 else after
        total += rows * stage.weight.size
    return total


def _rewritten(gm: GraphModule, choice: Choice) -> Split:
    """The host's graph: partitions in order of depth, each a call between what it reads and what reads it."""
    result = Split(gm)
    graph = fx.Graph()
    copies: dict[Node, Node] = {}
    order = sorted(gm.graph.nodes, key=lambda node: choice.depths[node])
    while order:
        node = order[0]
        if node not in choice.chosen:
            order.pop(0)
            copies[node] = graph.node_copy(node, copies.__getitem__)
            continue
        depth = choice.depths[node]
        members = [n for n in order if n in choice.chosen and choice.depths[n] == depth]
        order = order[len(members) :]
        conversion = Conversion(members, choice.stages, choice.layouts).run()
        copies |= _called(gm, graph, conversion, copies, result)
    # How arguments and results are nested.
    graph.set_codegen(gm.graph._codegen)
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    result.host = GraphModule(gm, graph)
    return result


def _called(
    gm: GraphModule, graph: fx.Graph, conversion: Conversion, copies: Mapping[Node, Node], result: Split
) -> dict[Node, Node]:
    """Add the call of a partition, and around it what brings tensors into the NPU's layout and out of it."""
    program = conversion.program
    blob = serialize(program)
    name = hashlib.sha256(blob).hexdigest()[:16]
    result.programs[name], result.flatbuffers[name] = program, blob
    register_program(name, program)
    inputs = [
        _to_npu(graph, copies[node], npu_shape(shape_of(node), layout), layout) for node, layout in conversion.inputs
    ]
    signature = Signature.of(program)
    call = graph.call_function(torch.ops.t3c.npu.default, (inputs, name, signature.text))
    made: dict[Node, Node] = {}
    for index, (node, layout, scales) in enumerate(conversion.outputs):
        value = graph.call_function(operator.getitem, (call, index))
        if scales is not None:
            factor = float(scales[0]) if len(set(scales)) == 1 else _stored(gm, graph, scales)
            value = graph.call_function(aten.to.dtype, (value, torch.float32))
            value = value if factor == 1.0 else graph.call_function(aten.mul.Tensor, (value, factor))
        made[node] = _from_npu(graph, value, shape_of(node), layout)
    return made


def _to_npu(graph: fx.Graph, x: Node, shape: tuple[int, ...], layout: str) -> Node:
    if layout == CHANNELS_FIRST:
        return graph.call_function(aten.permute.default, (x, [0, 2, 3, 1]))
    return graph.call_function(aten.reshape.default, (x, list(shape)))


def _from_npu(graph: fx.Graph, x: Node, shape: tuple[int, ...], layout: str) -> Node:
    if layout == CHANNELS_FIRST:
        return graph.call_function(aten.permute.default, (x, [0, 3, 1, 2]))
    return graph.call_function(aten.reshape.default, (x, list(shape)))


def _stored(gm: GraphModule, graph: fx.Graph, scales: Array) -> Node:
    """A vector of scales as a buffer, named by content: profiles share a store."""
    values = torch.from_numpy(scales.astype(np.float32))
    name = "npu_scale_" + hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]
    if not hasattr(gm, name):
        gm.register_buffer(name, values)
    return graph.get_attr(name)
