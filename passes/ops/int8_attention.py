"""Attention on int8: rows of query, key and value are rounded as they come, each by its greatest number.

Nothing is calibrated and no row depends on another, so padding and later tokens cannot move a result. Both products are
sums of integers; between them stands the softmax of ``t3c::attention_f32``.
"""

import torch
from torch import Tensor

from t3c_compile.passes.ops.attention import attended, exponentials, mask_scores
from t3c_compile.passes.ops.fake_quantize import composite, is_known, passed_through, straight_through

aten = torch.ops.aten

MOST = 127.0
STEP = 1 / 127
LEAST_NORM = 2.0**-100
"""Rows of smaller numbers are rounded to zero: the inverse of their greatest is no float32."""


def integer_rows(x: Tensor, most: float = MOST) -> tuple[Tensor, Tensor]:
    """float32 ``x`` [..., n] as whole numbers in [-most, most], float32, and what one is worth, [..., 1]."""
    greatest = x.abs().amax(-1, keepdim=True).clamp_min(LEAST_NORM)
    return _whole(x, greatest, most), greatest * (1 / most)


def _whole(x: Tensor, greatest: Tensor, most: float) -> Tensor:
    # A number divided by a tensor is its inverse times the number: two roundings instead of one.
    return (x * (torch.full_like(greatest, most) / greatest)).round_()


def fake_quantize_rows(x: Tensor, bits: Tensor) -> Tensor:
    """Each row of float32 ``x`` [..., n] rounded to int8 by its greatest number and back, as ``t3c::attention_int8``
    does; unchanged where ``bits`` (0-d float32, a layer's width) is 32. Gradient: one (nothing is clamped)."""
    if is_known(x):
        if float(bits.detach()) >= 32:
            return x
        whole, step = integer_rows(x.detach())
        return passed_through(x, whole.mul_(step))
    with torch.no_grad():
        whole, step = integer_rows(x)
        rounded = torch.where(bits >= 32, x, whole * step)
    return straight_through(x, rounded)


composite(fake_quantize_rows, "(Tensor x, Tensor bits) -> Tensor")


@torch.library.custom_op("t3c::attention_int8", mutates_args=())
def attention_int8(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """Scaled dot-product attention with both products in integers.

    Arguments, masks and result as ``t3c::attention_f32``. ::

        q, k, v = rows of query, key, value as int8, of steps sq, sk, sv
        s = (q @ k.T) * sk * (sq * scale) + mask      (fused with a float mask; -inf for what takes no part)
        e = exp(s - max(s))                           (0 below 2**-126)
        p = round(e * sv * (127 / max(e * sv)))       (each key's share with its step, as int8)
        y = (p @ v) * (max(e * sv) * (1 / 127) * (1 / sum(e)))

    Values that take no part must be finite.
    """
    share = query.shape[1] // key.shape[1]
    if share > 1:
        key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    (q, q_step), (k, k_step), (v, v_step) = (integer_rows(x) for x in (query, key, value))
    # Whole numbers below 2**24: a float32 product is exact in any order.
    s = (q @ k.transpose(-1, -2)) * k_step.transpose(-1, -2)
    s = mask_scores(s, q_step * scale, attn_mask, is_causal)
    e, inverse = exponentials(s)
    p = e * v_step.transpose(-1, -2)
    greatest = p.amax(-1, keepdim=True).clamp_min(LEAST_NORM)
    y = (_whole(p, greatest, MOST).double() @ v.double()).float()
    result: Tensor = y * ((greatest * STEP) * inverse)
    return result


attention_int8.register_fake(attended)


def attention_int8_aten(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """``t3c::attention_int8`` in ATen ops; sums of values are exact for up to 1040 keys."""
    share = query.shape[1] // key.shape[1]
    if share > 1:
        key, value = (aten.repeat_interleave.self_int(x, share, 1) for x in (key, value))

    def whole(x: Tensor, greatest: Tensor) -> Tensor:
        ratio = aten.div.Tensor(aten.full_like.default(greatest, MOST), greatest)
        rounded: Tensor = aten.round.default(aten.mul.Tensor(x, ratio))
        return rounded

    def rows(x: Tensor) -> tuple[Tensor, Tensor]:
        greatest = aten.clamp_min.default(aten.amax.default(aten.abs.default(x), [-1], True), LEAST_NORM)
        return whole(x, greatest), aten.mul.Scalar(greatest, STEP)

    (q, q_step), (k, k_step), (v, v_step) = rows(query), rows(key), rows(value)
    s = aten.mul.Tensor(aten.matmul.default(q, aten.transpose.int(k, -1, -2)), aten.transpose.int(k_step, -1, -2))
    s = aten.mul.Tensor(s, aten.mul.Scalar(q_step, scale))
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        s = aten.where.ScalarOther(attn_mask, s, -torch.inf) if is_bool else aten.add.Tensor(s, attn_mask)
    if is_causal:
        below = aten.gt.Scalar(aten.tril.default(aten.ones_like.default(s)), 0.5)
        s = aten.where.ScalarOther(below, s, -torch.inf)
    top = aten.clamp_min.default(aten.amax.default(s, [-1], True), torch.finfo(torch.float32).min)
    e = aten.exp.default(aten.sub.Tensor(s, top))
    p = aten.mul.Tensor(e, aten.transpose.int(v_step, -1, -2))
    greatest = aten.clamp_min.default(aten.amax.default(p, [-1], True), LEAST_NORM)
    total = aten.clamp_min.default(aten.sum.dim_IntList(e, [-1], True), 1.0)
    y: Tensor = aten.matmul.default(whole(p, greatest), v)
    factor = aten.div.Tensor(aten.mul.Scalar(greatest, STEP), total)
    result: Tensor = aten.mul.Tensor(y, factor)
    return result
