"""The ``t3c::`` products as stages of one integer convolution each: linear layers are 1x1 ones.

A 1x1 convolution on [1, rows, rows, columns] costs a tenth of TOSA's MATMUL on an Ethos-U, and weights stay constants.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from t3c_compile.backends.ethosu.program import Array, Pair
from t3c_compile.passes.ops import keep_top_bits

# A bias in units of the sums, with room for the sums in 32 bits.
_BIAS_MAX = 2.0**30
_ONE: Pair = (1, 1)
_NONE: Pair = (0, 0)


class CannotRunError(Exception):
    """The NPU cannot run a layer; the message is the reason."""


@dataclass(frozen=True)
class Stage:
    """A convolution of int8 by int8: ``weight`` [out, kh, kw, in], depthwise [kh, kw, channels, 1].

    One of the sums is worth ``scale`` [out]; ``bias`` [out] is in sums. The result is requantized to symmetric int8 of
    scale ``middle``, or is the layer's where that is 0.
    """

    weight: Array
    scale: Array
    bias: Array
    stride: Pair = _ONE
    padding: Pair = _NONE
    dilation: Pair = _ONE
    depthwise: bool = False
    middle: float = 0.0

    @property
    def outputs(self) -> int:
        return len(self.scale)


def stages_of(name: str, arguments: Mapping[str, Any]) -> list[Stage]:
    """The stages of ``t3c::name``; ``arguments`` by schema name, weights as tensors.

    Raises:
        CannotRunError: with the reason.
    """
    if name not in _STAGES:
        raise CannotRunError(_REASONS.get(name, f"the NPU has no {name}"))
    *middles, last = _STAGES[name](arguments)
    bias = arguments["bias"]
    return [*middles, last if bias is None else _with_bias(last, bias)]


def _top(weight: torch.Tensor, bits: int) -> Array:
    return keep_top_bits(weight, bits).numpy()


def _pointwise(weight: Array, scale: torch.Tensor, **options: Any) -> Stage:
    """``weight`` [out, in]."""
    return _stage(weight[:, None, None, :], scale, **options)


def _stage(weight: Array, scale: torch.Tensor, **options: Any) -> Stage:
    """``scale``: of each channel's sums, in units of the middle where the stage has one.

    RESCALE takes no negative gains (batch norm gives some): the channel's weights change sign instead."""
    scales = scale.to(torch.float64).numpy() * options.get("middle", 1.0)
    sign = np.where(scales < 0, -1, 1).astype(np.int8)
    shape = (1, 1, -1, 1) if options.get("depthwise") else (-1, 1, 1, 1)
    weight = weight * sign.reshape(shape)
    return Stage(weight, np.abs(scales), np.zeros(len(scales), np.int64), **options)


def _with_bias(stage: Stage, bias: torch.Tensor) -> Stage:
    """``bias`` rounded to whole sums. A channel whose sums are worth next to nothing has them in larger units."""
    values = bias.to(torch.float64).numpy()
    sums = values / np.maximum(stage.scale, 1e-300)
    constant = np.abs(sums) > _BIAS_MAX
    if not constant.any():
        return replace(stage, bias=np.rint(sums).astype(np.int64))
    weight = stage.weight.copy()
    reach = 255.0 * 119.0 * weight[..., 0].size if stage.depthwise else 255.0 * 119.0 * weight[0].size
    lost = (stage.scale * reach)[constant] / np.abs(values[constant])
    if (lost > 2.0**-10).any():
        raise CannotRunError("its bias is beyond 32 bits in units of its sums")
    weight[(slice(None), slice(None), constant) if stage.depthwise else constant] = 0
    scale = np.where(constant, np.abs(values) / 2.0**20, stage.scale)
    return replace(stage, weight=weight, scale=scale, bias=np.rint(values / np.maximum(scale, 1e-300)).astype(np.int64))


def _int8_linear(a: Mapping[str, Any]) -> list[Stage]:
    return [_pointwise(_top(a["weight"], a["bits"]), a["scale"] * a["x_scale"])]


