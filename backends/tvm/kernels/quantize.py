"""``t3c::quantize_int8`` and ``t3c::dequantize_int8`` as tensor expressions, which fuse with their neighbours."""

from tvm import te
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels.emit import float32


def quantize(x: te.Tensor, scale: float, zero_point: int) -> te.Tensor:
    """float32 to int8: ``clamp(rint(x * float32(1 / scale)) + zero_point, -128, 127)``."""

    def element(*index: Expr) -> Expr:
        q = T.nearbyint(x(*index) * float32(1.0 / scale)) + T.float32(zero_point)
        # Clamping before the cast keeps huge inputs defined; by way of int32 the cast vectorizes.
        return T.cast(T.cast(T.max(T.min(q, T.float32(127)), T.float32(-128)), "int32"), "int8")

    return te.compute(x.shape, element, name="quantize")


def dequantize(q: te.Tensor, scale: float, zero_point: int) -> te.Tensor:
    """int8 to float32: ``(q - zero_point) * scale``."""
    return te.compute(
        q.shape, lambda *i: (T.cast(q(*i), "float32") - T.float32(zero_point)) * float32(scale), name="dequantize"
    )
