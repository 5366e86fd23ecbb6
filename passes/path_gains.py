"""Path gains: how much a unit error at a layer's output can move the logits."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import networkx
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from t3c_compile.passes.base import Pass, elastic_calls
from t3c_compile.passes.elastic import ElasticLayer
from t3c_compile.passes.graph import ElasticGraphModule

_EXACT_OUTPUTS = 32
# Probes of one sample, and of all samples together where that leaves each enough.
_PROBES, _LEAST_PROBES, _ALL_PROBES = 16, 4, 128


@dataclass(frozen=True)
class PathGains(Pass):
    """Writes ``node.meta["t3c_gain"]`` of every elastic call and ``gm.meta["t3c_gains"]``, one by call, by layer.

    ``calibration`` are input tuples, of which the first 32 samples are used. The gain is the greatest, over the
    samples, spectral norm of the Jacobian from the layer's output to the logits, measured by vector-Jacobian products:
    all of them for up to 32 logits, else Gaussian probes, whose root mean square is the Frobenius norm (an upper
    bound). A layer the gradient does not reach gets the product of operator norms summed over all paths of the
    dataflow graph.
    """

    name: ClassVar[str] = "path-gains"
    calibration: Sequence[tuple[Any, ...]] = ()

    def requires(self, gm: GraphModule) -> None:
        if not self.calibration:
            raise self.fail("calibration inputs are needed to measure gains")

    def apply(self, gm: GraphModule) -> bool:
        calls = list(elastic_calls(gm))
        gains = measured_gains(gm, [node for node, _ in calls], self.calibration)
        missing = [node for node, _ in calls if node not in gains]
        if missing:
            products = norm_product_gains(gm)
            gains |= {node: products[node] for node in missing}
        for node, gain in gains.items():
            node.meta["t3c_gain"] = gain
        by_layer: dict[str, list[float]] = {}
        for node, _ in calls:
            by_layer.setdefault(str(node.target), []).append(gains[node])
        gm.meta["t3c_gains"] = by_layer
        return False


def path_gains(model: ElasticGraphModule, calibration: Sequence[tuple[Any, ...]]) -> dict[str, list[float]]:
    """Gains of the evaluation graph at the present ranks: by layer, of its calls in graph order."""
    training = model.training
    PathGains(calibration)(model.eval())
    model.train(training)
    gains: dict[str, list[float]] = model.meta["t3c_gains"]
    return gains


class Tap(Interpreter):
    """Runs a graph and keeps the outputs of some nodes, as leaves the gradient reaches."""

    def __init__(self, gm: GraphModule, nodes: Iterable[Node]) -> None:
        super().__init__(gm)
        self.nodes = set(nodes)
        self.outputs: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n in self.nodes:
            if not result.requires_grad:
                result = result.detach().requires_grad_(True)
            self.outputs[n] = result
        return result


def samples_of(gm: GraphModule, calibration: Iterable[tuple[Any, ...]], most: int = 32) -> list[tuple[Any, ...]]:
    """Up to ``most`` inputs of one sample each; whole batches where the graph's batch size is fixed.

    Layers may fold the batch into other dimensions, so only a batch of one says what belongs to one sample.
    """
    free = gm.meta.get("t3c_batch_is_free", False)
    found: list[tuple[Any, ...]] = []
    for inputs in calibration:
        size = max((len(x) for x in inputs if isinstance(x, Tensor) and x.dim()), default=1)
        if not free:
            found.append(inputs)
            continue
        for i in range(size):
            found.append(tuple(x[i : i + 1] if isinstance(x, Tensor) and x.dim() else x for x in inputs))
    return found[:most]


def measured_gains(gm: GraphModule, nodes: list[Node], calibration: Iterable[tuple[Any, ...]]) -> dict[Node, float]:
    """Greatest Jacobian norm over the samples, for each node the gradient reaches."""
    generator = torch.Generator().manual_seed(0)
    gains: dict[Node, float] = {}
    samples = samples_of(gm, calibration)
    for inputs in samples:
        tap = Tap(gm, nodes)
        with torch.enable_grad():
            logits = first_tensor(tap.run(*inputs)).flatten()
        found = list(tap.outputs)
        outputs = [tap.outputs[node] for node in found]
        if len(logits) <= _EXACT_OUTPUTS:
            norms = _exact_norms(logits, outputs)
        else:
            probes = max(_LEAST_PROBES, min(_PROBES, _ALL_PROBES // len(samples)))
            norms = _probed_norms(logits, outputs, torch.randn(probes, len(logits), generator=generator))
        for node, norm in zip(found, norms, strict=True):
            if norm is not None:
                gains[node] = max(gains.get(node, 0.0), norm)
    return gains


def _products(logits: Tensor, outputs: list[Tensor], probes: Tensor) -> Iterator[tuple[Tensor | None, ...]]:
    """``probe @ J`` of every output, probe by probe; None for an output that the gradient does not reach."""
    for probe in probes:
        yield torch.autograd.grad((logits @ probe).sum(), outputs, retain_graph=True, allow_unused=True)


def _exact_norms(logits: Tensor, outputs: list[Tensor]) -> list[float | None]:
    """Spectral norm of the Jacobian from each output to the logits."""
    rows = zip(*_products(logits, outputs, torch.eye(len(logits))), strict=True)
    jacobians = [None if found[0] is None else torch.stack([row.flatten() for row in found]) for found in rows]
    return [None if j is None else float(torch.linalg.eigvalsh(j @ j.T)[-1].clamp_min(0).sqrt()) for j in jacobians]


def _probed_norms(logits: Tensor, outputs: list[Tensor], probes: Tensor) -> list[float | None]:
    """Estimated Frobenius norm of the same; no row is kept, for they are as large as all activations together."""
    squares: list[float | None] = [0.0 for _ in outputs]
    for rows in _products(logits, outputs, probes):
        squares = [
            None if square is None or row is None else square + float(row.square().sum())
            for square, row in zip(squares, rows, strict=True)
        ]
    return [None if square is None else (square / len(probes)) ** 0.5 for square in squares]


def first_tensor(result: Any) -> Tensor:
    """The logits: the first tensor a model returns."""
    if isinstance(result, Tensor):
        return result
    values = result.values() if isinstance(result, dict) else result
    return next(first_tensor(value) for value in values if isinstance(value, Tensor | tuple | list | dict))


@torch.no_grad()
def norm_product_gains(gm: GraphModule) -> dict[Node, float]:
    """Sum over paths to the output of the product of operator norms; ops without parameters count as 1-Lipschitz."""
    flow = networkx.DiGraph()
    for node in gm.graph.nodes:
        flow.add_node(node)
        flow.add_edges_from((source, node) for source in node.all_input_nodes)
    norms: dict[Node, float] = {}
    for node, layer in elastic_calls(gm):
        norms[node] = operator_norm(layer)
    gains: dict[Node, float] = {}
    for node in reversed(list(networkx.topological_sort(flow))):
        users = list(flow.successors(node))
        gains[node] = 1.0 if node.op == "output" else sum(gains[user] * norms.get(user, 1.0) for user in users)
    return gains


@torch.no_grad()
def operator_norm(layer: ElasticLayer) -> float:
    """Upper bound of a layer's operator norm: the matrix norm, for k x k kernels times the root of their positions."""
    weight = layer.dense_weight()
    return float(torch.linalg.matrix_norm(weight.flatten(1), ord=2)) * kernel_factor(weight)


def kernel_factor(weight: Tensor) -> float:
    """``sqrt(kh * kw)``: a convolution's norm is at most this times its flattened kernel's
    (Sedghi et al., https://arxiv.org/abs/1805.10408, and the bound of Tsuzuku et al., https://arxiv.org/abs/1802.04034)."""
    return float((weight.shape[2] * weight.shape[3]) ** 0.5) if weight.dim() == 4 else 1.0
