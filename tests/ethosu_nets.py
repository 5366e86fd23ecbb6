"""Small networks whose first int8 results a partition gives: one layer between input and result on every path."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from t3c_compile.backends.ethosu import reference
from t3c_compile.backends.ethosu.convert import Conversion, op_name
from t3c_compile.backends.ethosu.partition import Choice
from t3c_compile.backends.ethosu.program import Program
from t3c_compile.backends.targets import get_target
from t3c_compile.passes.infer_values import InputSpec, infer_values
from t3c_compile.passes.specialize import specialize
from t3c_compile.snapping import snap
from t3c_compile.transforming import Config, transform


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
    """The program whose outputs are all int8 tensors that products in ``graph`` read; for each sample of ``x`` that the
    NPU's reference and the ``t3c::`` reference give them as pairs; and the program's inputs."""
    infer_values(graph, (InputSpec((1, *x.shape[1:]), x.dtype),))
    choice = Choice(graph)
    nodes = [node for node in graph.graph.nodes if node in choice.chosen]
    conversion = Conversion(nodes, choice.stages, choice.layouts).run()
    program = conversion.program
    made = {node: read.tensor for (node, _), read in conversion.reads.items() if node in choice.chosen}
    program.outputs = list(made.values())
    pairs, given = [], []
    for sample in x.split(1):
        values: dict[Node, Tensor] = {}

        class Recorder(Interpreter):
            def run_node(self, n: Node) -> object:
                values[n] = super().run_node(n)  # noqa: B023
                return values[n]  # noqa: B023

        Recorder(graph).run(sample)
        asked = zip(conversion.inputs, program.inputs, strict=True)
        inputs = [_as_npu(values[node], tensor.shape) for (node, _), tensor in asked]
        given.append(inputs)
        results = reference.run(program, inputs)
        answers = zip(made.items(), results, strict=True)
        pairs += [(got, _as_npu(values[node], tensor.shape)) for (node, tensor), got in answers]
    assert all(op_name(node) == "quantize_int8" for node in made)
    return program, pairs, given


def _as_npu(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    return (value.permute(0, 2, 3, 1) if value.dim() == 4 else value).reshape(shape)
