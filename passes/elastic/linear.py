"""Elastic linear layers."""

import torch
import torch.nn.functional as F
from torch import Tensor

from t3c_compile.passes.elastic.forms import TwoFactorLayer, WholeLayer


class SvdLinear(TwoFactorLayer):
    """``y = U (V x) + b``."""

    op = torch.ops.t3c.svd_linear.default
    weight_only_op = torch.ops.t3c.svd_weight_only_linear.default

    def forward(self, x: Tensor, call: int = 0) -> Tensor:
        whole = self._multiplied_out(x.numel() // x.shape[-1])
        if whole is not None:
            return F.linear(x, whole, self.bias)
        v, u, mid = self._opened()
        if mid is None:
            return F.linear(F.linear(x, v), u, self.bias)
        h = F.linear(self._quantized("x", x, call), v) * mid
        return F.linear(self._quantized("h", h, call), u, self.bias)


class DenseLinear(WholeLayer):
    """A linear elastic in width only: ``y = W x + b`` with ``W`` [m, n]."""

    op = torch.ops.t3c.int8_linear.default
    weight_only_op = torch.ops.t3c.weight_only_linear.default
    float_op = torch.ops.aten.linear.default

    def forward(self, x: Tensor, call: int = 0) -> Tensor:
        return F.linear(self._quantized("x", x, call), self._rounded(self.weight, 1), self.bias)
