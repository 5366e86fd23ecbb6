"""Every deployment op over a grid of shapes, as kernels of one library: numpy arguments and torch's answers.

:func:`run_calls` needs numpy and TVM's runtime alone, so that the same cases run on a device or in an emulator:
compile with :func:`compile_cases`, ship the library and the arrays.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm
from numpy.typing import NDArray

if TYPE_CHECKING:
    from t3c_compile.backends.targets import Target
    from t3c_compile.backends.tvm.kernels.isa import Isa

Array = NDArray[np.generic]


@dataclass(frozen=True)
class Packed:
    """A weight of ``bits`` that kernels take as their instruction set packs it."""

    raw: Array
    packing: Callable[[Any], Any]
    bits: int = 8

    def for_isa(self, isa: "Isa") -> Array:
        """Packed, and rounded where kernels want it so."""
        packing = self.packing(isa)
        return pack_numpy(replace(packing, bits=self.bits) if isa.rounds_at_load else packing, self.raw)


@dataclass(frozen=True)
class Call:
    """Kernel ``name`` on ``args`` writes an array of ``shape`` and ``dtype``.

    ``activations``: the first argument is int8 that the kernel takes in its dot product's form.
    """

    name: str
    args: tuple[Any, ...]
    shape: tuple[int, ...]
    dtype: str
    activations: bool = False


@dataclass(frozen=True)
class Case:
    """A call, what it must give, and the kernel's source for an instruction set; the spec of those that are tuned."""

    call: Call
    expected: Array
    kernel: Callable[..., object] = field(repr=False)
    spec: Any = None


def run_calls(library: Path, calls: Sequence[Call]) -> list[Array]:
    """What each call gives, run from a compiled library."""
    module = tvm.runtime.load_module(str(library))
    results = []
    for call in calls:
        result = tvm.runtime.tensor(np.zeros(call.shape, call.dtype))
        module[call.name](*(tvm.runtime.tensor(a) for a in call.args), result)
        results.append(result.numpy())
    return results


def calls_for(cases: Sequence[Case], target_name: str, isa: "Isa | None" = None) -> list[Call]:
    """The calls of ``cases`` as a target's kernels take them; ``isa`` in place of its instruction set."""
    from t3c_compile.backends.targets import get_target
    from t3c_compile.backends.tvm.kernels.isa import isa_for

    isa = isa or isa_for(get_target(target_name))

    def call(c: Call) -> Call:
        x, *others = (a.for_isa(isa) if isinstance(a, Packed) else a for a in c.args)
        return replace(c, args=(x.view("uint8") ^ 128 if c.activations and isa.unsigned else x, *others))

    return [call(case.call) for case in cases]


def save_calls(path: Path, calls: Sequence[Call]) -> None:
    """Write calls where no pickle is needed to read them."""
    arrays = {f"{i}.{j}": a for i, call in enumerate(calls) for j, a in enumerate(call.args)}
    described = json.dumps([(c.name, len(c.args), c.shape, c.dtype) for c in calls])
    np.savez(path, calls=np.array(described), **arrays)


def load_calls(path: Path) -> list[Call]:
    """Read what :func:`save_calls` wrote."""
    data = np.load(path)
    return [
        Call(name, tuple(data[f"{i}.{j}"] for j in range(count)), tuple(shape), dtype)
        for i, (name, count, shape, dtype) in enumerate(json.loads(str(data["calls"])))
    ]


