"""What each op makes of affine forms: of the full model's ops in float32, and of deployed layers with their integers.

A profile's integers are real numbers with an error of at most half a step at every rounding, clamps included. Forms
enclose what float32 computes, in any order of its sums: products get ``n 2**-24`` of their terms' magnitudes for n
terms (N. Higham, "Accuracy and stability of numerical algorithms", 2002, section 3.1) and sixteen roundings more, other
ops more than the few they do. That leaves room for what float64 rounds off here, which is a millionth of one of them.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from t3c_compile.affine import Affine, BoundError
from t3c_compile.passes.elastic import DenseConv2d, ElasticLayer
from t3c_compile.passes.elastic.conv import SvdConv2d, ThreeFactorConv2d
from t3c_compile.passes.ops.nested import keep_top_bits
from t3c_compile.passes.ops.quantize import quantize_int8

# Relative errors: of a few float32 roundings after one another, of one, and of float64 sums.
_FEW, _ONE, _DOUBLE = 2.0**-20, 2.0**-24, 2.0**-40

# A rounding's step, with what float32 rounds on the way to at most 255 of them.
_STEP = 1 + 2.0**-10

Product = Callable[[Tensor, Tensor], Tensor]
Arguments = Mapping[str, Any]


def _product(x: Affine, weight: Tensor, product: Product, error: float, magnitudes: Tensor | None = None) -> Affine:
    """A product with ``weight``, off by at most ``error`` times that of magnitudes."""
    y = x.mapped(lambda t: product(t, weight))
    return y.widened(error * product(x.magnitude(), weight.abs() if magnitudes is None else magnitudes))


def _few(x: Affine) -> Affine:
    """After a few float32 roundings."""
    return x.widened(_FEW * x.magnitude())


def _biased(y: Affine, bias: Tensor | None, product: Product) -> Affine:
    if bias is None:
        return _few(y)
    bias = bias.double() if product is F.linear else _channels(bias.double(), y)
    return y.shifted(bias).widened(_FEW * (y.magnitude() + bias.abs()))


def _channels(values: Tensor, like: Affine) -> Tensor:
    """[C] to broadcast over [n, C, ...]."""
    return values.reshape(-1, *[1] * (like.center.dim() - 2))


# -- layers of the full model -----------------------------------------------------------------------------------------


def elastic(layer: ElasticLayer, x: Affine) -> Affine:
    """An elastic layer at full rank in float32, its factors multiplied in any order."""
    factors = {name: factor.double() for name, (factor, _) in layer.factors().items()}
    weight = layer.compose(factors, layer.max_rank)
    magnitudes = layer.compose({name: factor.abs() for name, factor in factors.items()}, layer.max_rank)
    terms = sum(len(factor) if name == "u" else factor[0].numel() for name, factor in factors.items())
    product: Product = F.linear
    if isinstance(layer, SvdConv2d | ThreeFactorConv2d | DenseConv2d):
        product = partial(layer.conv.convolve, groups=layer.groups if isinstance(layer, DenseConv2d) else 1)
    return _biased(_product(x, weight, product, _sums(terms), magnitudes), layer.bias, product)


def _sums(terms: int) -> float:
    """Relative error of a float32 sum of products, with room for a few roundings more."""
    error = (terms + 16) * _ONE
    return error / (1 - error)


def _float_linear(a: Arguments) -> Affine:
    y = _product(a["input"], a["weight"].double(), F.linear, _sums(a["weight"].shape[1]))
    return _biased(y, a["bias"], F.linear)


def _float_conv2d(a: Arguments) -> Affine:
    product = partial(_convolve, **{key: a[key] for key in ("stride", "padding", "dilation", "groups")})
    weight = a["weight"].double()
    return _biased(_product(a["input"], weight, product, _sums(weight[0].numel())), a["bias"], product)


def _batch_norm(a: Arguments) -> Affine:
    if a["training"]:
        raise BoundError("batch norm in training mode has no worst-case bound: call model.eval()")
    mean, gain = a["running_mean"].double(), torch.rsqrt(a["running_var"].double() + a["eps"])
    x: Affine = a["input"]
    gain = _channels(gain if a["weight"] is None else gain * a["weight"].double(), x)
    mean = _channels(mean, x)
    bias = torch.zeros_like(mean) if a["bias"] is None else _channels(a["bias"].double(), x)
    error = _FEW * (gain.abs() * (x.magnitude() + mean.abs()) + bias.abs())
    return x.scaled(gain).shifted(bias - mean * gain).widened(error)


# -- deployed layers --------------------------------------------------------------------------------------------------


def _quantize(a: Arguments) -> Affine:
    """The real values that the integers stand for."""
    scale, zero = a["scale"], a["zero_point"]
    x: Affine = a["x"]
    low, high = x.bounds()
    # What is rounded is float32. The op itself rounds the last such numbers within the range; it does not fall.
    ends = low.float(), high.float()
    ends = (
        torch.where(ends[0] < low, ends[0].nextafter(high.float()), ends[0]),
        torch.where(ends[1] > high, ends[1].nextafter(low.float()), ends[1]),
    )
    first, last = ((quantize_int8(end, scale, zero).double() - zero) * scale for end in ends)
    return x.rounded(scale * _STEP, (-128 - zero) * scale, (127 - zero) * scale, first, last)


def _convolve(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int = 1) -> Tensor:
    return F.conv2d(x, weight, None, stride, padding, dilation, groups)


def _pointwise(x: Tensor, weight: Tensor, stride: Any = 1) -> Tensor:
    return F.conv2d(x, weight[:, :, None, None], None, stride)


def _integers(a: Arguments, name: str) -> Tensor:
    """A factor at the profile's width, cut at its rank."""
    factor = a[name]
    rank = len(factor) if "rank" not in a else min(a["rank"], len(factor))
    kept: Tensor = keep_top_bits(factor[:rank], a["bits"]).double()
    return kept


