"""Products of uint8 activations and narrow int8 weights on AVX2: neighbours in int16, several words before int32.

``vpmaddubsw`` adds the products of two neighbours in int16. Where int16 holds the sums of several words, they are added
up there, and ``vpmaddwd`` widens them once. How many it holds whatever the weights, their width says; of twice as many,
what the weights themselves come to. So the steps of a panel's reduction are sorted as they are rounded: first those
whose words are added up together, then those where it takes two turns.

The inner loop is assembly: a tile's sums fill the registers, so weights have to stay operands in memory. LLVM loads
them and spills sums: 176 GOP/s on a Zen 4 core with two words of 6 bits, where this loop reaches 222.
"""

from dataclasses import dataclass
from functools import cache

from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels.emit import Buffer, Index, fill, held, load, store
from t3c_compile.backends.tvm.kernels.isa import QUAD, Isa, avx2_pairs, avx2_widened
from t3c_compile.backends.tvm.kernels.product import Place, Rows, weight_words
from t3c_compile.backends.tvm.kernels.tile import Tile
from t3c_compile.passes.ops.nested import WEIGHT_QMAX

_LANES = 8
_SIZE = _LANES * QUAD  # bytes a register
_REGISTERS = 16
_ROWS = 8  # of a tile, at most
CHUNK_ROWS = 256  # of a task: what rounding takes, more rows have to pay back than elsewhere
_LINE_END = "\\0A"
_WORDS = 4  # that are added up in int16 at most: more gain nothing
_LIMIT = 0x7FFF // 0xFF  # what weights of one sign may come to whose products are added up in one int16


@dataclass(frozen=True)
class Steps:
    """``count`` steps of a reduction, of ``words`` each, of which ``together`` are added up in int16: those from
    ``begin`` on, with their weights from ``first`` on."""

    first: Index
    begin: Index
    count: Index
    words: int
    together: int


@dataclass(frozen=True)
class Panel:
    """A panel of weights in steps: ``weights``, [step, word, vector, 32]; ``places``: how far each step lies from where
    a row begins; ``sums``: of each column's weights, int32 x 8 a vector."""

    weights: Buffer
    places: Buffer
    steps: list[Steps]
    sums: list[Buffer]


