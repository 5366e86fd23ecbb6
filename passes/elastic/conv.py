"""Elastic 2-d convolutions. Tensors are NCHW; kernels are [O, I / groups, kh, kw]."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t3c_compile.passes.elastic.layer import ElasticLayer
from t3c_compile.passes.ops.nested import weight_scale


@dataclass(frozen=True)
class ConvGeometry:
    """How a 2-d convolution walks: (rows, columns) each."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)


class ConvLayer(ElasticLayer):
    """What the convolution forms share."""

    def __init__(self, max_rank: int, bias: Tensor | None, conv: ConvGeometry) -> None:
        super().__init__(max_rank, bias)
        self.conv = conv

    def geometry(self) -> dict[str, Any]:
        return {name: list(value) for name, value in asdict(self.conv).items()}

    def _convolve(self, x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
        return F.conv2d(x, weight, None, self.conv.stride, self.conv.padding, self.conv.dilation, groups)


class SvdConv2d(ConvLayer):
    """A 1x1 convolution as ``V`` [R, I] then ``U`` [O, R]; the stride is the first factor's."""

    form = "svd"
    op = torch.ops.t3c.svd_conv2d.default
    middles = ("h",)

    def __init__(self, v: Tensor, u: Tensor, bias: Tensor | None, conv: ConvGeometry) -> None:
        super().__init__(v.shape[0], bias, conv)
        self.V = nn.Parameter(v.detach().contiguous())
        self.U = nn.Parameter(u.detach().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        u, mid = self._rounded_out(self.U)
        v = self._rounded(self.V, 1)[:, :, None, None]
        h = self._convolve(self._quantized("x", x), v) * mid[:, None, None]
        h = self._quantized("h", self._masked(h, 1))
        return F.conv2d(h, u[:, :, None, None], self.bias)

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        u = self.U.T
        return {"v": (self.V, weight_scale(self.V, 1)), "u": (u, weight_scale(u, 1))}

    def compose(self, factors: dict[str, Tensor], rank: int) -> Tensor:
        return (factors["u"][:rank].T @ factors["v"][:rank])[:, :, None, None]

    def product(self, factors: dict[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
        return ((factors["v"] @ x) * mask) @ factors["u"]

    def scales(self) -> dict[str, Tensor]:
        return {"mid_scale": (weight_scale(self.V, 1) * weight_scale(self.U.T, 1))[:, 0]}

    def geometry(self) -> dict[str, Any]:
        return {"stride": list(self.conv.stride)}


class _ThreeFactorConv2d(ConvLayer):
    """1x1 ``V`` [Ri, I], a spatial core, 1x1 ``U`` [O, Ro]."""

    middles = ("h", "g")

    def __init__(self, v: Tensor, core: Tensor, u: Tensor, bias: Tensor | None, conv: ConvGeometry) -> None:
        super().__init__(max(v.shape[0], u.shape[1]), bias, conv)
        self.V = nn.Parameter(v.detach().contiguous())
        self.core = nn.Parameter(core.detach().contiguous())
        self.U = nn.Parameter(u.detach().contiguous())

    def _spatial(self, h: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        u, out = self._rounded_out(self.U)
        h = F.conv2d(self._quantized("x", x), self._rounded(self.V, 1)[:, :, None, None])
        h = self._quantized("h", self._masked(h, 1))
        g = self._spatial(h) * out[:, None, None]
        g = self._quantized("g", self._masked(g, 1))
        return F.conv2d(g, u[:, :, None, None], self.bias)

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        u = self.U.T
        rest = tuple(range(1, self.core.dim()))
        return {
            "v": (self.V, weight_scale(self.V, 1)),
            "core": (self.core, weight_scale(self.core, rest)),
            "u": (u, weight_scale(u, 1)),
        }

    def scales(self) -> dict[str, Tensor]:
        rest = tuple(range(1, self.core.dim()))
        core = weight_scale(self.core, rest).flatten()
        return {"mid_scale": weight_scale(self.V, 1)[:, 0], "core_scale": core * weight_scale(self.U.T, 1)[:, 0]}


class Tucker2Conv2d(_ThreeFactorConv2d):
    """Tucker-2: 1x1 ``V`` [Ri, I], ``core`` [Ro, Ri, kh, kw], 1x1 ``U`` [O, Ro].

    At rank k the first ``min(k, Ri)`` input and ``min(k, Ro)`` output components are in use.
    """

    form = "tucker2"
    op = torch.ops.t3c.tucker2_conv2d.default

    def _spatial(self, h: Tensor) -> Tensor:
        return self._convolve(h, self._rounded(self.core, (1, 2, 3)))

    def compose(self, factors: dict[str, Tensor], rank: int) -> Tensor:
        v, core, u = factors["v"][:rank], factors["core"][:rank, :rank], factors["u"][:rank]
        return torch.einsum("ro,rshw,si->oihw", u, core, v)

    def product(self, factors: dict[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
        h = (factors["v"] @ x.reshape(factors["v"].shape[1], -1)) * mask[: len(factors["v"]), None]
        g = (factors["core"].flatten(1) @ h.flatten()) * mask[: len(factors["u"])]
        return g @ factors["u"]

    def _cut(self, name: str, tensor: Tensor, rank: int) -> Tensor:
        return tensor[:rank, :rank] if name == "core" else super()._cut(name, tensor, rank)


class CpConv2d(_ThreeFactorConv2d):
    """CP with the kernel positions joined: 1x1 ``V`` [R, I], depthwise ``core`` [R, kh, kw], 1x1 ``U`` [O, R]."""

    form = "cp"
    op = torch.ops.t3c.cp_conv2d.default

    def _spatial(self, h: Tensor) -> Tensor:
        return self._convolve(h, self._rounded(self.core, (1, 2))[:, None], groups=h.shape[1])

    def compose(self, factors: dict[str, Tensor], rank: int) -> Tensor:
        v, core, u = (factors[name][:rank] for name in ("v", "core", "u"))
        return torch.einsum("ro,rhw,ri->oihw", u, core, v)

    def product(self, factors: dict[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
        h = factors["v"] @ x.reshape(factors["v"].shape[1], -1)
        return ((factors["core"].flatten(1) * h).sum(1) * mask) @ factors["u"]


class DenseConv2d(ConvLayer):
    """A convolution elastic in width only; grouped and depthwise included."""

    form = "dense"
    op = torch.ops.t3c.int8_conv2d.default

    def __init__(self, weight: Tensor, bias: Tensor | None, conv: ConvGeometry, groups: int) -> None:
        super().__init__(0, bias, conv)
        self.groups = groups
        self.weight = nn.Parameter(weight.detach().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        y = self._convolve(self._quantized("x", x), self._rounded(self.weight, (1, 2, 3)), self.groups)
        return y if self.bias is None else y + self.bias[:, None, None]

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {"weight": (self.weight, weight_scale(self.weight, (1, 2, 3)))}

    def compose(self, factors: dict[str, Tensor], rank: int) -> Tensor:
        return factors["weight"]

    def product(self, factors: dict[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
        return factors["weight"].flatten(1) @ x

    def scales(self) -> dict[str, Tensor]:
        return {"scale": weight_scale(self.weight, (1, 2, 3)).flatten()}

    def geometry(self) -> dict[str, Any]:
        return super().geometry() | {"groups": self.groups}

    def _cut(self, name: str, tensor: Tensor, rank: int) -> Tensor:
        return tensor
