"""Relax ops to PrimFuncs: our kernels where there is one, TVM's own legalization for the rest, then operator fusion.

A reshape in any spelling stays ``relax.reshape``, which the VM runs without copying.
"""

from collections.abc import Callable
from functools import partial

import tvm
from tvm import relax, te
from tvm.ir import Expr

from t3c_compile.backends.tvm.kernels import vmath
from t3c_compile.backends.tvm.kernels.emit import static
from t3c_compile.backends.tvm.kernels.table import Kernels
from t3c_compile.backends.tvm.relax_shapes import dims, shape_of

_ELEMENTWISE = {
    "relax.exp": vmath.exp,
    "relax.erf": vmath.erf,
    "relax.tanh": vmath.tanh,
    "relax.sigmoid": vmath.sigmoid,
    "relax.nn.silu": vmath.silu,
    "relax.nn.gelu": vmath.gelu,
    "relax.nn.gelu_tanh": vmath.gelu_tanh,
}
_RESHAPES = ("relax.expand_dims", "relax.squeeze", "relax.flatten")


def legalize(module: tvm.IRModule, kernels: Kernels) -> tvm.IRModule:
    """``module`` with every op but reshape a ``call_tir``, and element-wise neighbours fused."""
    passes = [
        relax.transform.DecomposeOpsForInference(),
        relax.transform.LegalizeOps(_rules(kernels), skip_ops=["relax.reshape"]),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
    ]
    return tvm.ir.transform.Sequential(passes)(module)


Rule = Callable[[relax.BlockBuilder, relax.Call], relax.Expr]


def _rules(kernels: Kernels) -> dict[str, Rule]:
    own: dict[str, Callable[[Kernels, relax.BlockBuilder, relax.Call], relax.Expr | None]] = {
        "relax.matmul": _matmul,
        "relax.nn.softmax": _softmax,
        "relax.nn.layer_norm": _layer_norm,
    }
    rules = {op: _or_default(op, partial(convert, kernels)) for op, convert in own.items()}
    rules |= {op: _or_default(op, partial(_elementwise, math)) for op, math in _ELEMENTWISE.items()}
    rules["relax.multiply"] = _or_default("relax.multiply", _multiply)
    return rules | {op: _as_reshape for op in _RESHAPES}


def _or_default(op: str, rule: Callable[[relax.BlockBuilder, relax.Call], relax.Expr | None]) -> Rule:
    """``rule``, or TVM's own legalization where it gives None."""

    def convert(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
        result = rule(builder, call)
        return call.op.get_attr("FLegalize")(builder, call) if result is None else result

    return convert


def _as_reshape(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    return relax.op.reshape(call.args[0], call.ty.shape)


def _elementwise(math: Callable[[Expr], Expr], builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr | None:
    if str(call.ty.dtype) != "float32":
        return None
    return builder.call_te(
        lambda x: te.compute(x.shape, lambda *i: math(x(*i)), name=math.__name__),
        call.args[0],
        primfunc_name_hint=math.__name__,
    )


def _multiply(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr | None:
    """A product that stays one: LLVM would join it with a sum after it, and round once where torch rounds twice."""
    if str(call.ty.dtype) != "float32" or not all(isinstance(a.ty, relax.TensorType) for a in call.args):
        return None
    shape = call.ty.shape.values

    def multiply(a: te.Tensor, b: te.Tensor) -> te.Tensor:
        def element(*index: Expr) -> Expr:
            return vmath.rounded(broadcast(a, index) * broadcast(b, index))

        return te.compute(shape, element, name="multiply")

    def broadcast(x: te.Tensor, index: tuple[Expr, ...]) -> Expr:
        inner = index[len(index) - len(x.shape) :]
        return x(*(0 if static(size) == 1 else i for size, i in zip(x.shape, inner, strict=True)))

    return builder.call_te(multiply, *call.args, primfunc_name_hint="multiply")


def _kernel_call(builder: relax.BlockBuilder, kernel: tvm.tirx.PrimFunc, name: str, call: relax.Call) -> relax.Expr:
    return relax.call_tir(builder.add_func(kernel, name), list(call.args), call.ty)


def _matmul(kernels: Kernels, builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr | None:
    a, b = (shape_of(argument) for argument in call.args)
    *batch, rows, inputs = a
    shared = len(b) == 2
    if len(a) < 2 or str(call.ty.dtype) != "float32" or not (shared or dims(b[:-2]) == dims(batch)):
        return None
    inputs, columns = dims([inputs, b[-1]])
    if shared:
        # One right factor for the whole batch: the batch is rows of one product.
        kernel = kernels.matmul((), dims([*batch, rows]), inputs, columns)
    else:
        kernel = kernels.matmul(dims(batch), dims([rows]), inputs, columns)
    return _kernel_call(builder, kernel, "matmul", call)


def _softmax(kernels: Kernels, builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr | None:
    *lead, count = shape_of(call.args[0])
    if call.attrs.axis not in (-1, len(lead)) or str(call.ty.dtype) != "float32":
        return None
    return _kernel_call(builder, kernels.softmax(dims(lead), dims([count])[0]), "softmax", call)


def _layer_norm(kernels: Kernels, builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr | None:
    *lead, count = shape_of(call.args[0])
    axes = [int(axis) % (len(lead) + 1) for axis in call.attrs.axes]
    if axes != [len(lead)] or not isinstance(count, int) or str(call.ty.dtype) != "float32":
        return None
    kernel = kernels.layer_norm(dims(lead), count, True, True, float(call.attrs.epsilon))
    return _kernel_call(builder, kernel, "layer_norm", call)
