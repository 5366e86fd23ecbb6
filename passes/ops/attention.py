"""Float32 products of two activations: ``t3c::matmul_f32`` and ``t3c::attention_f32``.

Every output of a product is one chain of fused multiply-adds over the reduction, in order, from zero.
"""

import torch
from torch import Tensor

from t3c_compile.passes.ops.float_math import TORCH, chain_matmul, fast_exp, fma, row_sum


def _lead(a: Tensor, b: Tensor) -> list[int]:
    """The leading dimensions of a product."""
    return list(torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]))  # type: ignore[no-untyped-call]


_LEAST = torch.finfo(torch.float32).min


@torch.library.custom_op("t3c::matmul_f32", mutates_args=())
def matmul_f32(a: Tensor, b: Tensor) -> Tensor:
    """float32 ``a`` [..., n, k] times ``b`` [..., k, m] -> [..., n, m]; leading dimensions broadcast."""
    lead = _lead(a, b)
    left, right = (t.expand(*lead, *t.shape[-2:]).reshape(-1, *t.shape[-2:]) for t in (a, b))
    return chain_matmul(left, right).reshape(*lead, a.shape[-2], b.shape[-1])


@matmul_f32.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    lead = _lead(a, b)
    return a.new_empty((*lead, a.shape[-2], b.shape[-1]))


def matmul_aten(a: Tensor, b: Tensor) -> Tensor:
    """``t3c::matmul_f32`` in ATen ops."""
    y: Tensor = torch.ops.aten.matmul.default(a, b)
    return y


@torch.library.custom_op("t3c::attention_f32", mutates_args=())
def attention_f32(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """Scaled dot-product attention: float32 ``query`` [B, H, L, D], ``key`` [B, G, S, D], ``value`` [B, G, S, E] ->
    [B, H, L, E]. H is a multiple of G: query head h reads key head ``h // (H / G)``.

    ``attn_mask`` broadcasts to [B, H, L, S]; float32 is added, bool says what takes part. ``is_causal``: row i takes
    the keys up to i. A row that no key takes part in gives zeros, as in torch. ::

        s = (query @ key.T) * scale + mask        (fused where there is a float mask; -inf for what takes no part)
        e = exp(s - max(s))                       (0 below 2**-126)
        y = (e @ value) * (1 / sum(e))

    Values that take no part must be finite.
    """
    batch, heads, rows, width = query.shape
    groups, keys = key.shape[1:3]
    grouped = query.reshape(batch * groups, -1, width)
    products = chain_matmul(grouped, key.reshape(batch * groups, keys, width).transpose(1, 2))
    s = products.reshape(batch, heads, rows, keys)
    s = mask_scores(s, torch.tensor(scale, dtype=torch.float32), attn_mask, is_causal)
    e, inverse = exponentials(s)
    y = chain_matmul(e.reshape(*grouped.shape[:2], keys), value.reshape(batch * groups, keys, -1))
    return y.reshape(batch, heads, rows, -1) * inverse


def mask_scores(products: Tensor, scale: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """Scores [B, H, L, S] of ``products``: times ``scale``, with the mask; -inf for what takes no part."""
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        s = fma(products, scale, attn_mask)
    else:
        s = products * scale
        if attn_mask is not None:
            s = torch.where(attn_mask, s, -torch.inf)
    if is_causal:
        s = torch.where(torch.ones(s.shape[-2:], dtype=torch.bool).tril(), s, -torch.inf)
    return s


def exponentials(scores: Tensor) -> tuple[Tensor, Tensor]:
    """``exp(s - max(s))`` of every row of ``scores``, and one over their sum, [..., 1]."""
    e = fast_exp(TORCH, scores - scores.amax(-1, keepdim=True).clamp_min(_LEAST))
    # The greatest score counts 1, so a sum is 0 or at least 1.
    return e, 1.0 / row_sum(e).clamp_min(1.0)


@attention_f32.register_fake
def attended(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """What attention gives, without values."""
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def attention_aten(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """``t3c::attention_f32`` in ATen ops."""
    y: Tensor = torch.ops.aten.scaled_dot_product_attention.default(
        query,
        key,
        value,
        attn_mask,
        0.0,
        is_causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return y
