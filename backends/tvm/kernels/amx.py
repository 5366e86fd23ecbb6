"""The instructions of AMX, and its registers' shapes.

Eight registers of up to 16 rows of 64 bytes (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1,
chapter 18). A row of a register of weights is a word of four inputs of each of 16 columns.
"""

from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels.emit import Buffer, Index, fill, store
from t3c_compile.backends.tvm.kernels.isa import QUAD

ROWS, BYTES, REGISTERS = 16, 64, 8
WORDS = BYTES // QUAD


def instruction(name: str, *arguments: Expr | int) -> None:
    """One of LLVM's intrinsics; a plain int is the number of a register."""
    given = [T.int8(a) if isinstance(a, int) else a for a in arguments]
    T.evaluate(T.call_llvm_intrin("void", f"llvm.x86.{name}", *given))


def load(register: int, buffer: Buffer, at: Index, step: int) -> None:
    """Fill a register from element ``at`` of ``buffer`` on, rows ``step`` bytes apart."""
    instruction("tileloadd64", register, T.address_of(buffer[at]), T.int64(step))


def store_sums(register: int, buffer: Buffer, at: Index, step: int) -> None:
    """Write a register of int32 from element ``at`` of ``buffer`` on, rows ``step`` bytes apart."""
    instruction("tilestored64", register, T.address_of(buffer[at]), T.int64(step))


def add_products(sums: int, activations: int, weights: int, dtype: str) -> None:
    """Add the products of activations of ``dtype``, int8 or uint8, and int8 weights to int32 sums."""
    instruction("tdpbssd" if dtype == "int8" else "tdpbusd", sums, activations, weights)


def configure(rows: Index, words: int, sums: int, activations: int) -> None:
    """Shape the registers: ``sums`` of sums, then ``activations``, the rest of weights; ``rows`` rows, and ``words`` of
    inputs. All become zero. A thread does so before it uses them, and releases them at the end."""
    config = T.alloc_buffer((64,), "uint8")
    store(config, 0, fill(T.uint8(0), 64), 64)
    T.buffer_store(config, T.uint8(1), [0])
    for register in range(REGISTERS):
        of_activations = sums <= register < sums + activations
        T.buffer_store(config, T.uint8(words * QUAD if of_activations else BYTES), [16 + 2 * register])
        height = T.cast(rows, "uint8") if register < sums + activations else T.uint8(words)
        T.buffer_store(config, height, [48 + register])
    instruction("ldtilecfg", T.address_of(config[0]))
