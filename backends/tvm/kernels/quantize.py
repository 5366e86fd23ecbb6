"""``quantize_int8``, ``dequantize_int8`` and ``int8_embedding`` as tensor expressions, which fuse with neighbours."""

from tvm import te
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels.emit import top_bits
from t3c_compile.backends.tvm.kernels.finish import quantized
from t3c_compile.backends.tvm.kernels.vmath import rounded


def quantize(x: te.Tensor, numbers: te.Tensor) -> te.Tensor:
    """float32 to int8: ``clamp(rint(x * numbers[0]) + numbers[1], -128, 127)``.

    ``numbers``: float32 1 / scale and zero point, an argument so that layers and profiles of one shape share a kernel.
    """

    return te.compute(x.shape, lambda *i: quantized(x(*i), numbers(0), numbers(1), 1), name="quantize")


def flip(q: te.Tensor, dtype: str) -> te.Tensor:
    """int8 to uint8 with 128 added, or back."""
    return te.compute(
        q.shape, lambda *i: T.reinterpret(dtype, T.reinterpret("uint8", q(*i)) ^ T.uint8(128)), name="flip"
    )


def dequantize(q: te.Tensor, numbers: te.Tensor) -> te.Tensor:
    """int8 to float32: ``(q - numbers[1]) * numbers[0]``; ``numbers``: float32 scale and zero point."""

    def element(*index: Expr) -> Expr:
        return rounded((T.cast(q(*index), "float32") - numbers(1)) * numbers(0))

    return te.compute(q.shape, element, name="dequantize")


def embedding(indices: te.Tensor, weight: te.Tensor, scale: te.Tensor, bits: int) -> te.Tensor:
    """Rows of int8 ``weight`` [rows, n] in float32; an index out of range reads the first or last row."""
    last = weight.shape[0] - 1

    def element(*index: Expr) -> Expr:
        row = T.max(T.min(indices(*index[:-1]), T.cast(last, indices.dtype)), T.cast(0, indices.dtype))
        return rounded(T.cast(top_bits(weight(row, index[-1]), bits, 1), "float32") * scale(row))

    return te.compute((*indices.shape, weight.shape[1]), element, name="embedding")
