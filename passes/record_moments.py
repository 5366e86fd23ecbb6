"""Second moments of layer inputs on calibration data, for whitened decomposition."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from t3c_compile.passes.find_elastic_layers import Candidate


class _Recorder(Interpreter):
    """Runs a graph and sums ``x^T x`` over the inputs of every SVD candidate."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}

    def run_node(self, n: Node) -> Any:
        candidate = n.meta.get("t3c_candidate")
        if isinstance(candidate, Candidate) and candidate.form == "svd":
            x = self.env[n.all_input_nodes[0]]
            # 1x1 convolutions: every pixel is a row of channels.
            rows = x.movedim(1, -1) if candidate.kind == "conv2d" else x
            rows = rows.reshape(-1, rows.shape[-1]).to(torch.float64)
            self.sums[candidate.layer] = self.sums.get(candidate.layer, 0) + rows.T @ rows
            self.rows[candidate.layer] = self.rows.get(candidate.layer, 0) + len(rows)
        return super().run_node(n)


@torch.no_grad()
def record_moments(gm: GraphModule, calibration: Iterable[tuple[Any, ...]]) -> None:
    """Run ``calibration`` (tuples of positional inputs) and keep the mean of ``x x^T`` [n, n] of every SVD candidate.

    Run it on the evaluation graph, after ``find-elastic-layers``; the decompose passes read what it leaves in
    ``gm.meta["t3c_moments"]``.
    """
    recorder = _Recorder(gm)
    for inputs in calibration:
        recorder.run(*inputs)
    gm.meta["t3c_moments"] = {name: total / recorder.rows[name] for name, total in recorder.sums.items()}
