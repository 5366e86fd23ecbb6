"""Nested integer weights: one int8 store whose rounded top bits are every lower width.

A weight is an integer ``q`` in [-119, 119]. At ``bits`` < 8 it is the nearest multiple of ``step = 2**(8 - bits)``,
still an int8 at the same scale. Of two that are as near it is the even one: integers lie in the middle often (half of
them at 7 bits), and if all went up, the weights of an output would be too large by half a unit in the mean, which many
positive inputs add up. The limit of 119 (not 127) keeps the rounding inside ``bits`` signed bits for every width from
4 to 8, so no clamp is needed in a kernel.
"""

import torch
from torch import Tensor

WEIGHT_QMAX = 119


def quantize_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """Integers of ``weight`` (float tensor of whole numbers, same shape), ``scale`` broadcastable to it."""
    return torch.clamp(torch.round(weight / scale), -WEIGHT_QMAX, WEIGHT_QMAX)


def keep_top_bits(q: Tensor, bits: Tensor | int) -> Tensor:
    """Round whole numbers ``q`` in [-119, 119] to multiples of ``2**(8 - bits)``, ties to even; same shape and dtype.

    ``bits`` is a number from 4 to 8, or a tensor holding one (so that a compiled graph serves every width).
    """
    if not isinstance(bits, Tensor):
        bits = torch.tensor(bits)
    step = torch.exp2(8.0 - bits.to(torch.float32))
    return (torch.round(q.to(torch.float32) / step) * step).to(q.dtype)


def weight_scale(weight: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Scale that maps the largest magnitude over ``dim`` to 119; kept dims, never zero."""
    # Not abs().amax(): that would make a second tensor of the weight's size.
    greatest = torch.maximum(weight.amax(dim=dim, keepdim=True), -weight.amin(dim=dim, keepdim=True))
    return greatest.clamp_min(1e-12) / WEIGHT_QMAX
