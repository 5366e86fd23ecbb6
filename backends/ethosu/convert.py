"""A partition of a profile's graph as a TOSA program: a table from nodes to values."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isqrt, prod
from typing import Any

import numpy as np
import torch
from torch import fx

from t3c_compile.backends.ethosu.program import Array, Pair, Program, Tensor
from t3c_compile.backends.ethosu.stages import Stage
from t3c_compile.backends.ethosu.values import Bounds, Clamped, Dequantized, Pooled, Sums, Value, interval
from t3c_compile.backends.op_name import op_name
from t3c_compile.passes.base import bound

CHANNELS_FIRST, CHANNELS_LAST, MATRICES = "channels first", "channels last", "matrices"

# Functions of one element that become tables, by op name.
TABLES = (
    "gelu_f32",
    "gelu_tanh_f32",
    "silu_f32",
    "sigmoid_f32",
    "tanh_f32",
    "hardswish",
    "hardswish_",
    "hardsigmoid",
    "hardsigmoid_",
)
# Functions that clamp, by op name: their limits, None where those are arguments.
CLAMPS: Mapping[str, Bounds | None] = {
    "relu": (0.0, np.inf),
    "relu_": (0.0, np.inf),
    "relu6": (0.0, 6.0),
    "hardtanh": None,
    "hardtanh_": None,
    "clamp": None,
    "clamp_": None,
}
# Of one pixel these leave the channels as they lie.
VIEWS = ("flatten", "view", "reshape", "squeeze")
# Sums of up to this many 31-bit numbers fit 32 bits when each has so much less.
_SUM_BITS = 30


def shape_of(node: fx.Node) -> tuple[int, ...]:
    return tuple(int(size) for size in node.meta["val"].shape)


def npu_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """How the NPU sees a tensor of ``shape``: [1, height, width, channels], matrices as [count, rows, columns].

    Rows of a matrix are spread over height and width, because the NPU works on blocks of at least two rows of pixels.
    """
    if layout == CHANNELS_FIRST:
        return (1, *shape[2:], shape[1])
    if layout == MATRICES:
        return (prod(shape[:-2]), *shape[-2:])
    rows = prod(shape[:-1])
    height = next(h for h in range(isqrt(rows), 0, -1) if rows % h == 0)
    return (1, height, rows // height, shape[-1])


@dataclass
class Read:
    """An int8 tensor of the program (int32: a product of two), and what it stands for: whole numbers above
    ``zero_point``."""

    tensor: Tensor
    zero_point: int


@dataclass
class Conversion:
    """The program of some nodes of a graph, in order; ``stages``: of each product among them.

    ``inputs``: (node, layout) of every tensor that comes from outside, all int8. ``outputs``: what others read of the
    nodes: the node, its layout and, of a float32 node, the scale of each channel (or one for all). Products of two
    tensors are int32, and the host's to read.
    """

    nodes: list[fx.Node]
    stages: Mapping[fx.Node, list[Stage]]
    layouts: Mapping[fx.Node, str]
    program: Program = field(default_factory=Program)
    inputs: list[tuple[fx.Node, str]] = field(default_factory=list)
    outputs: list[tuple[fx.Node, str, Array | None]] = field(default_factory=list)
    _values: dict[fx.Node, Value] = field(default_factory=dict)
    reads: dict[tuple[fx.Node, str], Read] = field(default_factory=dict)

    def run(self) -> "Conversion":
        inside = set(self.nodes)
        for node in self.nodes:
            if op_name(node) == "quantize_int8":
                source, scale, zero_point = node.args
                tensor = self._values[source].int8(float(scale), int(zero_point))  # type: ignore[index, arg-type]
                self.reads[node, self.layouts[node]] = Read(tensor, int(zero_point))  # type: ignore[arg-type]
            elif op_name(node) == "matmul_int8":
                self.reads[node, self.layouts[node]] = Read(self._matmul(node), 0)
            else:
                self._values[node] = self._value(node, inside)
        for node in self.nodes:
            if any(user not in inside for user in node.users):
                self._give(node)
        return self

    def _give(self, node: fx.Node) -> None:
        layout = self.layouts[node]
        if node in self._values:
            tensor, scales = self._values[node].for_host()
            self.outputs.append((node, layout, scales))
        else:
            tensor = self.reads[node, layout].tensor
            self.outputs.append((node, layout, None))
        self.program.outputs.append(tensor)

    def _value(self, node: fx.Node, inside: set[fx.Node]) -> Value:
        forms = {user.args[1:] if op_name(user) == "quantize_int8" else user for user in node.users if user in inside}
        common = {
            "program": self.program,
            "shape": npu_shape(shape_of(node), self.layouts[node]),
            "shared": len(forms) > 1,
            "step": _finest_step(node),
        }
        outside = any(user not in inside for user in node.users)
        name = op_name(node)
        if node in self.stages:
            return self._product(node, common, outside)
        make = _VALUES.get(name) or (_table if name in TABLES else _clamp)
        value: Value = make(self, node, common)
        return value

    def value(self, node: Any) -> Value:
        return self._values[node]

    def _product(self, node: fx.Node, common: dict[str, Any], for_host: bool) -> Sums:
        arguments = bound(node)
        zero_point = int(arguments["x_zero_point"])
        read = self._read(arguments["x"], self.layouts[node], zero_point)
        stages = self.stages[node]
        bounds = _bounds_of(stages, zero_point)

        def compute() -> Tensor:
            x, zero = read.tensor, zero_point
            for stage in stages:
                x = self.program.conv2d(
                    x, stage.weight, stage.bias, zero, stage.stride, stage.padding, stage.dilation, stage.depthwise
                )
                if stage.middle:
                    x = self.program.rescale(x, stage.scale / stage.middle, "int8")
                    x, zero = self.program.clamp(x, -127, 127), 0
            return x

        return Sums(**common, bounds=bounds, compute=compute, scales=stages[-1].scale, for_host_too=for_host)

    def _read(self, source: fx.Node, layout: str, zero_point: int) -> Read:
        """An int8 tensor, the program's input where none of its operators makes it."""
        if (source, layout) not in self.reads:
            tensor = self.program.input(npu_shape(shape_of(source), layout), "int8")
            self.reads[source, layout] = Read(tensor, zero_point)
            self.inputs.append((source, layout))
        return self.reads[source, layout]

    def _matmul(self, node: fx.Node) -> Tensor:
        a, b = (self._read(source, MATRICES, 0).tensor for source in node.all_input_nodes)
        return self.program.matmul(a, b)


