"""The forms a linear and a convolution share: two factors (SVD), and the whole weight."""

import torch
from torch import Tensor, nn

from t3c_compile.passes.elastic.layer import ElasticLayer, first
from t3c_compile.passes.ops.nested import weight_scale
from t3c_compile.passes.spectral_norm import matrix_norm


class TwoFactorLayer(ElasticLayer):
    """``W = U V`` with ``V`` [R, n] and ``U`` [m, R], components sorted by energy."""

    form = "svd"
    middles = ("h",)

    def __init__(self, v: Tensor, u: Tensor, bias: Tensor | None) -> None:
        super().__init__(v.shape[0], bias)
        self.V = nn.Parameter(v.detach().contiguous())
        self.U = nn.Parameter(u.detach().contiguous())

    def _opened(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """``V`` and ``U`` as far as the gate is open, rounded, and what the middle is multiplied by: it closes what is
        beyond the rank; where that is None ``V`` does."""
        rank = self._open()
        u, mid = self._rounded_out(first(self.U, rank, 1))
        v = self._rounded(first(self.V, rank), 1)
        return (self._gated(v), u, None) if mid is None else (v, u, self._gated(mid))

    def _multiplied_out(self, rows: int) -> Tensor | None:
        """``U V`` where nothing is rounded and ``rows`` rows times it take less than times the two factors."""
        if not self.unrounded or (self.x_quant and self.x_quant.training):
            return None
        (rank, n), m = self.V.shape, len(self.U)
        if rows * (rank * (m + n) - m * n) <= rank * m * n:
            return None
        return self.U @ self._gated(self.V)

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        u = self.U.T
        return {"v": (self.V, weight_scale(self.V, 1)), "u": (u, weight_scale(u, 1))}

    def compose(self, factors: dict[str, Tensor], rank: int) -> Tensor:
        return factors["u"][:rank].T @ factors["v"][:rank]

    def product(self, factors: dict[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
        return factors["u"].T @ ((factors["v"] @ x) * mask)

    def middle_norm(self, middle: str, rank: int) -> float:
        return out_norm(self.U, rank)

    def scales(self) -> dict[str, Tensor]:
        return {"mid_scale": (weight_scale(self.V, 1) * weight_scale(self.U.T, 1))[:, 0]}


class WholeLayer(ElasticLayer):
    """The weight undivided, one scale per output channel; elastic in width only."""

    form = "dense"

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(0, bias)
        self.weight = nn.Parameter(weight.detach().contiguous())

    def _inner(self) -> tuple[int, ...]:
        return tuple(range(1, self.weight.dim()))

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {"weight": (self.weight, weight_scale(self.weight, self._inner()))}

    def compose(self, factors: dict[str, Tensor], rank: int) -> Tensor:
        return factors["weight"]

    def product(self, factors: dict[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
        return factors["weight"].flatten(1) @ x

    def scales(self) -> dict[str, Tensor]:
        return {"scale": weight_scale(self.weight, self._inner()).flatten()}

    def _cut(self, name: str, tensor: Tensor, rank: int) -> Tensor:
        return tensor


@torch.no_grad()
def out_norm(u: Tensor, rank: int) -> float:
    """Norm of the last factor [m, R] at ``rank`` as the deployed op sees it: each component in units of its scale."""
    return matrix_norm((u / weight_scale(u, 0))[:, :rank])
