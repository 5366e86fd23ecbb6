"""The table from ops to CUDA kernels, where they are not those of the CPU's table with other kernels below them.

A chain is a kernel a factor; its int8 middles stand in memory.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from tvm import relax

from t3c_compile.backends.tvm.convert import CONVERTERS, attention
from t3c_compile.backends.tvm.convert_convs import window_of
from t3c_compile.backends.tvm.convert_floats import CallLast, attention_f32
from t3c_compile.backends.tvm.cuda import attention as kernels
from t3c_compile.backends.tvm.cuda.float_gemm import FloatLayerSpec, float_layer
from t3c_compile.backends.tvm.cuda.layers import CHAIN_END, MIDDLE, LayerSpec, layer
from t3c_compile.backends.tvm.cuda.pack import taps_of_depthwise, words_of_conv, words_of_matrix
from t3c_compile.backends.tvm.kernels.attention_heads import AttentionSpec
from t3c_compile.backends.tvm.lowering import Arguments, Converter, Lowering, scalars
from t3c_compile.backends.tvm.relax_shapes import dims, shape_of


def _args(lower: Lowering, s: LayerSpec, x: relax.Expr, numbers: relax.Expr, weight: Any) -> list[relax.Expr | None]:
    """What every int8 layer takes first."""
    sums = lower.packed(weight, s.packing.sums(s.bits)) if s.has_sums else None
    return [x, numbers, lower.packed(weight, s.packing), sums]


def _middle(
    lower: Lowering,
    s: LayerSpec,
    x: relax.Expr,
    factor: float,
    zero_point: int,
    weight: Any,
    scale: Any,
    lead: list[Any],
) -> relax.Var:
    """A chain's next int8 middle."""
    args = [*_args(lower, s, x, scalars(factor, zero_point), weight), lower.value(scale)]
    return lower.call(layer(s), args, [*lead, s.outputs], "int8")


def _int8_linear(lower: Lowering, a: Arguments) -> relax.Var | None:
    x, (outputs, inputs) = lower.value(a["x"]), shape_of(lower.value(a["weight"]))
    lead = shape_of(x)[:-1]
    packing = words_of_matrix((outputs, inputs))
    s = LayerSpec(dims(lead), inputs, outputs, packing, a["bits"], bias=a["bias"] is not None, zero_point=True)
    s = replace(s, finish=lower.finish)
    args = _args(lower, s, x, scalars(a["x_scale"], a["x_zero_point"]), a["weight"])
    return lower.call_fused(layer(s), [*args, lower.value(a["scale"]), lower.optional(a["bias"])], [*lead, outputs])


def _svd_linear(lower: Lowering, a: Arguments) -> relax.Var | None:
    x, v = lower.value(a["x"]), shape_of(lower.value(a["v"]))
    lead = shape_of(x)[:-1]
    s = LayerSpec(dims(lead), v[1], a["rank"], words_of_matrix((v[0], v[1])), a["bits"], MIDDLE, zero_point=True)
    h = _middle(lower, s, x, a["x_scale"] / a["h_scale"], a["x_zero_point"], a["v"], a["mid_scale"], lead)
    return _chain_end(lower, a, h, a["rank"], a["h_scale"], lead, images=False)


def _chain_end(
    lower: Lowering, a: Arguments, h: relax.Expr, rank: int, h_scale: float, lead: list[Any], images: bool
) -> relax.Var | None:
    stored, outputs = shape_of(lower.value(a["u"]))
    gain, bias = a["out_gain"], a["bias"]
    s = LayerSpec(
        dims(lead),
        rank,
        outputs,
        words_of_matrix((stored, outputs), transposed=True),
        a["bits"],
        CHAIN_END,
        gain is not None,
        bias is not None,
        finish=lower.image_finish if images else lower.finish,
    )
    args = [*_args(lower, s, h, scalars(h_scale, 0), a["u"]), lower.optional(gain), lower.optional(bias)]
    return lower.call_fused(layer(s), args, [*lead, outputs], channels_last=images)


def _int8_conv2d(lower: Lowering, a: Arguments) -> relax.Var | None:
    raw, x = shape_of(lower.value(a["weight"])), lower.activations(a["x"])
    batch, *size, channels = shape_of(x)
    window, groups = window_of(a, size, raw[2:]), a["groups"]
    depthwise = groups == channels == raw[0] and groups > 1
    lead = [batch, *window.out]
    s = LayerSpec(
        dims(lead),
        raw[1],
        raw[0],
        taps_of_depthwise(tuple(raw)) if depthwise else words_of_conv(tuple(raw)),
        a["bits"],
        bias=a["bias"] is not None,
        zero_point=True,
        window=window,
        groups=groups,
        depthwise=depthwise,
        finish=lower.image_finish,
    )
    args = _args(lower, s, x, scalars(a["x_scale"], a["x_zero_point"]), a["weight"])
    args += [lower.value(a["scale"]), lower.optional(a["bias"])]
    return lower.call_fused(layer(s), args, [*lead, raw[0]], channels_last=True)


