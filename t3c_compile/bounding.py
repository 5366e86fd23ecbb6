"""Worst-case bounds of drift for small networks: affine forms of the full model and of a profile, side by side.

Both graphs are run on :class:`~t3c_compile.affine.Affine` forms of one box of inputs (``affine_ops.py`` says what each
op makes of them), and the difference of their logits is bounded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from t3c_compile.affine import Affine, BoundError, relu_beside
from t3c_compile.affine_ops import OPS, RELU, elastic
from t3c_compile.drift import Array
from t3c_compile.passes.base import bound, get_attr
from t3c_compile.passes.elastic import ElasticLayer, Table
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.specialize import specialize
from t3c_compile.profile import Profile
from t3c_compile.progress import progress_bar


@dataclass(frozen=True)
class DriftBound:
    """What the drift of a profile is at most, for every input of a box.

    Attributes:
        linf: of any one logit; ``l2`` of all logits of a sample, in 2-norm.
        spread: the full model's greatest logit minus its least one at the centre of the box. A bound that is no less
            says nothing.
    """

    linf: float
    l2: float
    spread: float


class VacuousBoundError(BoundError):
    """A worst-case bound says nothing: it is no less than the spread of the full model's own logits."""


class WorstCase:
    """Worst-case bounds of one profile's drift from the full model: of its logits in torch, or compiled for a CPU, from
    those of the elastic model at full rank in float32.

    Layers: linear and 2-d convolution in every form, int8 activations; batch norm, ReLU, addition, mean, reshaping.

    Raises:
        BoundError: the model has more than one input, or a layer or op of no known bound.
    """

    def __init__(self, model: ElasticGraphModule, profile: Profile) -> None:
        deployed = specialize(model, profile.options, profile.activations)
        self._full = _Run(model, model.eval_graph)
        self._deployed = _Run(deployed, deployed.graph)

    @torch.no_grad()
    def bound(self, low: Tensor, high: Tensor) -> DriftBound:
        """The bound for all inputs from ``low`` to ``high``, each one sample [1, ...].

        Raises:
            VacuousBoundError: it is no less than the spread of the full model's own logits.
            BoundError: the network is too large.
        """
        if low.shape != high.shape or not len(low) == 1 or not bool((low <= high).all()):
            raise BoundError(
                f"low {list(low.shape)} and high {list(high.shape)} must be the ends of a box of one sample"
            )
        low, high = low.double(), high.double()
        # A little wider: float64 has rounded the ends.
        x = Affine((low + high) / 2, box=(high - low) / 2 * (1 + 2.0**-40)).spread()
        center = self._full(Affine(x.center)).center
        full = self._full(x)
        logits = self._deployed(x, self._full)
        apart = logits - full
        worst = apart.magnitude().flatten()
        generators = [apart.center, apart.box, *(part for part in apart.parts.values())]
        triangle = sum(float(part.flatten(1).norm(dim=1).sum()) for part in generators)
        found = DriftBound(float(worst.max()), min(float(worst.norm()), triangle), float(center.max() - center.min()))
        if not found.linf < found.spread:
            raise VacuousBoundError(
                f"the bound is vacuous: {found.linf:.3g} for a logit, where the full model's greatest and least are "
                f"{found.spread:.3g} apart; take a smaller box or a greater profile"
            )
        return found


def bound_near(
    model: ElasticGraphModule,
    profiles: Sequence[Profile],
    samples: Array,
    radius: float,
    progress: bool = False,
) -> list[tuple[list[DriftBound], str | None]]:
    """Of every profile the bounds for all inputs of which no number is further than ``radius`` from a sample's, and
    why samples are left out, where some are: their bounds are vacuous.

    Args:
        samples: float32, [samples, ...].

    Raises:
        BoundError: ``radius`` is negative, or as for :class:`WorstCase`.
    """
    if not radius >= 0:
        raise BoundError(f"radius={radius} must not be negative")
    worst_cases = [WorstCase(model, profile) for profile in profiles]  # what is refused shows before the long work
    found = []
    with progress_bar(progress) as bar:
        task = bar.add_task("bound", total=len(worst_cases) * len(samples))
        for worst_case in worst_cases:
            bounds, reason = [], None
            for index in range(len(samples)):
                sample = torch.from_numpy(samples[index : index + 1])
                try:
                    bounds.append(worst_case.bound(sample - radius, sample + radius))
                except VacuousBoundError as error:
                    reason = str(error)
                bar.advance(task)
            found.append((bounds, reason))
    return found


class _Run:
    """One graph on affine forms; the forms before and after every ReLU stay, by its name."""

    def __init__(self, gm: GraphModule, graph: Graph) -> None:
        self._gm = gm
        self._nodes = [node for node in graph.nodes if node.op != "get_attr"]
        inputs = [node.name for node in self._nodes if node.op == "placeholder"]
        if len(inputs) != 1:
            raise BoundError(f"the model takes {', '.join(inputs)}: worst-case bounds are for one input")
        for node in self._nodes:
            if node.op == "call_module":
                layer = gm.get_submodule(str(node.target))
                if not isinstance(layer, ElasticLayer) or isinstance(layer, Table):
                    raise BoundError(f"layer {node.target} has no worst-case bound: it is no linear or convolution")
            elif node.op == "call_function" and str(node.target) not in {*OPS, *RELU}:
                known = ", ".join(sorted({*OPS, *RELU}))
                raise BoundError(f"{node.name}: {node.target} has no worst-case bound; there are those of {known}")
        self.relus: dict[str, tuple[Affine, Affine]] = {}
        self._beside: _Run | None = None

    def __call__(self, x: Affine, beside: "_Run | None" = None) -> Affine:
        """The logits. ``beside``: the run of another graph whose forms ReLUs of the same names are to stay close to."""
        self.relus, self._beside = {}, beside
        values: dict[Node, Any] = {}
        for node in self._nodes:
            if node.op == "placeholder":
                values[node] = x
            elif node.op == "call_module":
                values[node] = elastic(self._gm.get_submodule(str(node.target)), values[node.args[0]])  # type: ignore[arg-type]
            elif node.op == "output":
                return _first(node.args[0], values)
            else:
                values[node] = self._computed(node, values)
        raise AssertionError("the graph has no output")

    def _computed(self, node: Node, values: Mapping[Node, Any]) -> Any:
        arguments = {key: self._value(value, values) for key, value in bound(node).items()}
        first, weight = next(iter(arguments.values())), arguments.get("weight")
        if not isinstance(first, Affine) or isinstance(weight, Affine):
            raise BoundError(
                f"{node.name}: {node.target} has a worst-case bound of a computed tensor and stored weights"
            )
        return self._relu(node.name, first) if str(node.target) in RELU else OPS[str(node.target)](arguments)

    def _value(self, argument: Any, values: Mapping[Node, Any]) -> Any:
        if isinstance(argument, list | tuple):
            return [self._value(item, values) for item in argument]
        if not isinstance(argument, Node):
            return argument
        return get_attr(self._gm, str(argument.target)).detach() if argument.op == "get_attr" else values[argument]

    def _relu(self, name: str, x: Affine) -> Affine:
        if self._beside is not None and name in self._beside.relus:
            return relu_beside(x, *self._beside.relus[name])
        self.relus[name] = x, x.relu().spread()
        return self.relus[name][1]


def _first(result: Any, values: Mapping[Node, Any]) -> Affine:
    """The logits: the first tensor a model returns."""
    while not isinstance(result, Node):
        result = next(iter(result.values() if isinstance(result, dict) else result))
    found: Affine = values[result]
    return found