def _rows(weight: Tensor, gain: Tensor | float) -> Tensor:
    """``weight`` with every row times its own number."""
    if isinstance(gain, float):
        return weight * gain
    return weight * gain.double()[: len(weight)].reshape(-1, *[1] * (weight.dim() - 1))


def _middle(x: Affine, weight: Tensor, product: Product) -> Affine:
    """The int8 tensor between two factors, ``weight`` in its units."""
    y = _product(x, weight, product, _DOUBLE)
    low, high = y.bounds()
    first, last = (
        torch.clamp(torch.round(end), -127, 127) for end in (low - _FEW * low.abs(), high + _FEW * high.abs())
    )
    return y.rounded(_STEP, -127.0, 127.0, first, last)


def _last(x: Affine, a: Arguments, scale: float, product: Product) -> Affine:
    weight = _rows(_integers(a, "u").T, scale)
    if a["out_gain"] is not None:
        weight = _rows(weight, a["out_gain"])
    return _biased(_product(x, weight, product, _DOUBLE), a["bias"], product)


def _dense(a: Arguments, product: Product) -> Affine:
    return _biased(_product(a["x"], _rows(_integers(a, "weight"), a["scale"]), product, _DOUBLE), a["bias"], product)


def _int8_conv2d(a: Arguments) -> Affine:
    return _dense(a, partial(_convolve, **{key: a[key] for key in ("stride", "padding", "dilation", "groups")}))


def _svd(a: Arguments, first: Product, last: Product) -> Affine:
    v = _rows(_rows(_integers(a, "v"), a["mid_scale"]), 1 / a["h_scale"])
    return _last(_middle(a["x"], v, first), a, a["h_scale"], last)