def _conv_chain(form: str, lower: Lowering, a: Arguments) -> relax.Var | None:
    x, v, bits = lower.activations(a["x"]), shape_of(lower.value(a["v"])), a["bits"]
    batch, *size, channels = shape_of(x)
    k_in, k_out = (min(a["rank"], shape_of(lower.value(a[name]))[0]) for name in "vu")
    single = form == "svd"
    window = (
        window_of({"stride": a["stride"], "padding": (0, 0), "dilation": (1, 1)}, size, [1, 1])
        if single
        else window_of(a, size, shape_of(lower.value(a["core"]))[-2:])
    )
    out = [batch, *window.out]
    lead = out if single else [batch, *size]
    s = LayerSpec(dims(lead), channels, k_in, words_of_matrix((v[0], channels)), bits, MIDDLE, zero_point=True)
    s = replace(s, window=window) if single else s
    h = _middle(lower, s, x, a["x_scale"] / a["h_scale"], a["x_zero_point"], a["v"], a["mid_scale"], lead)
    last = a["h_scale"]
    if not single:
        core, last = tuple(shape_of(lower.value(a["core"]))), a["g_scale"]
        if form == "cp":
            s = LayerSpec(dims(out), 1, k_out, taps_of_depthwise(core), bits, MIDDLE, groups=k_out, depthwise=True)
        else:
            s = LayerSpec(dims(out), k_in, k_out, words_of_conv(core), bits, MIDDLE)
        s = replace(s, window=window)
        h = _middle(lower, s, h, a["h_scale"] / last, 0, a["core"], a["core_scale"], out)
    return _chain_end(lower, a, h, k_out, last, out, images=True)


def _weight_only_linear(lower: Lowering, a: Arguments) -> relax.Var | None:
    x, (outputs, inputs) = lower.value(a["x"]), shape_of(lower.value(a["weight"]))
    lead, bias = shape_of(x)[:-1], a["bias"]
    s = FloatLayerSpec(
        dims(lead), inputs, outputs, (outputs, inputs), a["bits"], False, outputs, bias is not None, lower.finish
    )
    args = [x, *(lower.value(a[name]) for name in ("weight", "scale")), lower.optional(bias)]
    return lower.call_fused(float_layer(s), args, [*lead, outputs])


def _svd_weight_only_linear(lower: Lowering, a: Arguments) -> relax.Var | None:
    x, v, u = lower.value(a["x"]), *(tuple(shape_of(lower.value(a[name]))) for name in "vu")
    lead, bias, rank = shape_of(x)[:-1], a["bias"], a["rank"]
    first = FloatLayerSpec(dims(lead), v[1], rank, v, a["bits"], scale=v[0])
    args = [x, *(lower.value(a[name]) for name in ("v", "mid_scale"))]
    h = lower.call(float_layer(first), args, [*lead, rank], "float32")
    s = FloatLayerSpec(dims(lead), rank, u[1], u, a["bits"], True, bias=bias is not None, finish=lower.finish)
    return lower.call_fused(float_layer(s), [h, lower.value(a["u"]), lower.optional(bias)], [*lead, u[1]])


def _linear(lower: Lowering, a: Arguments) -> relax.Var | None:
    weight = a["weight"]
    if weight.name not in lower.names:
        return CONVERTERS["linear.default"](lower, a)
    x, stored = lower.value(a["input"]), tuple(shape_of(lower.value(weight)))
    lead = shape_of(x)[:-1]
    s = FloatLayerSpec(dims(lead), stored[1], stored[0], stored, bias=a["bias"] is not None)
    args = [x, lower.value(weight), lower.optional(a["bias"])]
    return lower.call(float_layer(s), args, [*lead, stored[0]], "float32")


def _attend(
    lower: Lowering,
    s: AttentionSpec,
    args: list[relax.Expr | None],
    sizes: tuple[Any, Any, Any],
    call_last: CallLast,
) -> relax.Var | None:
    q, k, v, mask = args
    batch, rows, keys = sizes
    heads = s.groups * s.share
    lead, scores = [batch, heads, rows], [batch, heads, rows, keys]
    if not s.integers:
        x = lower.call(kernels.float_scores(s), [q, k, mask], scores, "float32")
        e, inverse = lower.call_several(kernels.exponentials(s), [x], [(scores, "float32"), (lead, "float32")])
        return call_last(kernels.float_values(s), [e, inverse, v])
    across = kernels.padded(keys)

    def whole(x: relax.Expr | None, which: int, tokens: Any, count: int, width: int) -> tuple[relax.Var, relax.Var]:
        by_column = which == 2
        kernel = kernels.integer_rows(s.layouts[which], s.batch, count, dims([tokens])[0], width, by_column)
        stored = [batch, count, width, across] if by_column else [batch, count, tokens, width]
        found = lower.call_several(kernel, [x], [(stored, "int8"), ([batch, count, tokens], "float32")])
        return found[0], found[1]

    (q, q_step), (k, k_step) = whole(q, 0, rows, heads, s.width), whole(k, 1, keys, s.groups, s.width)
    v, v_step = whole(v, 2, keys, s.groups, s.value_width)
    x = lower.call(kernels.integer_scores(s), [q, q_step, k, k_step, mask], scores, "float32")
    share_types = [([*lead, across], "int8"), (lead, "float32")]
    shares, factors = lower.call_several(kernels.integer_shares(s), [x, v_step], share_types)
    return call_last(kernels.integer_values(s), [shares, factors, v])


CUDA_CONVERTERS: dict[str, Converter] = {
    **CONVERTERS,
    "int8_linear.default": _int8_linear,
    "svd_linear.default": _svd_linear,
    "int8_conv2d.default": _int8_conv2d,
    "svd_conv2d.default": partial(_conv_chain, "svd"),
    "tucker2_conv2d.default": partial(_conv_chain, "tucker2"),
    "cp_conv2d.default": partial(_conv_chain, "cp"),
    "weight_only_linear.default": _weight_only_linear,
    "svd_weight_only_linear.default": _svd_weight_only_linear,
    "linear.default": _linear,
    "scaled_dot_product_attention.default": partial(attention, attend=_attend),
    "attention_f32.default": partial(attention_f32, attend=_attend),
    "attention_int8.default": partial(attention_f32, integers=True, attend=_attend),
}
