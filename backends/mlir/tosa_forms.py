"""ATen ops in other words, because of how torch-mlir writes them: with float64 inside, which TOSA has not, or with
slices whose start or end is left out, which it does not take there."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

_LEAST = torch.finfo(torch.float32).min


def tosa_forms() -> dict[Any, Callable[..., Any]]:
    """A decomposition table for graphs of fixed sizes."""
    norms: dict[Any, Any] = torch._decomp.get_decompositions(
        [aten.native_layer_norm.default, aten.native_group_norm.default]
    )
    return norms | {
        aten.var_mean.correction: _var_mean,
        aten.var.correction: lambda *args, **options: _var_mean(*args, **options)[0],
        aten._safe_softmax.default: _safe_softmax,
        aten.roll.default: _roll,
        aten.slice.Tensor: _slice,
    }


def _var_mean(
    x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    dims = list(range(x.dim())) if dim is None else list(dim)
    count = math.prod(x.shape[d] for d in dims)
    mean = aten.mean.dim(x, dims, True)
    centred = aten.sub.Tensor(x, mean)
    squares = aten.sum.dim_IntList(aten.mul.Tensor(centred, centred), dims, keepdim)
    variance = aten.div.Scalar(squares, count - (1 if correction is None else correction))
    return variance, mean if keepdim else aten.squeeze.dims(mean, dims)


def _safe_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Softmax in which a row of -inf gives zeros: elsewhere the greatest term counts 1, so a sum is at least 1."""
    x = x if dtype is None else aten.to.dtype(x, dtype)
    greatest = aten.clamp.default(aten.amax.default(x, [dim], True), _LEAST)
    e = aten.exp.default(aten.sub.Tensor(x, greatest))
    return aten.div.Tensor(e, aten.clamp.default(aten.sum.dim_IntList(e, [dim], True), 1.0))  # type: ignore[no-any-return]


def _roll(x: Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Tensor:
    if not dims:
        return _roll(x.flatten(), shifts, [0]).reshape(x.shape)
    for shift, dim in zip(shifts, dims, strict=True):
        size = x.shape[dim]
        kept = size - shift % size
        parts = [aten.slice.Tensor(x, dim, kept, size), aten.slice.Tensor(x, dim, 0, kept)]
        x = aten.cat.default(parts if kept < size else parts[1:], dim)
    return x


def _slice(x: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    if start is not None and end is not None:
        return NotImplemented
    return aten.slice.Tensor(x, dim, start or 0, x.shape[dim] if end is None else end, step)
