"""What an int8 product multiplies: rows of activations, and weights in the ``words`` layout.

Activations lie row-major as int8 (or uint8 with 128 added, where the dot product wants it). Because they carry an
offset, sums start from ``-offset * sum(weights)``, summed once per panel by the dot product: that holds for any rank
prefix and any width, and needs nothing stored.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels.emit import (
    Buffer,
    Index,
    accumulators,
    ceil_div,
    chunks,
    fill,
    for_each,
    load,
    product,
    store,
    top_bits,
    vec,
)
from t3c_compile.backends.tvm.kernels.isa import BLOCK, QUAD, Isa


@dataclass(frozen=True)
class Epilogue:
    """What becomes of sums: ``store(rows, column, valid lanes, int32 sums)``, a vector of sums for each of the rows.

    ``at_once``: how many rows it is best given, where there are as many: more than one where much is done to a sum.
    """

    store: Callable[[Sequence[Index], Index, int, Sequence[Expr]], None]
    at_once: int = 1


# place(register, tap, word): where a register of weights lies
Place = Callable[[int, Index, Index], Index]

SPARE_ROWS = 16  # rows past the end that a tile may read


@dataclass(frozen=True)
class Product:
    """``rows x columns`` over ``inputs``; ``stored_inputs`` is the packed buffer's full reduction length.

    With ``groups``, ``columns`` and ``inputs`` are those of a group, and groups lie one after the other.
    """

    rows: Index
    columns: int
    inputs: int
    stored_inputs: int
    zero_point: Index
    bits: int
    groups: int = 1


@dataclass(frozen=True)
class Rows:
    """Where the activations of a product's rows lie in ``buffer``, in the form the dot product reads.

    A row begins at element ``place(row)``, and rows of one ``run`` (of all, where it is None) lie ``step`` elements
    apart; of a convolution's row, tap (ky, kx) of ``kernel`` lies ``shift(ky, kx)`` further, and neighbours along kx
    ``tap_step`` elements apart. A row past the last one may be asked for, too. To element ``end`` of a row (where that
    is not 0), zeros follow the product's inputs.
    """

    buffer: Buffer
    place: Callable[[Index], Index]
    step: int
    run: int | None = None
    kernel: tuple[int, int] = (1, 1)
    tap_step: int = 0
    shift: Callable[[Index, Index], Index] = lambda ky, kx: 0
    end: int = 0

    @contextmanager
    def taps(self) -> Iterator[tuple[Index, Index]]:
        """Loop over the window: (tap number, how far it lies)."""
        if self.kernel == (1, 1):
            yield 0, 0
            return
        with T.serial(0, self.kernel[0]) as ky, T.serial(0, self.kernel[1]) as kx:
            yield T.bind(ky * self.kernel[1] + kx), T.bind(self.shift(ky, kx))


def joined(p: Product, x: Rows) -> tuple[Product, Rows]:
    """The same product with taps that lie one after the other, in activations as in weights, as inputs of one tap."""
    inputs = ceil_div(p.inputs, QUAD) * QUAD
    if x.kernel[1] == 1 or x.tap_step != inputs or p.stored_inputs > inputs or p.groups > 1:
        return p, x
    inputs *= x.kernel[1]
    return replace(p, inputs=inputs, stored_inputs=inputs), replace(x, kernel=(x.kernel[0], 1))


def row_stride(inputs: int) -> int:
    """Bytes a row of prepared activations: whole words."""
    return ceil_div(inputs, BLOCK) * BLOCK


def as_read(isa: Isa, value: Expr, dtype: str, n: int) -> Expr:
    """``n`` activations of ``dtype``, int8 or uint8 with 128 added, as ``isa`` reads them."""
    if dtype == isa.activation_dtype:
        return value
    return T.reinterpret(vec(isa.activation_dtype, n), value) ^ fill(T.cast(128, isa.activation_dtype), n)


def prepare_rows(isa: Isa, x: Buffer, rows: Index, inputs: int) -> Rows:
    """int8 ``x`` [rows, inputs] in the form ``multiply`` reads: copied, or as it lies."""
    if isa.matrices and inputs % QUAD == 0:
        return Rows(x, lambda row: row * inputs, inputs)
    stride, lanes = row_stride(inputs), isa.lanes * QUAD
    prepared = scratch_rows(isa, rows, inputs)

    @for_each(rows, product((rows, inputs)))
    def _(row: Index) -> None:
        def copy(i: Index, n: int) -> None:
            store(prepared.buffer, row * stride + i, as_read(isa, load(x, row * inputs + i, n), "int8", n), n)

        chunks(inputs, lanes, copy)
        if inputs % isa.word:
            with T.serial(0, isa.word - inputs % isa.word) as i:
                T.buffer_store(prepared.buffer, T.cast(0, isa.activation_dtype), [row * stride + inputs + i])

    return prepared


def scratch_rows(isa: Isa, rows: Index, inputs: int) -> Rows:
    """Scratch for ``rows`` of ``inputs`` activations, ``row_stride(inputs)`` elements each."""
    stride = row_stride(inputs)
    return Rows(T.alloc_buffer(((rows + SPARE_ROWS) * stride,), isa.activation_dtype), lambda row: row * stride, stride)


def middle_rows(isa: Isa, rows: Index, rank: int) -> Rows:
    """Scratch for ``rows`` of ``rank`` activations between a chain's products; on AMX whole steps of its products."""
    if not isa.matrices:
        return scratch_rows(isa, rows, rank)
    whole = scratch_rows(isa, rows, ceil_div(rank, BLOCK * QUAD) * (BLOCK * QUAD))
    return replace(whole, end=whole.step)


