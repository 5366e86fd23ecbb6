"""Kernels of the float stages over a grid of shapes and hard inputs, as ``kernel_cases`` has those of the int8 ops."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from kernel_cases import Array, Call, Case
from torch import Tensor
from tvm import te

from t3c_compile.backends.tvm.default_schedule import schedule_default
from t3c_compile.backends.tvm.kernels import floats, pool, rows, vmath
from t3c_compile.backends.tvm.kernels.attention import attention
from t3c_compile.backends.tvm.kernels.attention_heads import AttentionSpec, plain
from t3c_compile.backends.tvm.kernels.window import Window
from t3c_compile.passes.ops.elementwise import FUNCTIONS

ops = torch.ops.t3c
INFINITY, LEAST = float("inf"), torch.finfo(torch.float32).min


def build_float_cases() -> list[Case]:
    """Ragged and whole rows, known and symbolic dimensions, masks of each kind, grouped heads, rows of hard values."""
    torch.manual_seed(11)
    make = _Maker()
    for name in FUNCTIONS:
        make.elementwise(name)
    for count, given in ((768, "wb"), (17, ""), (49, "w"), (100, "b"), (5, "wb")):
        make.norms(count, given)
    for shape in ((4, 197), (3, 5), (2, 3, 64)):
        make.softmax(shape, symbolic=False)
    make.softmax((3, 50), symbolic=True)
    for outer, reduced, inner in (
        ((3, 4), (7, 7), ()),
        ((2,), (20,), (3, 13)),
        ((1,), (16,), (33,)),
        ((5,), (100,), ()),
    ):
        make.mean(outer, reduced, inner, symbolic=False)
    make.mean((2,), (19,), (21,), symbolic=True)
    for sizes in (
        # height, width, kernel, stride, padding, ceil mode
        (23, 40, 3, 2, 1, False),
        (7, 5, 2, 2, 0, True),
        (6, 50, 3, 1, 1, False),
        (9, 9, 5, 3, 2, True),
        (2, 3, 3, 2, 1, False),
    ):
        make.max_pool2d(*sizes)
    for case in ((3, 17, 32, 17), (2, 5, 3, 70), (1, 130, 20, 3), (2, 1, 9, 33)):
        make.matmul(*case, symbolic=False)
    make.matmul(2, 17, 11, 40, symbolic=True)
    make.matmul(2, 5, 40, 3, symbolic=True)
    for case in (
        # batch, query heads, key heads, rows, keys, width, value width, mask, causal, tokens first, symbolic
        (2, 4, 4, 17, 17, 32, 32, "", False, False, False),
        (2, 4, 4, 17, 17, 32, 32, "", False, True, False),
        (1, 4, 2, 5, 33, 24, 20, "row", False, False, False),
        (1, 2, 1, 101, 70, 9, 33, "full", False, False, False),
        (2, 2, 2, 7, 40, 16, 16, "keys", False, True, False),
        (1, 8, 2, 1, 48, 64, 64, "bool", False, False, False),
        (1, 1, 1, 3, 16, 3, 1, "least", False, False, False),
        (1, 4, 2, 100, 100, 16, 16, "", True, False, False),
        (2, 2, 1, 20, 35, 8, 8, "", True, True, False),
        (2, 4, 2, 19, 23, 16, 12, "keys", False, False, True),
        (1, 2, 2, 21, 21, 16, 16, "", True, True, True),
    ):
        make.attention(*case)
        widths = case[5:7]
        if all(width % 16 == 0 for width in widths):
            make.attention(*case, integers=True)
    make.attention(2, 3, 3, 21, 21, 64, 64, "row", False, False, False, integers=True)
    make.attention(1, 2, 2, 300, 300, 32, 48, "", False, True, False, integers=True)
    return make.cases


def hard_values() -> Tensor:
    """Every size of float32, both signs, where functions saturate, and what is no number."""
    sizes = torch.exp2(torch.linspace(-149, 127, 277))
    special = torch.tensor([0.0, -0.0, INFINITY, -INFINITY, float("nan"), 3.4028235e38, -3.4028235e38, 1e-45])
    return torch.cat([sizes, -sizes, special, torch.linspace(-106, 90, 801), torch.randn(400) * 3])


class _Maker:
    def __init__(self) -> None:
        self.cases: list[Case] = []

    def add(
        self,
        name: str,
        kernel: Callable[..., object],
        args: Sequence[Tensor | None],
        expected: Tensor,
        dtype: str = "float32",
    ) -> None:
        arrays: tuple[Array, ...] = tuple(a.contiguous().numpy() for a in args if a is not None)
        call = Call(f"{name}_{len(self.cases)}", arrays, tuple(expected.shape), dtype)
        self.cases.append(Case(call, expected.contiguous().numpy(), kernel))

    def elementwise(self, name: str) -> None:
        x = hard_values()
        function = getattr(vmath, name.removesuffix("_f32"))

        def kernel(isa: object) -> object:
            values = te.placeholder((len(x),), "float32", name="x")
            y = te.compute((len(x),), lambda i: function(values(i)), name="y")
            return schedule_default(te.create_prim_func([values, y]), isa.lanes)  # type: ignore[attr-defined]

        self.add(name, kernel, [x], getattr(ops, name)(x))

    def norms(self, count: int, given: str) -> None:
        x = torch.randn(6, count) * torch.logspace(-20, 15, 6)[:, None]
        x = torch.cat([x, torch.full((1, count), 3.0), torch.zeros(1, count), torch.full((1, count), 1e-42)])
        weight = torch.randn(count) if "w" in given else None
        bias = torch.randn(count) if "b" in given else None
        for lead in ((9,), ("n",)):
            kernel = partial(
                rows.layer_norm, lead=lead, count=count, weight="w" in given, bias="b" in given, epsilon=1e-5
            )
            self.add("layer_norm", kernel, [x, weight, bias], ops.layer_norm_f32(x, weight, bias, 1e-5))
        rms = partial(rows.rms_norm, lead=(9,), count=count, weight="w" in given, epsilon=1e-6)
        self.add("rms_norm", rms, [x, weight], ops.rms_norm_f32(x, weight, 1e-6))

    def softmax(self, shape: tuple[int, ...], symbolic: bool) -> None:
        x = torch.randn(shape) * 4
        flat = x.reshape(-1, shape[-1])
        flat[0, ::3] = -INFINITY
        flat[1] = -INFINITY
        flat[2] *= 1e30
        count = "s" if symbolic else shape[-1]
        self.add("softmax", partial(rows.softmax, lead=shape[:-1], count=count), [x], ops.softmax_f32(x))

    def max_pool2d(self, height: int, width: int, kernel: int, stride: int, padding: int, ceil: bool) -> None:
        x = torch.randn(2, 19, height, width) - 5
        x[0, 0, 0], x[1, 2, :, -1] = -INFINITY, INFINITY
        expected = torch.nn.functional.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil)
        window = Window((height, width), (kernel, kernel), (stride, stride), (padding, padding), (1, 1))
        out = tuple(expected.shape[2:])
        for batch in (2, "n"):
            kernel = partial(pool.max_pool2d, batch=batch, channels=x.shape[1], window=window, out=out)
            self.add("max_pool2d", kernel, [x.permute(0, 2, 3, 1).contiguous()], expected.permute(0, 2, 3, 1))
            whole = x.clamp(-100, 100).to(torch.int8).permute(0, 2, 3, 1).contiguous()
            greatest = expected.clamp(-100, 100).to(torch.int8).permute(0, 2, 3, 1)
            self.add("max_pool2d", partial(kernel, dtype="int8"), [whole], greatest, "int8")

    def mean(self, outer: tuple[int, ...], reduced: tuple[int, ...], inner: tuple[int, ...], symbolic: bool) -> None:
        x = torch.randn(*outer, *reduced, *inner) * 100
        dim = list(range(len(outer), len(outer) + len(reduced)))
        sizes = (("a",), ("b",), ("c",)) if symbolic else (outer, reduced, inner)
        kernel = partial(rows.mean, outer=sizes[0], reduced=sizes[1], inner=sizes[2])
        self.add("mean", kernel, [x], ops.mean_f32(x, dim, False))

    def matmul(self, batch: int, count: int, inputs: int, columns: int, symbolic: bool) -> None:
        a, b = torch.randn(batch, count, inputs), torch.randn(batch, inputs, columns)
        sizes = (("b",), ("n",), "k", "m") if symbolic else ((batch,), (count,), inputs, columns)
        kernel = partial(floats.matmul, batch=sizes[0], rows=sizes[1], inputs=sizes[2], columns=sizes[3])
        self.add("matmul", kernel, [a, b], ops.matmul_f32(a, b))

    def attention(
        self,
        batch: int,
        heads: int,
        groups: int,
        count: int,
        keys: int,
        width: int,
        value_width: int,
        mask_kind: str,
        causal: bool,
        tokens_first: bool,
        symbolic: bool,
        integers: bool = False,
    ) -> None:
        q = torch.randn(batch, heads, count, width) * 2
        k, v = torch.randn(batch, groups, keys, width), torch.randn(batch, groups, keys, value_width)
        if integers:
            # Rows of very unlike sizes, and one of zeros.
            k, v = (x * torch.logspace(-3, 2, keys)[torch.randperm(keys), None] for x in (k, v))
            v[0, 0, -1] = 0.0
        mask = _mask(mask_kind, batch, heads, count, keys)
        shape: tuple[int | str, ...] = () if mask is None else tuple(mask.shape)
        if symbolic:
            names = ("b", heads, "l", "s")
            shape = tuple(size if size == 1 else name for size, name in zip(shape, names, strict=False))
        scale = width**-0.5
        b, many, n = ("b", "l", "s") if symbolic else (batch, count, keys)
        sizes = [(heads, many, width), (groups, n, width), (groups, n, value_width), (heads, many, value_width)]
        layouts = [plain(b, *size, tokens_first) for size in sizes]
        spec = AttentionSpec(
            b,
            groups,
            heads // groups,
            many,
            n,
            width,
            value_width,
            tuple(layouts),  # type: ignore[arg-type]
            scale,
            causal,
            None if mask is None else str(mask.dtype).removeprefix("torch."),
            shape,
            integers,
        )
        expected = (ops.attention_int8 if integers else ops.attention_f32)(q, k, v, mask, causal, scale)
        tensors = [t.transpose(1, 2) if tokens_first else t for t in (q, k, v, expected)]
        self.add(
            "attention_int8" if integers else "attention", partial(attention, s=spec), [*tensors[:3], mask], tensors[3]
        )


def _mask(kind: str, batch: int, heads: int, count: int, keys: int) -> Tensor | None:
    """A mask of a kind, with rows that leave out every key where they differ by row."""
    if kind == "row":
        return torch.randn(1, 1, count, keys).index_fill(2, torch.tensor([0]), -INFINITY)
    if kind == "full":
        return torch.where(torch.rand(batch, heads, count, keys) > 0.3, 0.0, -INFINITY)
    if kind == "keys":
        return torch.rand(batch, 1, 1, keys) > 0.3
    if kind == "bool":
        return torch.rand(batch, heads, count, keys) > 0.5
    if kind == "least":
        return torch.where(torch.rand(1, 1, count, keys) > 0.5, 0.0, LEAST).index_fill(2, torch.tensor([1]), LEAST)
    return None
