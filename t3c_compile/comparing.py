"""Compare a compiled library with torch, and find the first node where they part.

The ``t3c::`` ops mean the same to the bit in torch and in compiled code, so outputs are equal. Where they are not, the
profile is compiled once more with the value of every node as an output, which names the first that differs. A node
that is an output ends its kernel, and an error of a fused kernel may be gone then: so, where no node differs, the graph
is cut in two after a node, with the values that cross the cut as outputs, which leaves kernels before it as they are;
bisection finds the node after which a cut differs and before which it does not.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from t3c_compile.backends.targets import Target, get_target
from t3c_compile.backends.tvm.build import build_library
from t3c_compile.drift import Array
from t3c_compile.manifest import STORE, open_file, read_manifest
from t3c_compile.passes.capture import traced_inputs
from t3c_compile.passes.errors import T3CError
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.specialize import specialize
from t3c_compile.profile import Profile, ProfileSet
from t3c_compile.progress import progress_bar
from t3c_compile.runtime import Session, load
from t3c_compile.store import Store, read_store
from t3c_compile.virtual_machine import VirtualMachine

Inputs = tuple[Tensor, ...]


class ComparisonError(T3CError):
    """An artifact cannot be compared with a model; the message says why."""


@dataclass(frozen=True)
class Divergence:
    """The first node whose compiled value is not torch's.

    Attributes:
        node: its name in the specialized graph.
        layer: the layer of the model it belongs to or follows; empty where there is none.
        op: what it computes.
        difference: greatest absolute difference, and ``greatest`` absolute value in torch, of its elements.
        share: of its elements that differ.
    """

    node: str
    layer: str
    op: str
    difference: float
    greatest: float
    share: float


@dataclass(frozen=True)
class Comparison:
    """How a profile's compiled outputs differ from torch's.

    Attributes:
        difference: greatest absolute difference of an output; 0 where all are equal to the bit.
        divergence: where it begins; None where outputs are equal, or where the profile compiled now gives torch's
            outputs: then the artifact's library is another than this version makes.
    """

    profile: str
    difference: float
    divergence: Divergence | None


def compare(
    path: str | os.PathLike[str],
    model: ElasticGraphModule,
    samples: Sequence[Inputs],
    target: str | None = None,
    progress: bool = False,
) -> list[Comparison]:
    """Run every profile of an artifact here and in torch, and say where they part.

    Layers that were kept in float (recurrent ones, transposed convolutions) have no one order of rounding: they may
    differ in the last place, and so what follows them.

    Args:
        path: the ``NAME.t3c`` folder.
        model: the elastic model that was lowered.
        samples: input tuples, batches as for ``snap``.
        target: whose library; the first that runs here by default.

    Returns:
        One comparison a profile, from the least.

    Raises:
        ComparisonError: there are no samples, the target is no CPU, or the artifact was lowered from another model.
        ArtifactError, InputError: as for ``load`` and ``Session.run``.
    """
    if not samples:
        raise ComparisonError("compare needs samples: a few batches of the model's inputs")
    folder = Path(path)
    session, manifest = load(folder, target), read_manifest(folder)
    if manifest["targets"][session.target]["kind"] != "cpu":
        raise ComparisonError(f"target {session.target} is no CPU: only those compute what torch does to the bit")
    with open_file(folder, manifest, STORE) as file:
        store = read_store(file)
    profiles = ProfileSet([Profile.from_json(profile) for profile in manifest["profiles"]], "as lowered")
    _require_same_layers(model, profiles, folder)
    found = []
    with progress_bar(progress) as bar:
        for profile in bar.track(profiles.profiles, description="compare"):
            graph = specialize(model, profile.options, profile.activations, profiles.store_ranks())
            _require_same_tensors(graph, store, folder)
            session.set_profile(profile.name)
            difference, worst = max(((_difference(session, graph, x), x) for x in samples), key=lambda pair: pair[0])
            where = None
            if difference:
                bar.add_task(f"locate in {profile.name}", total=None)
                where = _Locator(model, graph, worst, store, get_target(session.target)).find()
            found.append(Comparison(profile.name, difference, where))
    return found


def _require_same_layers(model: ElasticGraphModule, profiles: ProfileSet, folder: Path) -> None:
    mine, theirs = set(model.report.elastic), set(profiles.profiles[0].options)
    if mine != theirs:
        odd = ", ".join(sorted(mine ^ theirs))
        raise ComparisonError(f"{folder} was lowered from another model: they differ in the layers {odd}")


def _require_same_tensors(graph: GraphModule, store: Store, folder: Path) -> None:
    mine = {name: list(tensor.shape) for name, tensor in graph.state_dict().items()}
    theirs = {name: list(array.shape) for name, array in store.items()}
    odd = [name for name in mine | theirs if mine.get(name) != theirs.get(name)]
    if odd:
        name = odd[0]
        raise ComparisonError(
            f"{folder} was lowered from another model: tensor {name} is {mine.get(name, 'missing')}, the artifact has "
            f"it as {theirs.get(name, 'missing')}"
        )


def _difference(session: Session, graph: GraphModule, inputs: Inputs) -> float:
    """The greatest absolute difference of an output."""
    with torch.no_grad():
        expected = tree_leaves(graph(*inputs))
    found = session.run(*[x.numpy() for x in inputs])
    results = found if isinstance(found, tuple) else (found,)
    return float(max(_apart(y, x.numpy()).max(initial=0) for y, x in zip(results, expected, strict=True)))


def _apart(found: Array, expected: Array) -> Array:
    """Absolute differences, float64; infinite where one alone is NaN, 0 where both are or both are equal."""
    with np.errstate(invalid="ignore"):
        apart = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    same = (found == expected) | ((found != found) & (expected != expected))
    result: Array = np.where(same, 0.0, np.where(np.isnan(apart), np.inf, apart))
    return result


class _Locator:
    """The first node of one profile, on one batch of inputs, where compiled code and torch part."""

    def __init__(
        self, model: ElasticGraphModule, graph: GraphModule, inputs: Inputs, store: Store, target: Target
    ) -> None:
        self._graph, self._inputs, self._store, self._target = graph, inputs, store, target
        self._shapes = model.meta["t3c_dynamic_shapes"]
        self._traced = traced_inputs(model, inputs)
        values = Interpreter(graph, garbage_collect_values=False)
        with torch.no_grad():
            values.run(*inputs)
        self._expected: Mapping[Node, Any] = values.env
        self._nodes = [
            node
            for node in graph.graph.nodes
            if node.op == "call_function" and isinstance(self._expected[node], Tensor)
        ]

    def find(self) -> Divergence | None:
        """None where the profile compiled now gives what torch gives."""
        found = self._differing(self._nodes)
        if found is not None:
            return found
        equal, apart = 0, len(self._nodes)
        found = self._differing(self._crossing(apart))
        while found is not None and apart - equal > 1:
            middle = (equal + apart) // 2
            here = self._differing(self._crossing(middle))
            if here is None:
                equal = middle
            else:
                apart, found = middle, here
        return found

    def _crossing(self, count: int) -> list[Node]:
        """The nodes among the first ``count`` whose values are read after them."""
        before = set(self._nodes[:count])
        return [node for node in self._nodes[:count] if not before.issuperset(node.users)]

    def _differing(self, nodes: list[Node]) -> Divergence | None:
        """The first of ``nodes`` whose value differs where all of them are outputs."""
        for node, value in zip(nodes, self._compiled(nodes), strict=True):
            expected = self._expected[node].numpy()
            apart = _apart(value, expected)
            if apart.any():
                greatest = float(np.abs(expected.astype(np.float64)).max())
                share = float((apart > 0).mean())
                return Divergence(node.name, _layer(node), str(node.target), float(apart.max()), greatest, share)
        return None

    def _compiled(self, outputs: list[Node]) -> list[Array]:
        """What compiled code, on the artifact's weights, gives for ``outputs``."""
        graph = Graph()
        copied: dict[Node, Node] = {}
        graph.graph_copy(self._graph.graph, copied)
        graph.output(tuple(copied[node] for node in outputs))
        graph.eliminate_dead_code()
        module = GraphModule(self._graph, graph)
        program = torch.export.export(module, self._traced, dynamic_shapes=self._shapes, strict=False)
        with TemporaryDirectory() as folder:
            # The library stays mapped after the file is gone.
            library = build_library({"profile": program}, self._target, Path(folder) / "profile.so")
            machine = VirtualMachine(library.path, {})
        weights: list[Any] = []
        for function, names in library.packs.items():
            weights += machine[function](*(machine.tensor(self._store[name]) for name in names))
        found = machine["profile"](*(machine.tensor(x.numpy()) for x in self._inputs), machine.tuple(weights))
        arrays = machine.array(found)
        return list(arrays) if isinstance(arrays, tuple) else [arrays]


def _layer(node: Node) -> str:
    own = node.meta.get("t3c_layer")
    return str(own) if own else next(filter(None, map(_layer, node.all_input_nodes)), "")