def _three(a: Arguments, depthwise: bool) -> Affine:
    v = _rows(_rows(_integers(a, "v"), a["mid_scale"]), 1 / a["h_scale"])
    core = _integers(a, "core")
    core = core[:, None] if depthwise else core[:, : len(v)]
    core = _rows(_rows(core, a["core_scale"]), a["h_scale"] / a["g_scale"])
    product = partial(_convolve, **{key: a[key] for key in ("stride", "padding", "dilation")})
    if depthwise:
        product = partial(product, groups=len(v))
    g = _middle(_middle(a["x"], v, _pointwise), core, product)
    return _last(g, a, a["g_scale"], _pointwise)


# -- the rest ---------------------------------------------------------------------------------------------------------


def _add(a: Arguments) -> Affine:
    x, y = a["self"], a["other"]
    if not isinstance(y, Affine) or a["alpha"] != 1 or x.center.shape != y.center.shape:
        raise BoundError("only an addition of two computed tensors of one shape has a worst-case bound")
    return _few(x + y)


def _mean(x: Affine, over: list[int], keepdim: bool) -> Affine:
    rank = x.center.dim()
    over = [dim % rank for dim in over]
    if 0 in over:
        raise BoundError("a mean over the batch has no worst-case bound")
    y = x.mapped(lambda t: t.mean(over, keepdim))
    terms = math.prod(x.center.shape[dim] for dim in over)
    return y.widened(_sums(terms) * x.magnitude().mean(over, keepdim))


def _pooled(a: Arguments) -> Affine:
    if set(a["output_size"]) != {1}:
        raise BoundError(f"pooling to {list(a['output_size'])} has no worst-case bound; to 1 it has")
    return _mean(a["self"], [-2, -1], True)


def _reshaped(a: Arguments) -> Affine:
    """To sizes of which the first is the batch."""
    x: Affine = a["self"]
    batch, *sizes = a["size"] if "size" in a else a["shape"]
    shape = x.center.reshape(-1, *sizes).shape if -1 not in sizes else x.center.reshape(1, *sizes).shape
    if batch not in (1, -1) or shape[0] != 1:
        raise BoundError("a reshaping of the batch has no worst-case bound")
    return x.mapped(lambda t: t.reshape(len(t), *shape[1:]))


def _flattened(a: Arguments) -> Affine:
    if a["start_dim"] in (0, -a["self"].center.dim()):
        raise BoundError("flattening the batch has no worst-case bound")
    return a["self"].mapped(lambda t: t.flatten(a["start_dim"], a["end_dim"]))  # type: ignore[no-any-return]


def _dropout(a: Arguments) -> Affine:
    if a["train"]:
        raise BoundError("dropout in training mode has no worst-case bound: call model.eval()")
    x: Affine = a["input"]
    return x


RELU = ("aten.relu.default", "aten.relu_.default")
OPS: dict[str, Callable[[Arguments], Any]] = {
    "aten.linear.default": _float_linear,
    "aten.conv2d.default": _float_conv2d,
    "aten.conv2d.padding": _float_conv2d,
    "aten.batch_norm.default": _batch_norm,
    "t3c.quantize_int8.default": _quantize,
    "t3c.int8_linear.default": lambda a: _dense(a, F.linear),
    "t3c.int8_conv2d.default": _int8_conv2d,
    "t3c.svd_linear.default": lambda a: _svd(a, F.linear, F.linear),
    "t3c.svd_conv2d.default": lambda a: _svd(a, partial(_pointwise, stride=a["stride"]), _pointwise),
    "t3c.tucker2_conv2d.default": lambda a: _three(a, depthwise=False),
    "t3c.cp_conv2d.default": lambda a: _three(a, depthwise=True),
    "aten.add.Tensor": _add,
    "aten.mean.dim": lambda a: _mean(a["self"], a["dim"], a["keepdim"]),
    "t3c.mean_f32.default": lambda a: _mean(a["x"], a["dim"], a["keepdim"]),
    "aten.adaptive_avg_pool2d.default": _pooled,
    "aten.flatten.using_ints": _flattened,
    "aten.view.default": _reshaped,
    "aten.reshape.default": _reshaped,
    "aten.sym_size.int": lambda a: a["self"].center.shape[a["dim"]],
    "aten.dropout.default": _dropout,
}
