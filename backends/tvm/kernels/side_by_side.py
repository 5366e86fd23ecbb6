"""``float_math.Arithmetic`` on several vectors side by side: each step is emitted for all of them before the next.

A function of one vector is a chain of steps that wait for one another, and a processor looks ahead to three such chains
at most: it does not see enough that need not wait.
"""

import operator
from collections.abc import Callable, Sequence
from functools import cache

from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels.emit import load, store
from t3c_compile.backends.tvm.kernels.vmath import Lanes


class Vectors:
    """Vectors that go through the same steps, or one that is the same for all others."""

    def __init__(self, each: Sequence[Expr]) -> None:
        self.each = list(each)

    def __add__(self, other: "Vectors") -> "Vectors":
        return by_vector(operator.add, self, other)

    def __sub__(self, other: "Vectors") -> "Vectors":
        return by_vector(operator.sub, self, other)

    def __mul__(self, other: "Vectors") -> "Vectors":
        return by_vector(operator.mul, self, other)

    def __truediv__(self, other: "Vectors") -> "Vectors":
        return by_vector(operator.truediv, self, other)

    def __lt__(self, other: "Vectors") -> "Vectors":
        # A vector of truths has no variable in TVM; it is part of what asks for it.
        return Vectors([a < b for a, b in _rows(self, other)])


def by_vector(function: Callable[..., Expr], *operands: Vectors) -> Vectors:
    """``function`` of each vector."""
    return Vectors([T.bind(function(*row)) for row in _rows(*operands)])


def _rows(*operands: Vectors) -> list[tuple[Expr, ...]]:
    """The operands of each vector."""
    count = max(len(operand.each) for operand in operands)
    columns = [operand.each if len(operand.each) == count else operand.each * count for operand in operands]
    return list(zip(*columns, strict=True))


class SideBySide:
    """The arithmetic, on :class:`Vectors` of ``lanes`` float32 each."""

    def __init__(self, lanes: int) -> None:
        self._lanes, self._one = lanes, Lanes(lanes)

    def number(self, value: float) -> Vectors:
        return Vectors([self._one.number(value)])

    def fma(self, a: Vectors, b: Vectors, c: Vectors) -> Vectors:
        return Vectors(_in_step(by_vector(self._one.fma, a, b, c).each, self._lanes))

    def rint(self, x: Vectors) -> Vectors:
        return by_vector(self._one.rint, x)

    def clamp(self, x: Vectors, low: float, high: float) -> Vectors:
        return by_vector(lambda vector: self._one.clamp(vector, low, high), x)

    def select(self, condition: Vectors, a: Vectors, b: Vectors) -> Vectors:
        return by_vector(self._one.select, condition, a, b)

    def power_of_two(self, n: Vectors) -> Vectors:
        return by_vector(self._one.power_of_two, n)

    def half(self, n: Vectors) -> Vectors:
        return by_vector(self._one.half, n)


def _in_step(vectors: list[Expr], lanes: int) -> list[Expr]:
    """The same vectors, none of which is there before all are: LLVM would finish one after the other."""
    cells = [T.alloc_buffer((lanes,), "float32") for _ in vectors]
    for cell, vector in zip(cells, vectors, strict=True):
        store(cell, 0, vector, lanes)
    name, definition = _step(len(vectors), lanes)
    with T.attr(T.int32(0), "pragma_import_llvm", definition):
        T.evaluate(T.call_extern("int32", name, *[T.address_of(cell[0]) for cell in cells]))
    return [load(cell, 0, lanes) for cell in cells]


@cache
def _step(count: int, lanes: int) -> tuple[str, str]:
    """The name and the LLVM function of pointers to ``count`` vectors, which leaves them as they are. Inlined, it is
    an empty piece of assembly that takes all of them and gives all of them."""
    vector, name = f"<{lanes} x float>", f"t3c_step_{count}x{lanes}"
    kinds, numbers = ", ".join([vector] * count), range(count)
    # Results in vector registers, each of which is an operand, too.
    constraints = ",".join(["=v"] * count + [str(i) for i in numbers])
    lines = [
        f"define linkonce_odr i32 @{name}({', '.join(f'ptr %p{i}' for i in numbers)}) alwaysinline nounwind {{",
        *(f"%a{i} = load {vector}, ptr %p{i}, align 16" for i in numbers),
        f'%r = call {{ {kinds} }} asm "", "{constraints}"({", ".join(f"{vector} %a{i}" for i in numbers)})',
        *(f"%b{i} = extractvalue {{ {kinds} }} %r, {i}" for i in numbers),
        *(f"store {vector} %b{i}, ptr %p{i}, align 16" for i in numbers),
        "ret i32 0",
        "}",
    ]
    return name, "\n".join(lines)