def build_cases() -> list[Case]:
    """The grid. Inputs reach both ends of int8, zero-points too; ranks lie below the store's; shapes are ragged."""
    from t3c_compile.backends.tvm.kernels import quantize  # noqa: F401

    make = _Maker(np.random.default_rng(7))
    make.quantize()
    make.embedding((3, 17), 40, 64, 8, "int64")
    make.embedding((5,), 7, 33, 4, "int32")
    make.embedding((2, 700), 300, 48, 6, "int64")
    for rows, inputs, outputs, bits, zero_point in [
        (1, 64, 64, 8, 0),
        (7, 30, 100, 4, -128),
        (13, 33, 17, 6, 127),
        (197, 40, 10, 8, 5),
        (100, 129, 130, 4, -3),
        (40, 45, 70, 7, -128),
    ]:
        make.int8_linear(rows, inputs, outputs, bits, zero_point)
    # Tiles that tuning may choose: one vector, more than a block, tall ones, tasks that end inside a tile.
    for tile in [(2, 1, 38), (4, 5, 10), (12, 2, 24), (16, 1, 16)]:
        make.int8_linear(37, 75, 50, 6, 9, tile)
    for rows, inputs, outputs, bits, symbolic in [
        (1, 64, 64, 8, False),
        (1, 130, 257, 4, True),
        (1, 5, 3, 6, False),
        (1, 1025, 1031, 4, False),
        (2, 33, 17, 4, False),
        (3, 70, 150, 7, True),
        (4, 40, 10, 4, False),
        (5, 129, 130, 8, True),
        (197, 77, 100, 4, False),
    ]:
        make.weight_only_linear(rows, inputs, outputs, bits, symbolic)
    for rows, inputs, outputs, max_rank, rank, bits, symbolic in [
        (1, 64, 96, 32, 16, 8, False),
        (1, 70, 90, 48, 33, 4, True),
        (3, 17, 5, 7, 7, 4, False),
        (4, 30, 50, 21, 9, 6, False),
        (101, 30, 50, 21, 13, 4, True),
    ]:
        make.svd_weight_only_linear(rows, inputs, outputs, max_rank, rank, bits, symbolic)
    make.tie()
    make.int16_limit()
    for rows, inputs, outputs, max_rank, rank, bits, zero_point in [
        (8, 64, 96, 32, 16, 8, 3),
        (5, 30, 50, 21, 9, 6, -128),
        (1, 17, 5, 7, 7, 4, 127),
        (101, 70, 90, 48, 33, 8, 0),
    ]:
        make.svd_linear(rows, inputs, outputs, max_rank, rank, bits, zero_point)
    for case in [
        # batch, channels, height, width, outputs, kernel, stride, padding, dilation, groups, bits, zero point
        (1, 8, 6, 6, 8, 1, 1, 0, 1, 1, 8, 0),
        (2, 3, 9, 7, 5, 3, 1, 1, 1, 1, 8, -128),
        (1, 3, 20, 33, 12, 7, 2, 3, 1, 1, 6, 127),
        (1, 16, 14, 14, 32, 3, 2, 1, 1, 1, 4, -3),
        (1, 10, 13, 12, 33, 3, 1, 2, 2, 1, 6, 9),
        (1, 12, 10, 11, 18, 3, 1, 1, 1, 2, 8, 4),
        (1, 12, 5, 5, 20, 2, 3, 1, 1, 4, 4, -4),
        (1, 16, 15, 13, 24, 1, 2, 0, 1, 1, 8, 1),
        (1, 20, 10, 11, 20, 5, 1, 2, 1, 20, 4, 127),
        (2, 10, 9, 11, 10, 3, 2, 1, 1, 10, 8, -128),
        (1, 6, 30, 40, 9, 3, 1, 1, 1, 1, 8, 2),
        (1, 20, 11, 10, 40, 3, 1, 1, 1, 1, 7, 5),
    ]:
        make.int8_conv2d(*case)
    for form in ("svd", "tucker2", "cp"):
        for case in [
            # batch, channels, height, width, outputs, kernel, stride, padding, max ranks, rank, bits, zero point
            (2, 12, 9, 7, 20, 3, 1, 1, (16, 12), 8, 8, 3),
            (1, 13, 9, 8, 21, 3, 2, 1, (9, 13), 7, 4, -128),
            (1, 5, 24, 31, 6, 5, 1, 2, (8, 8), 8, 6, 127),
            (2, 3, 11, 19, 9, 3, 1, 1, (3, 7), 3, 8, -128),
        ]:
            make.chain(form, *case)
    return make.cases


def compile_cases(
    cases: Sequence[Case], target_name: str, path: Path | None = None, isa: "Isa | None" = None
) -> tvm.runtime.Module:
    """The kernels of ``cases`` for a target, exported to ``path`` where one is given; ``isa`` as above."""
    from t3c_compile.backends.targets import get_target
    from t3c_compile.backends.tvm.build import link
    from t3c_compile.backends.tvm.kernels.isa import isa_for

    target = get_target(target_name)
    isa = isa or isa_for(target)
    functions = {c.call.name: c.kernel(isa).with_attr("global_symbol", c.call.name) for c in cases}  # type: ignore[attr-defined]
    module = compile_module(functions, target)
    if path is not None:
        link(module, target, path)
    return module


