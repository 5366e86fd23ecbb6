"""The float32 stages between int8 layers that have one meaning on every target.

:data:`FLOAT_ATEN` says what each is in ordinary ATen ops: ``program.run_decompositions({..., **FLOAT_ATEN})`` gives a
graph for back ends with float functions of their own.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from t3c_compile.passes.ops.attention import attention_aten, matmul_aten
from t3c_compile.passes.ops.elementwise import ELEMENTWISE_ATEN
from t3c_compile.passes.ops.int8_attention import attention_int8_aten
from t3c_compile.passes.ops.reductions import layer_norm_aten, mean_aten, rms_norm_aten, softmax_aten

_ATEN: Mapping[str, Callable[..., torch.Tensor]] = {
    **ELEMENTWISE_ATEN,
    "layer_norm_f32": layer_norm_aten,
    "rms_norm_f32": rms_norm_aten,
    "softmax_f32": softmax_aten,
    "mean_f32": mean_aten,
    "matmul_f32": matmul_aten,
    "attention_f32": attention_aten,
    "attention_int8": attention_int8_aten,
}

FLOAT_OPS = tuple(_ATEN)
FLOAT_ATEN: Mapping[Any, Callable[..., torch.Tensor]] = {
    getattr(torch.ops.t3c, name).default: function for name, function in _ATEN.items()
}
