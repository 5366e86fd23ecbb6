"""Small networks whose first int8 results a partition gives: one layer between input and result on every path."""

import importlib
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from t3c_compile.backends.ethosu import reference
from t3c_compile.backends.ethosu.convert import Conversion
from t3c_compile.backends.ethosu.partition import Choice
from t3c_compile.backends.ethosu.program import Program
from t3c_compile.backends.ethosu.program import Tensor as NpuTensor
from t3c_compile.backends.op_name import op_name
from t3c_compile.backends.targets import get_target
from t3c_compile.passes.infer_values import InputSpec, infer_values
from t3c_compile.passes.ops import conv_chains
from t3c_compile.passes.ops.int8_linear import requantize
from t3c_compile.passes.specialize import specialize
from t3c_compile.snapping import snap
from t3c_compile.transforming import Config, transform

# The module, whose name among the ops is that of an op.
LINEAR = importlib.import_module("t3c_compile.passes.ops.int8_linear")


class Between(nn.Module):
    """``last(between(first(x), second(x)))``: what is between becomes the last layer's int8 input."""

    def __init__(
        self, first: nn.Module, second: nn.Module, between: Callable[[Tensor, Tensor], Tensor], last: nn.Module
    ):
        super().__init__()
        self.first, self.second, self.last = first, second, last
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x), self.second(x)))


def settled(model: nn.Module, x: Tensor) -> nn.Module:
    """``model`` in eval mode with the batch norm statistics of ``x``."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def profile_graphs(
    model: nn.Module, x: Tensor, count: int = 1, conv: str = "tucker2", rank_multiple: int = 16
) -> list[GraphModule]:
    """The specialized graphs of ``count`` profiles."""
    elastic = transform(model, (x,), Config(conv=conv, rank_multiple=rank_multiple), calibration=[(x,)])
    profiles = snap(elastic, [(x,)], [get_target("ethos-u55-128")], count=count)
    ranks = profiles.store_ranks()
    return [specialize(elastic, p.options, p.activations, ranks) for p in profiles.profiles]


def first_results(graph: GraphModule, x: Tensor) -> tuple[Program, list[tuple[Tensor, Tensor]], list[Tensor]]:
    """The program whose outputs are the int8 middles of chains of factors, and all int8 tensors that products in
    ``graph`` read; for each sample of ``x`` what the NPU's reference and the ``t3c::`` reference give them, as pairs;
    and the program's inputs.

    The ``t3c::`` reference goes on from the NPU's middles: a pair differs by what one stage does."""
    infer_values(graph, (InputSpec((1, *x.shape[1:]), x.dtype),))
    choice = Choice(graph)
    nodes = [node for node in graph.graph.nodes if node in choice.chosen]
    conversion = Conversion(nodes, choice.stages, choice.layouts).run()
    program = conversion.program
    made = {node: read.tensor for (node, _), read in conversion.reads.items() if node in choice.chosen}
    assert all(op_name(node) == "quantize_int8" for node in made)
    middles = _middles(program, [*program.inputs, *made.values()])
    program.outputs = [*middles, *made.values()]
    pairs, given = [], []
    for sample in x.split(1):
        values = _values(graph, sample)
        asked = zip(conversion.inputs, program.inputs, strict=True)
        inputs = [_as_npu(values[node], tensor.shape) for (node, _), tensor in asked]
        given.append(inputs)
        results = reference.run(program, inputs)
        between = _Middles(results[: len(middles)])
        with patch.object(conv_chains, "requantize", between), patch.object(LINEAR, "requantize", between):
            values = _values(graph, sample)
        assert len(between.pairs) == len(middles)
        pairs += between.pairs
        answers = zip(made.items(), results[len(middles) :], strict=True)
        pairs += [(got, _as_npu(values[node], tensor.shape)) for (node, tensor), got in answers]
    return program, pairs, given


def _middles(program: Program, others: list[NpuTensor]) -> list[NpuTensor]:
    """What one convolution makes for another, in order; ``others``: tensors that are no middles."""
    makers = {operator.output: operator for operator in program.operators}
    found = []
    for operator in program.operators:
        if operator.kind in ("CONV2D", "DEPTHWISE_CONV2D"):
            tensor = operator.inputs[0]
            while tensor in makers and makers[tensor].kind == "SLICE":
                tensor = makers[tensor].inputs[0]
            found += [tensor] if tensor not in others else []
    return found


class _Middles:
    """In the place of ``requantize``: gives the NPU's ``middles``, in order, and keeps what it should have given."""

    def __init__(self, middles: list[Tensor]) -> None:
        self.middles, self.pairs = list(middles), []

    def __call__(self, acc: Tensor, multiplier: Tensor) -> Tensor:
        mine, theirs = requantize(acc, multiplier), self.middles[len(self.pairs)]
        self.pairs.append((theirs, _as_npu(mine, theirs.shape)))
        if mine.dim() == 4:
            theirs = theirs.permute(0, 3, 1, 2)
        return theirs.reshape(mine.shape).to(mine.dtype)


def _values(graph: GraphModule, sample: Tensor) -> dict[Node, Tensor]:
    """What every node gives."""
    values: dict[Node, Tensor] = {}

    class Recorder(Interpreter):
        def run_node(self, n: Node) -> object:
            values[n] = super().run_node(n)
            return values[n]

    Recorder(graph).run(sample)
    return values


def _as_npu(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    return (value.permute(0, 2, 3, 1) if value.dim() == 4 else value).reshape(shape)
