"""The most int8 operations a core can do: the dot product of a target on registers and a few cached bytes."""

from functools import cache

import tvm
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels import amx
from t3c_compile.backends.tvm.kernels.emit import Buffer, accumulators, fill, load, prim_func, store
from t3c_compile.backends.tvm.kernels.gemm_vector import row_words
from t3c_compile.backends.tvm.kernels.isa import BLOCK, QUAD, Isa

_STEPS, _WORDS = 1 << 14, 16


def _tile(isa: Isa) -> tuple[int, int]:
    """Rows and vectors of accumulators."""
    return (2 * amx.ROWS, 2) if isa.matrices else (isa.registers // isa.panel, isa.panel)


def _depth(isa: Isa) -> int:
    """Inputs a step."""
    return amx.BYTES if isa.matrices else isa.word


def peak_operations(isa: Isa) -> int:
    """Multiplications and additions of a call of :func:`peak`."""
    rows, vectors = _tile(isa)
    return 2 * _STEPS * rows * vectors * isa.lanes * _depth(isa)


def peak_arguments(isa: Isa) -> list[tuple[tuple[int, ...], str]]:
    (rows, vectors), lanes, steps = _tile(isa), isa.lanes, 1 if isa.matrices else _WORDS
    return [
        ((steps * rows * _depth(isa),), isa.activation_dtype),
        ((steps * vectors * lanes * _depth(isa),), "int8"),
        ((rows * vectors * lanes,), "int32"),
    ]


@cache
def peak(isa: Isa) -> tvm.tirx.PrimFunc:
    """(activations, weights, int32 sums): a tile of accumulators, the operands always in the first-level cache."""
    with prim_func("peak") as function:
        x, weights, sums = function.args(**dict(zip(("x", "weights", "sums"), peak_arguments(isa), strict=True)))
        (_matrices if isa.matrices else _vectors)(isa, x, weights, sums)
    return function.func


def _vectors(isa: Isa, x: Buffer, weights: Buffer, sums: Buffer) -> None:
    (rows, vectors), lanes = _tile(isa), isa.lanes
    registers = vectors * isa.height
    acc = accumulators(rows // isa.height, registers, lanes, "int32")
    for line in acc:
        for cell in line:
            store(cell, 0, fill(T.int32(0), lanes), lanes)
    with T.serial(0, _STEPS) as step:
        at = T.bind(step % _WORDS)
        words = [T.bind(load(weights, (at * registers + v) * (lanes * QUAD), lanes * QUAD)) for v in range(registers)]
        for r, line in enumerate(acc):
            places = [(at * rows + r * isa.height + i) * isa.word for i in range(isa.height)]
            value = row_words(isa, x, places, 1)[0]
            for cell, word in zip(line, words, strict=True):
                store(cell, 0, isa.dot(load(cell, 0, lanes), value, word), lanes)
    for r, line in enumerate(acc):
        for v, cell in enumerate(line):
            store(sums, (r * registers + v) * lanes, load(cell, 0, lanes), lanes)


def _matrices(isa: Isa, x: Buffer, weights: Buffer, sums: Buffer) -> None:
    rows, vectors = _tile(isa)
    high = rows // amx.ROWS
    left, right = high * vectors, high * vectors + high
    amx.configure(amx.ROWS, amx.WORDS, left, high)
    with T.serial(0, _STEPS):
        for i in range(high):
            amx.load(left + i, x, i * amx.ROWS * amx.BYTES, amx.BYTES)
        for v in range(vectors):
            amx.load(right + v, weights, v * amx.WORDS * amx.BYTES, amx.BYTES)
            for i in range(high):
                amx.add_products(i * vectors + v, left + i, right + v, x.dtype)
    for i in range(high):
        for v in range(vectors):
            amx.store_sums(i * vectors + v, sums, (i * amx.ROWS * vectors + v) * BLOCK, vectors * BLOCK * 4)
    amx.instruction("tilerelease")
