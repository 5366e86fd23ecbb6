"""Float functions of ``passes.ops.float_math`` as TIR, on scalars or vectors of float32.

libm is called once an element; these vectorize, and round as the torch reference does.
"""

from typing import Any

import tvm
import tvm.ir._ffi_api as _ir
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels.emit import fill, float32, vec
from t3c_compile.passes.ops import float_math


def _register(name: str, what: str, intrinsic: str) -> str:
    """A TIR op of one argument that is an LLVM intrinsic, and vectorizes as TVM's own do."""
    if name not in _ir.ListOpNames():
        _ir.RegisterOp(name, what)
        tvm.ir.register_op_attr(name, "TVectorizable", True)
        tvm.ir.register_op_attr(name, "TCallEffectKind", tvm.tirx.CallEffectKind.Pure.value)
        tvm.tirx.register_intrin_lowering(
            name, target="llvm", f=lambda call: T.call_llvm_pure_intrin(str(call.ty.dtype), intrinsic, call.args[0])
        )
    return name


# LLVM joins a product and a sum into one operation wherever they meet; nothing passes through this fence.
ROUNDED = _register(
    "tirx.t3c_rounded", "The value as float32, never as part of a fused multiply-add.", "llvm.arithmetic.fence"
)
NEAREST = _register("tirx.t3c_nearest", "The nearest int32, ties to even.", "llvm.lrint")


def rounded(x: Expr, lanes: int = 1) -> Expr:
    """The product ``x`` rounded to float32 before anything is added to it."""
    return tvm.tirx.call_intrin(vec("float32", lanes), ROUNDED, x)


def nearest(x: Expr, lanes: int = 1) -> Expr:
    """float32 ``x`` as int32, ties to even: one instruction. Past the range of int32 it is any number."""
    return tvm.tirx.call_intrin(vec("int32", lanes), NEAREST, x)


class Lanes:
    """``float_math.Arithmetic`` on TIR vectors of ``lanes`` float32."""

    def __init__(self, lanes: int = 1) -> None:
        self._lanes = lanes

    def number(self, value: float) -> Expr:
        return fill(float32(value), self._lanes)

    def fma(self, a: Expr, b: Expr, c: Expr) -> Expr:
        return T.fma(a, b, c)

    def rint(self, x: Expr) -> Expr:
        return T.nearbyint(x)

    def clamp(self, x: Expr, low: float, high: float) -> Expr:
        # The bound first: a comparison with NaN is false, and gives the second.
        return T.min(self.number(high), T.max(self.number(low), x))

    def select(self, condition: Expr, a: Expr, b: Expr) -> Expr:
        return T.Select(condition, a, b)

    def power_of_two(self, n: Expr) -> Expr:
        bits = T.cast(n, vec("int32", self._lanes)) + fill(T.int32(127), self._lanes)
        return T.reinterpret(vec("float32", self._lanes), bits << fill(T.int32(23), self._lanes))

    def half(self, n: Expr) -> Expr:
        return T.floor(n * self.number(0.5))


_SCALAR: Any = Lanes()


def exp(x: Expr) -> Expr:
    return rounded(float_math.exp(_SCALAR, x))


def erf(x: Expr) -> Expr:
    return float_math.erf(_SCALAR, x)


def tanh(x: Expr) -> Expr:
    return float_math.tanh(_SCALAR, x)


def sigmoid(x: Expr) -> Expr:
    return float_math.sigmoid(_SCALAR, x)


def silu(x: Expr) -> Expr:
    return float_math.silu(_SCALAR, x)


def gelu(x: Expr) -> Expr:
    return float_math.gelu(_SCALAR, x)


def gelu_tanh(x: Expr) -> Expr:
    return float_math.gelu_tanh(_SCALAR, x)


def hard(x: Expr, lanes: int = 1) -> Expr:
    """``clamp(x + 3, 0, 6)``"""
    return T.min(T.max(x + fill(T.float32(3), lanes), fill(T.float32(0), lanes)), fill(T.float32(6), lanes))


def hardswish(x: Expr, lanes: int = 1) -> Expr:
    """``x * hard(x) / 6``"""
    return x * hard(x, lanes) / fill(T.float32(6), lanes)