def weight_words(isa: Isa, weights: Buffer, index: Index, bits: int) -> Expr:
    """A vector of weight words at byte ``index``, rounded to ``bits``."""
    lanes = isa.lanes * QUAD
    return T.bind(top_bits(load(weights, index, lanes), bits, lanes))


def spread_word(isa: Isa, buffer: Buffer, index: Index) -> Expr:
    """The four bytes at ``index`` in every lane."""
    word = T.reinterpret("int32", load(buffer, index, QUAD))
    return T.reinterpret(vec(buffer.dtype, isa.lanes * QUAD), T.broadcast(word, isa.lanes))


def narrowed_panel(
    isa: Isa, weights: Buffer, at: Place, taps: int, words: int, count: int, bits: int
) -> tuple[Buffer, Place]:
    """The ``count`` registers of weights at each word, rounded to ``bits``, in scratch."""
    size = isa.lanes * QUAD
    panel = T.alloc_buffer((taps * words * count * size,), "int8")

    def place(register: int, tap: Index, k: Index) -> Index:
        return ((tap * words + k) * count + register) * size

    with T.serial(0, taps) as tap, T.serial(0, words) as k:
        for v in range(count):
            word = weight_words(isa, weights, at(v, tap, k), bits)
            store(panel, place(v, tap, k), word, size)
    return panel, place


def weight_sums(isa: Isa, weights: Buffer, at: Place, taps: int, words: int, count: int, bits: int) -> list[Buffer]:
    """Sums of the weight words ``at(register, tap, word)``, one small int32 buffer a register."""
    sums = ColumnSums(isa, count)
    with T.serial(0, taps) as tap, T.serial(0, words) as k:
        for v in range(count):
            sums.add(v, 0, weight_words(isa, weights, at(v, tap, k), bits))
    return [chain for (chain,) in sums.chains]


class ColumnSums:
    """Sums of weight words by column, of ``registers`` of columns, by the dot product with ones.

    One waits for the one before in its chain, of which each register has ``chains``.
    """

    def __init__(self, isa: Isa, registers: int, chains: int = 1) -> None:
        self._isa = isa
        self.chains = accumulators(registers, chains, isa.lanes, "int32")
        for chain in (chain for line in self.chains for chain in line):
            store(chain, 0, fill(T.int32(0), isa.lanes), isa.lanes)

    def add(self, register: int, number: int, words: Expr) -> None:
        """Add a register's words, in the chain whose turn ``number`` is."""
        lanes, line = self._isa.lanes, self.chains[register]
        chain, ones = line[number % len(line)], fill(T.cast(1, self._isa.activation_dtype), lanes * QUAD)
        store(chain, 0, self._isa.dot(load(chain, 0, lanes), ones, words), lanes)

    def of(self, register: int) -> Expr:
        """A register's sums."""
        first, *others = (load(chain, 0, self._isa.lanes) for chain in self.chains[register])
        for other in others:
            first = first + other
        return first
