"""Elastic linear layers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t3c_compile.passes.elastic.layer import ElasticLayer
from t3c_compile.passes.ops.nested import weight_scale


class SvdLinear(ElasticLayer):
    """``y = U (V x) + b`` with ``V`` [R, n] and ``U`` [m, R]; components sorted by energy."""

    form = "svd"
    op = torch.ops.t3c.svd_linear.default
    middles = ("h",)

    def __init__(self, v: Tensor, u: Tensor, bias: Tensor | None) -> None:
        super().__init__(v.shape[0], bias)
        self.V = nn.Parameter(v.detach().contiguous())
        self.U = nn.Parameter(u.detach().contiguous())

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features m, in_features n)."""
        return self.U.shape[0], self.V.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        u, mid = self._rounded_out(self.U)
        h = F.linear(self._quantized("x", x), self._rounded(self.V, 1)) * mid
        h = self._quantized("h", self._masked(h, -1))
        return F.linear(h, u, self.bias)

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        u = self.U.T
        return {"v": (self.V, weight_scale(self.V, 1)), "u": (u, weight_scale(u, 1))}

    def compose(self, factors: dict[str, Tensor], rank: int) -> Tensor:
        return factors["u"][:rank].T @ factors["v"][:rank]

    def product(self, factors: dict[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
        return ((factors["v"] @ x) * mask) @ factors["u"]

    def scales(self) -> dict[str, Tensor]:
        return {"mid_scale": (weight_scale(self.V, 1) * weight_scale(self.U.T, 1))[:, 0]}


class DenseLinear(ElasticLayer):
    """A linear elastic in width only: ``y = W x + b`` with ``W`` [m, n]."""

    form = "dense"
    op = torch.ops.t3c.int8_linear.default

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(0, bias)
        self.weight = nn.Parameter(weight.detach().contiguous())

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features m, in_features n)."""
        return self.weight.shape[0], self.weight.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self._quantized("x", x), self._rounded(self.weight, 1), self.bias)

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {"weight": (self.weight, weight_scale(self.weight, 1))}

    def compose(self, factors: dict[str, Tensor], rank: int) -> Tensor:
        return factors["weight"]

    def product(self, factors: dict[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
        return factors["weight"].flatten(1) @ x

    def scales(self) -> dict[str, Tensor]:
        return {"scale": weight_scale(self.weight, 1)[:, 0]}

    def _cut(self, name: str, tensor: Tensor, rank: int) -> Tensor:
        return tensor
