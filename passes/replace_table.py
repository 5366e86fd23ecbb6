"""Embedding candidates, and the linears tied to them, become one table of quantized rows."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.fx import GraphModule

from t3c_compile.passes.base import Pass
from t3c_compile.passes.elastic import Table
from t3c_compile.passes.find_elastic_layers import Candidate
from t3c_compile.passes.replace import candidates, replace_with_elastic


@dataclass(frozen=True)
class ReplaceTable(Pass):
    """Replaces each table candidate by a :class:`Table`.

    A tied pair is not factorized: one row of the table would be a whole product, and every look-up would lose what
    truncation saves the output layer.
    """

    name: ClassVar[str] = "replace-table"

    def apply(self, gm: GraphModule) -> bool:
        found = candidates(gm, "table")
        for node, candidate in found:
            replace_with_elastic(gm, node, candidate, self._build)
        return bool(found)

    def _build(self, gm: GraphModule, candidate: Candidate, weight: Tensor, bias: Tensor | None) -> nn.Module:
        return Table(weight, bias, candidate.padding_idx)
