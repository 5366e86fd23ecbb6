"""Look-up in a table of quantized rows."""

import torch
from torch import Tensor

from t3c_compile.passes.ops.nested import keep_top_bits


@torch.library.custom_op("t3c::int8_embedding", mutates_args=())
def int8_embedding(indices: Tensor, weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """int64 or int32 ``indices`` [...], int8 ``weight`` [rows, n], float32 ``scale`` [rows] -> float32 [..., n].

    Indices are in [0, rows). ``y = top_bits(weight[indices]) * scale[indices]``.
    """
    return keep_top_bits(weight[indices], bits).to(torch.float32) * scale[indices][..., None]


@int8_embedding.register_fake
def _(indices: Tensor, weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    return scale.new_empty((*indices.shape, weight.shape[1]))
