"""Float32 functions of one element: ``t3c::exp_f32``, ``erf_f32``, ``tanh_f32``, ``sigmoid_f32``, ``silu_f32``,
``gelu_f32`` and ``gelu_tanh_f32``.

Each takes a float32 tensor of any shape and gives one of that shape. The polynomials and their order of operations
are those of ``float_math``, which is what makes them equal on every target.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from t3c_compile.passes.ops import float_math
from t3c_compile.passes.ops.float_math import TORCH, Arithmetic

FUNCTIONS: Mapping[str, Callable[[Arithmetic, Any], Any]] = {
    "exp_f32": float_math.exp,
    "erf_f32": float_math.erf,
    "tanh_f32": float_math.tanh,
    "sigmoid_f32": float_math.sigmoid,
    "silu_f32": float_math.silu,
    "gelu_f32": float_math.gelu,
    "gelu_tanh_f32": float_math.gelu_tanh,
}

aten = torch.ops.aten

# What each op is in ordinary ATen ops, for back ends that have their own float functions.
ELEMENTWISE_ATEN: Mapping[str, Callable[[Tensor], Tensor]] = {
    "exp_f32": aten.exp.default,
    "erf_f32": aten.erf.default,
    "tanh_f32": aten.tanh.default,
    "sigmoid_f32": aten.sigmoid.default,
    "silu_f32": aten.silu.default,
    "gelu_f32": lambda x: aten.gelu.default(x),
    "gelu_tanh_f32": lambda x: aten.gelu.default(x, approximate="tanh"),
}


def _register(name: str, function: Callable[[Arithmetic, Any], Any]) -> None:
    def reference(x: Tensor) -> Tensor:
        return function(TORCH, x)  # type: ignore[no-any-return]

    torch.library.custom_op(f"t3c::{name}", reference, mutates_args=()).register_fake(torch.empty_like)


for _name, _function in FUNCTIONS.items():
    _register(_name, _function)