def compile_module(functions: Mapping[str, object], target: "Target") -> tvm.runtime.Module:
    """Kernels by name, compiled for a target."""
    from t3c_compile.backends.tvm.pipelines import KERNEL_PIPELINE

    described = tvm.target.Target(dict(target.tvm))
    return tvm.tirx.build(tvm.IRModule(dict(functions)), target=described, pipeline=KERNEL_PIPELINE)


def pack_numpy(packing: object, raw: Array) -> Array:
    """The meaning of a packing, by numpy; what the pack kernels are held against."""
    p = packing
    blocks, words = -(-p.outputs // p.block), -(-p.inputs // p.word)  # type: ignore[attr-defined]
    packed = np.zeros((p.groups, blocks * p.block, p.taps, words * p.word), raw.dtype)  # type: ignore[attr-defined]
    g, o, t, i = np.ix_(*(range(n) for n in (p.groups, p.outputs, p.taps, p.inputs)))  # type: ignore[attr-defined]
    so, si, st = p.strides  # type: ignore[attr-defined]
    packed[:, : p.outputs, :, : p.inputs] = raw.reshape(-1)[(g * p.outputs + o) * so + i * si + t * st]  # type: ignore[attr-defined]
    step = 1 << (8 - p.bits)  # type: ignore[attr-defined]
    packed = (np.rint(packed / step) * step).astype(raw.dtype) if step > 1 else packed
    packed = packed.reshape(p.groups * blocks, p.block, p.taps * words, p.word).transpose(0, 2, 1, 3)  # type: ignore[attr-defined]
    if p.layout == "nibbles":  # type: ignore[attr-defined]
        top = np.rint(packed / 16).astype(np.int32)
        packed = (top[:, :, :16] & 15 | top[:, :, 16:] << 4).astype(np.int8)
    return np.ascontiguousarray(packed.reshape(p.shape))  # type: ignore[attr-defined]


class _Maker:
    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.cases: list[Case] = []

    def add(
        self,
        args: Sequence[Any],
        expected: object,
        kernel: Callable[..., object],
        name: str,
        images: bool = False,
        spec: object = None,
    ) -> None:
        answer = expected.numpy()  # type: ignore[attr-defined]
        call = Call(f"{name}_{len(self.cases)}", tuple(args), answer.shape, str(answer.dtype), images)
        self.cases.append(Case(call, answer, kernel, spec))

    def expression(self, function: Callable[..., object], args: Sequence[Array], expected: object, name: str) -> None:
        """Add a kernel of one tensor expression, scheduled as the build schedules it."""
        from tvm import te

        from t3c_compile.backends.tvm.default_schedule import schedule_default

        def kernel(isa: object) -> object:
            inputs = [te.placeholder(a.shape, str(a.dtype), name=f"x{i}") for i, a in enumerate(args)]
            return schedule_default(te.create_prim_func([*inputs, function(*inputs)]), isa.lanes)  # type: ignore[attr-defined]

        self.add(args, expected, kernel, name)

    def activations(self, *shape: int) -> Array:
        x = self.rng.integers(-128, 128, shape).astype("int8")
        x.reshape(-1)[: 1 + x.size // 8] = -128
        x.reshape(-1)[-(1 + x.size // 8) :] = 127
        return x

    def planes(self, q: Array, zero_point: int) -> tuple[Array, Array]:
        """float32 values that are ``q`` when quantized, off the middle of a step, and the numbers of that."""
        at = q.astype("float32") + self.floats(*q.shape, low=-0.45, high=0.45)
        # Past the ends of int8 too.
        at[q == 127] += 1e4
        at[q == -128] -= 1e4
        return (at - np.float32(zero_point)) * np.float32(0.5), _numbers(2.0, zero_point)

    def weights(self, *shape: int) -> Array:
        w = self.rng.integers(-119, 120, shape).astype("int8")
        w.reshape(-1)[: 1 + w.size // 8] = 119
        w.reshape(-1)[-(1 + w.size // 8) :] = -119
        w[..., 8:24] //= 4  # int16 holds the sums of more words of these
        return w

    def floats(self, *shape: int, low: float = -1.0, high: float = 1.0) -> Array:
        return self.rng.uniform(low, high, shape).astype("float32")

    def quantize(self) -> None:
        from t3c_compile.backends.tvm.kernels import quantize

        for shape, scale, zero_point in [((3, 50), 0.05, -128), ((257,), 0.37, 127), ((2, 5, 9000), 1e-3, 0)]:
            x = self.floats(*shape, low=-20, high=20)
            # Ties between two integers, and values far outside the range.
            x.reshape(-1)[:40] = (np.arange(40) - 20.5) * np.float32(scale)
            x.reshape(-1)[40:42] = 1e30, -1e30
            q = _op("quantize_int8", x, scale, zero_point)
            back = _op("dequantize_int8", q.numpy(), scale, zero_point)  # type: ignore[attr-defined]
            to_int8, to_float = _numbers(1 / scale, zero_point), _numbers(scale, zero_point)
            self.expression(quantize.quantize, [x, to_int8], q, "quantize")
            self.expression(quantize.dequantize, [q.numpy(), to_float], back, "dequantize")  # type: ignore[attr-defined]

    def embedding(self, lead: tuple[int, ...], rows: int, columns: int, bits: int, dtype: str) -> None:
        from t3c_compile.backends.tvm.kernels import quantize

        indices, w = self.rng.integers(0, rows, lead).astype(dtype), self.weights(rows, columns)
        indices.reshape(-1)[:2] = 0, rows - 1
        scale = self.floats(rows, low=0.01)
        expected = _op("int8_embedding", indices, w, scale, bits)
        self.expression(partial(quantize.embedding, bits=bits), [indices, w, scale], expected, "int8_embedding")

    def int8_linear(
        self,
        rows: int,
        inputs: int,
        outputs: int,
        bits: int,
        zero_point: int,
        tile: tuple[int, int, int] | None = None,
    ) -> None:
        from t3c_compile.backends.tvm.kernels import linear
        from t3c_compile.backends.tvm.kernels.tile import Tile

        x, w = self.activations(rows, inputs), self.weights(outputs, inputs)
        scale, bias = self.floats(outputs, low=0.01), self.floats(outputs) if bits != 6 else None
        spec = linear.LinearSpec((rows,), inputs, outputs, bits, bias=bias is not None)
        tiles = () if tile is None else (Tile(*tile),)
        args = [x, _numbers(0.02, zero_point), _matrix(w, bits), scale, bias]
        expected = _op("int8_linear", x, w, scale, bias, 0.02, zero_point, bits)
        self.add(_present(args), expected, _kernel(spec, tiles), "int8_linear", spec=spec)

    def int16_limit(self) -> None:
        """Weights of 7 bits by which int16 just holds the sums of two words, beside some by which it does not."""
        from t3c_compile.backends.tvm.kernels import linear

        x, w = np.full((40, 24), 127, np.int8), np.full((64, 24), 64, np.int8)
        w[1::2] *= -1
        w[3, 9] += 2 * np.sign(w[3, 9])
        w[36, 20] += 2
        spec = linear.LinearSpec((40,), 24, 64, 7)
        args = [x, _numbers(1.0, -128), _matrix(w, 7), np.ones(64, np.float32)]
        expected = _op("int8_linear", x, w, np.ones(64, np.float32), None, 1.0, -128, 7)
        self.add(args, expected, _kernel(spec), "int8_linear")

    def tie(self) -> None:
        """A product midway between two float32, and a bias too small for float64 to see beside it, which decides."""
        from t3c_compile.backends.tvm.kernels import linear

        x, w = np.ones((1, 1), np.int8), np.full((2, 1), 3, np.int8)
        scale, bias = np.full(2, 1 + 2**-23, np.float32), np.array([-1e-30, 1e-30], np.float32)
        spec = linear.LinearSpec((1,), 1, 2, 8, bias=True)
        args = [x, _numbers(1.0, 0), _matrix(w, 8), scale, bias]
        expected = _op("int8_linear", x, w, scale, bias, 1.0, 0, 8)
        assert expected.tolist() == [[3 + 2**-22, 3 + 2**-21]]  # type: ignore[attr-defined]
        self.add(args, expected, _kernel(spec), "int8_linear")

    def weight_only_linear(self, rows: int, inputs: int, outputs: int, bits: int, symbolic: bool) -> None:
        from t3c_compile.backends.tvm.kernels import weight_only

        x, w = self.floats(rows, inputs), self.weights(outputs, inputs)
        x[:, 0], x[:, -1] = 1e4, -1e-4
        if rows > 4:
            # A row of zeros has no greatest; what is no number stays in its row.
            x[0], x[1, 1], x[2, 0] = 0, np.nan, np.inf
        scale, bias = self.floats(outputs, low=0.01), self.floats(outputs) if bits != 6 else None
        args = _present([x, pack_numpy(weight_only.weight_packing(w.shape, bits), w), scale, bias])
        expected = _op("weight_only_linear", x, w, scale, bias, bits)
        spec = weight_only.WeightOnlySpec(("n" if symbolic else rows,), inputs, outputs, bits, bias is not None)
        self.add(args, expected, partial(weight_only.weight_only_linear, s=spec), "weight_only_linear")

    def svd_weight_only_linear(
        self, rows: int, inputs: int, outputs: int, max_rank: int, rank: int, bits: int, symbolic: bool
    ) -> None:
        from t3c_compile.backends.tvm.kernels import weight_only

        x, v, u = self.floats(rows, inputs), self.weights(max_rank, inputs), self.weights(max_rank, outputs)
        mid, bias = self.floats(max_rank, low=1e-4, high=0.01), self.floats(outputs) if bits != 6 else None
        packed = [
            pack_numpy(weight_only.weight_packing(v.shape, bits), v),
            pack_numpy(weight_only.weight_packing(u.shape, bits, transposed=True), u),
        ]
        args = _present([x, *packed, mid, bias])
        expected = _op("svd_weight_only_linear", x, v, u, mid, bias, rank, bits)
        lead = ("n" if symbolic else rows,)
        spec = weight_only.WeightOnlySpec(lead, inputs, outputs, bits, bias is not None, max_rank, rank)
        self.add(args, expected, partial(weight_only.svd_weight_only_linear, s=spec), "svd_weight_only_linear")

    def svd_linear(
        self, rows: int, inputs: int, outputs: int, max_rank: int, rank: int, bits: int, zero_point: int
    ) -> None:
        from t3c_compile.backends.tvm.kernels import linear

        x, v, u = self.activations(rows, inputs), self.weights(max_rank, inputs), self.weights(max_rank, outputs)
        mid = self.floats(max_rank, low=1e-4, high=0.01)
        gain, bias = (self.floats(outputs), self.floats(outputs)) if bits != 6 else (None, None)
        spec = linear.LinearSpec((rows,), inputs, outputs, bits, gain is not None, bias is not None, max_rank, rank)
        packed = [_matrix(v, bits), _matrix(u, bits, transposed=True)]
        expected = _op("svd_linear", x, v, u, mid, gain, bias, 0.02, zero_point, 0.3, rank, bits)
        args = _present([x, _numbers(0.02 / 0.3, zero_point, 0.3), *packed, mid, gain, bias])
        self.add(args, expected, _kernel(spec), "svd_linear", spec=spec)

    def int8_conv2d(
        self, n: int, c: int, h: int, w: int, o: int, k: int, s: int, p: int, d: int, g: int, bits: int, zero_point: int
    ) -> None:
        from t3c_compile.backends.tvm.kernels import conv
        from t3c_compile.backends.tvm.kernels.window import Window

        x, weight = self.activations(n, c, h, w), self.weights(o, c // g, k, k)
        scale, bias = self.floats(o, low=0.01), self.floats(o) if bits != 6 else None
        window = Window((h, w), (k, k), (s, s), (p, p), (d, d))
        spec = conv.ConvSpec(n, c, o, window, g, bits, bias is not None)
        packed = Packed(weight, spec.packing, bits)
        expected = _op("int8_conv2d", x, weight, scale, bias, 0.02, zero_point, [s, s], [p, p], [d, d], g, bits)
        args = _present([_last(x), _numbers(0.02, zero_point), packed, scale, bias])
        self.add(args, expected.permute(0, 2, 3, 1), _kernel(spec), "int8_conv2d", True, spec)
        if c <= conv.MOST_PLANES:
            of_planes = replace(spec, planes=True)
            args = _present([*self.planes(x, zero_point), packed, scale, bias])
            args[1] = np.concatenate([_numbers(0.02, zero_point), args[1]])
            self.add(args, expected.permute(0, 2, 3, 1), _kernel(of_planes), "int8_conv2d")

    def chain(
        self,
        form: str,
        n: int,
        c: int,
        h: int,
        w: int,
        o: int,
        k: int,
        s: int,
        p: int,
        ranks: tuple[int, int],
        rank: int,
        bits: int,
        zero_point: int,
    ) -> None:
        from t3c_compile.backends.tvm.kernels import conv
        from t3c_compile.backends.tvm.kernels.window import Window

        r_in, r_out = ranks if form == "tucker2" else (ranks[0], ranks[0])
        x, v, u = self.activations(n, c, h, w), self.weights(r_in, c), self.weights(r_out, o)
        mid, out_scale = self.floats(r_in, low=1e-4, high=0.01), self.floats(r_out, low=1e-4, high=0.01)
        gain, bias = (self.floats(o), self.floats(o)) if bits != 6 else (None, None)
        size, stride, padding = ((1, 1), [s, s], (0, 0)) if form == "svd" else ((k, k), [s, s], (p, p))
        window = Window((h, w), size, (s, s), padding, (1, 1))
        spec = conv.ChainSpec(
            form,
            n,
            c,
            o,
            window,
            (r_in, r_out),
            rank,
            bits,
            gain is not None,
            bias is not None,
        )
        packed_v, packed_u = _matrix(v, bits), _matrix(u, bits, transposed=True)
        if form == "svd":
            expected = _op("svd_conv2d", x, v, u, mid, gain, bias, 0.02, zero_point, 0.3, stride, rank, bits)
            args = [_last(x), _numbers(0.02 / 0.3, zero_point, 1.0, 0.3), packed_v, packed_u, mid, gain, bias]
        else:
            core = self.weights(r_out, r_in, k, k) if form == "tucker2" else self.weights(r_in, k, k)
            numbers = (0.02, zero_point, 0.3, 0.7, stride, [p, p], [1, 1], rank, bits)
            expected = _op(f"{form}_conv2d", x, v, core, u, mid, out_scale, gain, bias, *numbers)
            packed = Packed(core, spec.core_packing, bits)
            at = _numbers(0.02 / 0.3, zero_point, 0.3 / 0.7, 0.7)
            args = [_last(x), at, packed_v, packed, packed_u, mid, out_scale, gain, bias]
        expected = expected.permute(0, 2, 3, 1)  # type: ignore[attr-defined]
        self.add(_present(args), expected, _kernel(spec), f"{form}_conv2d", True, spec)
        if c <= conv.MOST_PLANES and (form != "svd" or s == 1):
            of_planes = replace(spec, planes=True)
            args[0], numbers = self.planes(x, zero_point)
            args[1] = np.concatenate([args[1], numbers])
            self.add(_present(args), expected, _kernel(of_planes), f"{form}_conv2d")


def _last(x: Array) -> Array:
    """[N, C, H, W] as [N, H, W, C]."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1))


def _numbers(*values: float) -> Array:
    """Scales and zero points as the kernels take them."""
    return np.array(values, np.float32)


def _matrix(weight: Array, bits: int, transposed: bool = False) -> Packed:
    from t3c_compile.backends.tvm.kernels import pack

    return Packed(weight, lambda isa: pack.words_of_matrix(isa, weight.shape, transposed), bits)


def _kernel(spec: object, tiles: Any = ()) -> Callable[[Any], object]:
    """The kernel of a spec, as a build calls for it."""
    from t3c_compile.backends.tvm.tuning.workload import Workload

    return lambda isa: Workload(isa, spec).kernel(tiles)


def _present(args: Sequence[Any]) -> list[Any]:
    return [a for a in args if a is not None]


def _op(name: str, *args: object) -> object:
    """The torch reference of a ``t3c::`` op on numpy arguments."""
    import torch

    import t3c_compile.passes.ops  # noqa: F401  (registers the ops)

    values = [torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in args]
    return getattr(torch.ops.t3c, name)(*values)


if __name__ == "__main__":  # LIBRARY CALLS RESULTS, on the device or in the emulator
    np.savez(sys.argv[3], *run_calls(Path(sys.argv[1]), load_calls(Path(sys.argv[2]))))