def _bounds_of(stages: list[Stage], zero_point: int) -> Bounds:
    """The least and greatest result of a product of any int8 input."""
    last = stages[-1]
    low, high = (-128 - zero_point, 127 - zero_point) if len(stages) == 1 else (-127, 127)
    # Padding reads zeros.
    low, high = min(low, 0), max(high, 0)
    weight = last.weight[..., 0].transpose(2, 0, 1) if last.depthwise else last.weight
    least, greatest = interval(weight, low, high)
    return float(((least + last.bias) * last.scale).min()), float(((greatest + last.bias) * last.scale).max())


def _finest_step(node: fx.Node) -> float:
    """The finest int8 step that ``node``, or what is made of it by sums, products and the like, is rounded to."""
    steps = []
    for user in node.users:
        if op_name(user) == "quantize_int8":
            steps.append(float(user.args[1]))  # type: ignore[arg-type]
        elif op_name(user) in ("add", "add_", "mul", "mul_", "max_pool2d", "mean_f32", *VIEWS, *CLAMPS):
            steps.append(_finest_step(user))
    return min((step for step in steps if step), default=0.0)


def _dequantize(conversion: Conversion, node: fx.Node, common: dict[str, Any]) -> Value:
    a = bound(node)
    scale, zero_point = float(a["scale"]), int(a["zero_point"])
    tensor = conversion.reads[a["q"], conversion.layouts[node]].tensor
    bounds = ((-128 - zero_point) * scale, (127 - zero_point) * scale)
    return Dequantized(**common, bounds=bounds, tensor=tensor, scale=scale, zero_point=zero_point)


def _clamp(conversion: Conversion, node: fx.Node, common: dict[str, Any]) -> Value:
    a = bound(node)
    limits = CLAMPS[op_name(node)]
    if limits is None:
        names = ("min_val", "max_val") if "min_val" in a else ("min", "max")
        low, high = (a[name] for name in names)
        limits = (-np.inf if low is None else float(low), np.inf if high is None else float(high))
    source = conversion.value(a["self"])
    bounds = tuple(float(np.clip(edge, *limits)) for edge in source.bounds)
    return Clamped(**common, bounds=bounds, source=source, limits=limits)  # type: ignore[arg-type]


def _add(conversion: Conversion, node: fx.Node, common: dict[str, Any]) -> Value:
    a, b = (conversion.value(source) for source in node.args)
    bounds = (a.bounds[0] + b.bounds[0], a.bounds[1] + b.bounds[1])
    scale = max(abs(bounds[0]), abs(bounds[1]), a.magnitude, b.magnitude) / 2.0**24

    def compute() -> Tensor:
        return conversion.program.add(a.fixed(scale, "int32"), b.fixed(scale, "int32"))

    return Sums(**common, bounds=bounds, compute=compute, scales=np.array([scale]))


