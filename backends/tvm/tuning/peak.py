"""The most int8 operations a core can do: the dot product of a target on registers and a few cached bytes."""

from functools import cache

import tvm
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels.emit import accumulators, fill, load, prim_func, store
from t3c_compile.backends.tvm.kernels.gemm_vector import row_words
from t3c_compile.backends.tvm.kernels.isa import QUAD, Isa

_STEPS, _WORDS = 1 << 14, 16


def _tile(isa: Isa) -> tuple[int, int]:
    """Rows and vectors of accumulators."""
    return isa.registers // isa.panel, isa.panel


def peak_operations(isa: Isa) -> int:
    """Multiplications and additions of a call of :func:`peak`."""
    rows, vectors = _tile(isa)
    return 2 * _STEPS * rows * vectors * isa.lanes * isa.word


def peak_arguments(isa: Isa) -> list[tuple[tuple[int, ...], str]]:
    (rows, vectors), lanes = _tile(isa), isa.lanes
    return [
        ((_WORDS * rows * isa.word,), isa.activation_dtype),
        ((_WORDS * vectors * lanes * isa.word,), "int8"),
        ((rows * vectors * lanes,), "int32"),
    ]


@cache
def peak(isa: Isa) -> tvm.tirx.PrimFunc:
    """(activations, weights, int32 sums): a tile of accumulators, the operands always in the first-level cache."""
    (rows, vectors), lanes = _tile(isa), isa.lanes
    with prim_func("peak") as function:
        x, weights, sums = function.args(**dict(zip(("x", "weights", "sums"), peak_arguments(isa), strict=True)))
        registers = vectors * isa.height
        acc = accumulators(rows // isa.height, registers, lanes, "int32")
        for line in acc:
            for cell in line:
                store(cell, 0, fill(T.int32(0), lanes), lanes)
        with T.serial(0, _STEPS) as step:
            at = T.bind(step % _WORDS)
            words = [
                T.bind(load(weights, (at * registers + v) * (lanes * QUAD), lanes * QUAD)) for v in range(registers)
            ]
            for r, line in enumerate(acc):
                places = [(at * rows + r * isa.height + i) * isa.word for i in range(isa.height)]
                value = row_words(isa, x, places, 1)[0]
                for cell, word in zip(line, words, strict=True):
                    store(cell, 0, isa.dot(load(cell, 0, lanes), value, word), lanes)
        for r, line in enumerate(acc):
            for v, cell in enumerate(line):
                store(sums, (r * registers + v) * lanes, load(cell, 0, lanes), lanes)
    return function.func
