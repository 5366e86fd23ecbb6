"""Second moments of layer inputs on calibration data, for whitened decomposition; one layer's in memory at a time."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from t3c_compile.passes.find_elastic_layers import Candidate


class InputMoments:
    """The mean of ``x x^T`` over a layer's inputs, taken when a decompose pass comes to the layer.

    All calibration batches go through the graph together, node by node, as far as the layer asked for. Between two
    layers only the values that later nodes read are kept: activations of the whole calibration set at one place of the
    graph, instead of a moment for every layer of it.
    """

    def __init__(self, gm: GraphModule, calibration: Iterable[tuple[Any, ...]]) -> None:
        # The passes rewrite the graph; this one keeps the nodes and weights of the model as it was.
        self._gm = GraphModule(gm, copy.deepcopy(gm.graph))
        self._calibration = [tuple(inputs) for inputs in calibration]
        self._sweep = self._run()
        self._last: tuple[Node, Tensor] | None = None
        self._products: dict[str, list[Node]] = {}
        for node in self._gm.graph.nodes:
            candidate = node.meta.get("t3c_candidate")
            if isinstance(candidate, Candidate) and candidate.form == "svd":
                self._products.setdefault(candidate.layer, []).append(node)

    def get(self, layer: str) -> Tensor | None:
        """float64 [n, n] of a layer found as an SVD candidate (over all its products), else None."""
        if layer not in self._products or not self._calibration:
            return None
        moments = [self._moment(node) for node in self._products[layer]]
        return moments[0] if len(moments) == 1 else torch.stack(moments).mean(0)

    @torch.no_grad()
    def _moment(self, product: Node) -> Tensor:
        x = product.all_input_nodes[0]
        # Query, key and value read one input.
        if self._last is None or self._last[0] is not x:
            self._last = None
            rows = self._inputs_of(product)
            total = torch.zeros(rows[0].shape[1], rows[0].shape[1], dtype=torch.float64)
            for block in rows:
                block = block.to(torch.float64)
                total.addmm_(block.T, block)
            self._last = (x, total / sum(len(block) for block in rows))
        return self._last[1]

    def _inputs_of(self, product: Node) -> list[Tensor]:
        """Rows [*, n] of every batch. Asked in graph order, one run gives them all."""
        for _ in range(2):
            for node, values in self._sweep:
                if node is product:
                    # 1x1 convolutions: every pixel is a row of channels.
                    if node.meta["t3c_candidate"].kind == "conv2d":
                        values = [value.movedim(1, -1) for value in values]
                    return [value.reshape(-1, value.shape[-1]) for value in values]
            self._sweep = self._run()
        raise AssertionError(f"{product} is not in the graph")

    def _run(self) -> Iterator[tuple[Node, list[Tensor]]]:
        """Every SVD candidate with its first input in every batch, in graph order."""
        runs = [Interpreter(self._gm) for _ in self._calibration]
        for run, inputs in zip(runs, self._calibration, strict=True):
            run.args_iter = iter(self._gm.graph.process_inputs(*inputs))
        for node in self._gm.graph.nodes:
            candidate = node.meta.get("t3c_candidate")
            if isinstance(candidate, Candidate) and candidate.form == "svd":
                yield node, [run.env[node.all_input_nodes[0]] for run in runs]
            for run in runs:
                with torch.no_grad():
                    run.env[node] = run.run_node(node)
                for dead in run.user_to_last_uses.get(node, []):
                    del run.env[dead]


def record_moments(gm: GraphModule, calibration: Iterable[tuple[Any, ...]]) -> None:
    """Give the decompose passes the inputs' second moments on ``calibration`` (tuples of positional inputs).

    Run it on the evaluation graph, after ``find-elastic-layers``; it leaves :class:`InputMoments` in
    ``gm.meta["t3c_moments"]``.
    """
    gm.meta["t3c_moments"] = InputMoments(gm, calibration)
