"""What a program means, in whole numbers: the NPU's own reference, in torch.

TOSA's rules for integers (https://www.mlplatform.org/tosa/tosa_spec_1_0_0.html): convolutions give exact sums, RESCALE
rounds once, halves up, in 64 bits, and saturates; TABLE of int16 interpolates between 513 entries; everything else is
exact.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from t3c_compile.backends.ethosu.program import RANGES, Operator, Program

_DTYPES = {"int8": torch.int8, "int16": torch.int16, "int32": torch.int32}


def run(program: Program, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of ``program`` (as its tensors say: dtypes and shapes) for ``inputs``.

    Raises:
        OverflowError: a sum does not fit 32 bits; TOSA calls what happens then unpredictable.
    """
    values = {tensor: value.to(torch.int64) for tensor, value in zip(program.inputs, inputs, strict=True)}
    for operator in program.operators:
        result = _MEANING[operator.kind](operator, *(values[x] for x in operator.inputs))
        low, high = RANGES[operator.output.dtype]
        if result.numel() and (int(result.min()) < low or int(result.max()) > high):
            raise OverflowError(f"{operator.kind} gives more than {operator.output.dtype} holds")
        values[operator.output] = result
    return [values[tensor].to(_DTYPES[tensor.dtype]) for tensor in program.outputs]


def _convolution(operator: Operator, x: Tensor) -> Tensor:
    a = operator.attributes
    weight = torch.from_numpy(a["weight"])
    groups = 1
    if operator.kind == "DEPTHWISE_CONV2D":
        weight, groups = weight.permute(2, 3, 0, 1), len(a["bias"])
    else:
        weight = weight.permute(0, 3, 1, 2)
    top, bottom, left, right = a["pad"]
    centred = (x - a["input_zp"]).permute(0, 3, 1, 2).to(torch.float64)
    # Exact in float64: sums of products of bytes stay far below 2**53.
    y = F.conv2d(
        F.pad(centred, (left, right, top, bottom)),
        weight.to(torch.float64),
        torch.from_numpy(a["bias"]).to(torch.float64),
        a["stride"],
        0,
        a["dilation"],
        groups,
    )
    return y.permute(0, 2, 3, 1).to(torch.int64)


def _matmul(operator: Operator, a: Tensor, b: Tensor) -> Tensor:
    return (a.to(torch.float64) @ b.to(torch.float64)).to(torch.int64)  # as exact


def _rescale(operator: Operator, x: Tensor) -> Tensor:
    a = operator.attributes
    multiplier, shift = (torch.from_numpy(a[name]).to(torch.int64) for name in ("multiplier", "shift"))
    x = x - a["input_zp"]
    if bool((x.abs() >= 1 << (shift - 1)).any()):
        raise OverflowError("RESCALE's input has more bits than its shift")
    rounded = (x * multiplier + (torch.ones_like(shift) << (shift - 1))) >> shift
    return torch.clamp(rounded + a["output_zp"], *RANGES[operator.output.dtype])


def _table(operator: Operator, x: Tensor) -> Tensor:
    table = torch.from_numpy(operator.attributes["table"]).to(torch.int64)
    if operator.output.dtype == "int8":
        return table[x + 128]
    index, fraction = (x >> 7) + 256, x & 127
    return (table[index] << 7) + (table[index + 1] - table[index]) * fraction


def _max_pool(operator: Operator, x: Tensor) -> Tensor:
    a = operator.attributes
    top, bottom, left, right = a["pad"]
    images = F.pad(x.permute(0, 3, 1, 2).to(torch.float64), (left, right, top, bottom), value=-float("inf"))
    return F.max_pool2d(images, a["kernel"], a["stride"]).permute(0, 2, 3, 1).to(torch.int64)


def _slice(operator: Operator, x: Tensor) -> Tensor:
    return x[tuple(slice(size) for size in operator.output.shape)]


_MEANING: dict[str, Callable[..., Any]] = {
    "CONV2D": _convolution,
    "DEPTHWISE_CONV2D": _convolution,
    "MATMUL": _matmul,
    "RESCALE": _rescale,
    "ADD": lambda operator, a, b: a + b,
    "MUL": lambda operator, a, b: a * b,
    "CLAMP": lambda operator, x: x.clamp(operator.attributes["low"], operator.attributes["high"]),
    "MAXIMUM": lambda operator, x: x.clamp(min=operator.attributes["limit"]),
    "MINIMUM": lambda operator, x: x.clamp(max=operator.attributes["limit"]),
    "TABLE": _table,
    "MAX_POOL2D": _max_pool,
    "RESHAPE": lambda operator, x: x.reshape(operator.output.shape),
    "REDUCE_SUM": lambda operator, x: x.sum(operator.attributes["axis"], keepdim=True),
    "SLICE": _slice,
}
