"""Elastic 2-d convolutions. Tensors are NCHW; kernels are [O, I / groups, kh, kw]."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t3c_compile.passes.elastic.forms import TwoFactorLayer, WholeLayer, out_norm
from t3c_compile.passes.elastic.layer import ElasticLayer, first
from t3c_compile.passes.ops.fake_quantize import is_known
from t3c_compile.passes.ops.nested import weight_scale
from t3c_compile.passes.spectral_norm import matrix_norm


@dataclass(frozen=True)
class ConvGeometry:
    """How a 2-d convolution walks: (rows, columns) each."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def convolve(self, x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, groups)

    def arguments(self) -> dict[str, Any]:
        """As the deployed ops name them."""
        return {name: list(value) for name, value in asdict(self).items()}


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1x1 convolution of ``x`` [N, I, H, W] by ``weight`` [O, I], as a product: on small tensors torch's convolution
    takes twice as long. The outcome is a view."""
    rows = F.linear(x.permute(0, 2, 3, 1).flatten(0, 2), weight, bias)
    return rows.view(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2)


class SvdConv2d(TwoFactorLayer):
    """A 1x1 convolution as ``V`` [R, I] then ``U`` [O, R]; the stride is the first factor's."""

    op = torch.ops.t3c.svd_conv2d.default

    def __init__(self, v: Tensor, u: Tensor, bias: Tensor | None, conv: ConvGeometry) -> None:
        super().__init__(v, u, bias)
        self.conv = conv

    def forward(self, x: Tensor, call: int = 0) -> Tensor:
        v, u, mid = self._opened()
        h = self.conv.convolve(self._quantized("x", x, call), v[:, :, None, None])
        if mid is not None:
            h = self._quantized("h", h * mid[:, None, None], call)
        return pointwise(h, u, self.bias).clone()  # FSDP2 hooks outputs, which may be no views.

    def compose(self, factors: dict[str, Tensor], rank: int) -> Tensor:
        return super().compose(factors, rank)[:, :, None, None]

    def geometry(self) -> dict[str, Any]:
        return {"stride": list(self.conv.stride)}


class DenseConv2d(WholeLayer):
    """A convolution elastic in width only; grouped and depthwise included."""

    op = torch.ops.t3c.int8_conv2d.default
    float_op = torch.ops.aten.conv2d.default

    def __init__(self, weight: Tensor, bias: Tensor | None, conv: ConvGeometry, groups: int) -> None:
        super().__init__(weight, bias)
        self.conv = conv
        self.groups = groups

    def forward(self, x: Tensor, call: int = 0) -> Tensor:
        y = self.conv.convolve(self._quantized("x", x, call), self._rounded(self.weight, (1, 2, 3)), self.groups)
        return y if self.bias is None else y + self.bias[:, None, None]

    def geometry(self) -> dict[str, Any]:
        return self.conv.arguments() | {"groups": self.groups}


