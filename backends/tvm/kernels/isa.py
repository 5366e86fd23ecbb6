"""What a target's vector unit offers to the kernels: lanes, tile shapes and the int8 dot product.

Activations and weights come in *words* of int8 along the reduction. Most instruction sets multiply a word of four of
one row with one of each lane's output. A matrix product (``height`` 2) takes words of eight of two rows and of two
outputs, and its four sums are those of a 2 x 2 tile, row by row. All else is the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import tvm
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.targets import Target, require_cpu

QUAD = 4  # int8 values a lane
BLOCK = 16  # outputs a packed weight block
_LEAST_ROWS = 4  # from which on AMX, and narrow weights, were measured to be no slower


@dataclass(frozen=True)
class Isa:
    """``dot(acc, activations, weights)`` adds the products of words: int32 x lanes, int8 x 4 lanes, int8 x 4 lanes.

    ``unsigned``: the dot product wants activations as uint8, which the kernels hold as ``x + 128``.
    ``registers``: how many accumulator registers a tile may use.
    ``height``: rows whose words lie in one register of activations, and whose sums in one accumulator.
    ``turn``: words that are loaded at once of each row.
    ``narrows_panels``: weights of fewer bits are rounded once for a task's rows, not for each tile, because rounding
    takes the units that ``dot`` does.
    ``rounds_at_load``: weights of fewer bits are rounded when they are packed, a copy for each width in use: such
    processors have the memory.
    ``panel``: vectors side by side in a tile that is not tuned.
    ``side_by_side``: vectors of results that go through a function side by side, see ``side_by_side.py``.
    ``narrow``: weights of fewer bits are multiplied as whole numbers of their own width, see ``gemm_pairs.py``.
    ``matrices``: AMX multiplies whole matrices of such words, signed or not, see ``gemm_amx.py``; all else is AVX512's.
    """

    name: str
    lanes: int
    registers: int
    unsigned: bool
    dot: Callable[[Expr, Expr, Expr], Expr]
    height: int = 1
    turn: int = 1
    narrows_panels: bool = False
    rounds_at_load: bool = False
    panel: int = 4
    side_by_side: int = 1
    narrow: bool = False
    matrices: bool = False

    @property
    def word(self) -> int:
        """int8 values a word."""
        return QUAD * self.height

    @property
    def columns(self) -> int:
        """Outputs whose words lie in one register of weights."""
        return self.lanes // self.height

    @property
    def activation_dtype(self) -> str:
        return "uint8" if self.unsigned else "int8"

    @property
    def fetches(self) -> bool:
        """Whether a product asks for weights ahead: measured to pay on x86 alone."""
        return self.lanes > 4

    @property
    def offset(self) -> int:
        """What is added to an int8 activation when it is stored for ``dot``."""
        return 128 if self.unsigned else 0

    @property
    def flip(self) -> int:
        """The int32 word that, by exclusive or, adds ``offset`` to four int8 values."""
        return -0x7F7F7F80 if self.unsigned else 0


def _vnni_dot(lanes: int, acc: Expr, activations: Expr, weights: Expr) -> Expr:
    # Of 256 bits LLVM has one intrinsic for AVX512-VNNI and AVX-VNNI.
    intrinsic = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
    return T.call_llvm_pure_intrin(f"int32x{lanes}", intrinsic, acc, activations, weights)


def _avx2_dot(acc: Expr, activations: Expr, weights: Expr) -> Expr:
    # |x| as uint8 times sign(x) * w. Weights are within +-119: a pair is at most 2 * 128 * 119, inside int16.
    magnitude = T.call_llvm_pure_intrin("int8x32", "llvm.x86.avx2.psign.b", activations, activations)
    signed = T.call_llvm_pure_intrin("int8x32", "llvm.x86.avx2.psign.b", weights, activations)
    return avx2_widened(acc, avx2_pairs(magnitude, signed))


def _avx2_narrow_dot(acc: Expr, activations: Expr, weights: Expr) -> Expr:
    return avx2_widened(acc, avx2_pairs(activations, weights))


def avx2_pairs(activations: Expr, weights: Expr) -> Expr:
    return T.call_llvm_pure_intrin("int16x16", "llvm.x86.avx2.pmadd.ub.sw", activations, weights)


def avx2_widened(acc: Expr, pairs: Expr) -> Expr:
    return acc + T.call_llvm_pure_intrin("int32x8", "llvm.x86.avx2.pmadd.wd", pairs, T.broadcast(T.int16(1), 16))


def _sdot(acc: Expr, activations: Expr, weights: Expr) -> Expr:
    # The instruction multiplies by a lane of its last operand, so a word of a row is spread by none of its own.
    return T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.sdot.v4i32.v16i8", acc, weights, activations)


def _smmla(acc: Expr, activations: Expr, weights: Expr) -> Expr:
    return T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.smmla.v4i32.v16i8", acc, activations, weights)


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


def _isa(
    name: str,
    lanes: int,
    registers: int,
    dot: Callable[[Expr, Expr, Expr], Expr],
    height: int = 1,
    turn: int = 1,
    narrows_panels: bool = False,
) -> Isa:
    return Isa(name, lanes, registers, False, dot, height, turn, narrows_panels)


_AVX512VNNI = Isa("avx512vnni", 16, 24, True, partial(_vnni_dot, 16), rounds_at_load=True, side_by_side=8)
_ISAS = {
    "amx": replace(_AVX512VNNI, name="amx", matrices=True),
    "avx512vnni": _AVX512VNNI,
    "avxvnni": Isa("avxvnni", 8, 12, True, partial(_vnni_dot, 8), narrows_panels=True, panel=2),
    "avx2": _isa("avx2", 8, 8, _avx2_dot),
    "i8mm": _isa("i8mm", 4, 24, _smmla, height=2, narrows_panels=True),
    "dotprod": _isa("dotprod", 4, 24, _sdot, turn=4, narrows_panels=True),
    "neon": _isa("neon", 4, 24, _neon_dot),
}


_NARROW = {"avx2": Isa("avx2", 8, 8, True, _avx2_narrow_dot, narrow=True)}


def for_rows(isa: Isa, rows: int | None) -> Isa:
    """The instruction set to multiply ``rows`` (None: not known) with: ``isa``, or AVX512's where they are too few for
    AMX, which loads all of a matrix of weights before it multiplies."""
    return _AVX512VNNI if isa.matrices and rows is not None and rows < _LEAST_ROWS else isa


def for_weights(isa: Isa, bits: int, rows: int | None) -> Isa:
    """The instruction set to multiply many (or unknown) ``rows`` with weights of ``bits``: ``isa`` or one of its own,
    which has activations in another form."""
    few = rows is not None and rows < _LEAST_ROWS
    return for_rows(isa, rows) if bits == 8 or few else _NARROW.get(isa.name, for_rows(isa, rows))


def for_middle(isa: Isa) -> Isa:
    """The instruction set for the symmetric numbers between a chain's products: signed where AMX multiplies them, which
    leaves nothing to take away from the sums."""
    return replace(isa, unsigned=False) if isa.matrices else isa


def by_lane(isa: Isa) -> Isa:
    """The instruction set to multiply words of single rows with: ``isa``, or dotprod, which every CPU with i8mm has."""
    return _ISAS["dotprod"] if isa.height > 1 else isa


def isa_for(target: Target) -> Isa:
    """The instruction set of ``target``. Raises :class:`UnsupportedTargetError` where that is no CPU."""
    require_cpu(target)
    return _ISAS[target.simd]
