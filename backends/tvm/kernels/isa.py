"""What a target's vector unit offers to the kernels: lanes, tile shapes and the four-way int8 dot product.

Every instruction set sees the same data: activations and weights come in *words* of four int8 along the reduction,
one word a lane. So weights are packed alike for all targets and only ``dot`` differs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import tvm
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.targets import Target

QUAD = 4  # int8 values a word
BLOCK = 16  # outputs a packed weight block


@dataclass(frozen=True)
class Isa:
    """``dot(acc, activations, weights)`` adds four products a lane: int32 x lanes, int8 x 4 lanes, int8 x 4 lanes.

    ``unsigned``: the dot product wants activations as uint8, which the kernels hold as ``x + 128``.
    ``registers``: how many accumulator registers a tile may use.
    """

    name: str
    lanes: int
    registers: int
    unsigned: bool
    dot: Callable[[Expr, Expr, Expr], Expr]

    @property
    def activation_dtype(self) -> str:
        return "uint8" if self.unsigned else "int8"

    @property
    def offset(self) -> int:
        """What is added to an int8 activation when it is stored for ``dot``."""
        return 128 if self.unsigned else 0

    @property
    def flip(self) -> int:
        """The int32 word that, by exclusive or, adds ``offset`` to four int8 values."""
        return -0x7F7F7F80 if self.unsigned else 0

    def panel(self) -> int:
        """Vectors side by side in a row-by-column tile (linear layers)."""
        return 4 if self.registers >= 24 else 2


def _vnni_dot(acc: Expr, activations: Expr, weights: Expr) -> Expr:
    return T.call_llvm_pure_intrin("int32x16", "llvm.x86.avx512.vpdpbusd.512", acc, activations, weights)


def _avx2_dot(acc: Expr, activations: Expr, weights: Expr) -> Expr:
    # |x| as uint8 times sign(x) * w. Weights are within +-119: a pair is at most 2 * 128 * 119, inside int16.
    magnitude = T.call_llvm_pure_intrin("int8x32", "llvm.x86.avx2.psign.b", activations, activations)
    signed = T.call_llvm_pure_intrin("int8x32", "llvm.x86.avx2.psign.b", weights, activations)
    pairs = T.call_llvm_pure_intrin("int16x16", "llvm.x86.avx2.pmadd.ub.sw", magnitude, signed)
    return acc + T.call_llvm_pure_intrin("int32x8", "llvm.x86.avx2.pmadd.wd", pairs, T.broadcast(T.int16(1), 16))


def _sdot(acc: Expr, activations: Expr, weights: Expr) -> Expr:
    return T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.sdot.v4i32.v16i8", acc, activations, weights)


def _neon_dot(acc: Expr, activations: Expr, weights: Expr) -> Expr:
    # Two widening multiplications, a pairwise add (at most 2 * 128 * 119, inside int16) and a pairwise accumulate.
    products = [
        T.call_llvm_pure_intrin(
            "int16x8", "llvm.aarch64.neon.smull.v8i16", half("int8x8", activations), half("int8x8", weights)
        )
        for half in (tvm.tirx.vectorlow, tvm.tirx.vectorhigh)
    ]
    pairs = T.call_llvm_pure_intrin("int16x8", "llvm.aarch64.neon.addp.v8i16", *products)
    return acc + T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.saddlp.v4i32.v8i16", pairs)


_ISAS = {
    "avx512vnni": Isa("avx512vnni", lanes=16, registers=24, unsigned=True, dot=_vnni_dot),
    "avx2": Isa("avx2", lanes=8, registers=8, unsigned=False, dot=_avx2_dot),
    "dotprod": Isa("dotprod", lanes=4, registers=24, unsigned=False, dot=_sdot),
    "neon": Isa("neon", lanes=4, registers=24, unsigned=False, dot=_neon_dot),
}


def isa_for(target: Target) -> Isa:
    """The instruction set of ``target``."""
    return _ISAS[target.simd]