def _multiply(conversion: Conversion, node: fx.Node, common: dict[str, Any]) -> Value:
    a, b = (conversion.value(source) for source in node.args)
    corners = [x * y for x in a.bounds for y in b.bounds]

    def compute() -> Tensor:
        return conversion.program.multiply(a.int16()[0], b.int16()[0])

    scales = np.array([a.magnitude / 32767 * (b.magnitude / 32767)])
    return Sums(**common, bounds=(min(corners), max(corners)), compute=compute, scales=scales)


def _mean(conversion: Conversion, node: fx.Node, common: dict[str, Any]) -> Value:
    source = conversion.value(bound(node)["x"])
    pixels = prod(source.shape[1:3])
    scale = source.magnitude / 2.0 ** (_SUM_BITS - 1 - int(np.ceil(np.log2(max(pixels, 2)))))

    def compute() -> Tensor:
        x = source.fixed(scale, "int32")
        if pixels == 1:
            return x
        # As one axis: a U85 takes tens of times as long for two.
        return conversion.program.reduce_sum(conversion.program.reshape(x, (1, pixels, 1, x.shape[3])), 1)

    return Sums(**common, bounds=source.bounds, compute=compute, scales=np.array([scale / pixels]))


def _max_pool(conversion: Conversion, node: fx.Node, common: dict[str, Any]) -> Value:
    a = bound(node)
    source = conversion.value(a["self"])
    kernel, stride, padding = pool_window(a)
    return Pooled(**common, bounds=source.bounds, source=source, window=(kernel, stride, padding))


def pool_window(a: Mapping[str, Any]) -> tuple[Pair, Pair, Pair]:
    """Kernel, stride and padding of a max_pool2d."""
    kernel, stride, padding = (list(a[name]) for name in ("kernel_size", "stride", "padding"))
    pairs = [(size[0], size[-1]) for size in (kernel, stride or kernel, padding)]
    return pairs[0], pairs[1], pairs[2]


def _same(conversion: Conversion, node: fx.Node, common: dict[str, Any]) -> Value:
    """A view of one pixel's channels, which lie as they did."""
    return conversion.value(node.args[0])


def _table(conversion: Conversion, node: fx.Node, common: dict[str, Any]) -> Value:
    """A function of one element by TOSA's table of 513 entries, interpolated.

    The table covers what the input can be, less where the function (or its rounding to int8) no longer changes.
    """
    source = conversion.value(bound(node)["self" if "self" in bound(node) else "x"])

    def function(x: Array) -> Array:
        y: torch.Tensor = node.target(torch.from_numpy(x.astype(np.float32)))  # type: ignore[operator]
        return y.to(torch.float64).numpy()

    users = list(node.users)
    ends = (-np.inf, np.inf)
    if all(op_name(user) == "quantize_int8" for user in users):
        ends = (
            min(float(u.args[1]) * (-128.5 - int(u.args[2])) for u in users),  # type: ignore[arg-type]
            max(float(u.args[1]) * (127.5 - int(u.args[2])) for u in users),  # type: ignore[arg-type]
        )
    reach = _reach(lambda x: np.clip(function(x), *ends), source.magnitude, common["step"])
    unit = reach / 32767
    entries = np.clip(function(np.arange(-256, 257) * 128.0 * unit), *ends)
    scale = max(float(np.abs(entries).max()), 1e-30) / 32767
    table = np.rint(entries / scale)

    def compute() -> Tensor:
        return conversion.program.table(source.fixed(unit, "int16"), table)

    bounds = (float(entries.min()), float(entries.max()))
    return Sums(**common, bounds=bounds, compute=compute, scales=np.array([scale / 128]))


def _reach(function: Callable[[Array], Array], magnitude: float, step: float) -> float:
    """The least distance from 0 beyond which ``function`` is what it is there, to a 64th of an int8 step."""
    places = np.linspace(0.0, magnitude, 8193)
    reach = 0.0
    for sign in (-1, 1):
        values = function(sign * places)
        differs = np.flatnonzero(np.abs(values - values[-1]) > step / 64)
        reach = max(reach, places[min(differs[-1] + 1, len(places) - 1)] if len(differs) else 0.0)
    return max(float(reach), 1e-30)


_VALUES: dict[str, Callable[[Conversion, fx.Node, dict[str, Any]], Value]] = {
    "dequantize_int8": _dequantize,
    "add": _add,
    "add_": _add,
    "mul": _multiply,
    "mul_": _multiply,
    "mean_f32": _mean,
    "max_pool2d": _max_pool,
    **dict.fromkeys(VIEWS, _same),
}