def words_for(bits: int) -> int:
    """Words whose sums int16 holds, whatever their weights of ``bits``: a power of two."""
    step = 1 << (8 - bits)
    most = (WEIGHT_QMAX + step // 2) // step
    return min(_WORDS, 1 << (_LIMIT // (2 * most)).bit_length() - 1)


def fitted(tile: Tile) -> Tile:
    """``tile`` with no more sums than registers: beside them there are the weights' ones, a word of a row, its products
    of each vector, and one more. Rows take a register for addresses each."""
    vectors = min(tile.vectors, 4)
    return Tile(min(tile.rows, _ROWS, (_REGISTERS - 3 - vectors) // vectors), vectors, tile.chunk)


def narrow_panel(isa: Isa, x: Rows, weights: Buffer, at: Place, words: int, vectors: int, bits: int) -> Panel:
    """The weights ``at(vector, tap, word)`` as whole numbers of ``bits``, in scratch."""
    safe = words_for(bits)
    sorts = safe == 1  # with more, what it gains is what it costs
    together = 2 if sorts else safe
    taps, (turns, rest) = x.kernel[0] * x.kernel[1], divmod(words, together)
    size = vectors * _SIZE
    panel = T.alloc_buffer((taps * words * size,), "int8")
    places = T.alloc_buffer((taps * (turns + rest),), "int32")
    sums = [T.alloc_buffer((_LANES,), "int32") for _ in range(vectors)]
    for total in sums:
        store(total, 0, fill(T.int32(0), _LANES), _LANES)
    # Sorted steps fill their part from both ends; single words follow.
    ends = T.alloc_buffer((2,), "int32")
    T.buffer_store(ends, T.int32(0), [0])
    T.buffer_store(ends, T.int32(taps * turns - 1), [1])

    def rounded(tap: Index, first: Index, number: int) -> list[list[Expr]]:
        """``number`` words of each vector."""
        return [
            [
                T.bind(weight_words(isa, weights, at(v, tap, first + k), bits) >> fill(T.int8(8 - bits), _SIZE))
                for k in range(number)
            ]
            for v in range(vectors)
        ]

    def fits(found: list[list[Expr]]) -> Expr:
        """1 where int16 holds the sums of these words' products, whatever the activations, else 0."""
        worst = fill(T.int16(0), 2 * _LANES)
        for of_vector in found:
            positive = T.bind(_sum_of_pairs([T.max(word, fill(T.int8(0), _SIZE)) for word in of_vector]))
            worst = T.max(worst, T.max(positive, positive - _sum_of_pairs(of_vector)))
        greatest = T.call_llvm_pure_intrin("int16", "llvm.vector.reduce.smax.v16i16", worst)
        return T.bind(T.cast(greatest <= T.int16(_LIMIT), "int32"))

    def write(step: Index, found: list[list[Expr]], start: Index, far: Index) -> None:
        for v, of_vector in enumerate(found):
            for k, word in enumerate(of_vector):
                store(panel, start + (k * vectors + v) * _SIZE, word, _SIZE)
            store(sums[v], 0, avx2_widened(load(sums[v], 0, _LANES), _sum_of_pairs(of_vector)), _LANES)
        T.buffer_store(places, T.cast(far, "int32"), [step])

    alone = taps * turns * together * size  # where single words begin
    with x.taps() as (tap, far):
        if turns:
            with T.serial(0, turns) as i:
                found = rounded(tap, i * together, together)
                step = T.cast(tap * turns + i, "int32")
                if sorts:
                    low, high, fast = T.bind(ends[0]), T.bind(ends[1]), fits(found)
                    T.buffer_store(ends, low + fast, [0])
                    T.buffer_store(ends, high - (1 - fast), [1])
                    step = T.Select(fast == 1, low, high)
                step = held(step)
                write(step, found, step * (together * size), far + i * (together * QUAD))
        if rest:
            with T.serial(0, rest) as k:
                step = T.bind(tap * rest + k)
                found = rounded(tap, turns * together + k, 1)
                write(taps * turns + step, found, alone + step * size, far + (turns * together + k) * QUAD)
    steps = []
    if turns and sorts:
        fast = T.bind(ends[0])
        steps.append(Steps(0, 0, fast, together, together))
        steps.append(Steps(fast * (together * size), fast, taps * turns - fast, together, safe))
    elif turns:
        steps.append(Steps(0, 0, taps * turns, together, together))
    if rest:
        steps.append(Steps(alone, taps * turns, taps * rest, 1, 1))
    return Panel(panel, places, steps, sums)


def _sum_of_pairs(words: list[Expr]) -> Expr:
    """Neighbours added up, and those of all words, in int16."""
    pairs = [avx2_pairs(fill(T.uint8(1), _SIZE), word) for word in words]
    return sum(pairs[1:], pairs[0])


def add_products(acc: list[list[Buffer]], activations: Buffer, rows: list[Index], panel: Panel) -> None:
    """Add a panel's products to the sums ``acc[row][vector]`` of the rows that begin at ``rows``."""
    for steps in panel.steps:
        name, definition = _function(len(acc), len(acc[0]), steps.words, steps.together)
        arguments = [T.address_of(cell[0]) for line in acc for cell in line]
        arguments += [T.address_of(activations[row]) for row in rows]
        arguments += [T.address_of(panel.weights[steps.first]), T.address_of(panel.places[steps.begin])]
        with T.attr(T.int32(0), "pragma_import_llvm", definition):
            T.evaluate(T.call_extern("int32", name, *arguments, T.cast(steps.count, "int64")))


@cache
def _function(rows: int, vectors: int, words: int, together: int) -> tuple[str, str]:
    """The name and the LLVM function: pointers to sums, rows, weights and places, and the number of steps."""
    sums = rows * vectors
    # Operands: results, which are the first inputs, too; what is used meanwhile; the other inputs.
    weights, places, count = sums, sums + 1, sums + 2
    offset, word, more = sums + 3, sums + 4, sums + 5 + vectors
    results, temporaries = sums + 3, vectors + 3
    row, ones = 2 * results + temporaries, 2 * results + temporaries + rows
    code = [f"testq ${count}, ${count}", "je 2f", "1:", f"movslq (${places}), ${offset}"]
    for r in range(rows):
        for k in range(words):
            code.append(f"vpbroadcastd {QUAD * k}(${row + r},${offset}), ${word}")
            for v in range(vectors):
                products, total = word + 1 + v, r * vectors + v
                target = more if k % together else products
                code.append(f"vpmaddubsw {_SIZE * (k * vectors + v)}(${weights}), ${word}, ${target}")
                if k % together:
                    code.append(f"vpaddw ${more}, ${products}, ${products}")
                if (k + 1) % together == 0:
                    code.append(f"vpmaddwd ${ones}, ${products}, ${products}")
                    code.append(f"vpaddd ${products}, ${total}, ${total}")
    code += [f"addq $$4, ${places}", f"addq $${_SIZE * words * vectors}, ${weights}", f"decq ${count}", "jne 1b", "2:"]
    vector, name = "<8 x i32>", f"t3c_pairs_{rows}x{vectors}_{words}_{together}"
    pointers = [f"ptr %s{i}" for i in range(sums)] + [f"ptr %x{r}" for r in range(rows)]
    kinds = ", ".join([vector] * sums + ["ptr", "ptr", "i64", "i64"] + [vector] * (vectors + 2))
    constraints = ["=&x"] * sums + ["=&r"] * 4 + ["=&x"] * (vectors + 2)
    constraints += [str(i) for i in range(results)] + ["r"] * rows + ["x", "~{memory}", "~{flags}"]
    arguments = [f"{vector} %a{i}" for i in range(sums)] + ["ptr %w", "ptr %p", "i64 %n"]
    arguments += [f"ptr %x{r}" for r in range(rows)] + [f"<16 x i16> <{', '.join(['i16 1'] * 16)}>"]
    lines = [
        f"define linkonce_odr i32 @{name}({', '.join(pointers)}, ptr %w, ptr %p, i64 %n) alwaysinline nounwind {{",
        *(f"%a{i} = load {vector}, ptr %s{i}, align 16" for i in range(sums)),
        f'%r = call {{ {kinds} }} asm sideeffect "{_LINE_END.join(code)}",',
        f'"{",".join(constraints)}"({", ".join(arguments)})',
        *(f"%b{i} = extractvalue {{ {kinds} }} %r, {i}" for i in range(sums)),
        *(f"store {vector} %b{i}, ptr %s{i}, align 16" for i in range(sums)),
        "ret i32 0",
        "}",
    ]
    return name, "\n".join(lines)
