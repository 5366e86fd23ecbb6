"""Linear layers with integer weights and float32 activations: dense, and two-factor (SVD) chain.

Decoding reads each weight once a token, so the bytes of the weights are what it costs, and int8 activations would save
nothing. A row of activations is taken as whole numbers of 24 bits, in steps of its own greatest one, which a kernel
multiplies as three int8 digits: sums are then exact in any order, rounded once at the end. An activation is off by half
a step at most, 2**-24 of the row's greatest, as much as a float32 sum loses in which that one takes part.
"""

import torch
from torch import Tensor

from t3c_compile.passes.ops.int8_attention import integer_rows
from t3c_compile.passes.ops.int8_linear import affine
from t3c_compile.passes.ops.nested import keep_top_bits

MOST = 8_355_000.0
"""The greatest whole number of a row: three digits of -128 to 127, with room for a rounding."""
STEP = 1 / MOST


def _product(x: Tensor, weight: Tensor, bits: int) -> Tensor:
    whole, step = integer_rows(x, MOST)
    # float64 holds every sum of fewer than 2**22 products.
    sums = whole.to(torch.float64) @ keep_top_bits(weight, bits).to(torch.float64).T
    return sums.to(torch.float32) * step


@torch.library.custom_op("t3c::weight_only_linear", mutates_args=())
def weight_only_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    """float32 ``x`` [..., n], int8 ``weight`` [m, n], float32 ``scale`` [m], ``bias`` [m] or None -> float32 [..., m].

    ``y = (x @ top_bits(weight).T) * scale + bias``, ``x`` in steps as above.
    """
    return affine(_product(x, weight, bits), scale, bias)


@weight_only_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("t3c::svd_weight_only_linear", mutates_args=())
def svd_weight_only_linear(
    x: Tensor, v: Tensor, u: Tensor, mid_scale: Tensor, bias: Tensor | None, rank: int, bits: int
) -> Tensor:
    """Two-factor linear at ``rank`` k, both factors stored rank-major at their greatest rank R >= k.

    float32 ``x`` [..., n], int8 ``v`` [R, n], int8 ``u`` [R, m], float32 ``mid_scale`` [R], ``bias`` [m] or None ->
    float32 [..., m]::

        h = (x @ top_bits(v[:k]).T) * mid_scale[:k]
        y = h @ top_bits(u[:k]) + bias
    """
    y = _product(_product(x, v[:rank], bits) * mid_scale[:rank], u[:rank].T, bits)
    return y if bias is None else y + bias


@svd_weight_only_linear.register_fake
def _(x: Tensor, v: Tensor, u: Tensor, mid_scale: Tensor, bias: Tensor | None, rank: int, bits: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], u.shape[1]))
