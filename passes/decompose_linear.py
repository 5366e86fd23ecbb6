"""Linear candidates become elastic linears: SVD, whitened where input second moments are known."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.fx import GraphModule

from t3c_compile.passes.base import Pass
from t3c_compile.passes.elastic import DenseLinear, SvdLinear
from t3c_compile.passes.find_elastic_layers import Candidate
from t3c_compile.passes.replace import candidates, kept_svd, replace_with_elastic


@dataclass(frozen=True)
class DecomposeLinear(Pass):
    """Replaces each linear candidate by an ``SvdLinear`` (or ``DenseLinear``) at the weight owner's name.

    With moments left by ``record_moments``, the SVD is of ``W S``, ``S S^T`` the damped second moment of the layer's
    inputs, so that truncation error is the energy lost on real inputs (SVD-LLM, https://arxiv.org/abs/2403.07378).
    """

    name: ClassVar[str] = "decompose-linear"
    damping: float = 1e-2

    def apply(self, gm: GraphModule) -> bool:
        found = candidates(gm, "linear")
        for node, candidate in found:
            replace_with_elastic(gm, node, candidate, self._build)
        return bool(found)

    def _build(self, gm: GraphModule, candidate: Candidate, weight: Tensor, bias: Tensor | None) -> nn.Module:
        if candidate.form == "dense":
            return DenseLinear(weight, bias)
        v, u = kept_svd(gm, candidate.layer, weight, self.damping)
        return SvdLinear(v, u, bias)
