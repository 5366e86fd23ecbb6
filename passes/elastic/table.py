"""An embedding with quantized rows, which linears may share."""

import torch
import torch.nn.functional as F
from torch import Tensor

from t3c_compile.passes.elastic.linear import DenseLinear


class Table(DenseLinear):
    """``y = W[indices]`` with ``W`` [rows, n], elastic in width; for a linear tied to it, ``y = W x + b``.

    One scale a row is also one an output channel, so rows and products read the same stored integers.
    """

    op = torch.ops.t3c.int8_embedding.default
    product_op = DenseLinear.op

    def __init__(self, weight: Tensor, bias: Tensor | None, padding_idx: int = -1) -> None:
        super().__init__(weight, bias)
        self.padding_idx = padding_idx
        # Only products count: a look-up multiplies nothing, and its indices are not quantized.
        self.calls = self.rows_in = self.rows_out = 0

    def forward(self, x: Tensor, call: int = 0, product: bool = False) -> Tensor:
        """Rows at int64 or int32 indices ``x`` [...]; with ``product``, the linear of float32 ``x`` [..., n]."""
        if product:
            return super().forward(x, call)
        padding_idx = None if self.padding_idx < 0 else self.padding_idx
        return F.embedding(x, self._rounded(self.weight, 1), padding_idx)
