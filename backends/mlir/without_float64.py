"""ATen ops that torch-mlir writes with float64 inside, written without it: TOSA has none."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

_LEAST = torch.finfo(torch.float32).min


def without_float64() -> dict[Any, Callable[..., Any]]:
    """A decomposition table; norms, variances and softmax of attention come out in the tensors' own type."""
    norms: dict[Any, Any] = torch._decomp.get_decompositions(
        [aten.native_layer_norm.default, aten.native_group_norm.default]
    )
    return norms | {
        aten.var_mean.correction: _var_mean,
        aten.var.correction: lambda *args, **options: _var_mean(*args, **options)[0],
        aten._safe_softmax.default: _safe_softmax,
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
