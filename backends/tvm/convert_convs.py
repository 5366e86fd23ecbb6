"""Convolutions and max pooling to Relax: images go from kernel to kernel channels-last."""

from functools import partial
from typing import Any

import torch
from torch import fx
from tvm import relax

from t3c_compile.backends.tvm.kernels import conv, pack
from t3c_compile.backends.tvm.kernels.window import Window
from t3c_compile.backends.tvm.lowering import Arguments, Converter, Lowering, scalars
from t3c_compile.backends.tvm.relax_shapes import dims, shape_of


def window_of(a: Arguments, size: list[Any], kernel: list[int]) -> Window:
    pairs = ((int(v[0]), int(v[1])) for v in (a["stride"], a["padding"], a["dilation"]))
    return Window((size[0], size[1]), (kernel[0], kernel[1]), *pairs)


def _images(lower: Lowering, x: fx.Node, single: bool) -> tuple[relax.Expr, list[Any], list[float]]:
    """What a convolution of int8 images ``x`` reads, their shape channels-last, and the numbers for planes.

    Planes are read where ``x`` is quantized from few of them. ``single``: the window reads single pixels, not all.
    """
    planes = x.args[0] if x.target == torch.ops.t3c.quantize_int8.default else None
    channels = x.meta["val"].shape[1]
    if not isinstance(planes, fx.Node) or lower.has_activations(x) or channels > conv.MOST_PLANES or single:
        images = lower.activations(x)
        return images, shape_of(images), []
    batch, _, *size = shape_of(lower.value(planes))
    scale, zero_point = x.args[1:]
    return lower.value(planes), [batch, *size, channels], [1 / scale, zero_point]  # type: ignore[operator, list-item]


def _int8_conv2d(lower: Lowering, a: Arguments) -> relax.Var | None:
    raw = shape_of(lower.value(a["weight"]))
    single = raw[2:] == [1, 1] and max(a["stride"]) > 1
    x, (batch, *size, channels), planes = _images(lower, a["x"], single)
    window = window_of(a, size, raw[2:])
    spec = conv.ConvSpec(
        dims([batch])[0],
        channels,
        raw[0],
        window,
        a["groups"],
        a["bits"],
        bias=a["bias"] is not None,
        finish=lower.image_finish,
        planes=bool(planes),
    )
    weight = lower.weights(a["weight"], spec.packing(lower.isa), a["bits"])
    numbers = scalars(a["x_scale"], a["x_zero_point"], *planes)
    args = [x, numbers, weight, lower.value(a["scale"]), lower.optional(a["bias"])]
    return lower.call_fused(lower.kernel(spec), args, [batch, *window.out, raw[0]], channels_last=True)


def _conv_chain(form: str, lower: Lowering, a: Arguments) -> relax.Var | None:
    x, (batch, *size, channels), planes = _images(lower, a["x"], form == "svd" and max(a["stride"]) > 1)
    (r_in, _), (r_out, outputs) = shape_of(lower.value(a["v"])), shape_of(lower.value(a["u"]))
    if form == "svd":
        window = window_of({"stride": a["stride"], "padding": (0, 0), "dilation": (1, 1)}, size, [1, 1])
    else:
        window = window_of(a, size, shape_of(lower.value(a["core"]))[-2:])
    spec = conv.ChainSpec(
        form,
        dims([batch])[0],
        channels,
        outputs,
        window,
        (r_in, r_out),
        a["rank"],
        a["bits"],
        gain=a["out_gain"] is not None,
        bias=a["bias"] is not None,
        finish=lower.image_finish,
        planes=bool(planes),
    )
    h_scale, core = a["h_scale"], spec.core_packing(lower.isa)
    last = a.get("g_scale", h_scale)
    args = [
        x,
        scalars(a["x_scale"] / h_scale, a["x_zero_point"], h_scale / last, last, *planes),
        lower.weights(a["v"], pack.words_of_matrix(lower.isa, (r_in, channels)), a["bits"]),
        None if core is None else lower.weights(a["core"], core, a["bits"]),
        lower.weights(a["u"], pack.words_of_matrix(lower.isa, (r_out, outputs), transposed=True), a["bits"]),
        lower.value(a["mid_scale"]),
        lower.optional(a.get("core_scale")),
        lower.optional(a["out_gain"]),
        lower.optional(a["bias"]),
    ]
    return lower.call_fused(lower.kernel(spec), args, [batch, *window.out, outputs], channels_last=True)


def _max_pool2d(lower: Lowering, a: Arguments) -> relax.Var | None:
    if not lower.is_fused:
        return lower.default()
    rounded = a["self"].meta["val"].dtype == torch.int8
    x = lower.activations(a["self"]) if rounded else lower.channels_last(a["self"])
    batch, *size, channels = shape_of(x)
    kernel, stride, padding = ([v[0], v[-1]] for v in (a["kernel_size"], a["stride"] or a["kernel_size"], a["padding"]))
    window = window_of({"stride": stride, "padding": padding, "dilation": (1, 1)}, size, kernel)
    rows, columns = lower.node.meta["val"].shape[2:]
    known, shape = (dims([batch])[0], channels, window, (rows, columns)), [batch, rows, columns, channels]
    if rounded:
        dtype = lower.isa.activation_dtype
        pooled = lower.call(lower.kernels.max_pool2d(*known, dtype=dtype), [x], shape, dtype)
        return lower.int8_images(lower.node, pooled)
    pooled = lower.kernels.max_pool2d(*known, lower.image_finish)
    return lower.call_fused(pooled, [x], shape, channels_last=True)


CONV_CONVERTERS: dict[str, Converter] = {
    "int8_conv2d.default": _int8_conv2d,
    "svd_conv2d.default": partial(_conv_chain, "svd"),
    "tucker2_conv2d.default": partial(_conv_chain, "tucker2"),
    "cp_conv2d.default": partial(_conv_chain, "cp"),
    "max_pool2d.default": _max_pool2d,
}
