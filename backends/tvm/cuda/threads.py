"""Building blocks of CUDA kernels: blocks and threads, words of int8, and what the lanes of a warp do together."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import tvm
from tvm.ir import Expr
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels import vmath
from t3c_compile.backends.tvm.kernels.emit import Buffer, Index, ceil_div, static, when

WARP = 32
# Threads of a block where each has a task of its own.
_THREADS = 128

for _op, _function in (("tirx.fma", "fmaf"),):
    tvm.tirx.register_intrin_lowering(
        _op, target="cuda", f=lambda call, name=_function: T.call_extern(str(call.ty.dtype), name, *call.args)
    )
tvm.tirx.register_intrin_lowering(
    vmath.NEAREST, target="cuda", f=lambda call: T.call_extern("int32", "t3c_nearest", *call.args)
)
# Our code is compiled so that no product is joined with a sum.
tvm.tirx.register_intrin_lowering(vmath.ROUNDED, target="cuda", f=lambda call: call.args[0])


@contextmanager
def grid(counts: Sequence[Index], threads: int) -> Iterator[tuple[Expr, ...]]:
    """Blocks of ``threads``, numbered in up to three dimensions, of which the first may be large: (block..., thread).

    Launching none at all is an error, so one is the least.
    """
    with ExitStack() as stack:
        yield (
            *(
                stack.enter_context(
                    T.launch_thread(f"blockIdx.{name}", T.max(count, 1) if static(count) is None else max(count, 1))
                )
                for name, count in zip("xyz", counts, strict=False)
            ),
            stack.enter_context(T.launch_thread("threadIdx.x", threads)),
        )


def for_each_thread(count: Index) -> Callable[[Callable[[Index], None]], None]:
    """Decorator that emits its function for each of ``count`` independent tasks, one a thread."""

    def emit(body: Callable[[Index], None]) -> None:
        with grid([ceil_div(count, _THREADS)], _THREADS) as (block, thread):
            task = T.bind(block * _THREADS + thread)
            if (known := static(count)) is not None and known % _THREADS == 0 and known:
                body(task)
            else:
                when(task < count, lambda: body(task))

    return emit


def barrier() -> None:
    """All threads of the block wait for each other."""
    T.evaluate(T.tvm_storage_sync("shared"))


def exchange(value: Expr, distance: int) -> Expr:
    """``value`` (float32) of the lane whose number differs in the bit ``distance``."""
    return T.bind(T.call_extern("float32", "t3c_exchange", value, distance))


def words(buffer: Buffer, count: Index) -> Buffer:
    """int8 ``buffer`` as ``count`` int32 words of four."""
    return T.decl_buffer((count,), "int32", data=buffer.data, layout=None)


def copy(target: Buffer, to: Index, source: Buffer, at: Index, count: int) -> None:
    """``count`` words, of 1, 2 or 4, that lie aligned in both buffers."""
    T.evaluate(T.call_extern("void", f"t3c_copy{count}", T.address_of(target[to]), T.address_of(source[at])))


def rounded_word(word: Expr, bits: int) -> Expr:
    """``keep_top_bits`` of the four int8 of a word: bytes are added without carries into each other."""
    if bits == 8:
        return word
    step = 1 << (8 - bits)
    below_half, mask = 0x01010101 * (step // 2 - 1), 0x01010101 * (256 - step)
    # A tie goes up from an odd multiple alone.
    odd = (word >> T.int32(8 - bits)) & _int32(0x01010101)
    total = ((word & _int32(0x7F7F7F7F)) + (_int32(below_half) + odd)) ^ (word & _int32(0x80808080))
    return total & _int32(mask)


def _int32(bits: int) -> Expr:
    return T.int32(bits - (1 << 32) if bits >= 1 << 31 else bits)
