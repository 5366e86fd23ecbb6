"""Weight packing, run once at load: from the raw store's layout to what the kernels read.

``quads``: int8 ``[groups][outputs / 16][taps][inputs / 4][16][4]``, the layout of every int8 kernel, zero-padded.
``lanes``: ``[outputs / 16][inputs][16]`` in the raw dtype, the layout of the float and weight-only kernels; of a
depthwise convolution's taps.
"""

from dataclasses import dataclass

import tvm
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.tvm.kernels.emit import Index, ceil_div, for_each, prim_func, product
from t3c_compile.backends.tvm.kernels.isa import BLOCK, QUAD


@dataclass(frozen=True)
class Packing:
    """How one raw tensor is packed. ``strides`` are the raw strides of (output, input, tap), in elements."""

    layout: str
    dtype: str
    raw_shape: tuple[int, ...]
    groups: int
    outputs: int
    inputs: int
    taps: int
    strides: tuple[int, int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the packed tensor."""
        blocks = self.groups * ceil_div(self.outputs, BLOCK)
        if self.layout == "quads":
            return (blocks, self.taps * ceil_div(self.inputs, QUAD), BLOCK, QUAD)
        return (blocks, self.inputs, BLOCK)


def quads_of_matrix(shape: tuple[int, ...], transposed: bool = False) -> Packing:
    """int8 [outputs, inputs], or [inputs, outputs] when ``transposed``."""
    outputs, inputs = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    strides = (1, shape[1], 0) if transposed else (shape[1], 1, 0)
    return Packing("quads", "int8", shape, 1, outputs, inputs, 1, strides)


def quads_of_conv(shape: tuple[int, ...], groups: int = 1) -> Packing:
    """int8 [O, C / groups, kh, kw]."""
    outputs, inputs, taps = shape[0] // groups, shape[1], shape[2] * shape[3]
    return Packing("quads", "int8", shape, groups, outputs, inputs, taps, (inputs * taps, taps, 1))


def lanes_of_matrix(shape: tuple[int, ...], dtype: str) -> Packing:
    """[outputs, inputs] of ``dtype``."""
    return Packing("lanes", dtype, shape, 1, shape[0], shape[1], 1, (shape[1], 1, 0))


def lanes_of_depthwise(shape: tuple[int, ...]) -> Packing:
    """int8 [channels, ..., kh, kw], the rest 1: as [channels / 16][kh * kw][16]."""
    taps = shape[-2] * shape[-1]
    return Packing("lanes", "int8", shape, 1, shape[0], taps, 1, (taps, 1, 0))


def pack(packing: Packing) -> tvm.tirx.PrimFunc:
    """(raw, packed) of the shapes in ``packing``."""
    p = packing
    quad = QUAD if p.layout == "quads" else 1
    blocks, quads = ceil_div(p.outputs, BLOCK), ceil_div(p.inputs, quad)
    with prim_func(f"pack_{p.layout}") as function:
        raw, packed = function.args(raw=(p.raw_shape, p.dtype), packed=(p.shape, p.dtype))

        @for_each(p.groups * blocks, product(p.shape))
        def _(task: Index) -> None:
            loops = T.serial(0, p.taps), T.serial(0, quads), T.serial(0, BLOCK), T.serial(0, quad)
            with loops[0] as tap, loops[1] as k, loops[2] as lane, loops[3] as i:
                output, source = (task % blocks) * BLOCK + lane, k * quad + i
                where = (
                    ((task // blocks) * p.outputs + output) * p.strides[0] + source * p.strides[1] + tap * p.strides[2]
                )
                inside = T.And(output < p.outputs, source < p.inputs)
                value = T.if_then_else(inside, raw[where], T.cast(0, p.dtype))
                T.buffer_store(packed, value, [(((task * p.taps + tap) * quads + k) * BLOCK + lane) * quad + i])

    return function.func