def _int8_conv2d(a: Mapping[str, Any]) -> list[Stage]:
    weight, groups = _top(a["weight"], a["bits"]), a["groups"]
    outputs, inner = weight.shape[:2]
    geometry = _geometry(a)
    if groups == 1:
        return [_stage(weight.transpose(0, 2, 3, 1), a["scale"] * a["x_scale"], **geometry)]
    if inner != 1 or outputs != groups:
        raise CannotRunError(f"it is a convolution in {groups} groups; TOSA has whole and depthwise ones")
    return [_stage(weight.transpose(2, 3, 0, 1), a["scale"] * a["x_scale"], depthwise=True, **geometry)]


def _geometry(a: Mapping[str, Any]) -> dict[str, Pair]:
    return {name: tuple(a[name]) for name in ("stride", "padding", "dilation")}


def _outwards(a: Mapping[str, Any], rank: int, scale: float) -> Stage:
    gain = torch.ones(a["u"].shape[1]) if a["out_gain"] is None else a["out_gain"]
    return _pointwise(_top(a["u"][:rank], a["bits"]).T, gain * scale)


def _svd(a: Mapping[str, Any]) -> list[Stage]:
    rank = a["rank"]
    scale = a["mid_scale"][:rank] * (a["x_scale"] / a["h_scale"])
    stride = tuple(a.get("stride", _ONE))
    first = _pointwise(_top(a["v"][:rank], a["bits"]), scale, stride=stride, middle=a["h_scale"])
    return [first, _outwards(a, rank, a["h_scale"])]


def _three_factors(a: Mapping[str, Any], depthwise: bool) -> list[Stage]:
    bits = a["bits"]
    inner, outer = min(a["rank"], a["v"].shape[0]), min(a["rank"], a["u"].shape[0])
    scale = a["mid_scale"][:inner] * (a["x_scale"] / a["h_scale"])
    first = _pointwise(_top(a["v"][:inner], bits), scale, middle=a["h_scale"])
    if depthwise:
        core = _top(a["core"][:outer], bits).transpose(1, 2, 0)[..., None]
    else:
        core = _top(a["core"][:outer, :inner], bits).transpose(0, 2, 3, 1)
    scale = a["core_scale"][:outer] * (a["h_scale"] / a["g_scale"])
    second = _stage(core, scale, middle=a["g_scale"], depthwise=depthwise, **_geometry(a))
    return [first, second, _outwards(a, outer, a["g_scale"])]


_STAGES: dict[str, Callable[[Mapping[str, Any]], list[Stage]]] = {
    "int8_linear": _int8_linear,
    "int8_conv2d": _int8_conv2d,
    "svd_linear": _svd,
    "svd_conv2d": _svd,
    "tucker2_conv2d": lambda a: _three_factors(a, False),
    "cp_conv2d": lambda a: _three_factors(a, True),
}
_REASONS = {
    "weight_only_linear": "its activations are float32, and the NPU has no floats",
    "svd_weight_only_linear": "its activations are float32, and the NPU has no floats",
    "int8_embedding": "look-ups are cheaper on the host",
    "attention_f32": "its products are of two float32 tensors, and the NPU has no floats: snap with int8 attention",
    "attention_int8": "its mask is added in float32, and the NPU has no floats: give one of true and false",
    "integer_rows": "its rows are rounded by their own greatest numbers, which are float32",
    "exponentials": "it is float32, and the NPU has no floats",
    "matmul_f32": "its product is of two float32 tensors, and the NPU has no floats",
    "layer_norm_f32": "its mean and variance are float32, and the NPU has no floats",
    "rms_norm_f32": "its mean square is float32, and the NPU has no floats",
    "softmax_f32": "it is float32, and the NPU has no floats",
    "linear": "it is float32 (32 bits), and the NPU has no floats",
    "conv2d": "it is float32 (32 bits), and the NPU has no floats",
}
