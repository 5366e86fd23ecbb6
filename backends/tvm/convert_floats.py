"""Float stages to Relax: the ``t3c::`` ops of ``passes.ops.float_stages``, and attention as ATen has it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import sympy
import torch
import tvm
from torch import fx
from tvm import relax, te
from tvm.ir import Expr

from t3c_compile.backends.tvm.kernels import vmath
from t3c_compile.backends.tvm.kernels.attention import attention
from t3c_compile.backends.tvm.kernels.attention_heads import AttentionSpec, Layout, plain
from t3c_compile.backends.tvm.kernels.finish import PLAIN
from t3c_compile.backends.tvm.lowering import Arguments, Converter, Lowering
from t3c_compile.backends.tvm.relax_shapes import dims, shape_of
from t3c_compile.backends.tvm.strides import lying
from t3c_compile.passes.ops.elementwise import FUNCTIONS

_SWAP = [0, 2, 1, 3]


def _elementwise(function: Callable[[Expr], Expr], lower: Lowering, a: Arguments) -> relax.Var:
    def element(x: te.Tensor) -> te.Tensor:
        return te.compute(x.shape, lambda *i: function(x(*i)), name=function.__name__)

    element.__name__ = function.__name__
    return lower.expression(element, lower.value(a["x"]))


def _layer_norm(lower: Lowering, a: Arguments) -> relax.Var | None:
    x, weight, bias = lower.value(a["x"]), lower.optional(a["weight"]), lower.optional(a["bias"])
    *lead, count = shape_of(x)
    kernel = lower.kernels.layer_norm(
        dims(lead), dims([count])[0], weight is not None, bias is not None, float(a["eps"]), lower.finish
    )
    return lower.call_fused(kernel, [x, weight, bias], [*lead, count])


def _rms_norm(lower: Lowering, a: Arguments) -> relax.Var | None:
    x, weight = lower.value(a["x"]), lower.optional(a["weight"])
    *lead, count = shape_of(x)
    kernel = lower.kernels.rms_norm(dims(lead), dims([count])[0], weight is not None, float(a["eps"]), lower.finish)
    return lower.call_fused(kernel, [x, weight], [*lead, count])


def _softmax(lower: Lowering, a: Arguments) -> relax.Var:
    return lower.emit(relax.op.nn.softmax(lower.value(a["x"])))


def _mean(lower: Lowering, a: Arguments) -> relax.Var:
    x, over = lower.value(a["x"]), list(a["dim"])
    shape = shape_of(x)
    if over == [2, 3] and lower.is_channels_last(a["x"]):
        images = lower.channels_last(a["x"])
        batch, *size, channels = shape_of(images)
        kernel = lower.kernels.mean(dims([batch]), dims(size), dims([channels]))
        y = lower.call(kernel, [images], [batch, channels], "float32")
        return lower.emit(relax.op.reshape(y, [batch, channels, 1, 1])) if a["keepdim"] else y
    kept = [d for d in range(len(shape)) if d not in over]
    first, last = over[0], over[-1]
    sizes: tuple[tuple[int | str, ...], ...]
    if last - first + 1 != len(over):
        x = lower.emit(relax.op.permute_dims(x, kept + over))
        sizes = dims([shape[d] for d in kept]), dims([shape[d] for d in over]), ()
    else:
        sizes = dims(shape[:first]), dims(shape[first : last + 1]), dims(shape[last + 1 :])
    y = lower.call(lower.kernels.mean(sizes[0], sizes[1], sizes[2]), [x], [shape[d] for d in kept], "float32")
    if not a["keepdim"]:
        return y
    return lower.emit(relax.op.reshape(y, [1 if d in over else size for d, size in enumerate(shape)]))


def _matmul(lower: Lowering, a: Arguments) -> relax.Var:
    x, y = lower.value(a["a"]), lower.value(a["b"])
    lead = lower.node.meta["val"].dim() - 2
    shapes = [[1] * (lead + 2 - len(shape)) + shape for shape in (shape_of(x), shape_of(y))]
    if lead and dims(shapes[0][:-2]) != dims(shapes[1][:-2]):
        common = [q if p == 1 else p for p, q in zip(shapes[0][:-2], shapes[1][:-2], strict=True)]
        x, y = (
            t if dims(shape[:-2]) == dims(common) else lower.emit(relax.op.broadcast_to(t, [*common, *shape[-2:]]))
            for t, shape in zip((x, y), shapes, strict=True)
        )
    return lower.emit(relax.op.matmul(x, y))


def _swaps_tokens(node: Any) -> bool:
    """Whether ``node`` exchanges tokens and heads."""
    if not isinstance(node, fx.Node) or node.target != torch.ops.aten.permute.default:
        return False
    order: Any = node.args[1]
    return [d % len(order) for d in order] == _SWAP


# The call of the kernel that writes attention's result.
CallLast = Callable[[tvm.tirx.PrimFunc, list[relax.Expr | None]], relax.Var | None]


def one_kernel(
    lower: Lowering,
    spec: AttentionSpec,
    args: list[relax.Expr | None],
    sizes: tuple[Any, Any, Any],
    call_last: CallLast,
) -> relax.Var | None:
    return call_last(attention(lower.isa, spec), args)


# From query, key, value and mask: the result; (batch, rows, keys) are the sizes the spec has by name.
Attend = Callable[[Lowering, AttentionSpec, list[relax.Expr | None], tuple[Any, Any, Any], CallLast], relax.Var | None]


def attention_f32(
    lower: Lowering, a: Arguments, integers: bool = False, attend: Attend = one_kernel
) -> relax.Var | None:
    """``t3c::attention_f32``, ``t3c::attention_int8``, and ATen's, whose inputs may have three dimensions.

    Inputs that are views of other tensors are read as they lie, and an output that is transposed to [batch, tokens,
    heads, width] is written so. ``attend`` emits it.
    """
    nodes = [a["query"], a["key"], a["value"]]
    shapes = [shape_of(lower.value(node)) for node in nodes]
    four = len(shapes[0]) == 4
    if not four:
        shapes = [[batch, 1, tokens, width] for batch, tokens, width in shapes]
    (batch, heads, count, width), (_, groups, keys, _), (*_, value_width) = shapes
    mask = lower.optional(a["attn_mask"])
    mask_shape: list[Any] = []
    if mask is not None:
        mask_shape = shape_of(mask)
        lead = mask_shape[:-2]
        lead = [1] * (2 - len(lead)) + lead if four or not lead else [*lead, 1]
        mask_shape = [*lead, *mask_shape[-2:]]
        mask = lower.emit(relax.op.reshape(mask, mask_shape))
    last = four and bool(lower.readers) and all(map(_swaps_tokens, lower.readers))
    (q, q_layout), (k, k_layout), (v, v_layout) = (_heads(lower, *pair) for pair in zip(nodes, shapes, strict=True))
    written = plain(dims([batch])[0], heads, dims([count])[0], value_width, last)
    spec = AttentionSpec(
        dims([batch])[0],
        groups,
        heads // groups,
        dims([count])[0],
        dims([keys])[0],
        width,
        value_width,
        (q_layout, k_layout, v_layout, written),
        float(a["scale"] or width**-0.5),
        bool(a["is_causal"]),
        None if mask is None else str(mask.ty.dtype),
        dims(mask_shape),
        integers,
        lower.finish if lower.is_fused else PLAIN,
    )
    shape = [batch, count, heads, value_width] if last else [batch, heads, count, value_width]

    def call_last(kernel: tvm.tirx.PrimFunc, args: list[relax.Expr | None]) -> relax.Var | None:
        if lower.is_fused:
            return lower.call_fused(kernel, args, shape, tokens_first=last)
        y = lower.call(kernel, args, shape, "float32")
        return lower.heads_first(lower.node, y) if last else y

    y = attend(lower, spec, [q, k, v, mask], (batch, count, keys), call_last)
    return y if four else lower.emit(relax.op.reshape(y, [batch, count, value_width]))


def _heads(lower: Lowering, node: fx.Node, shape: list[Any]) -> tuple[relax.Expr, Layout]:
    """The tensor to read ``node``, of ``shape`` [batch, heads, tokens, width], from, and where its heads lie in it."""
    view = lying(node, lower.exists)
    steps = view.steps()
    x = lower.value(view.base)
    known = dims(shape_of(x))
    if steps is not None and len(steps) == 4 and view.start.is_Integer and steps[3] in (0, 1):
        batch_step, head_step, token_step = (_factors(step, known) for step in steps[:3])
        if batch_step is not None and head_step is not None and token_step is not None:
            return x, Layout(known, batch_step, head_step, token_step, int(view.start))
    batch, heads, tokens, width = dims(shape)
    return lower.emit(relax.op.reshape(lower.value(node), shape)), plain(batch, int(heads), tokens, int(width))


def _factors(step: Any, known: tuple[int | str, ...]) -> tuple[int | str, ...] | None:
    """A step as a product of a number and sizes that ``known`` names; None where it is none."""
    number, rest = sympy.sympify(step).as_coeff_Mul()
    names: list[int | str] = []
    for base, power in rest.as_powers_dict().items() if rest != 1 else ():
        if not base.is_Symbol or not power.is_Integer or power < 0 or str(base) not in known:
            return None
        names += [str(base)] * int(power)
    return (int(number), *names)


def _permute(lower: Lowering, a: Arguments) -> relax.Var:
    x = a["self"]
    if x in lower.tokens_first and _swaps_tokens(lower.node):
        return lower.tokens_first[x]
    return lower.default()


FLOAT_CONVERTERS: dict[str, Converter] = {
    **{f"{name}.default": partial(_elementwise, getattr(vmath, name.removesuffix("_f32"))) for name in FUNCTIONS},
    "layer_norm_f32.default": _layer_norm,
    "rms_norm_f32.default": _rms_norm,
    "softmax_f32.default": _softmax,
    "mean_f32.default": _mean,
    "matmul_f32.default": _matmul,
    "attention_f32.default": attention_f32,
    "attention_int8.default": partial(attention_f32, integers=True),
    "permute.default": _permute,
}