class ThreeFactorConv2d(ElasticLayer):
    """1x1 ``V`` [Ri, I], a spatial core, 1x1 ``U`` [O, Ro]."""

    middles = ("h", "g")

    def __init__(self, v: Tensor, core: Tensor, u: Tensor, bias: Tensor | None, conv: ConvGeometry) -> None:
        super().__init__(max(v.shape[0], u.shape[1]), bias)
        self.conv = conv
        self.V = nn.Parameter(v.detach().contiguous())
        self.core = nn.Parameter(core.detach().contiguous())
        self.U = nn.Parameter(u.detach().contiguous())

    def _opened_core(self) -> Tensor:
        """The core as far as the gate is open, rounded, as the weight of a convolution."""
        raise NotImplementedError

    def _core_inner(self) -> tuple[int, ...]:
        return tuple(range(1, self.core.dim()))

    def forward(self, x: Tensor, call: int = 0) -> Tensor:
        rank = self._open()
        u, out = self._rounded_out(first(self.U, rank, 1))
        # A middle without a scale of its own: rows of V are closed.
        v = self._rounded(self._gated(first(self.V, rank)), 1)
        h = self._quantized("h", pointwise(self._quantized("x", x, call), v), call)
        core = self._opened_core()
        if is_known(h) and h.numel() < core.numel():
            # In one layout with the core, which else is copied into that of ``h``.
            h = h.contiguous()
        g = self.conv.convolve(h, core, h.shape[1] // core.shape[1])
        if out is None:
            return pointwise(g, self._gated(u.T).T, self.bias).clone()
        g = self._quantized("g", g * self._gated(out[:, None, None]), call)
        return pointwise(g, u, self.bias).clone()  # FSDP2 hooks outputs, which may be no views.

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        u = self.U.T
        return {
            "v": (self.V, weight_scale(self.V, 1)),
            "core": (self.core, weight_scale(self.core, self._core_inner())),
            "u": (u, weight_scale(u, 1)),
        }

    def scales(self) -> dict[str, Tensor]:
        core = weight_scale(self.core, self._core_inner()).flatten()
        return {"mid_scale": weight_scale(self.V, 1)[:, 0], "core_scale": core * weight_scale(self.U.T, 1)[:, 0]}

    @torch.no_grad()
    def middle_norm(self, middle: str, rank: int) -> float:
        if middle == "g":
            return out_norm(self.U, rank)
        kernel = self.core.shape[-2] * self.core.shape[-1]
        return matrix_norm(self._core_matrix(rank)) * float(kernel**0.5) * matrix_norm(self.U[:, :rank])

    def _core_matrix(self, rank: int) -> Tensor:
        """The matrix whose norm, times the root of the kernel size, bounds the core's convolution at ``rank``."""
        raise NotImplementedError

    def geometry(self) -> dict[str, Any]:
        return self.conv.arguments()


class Tucker2Conv2d(ThreeFactorConv2d):
    """Tucker-2: 1x1 ``V`` [Ri, I], ``core`` [Ro, Ri, kh, kw], 1x1 ``U`` [O, Ro].

    At rank k the first ``min(k, Ri)`` input and ``min(k, Ro)`` output components are in use.
    """

    form = "tucker2"
    op = torch.ops.t3c.tucker2_conv2d.default

    def _opened_core(self) -> Tensor:
        rank = self._open()
        rows = first(self.core, rank)
        # Scales are those of the whole rows.
        scale = weight_scale(rows.detach(), self._core_inner())
        return self._rounded(first(rows, rank, 1), self._core_inner(), scale)

    def compose(self, factors: dict[str, Tensor], rank: int) -> Tensor:
        v, core, u = factors["v"][:rank], factors["core"][:rank, :rank], factors["u"][:rank]
        return torch.einsum("ro,rshw,si->oihw", u, core, v)

    def product(self, factors: dict[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
        v, core, u = factors["v"], factors["core"], factors["u"]
        h = (v @ x.reshape(v.shape[1], -1)).reshape(len(v), -1, x.shape[1]) * mask[: len(v), None]
        return u.T @ ((core.flatten(1) @ h.flatten(0, 1)) * mask[: len(u)])

    def _core_matrix(self, rank: int) -> Tensor:
        return self.core[:rank, :rank].flatten(1)

    def _cut(self, name: str, tensor: Tensor, rank: int) -> Tensor:
        return tensor[:rank, :rank] if name == "core" else super()._cut(name, tensor, rank)


class CpConv2d(ThreeFactorConv2d):
    """CP with the kernel positions joined: 1x1 ``V`` [R, I], depthwise ``core`` [R, kh, kw], 1x1 ``U`` [O, R]."""

    form = "cp"
    op = torch.ops.t3c.cp_conv2d.default

    def _opened_core(self) -> Tensor:
        return self._rounded(first(self.core, self._open()), self._core_inner())[:, None]

    def compose(self, factors: dict[str, Tensor], rank: int) -> Tensor:
        v, core, u = (factors[name][:rank] for name in ("v", "core", "u"))
        return torch.einsum("ro,rhw,ri->oihw", u, core, v)

    def product(self, factors: dict[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
        v, core, u = factors["v"], factors["core"], factors["u"]
        h = (v @ x.reshape(v.shape[1], -1)).reshape(len(v), -1, x.shape[1])
        return u.T @ ((core.flatten(1)[:, :, None] * h).sum(1) * mask)

    def _core_matrix(self, rank: int) -> Tensor:
        # A depthwise convolution maps each channel to itself: its norm is that of the largest row.
        rows: Tensor = self.core[:rank].flatten(1).norm(dim=1, keepdim=True)
        return rows.amax(0, keepdim=True)
