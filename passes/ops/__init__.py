"""The ``t3c::`` dialect: every op a compressed graph can hold, registered with ``torch.library``.

The CPU reference in these files *is* the meaning of each op; every backend is a table from these ops to its own
code and is tested against the reference. Importing this package registers the ops.

Float stages between int8 layers: :data:`FLOAT_OPS`, and :data:`FLOAT_ATEN`, what each is in ATen ops.
Training ops: ``fake_quantize``, ``fake_quantize_weight``.
Deployment ops: ``quantize_int8``, ``dequantize_int8``, ``int8_linear``, ``int8_conv2d``,
``int8_embedding``, ``svd_linear``, ``svd_conv2d``, ``tucker2_conv2d``, ``cp_conv2d``, ``weight_only_linear``,
``svd_weight_only_linear``.
"""

from t3c_compile.passes.ops.conv_chains import cp_conv2d, svd_conv2d, tucker2_conv2d
from t3c_compile.passes.ops.fake_quantize import fake_quantize, fake_quantize_weight
from t3c_compile.passes.ops.float_stages import FLOAT_ATEN, FLOAT_OPS
from t3c_compile.passes.ops.int8_conv import int8_conv2d
from t3c_compile.passes.ops.int8_embedding import int8_embedding
from t3c_compile.passes.ops.int8_linear import int8_linear, svd_linear
from t3c_compile.passes.ops.nested import WEIGHT_QMAX, keep_top_bits, quantize_weight
from t3c_compile.passes.ops.quantize import dequantize_int8, quantize_int8
from t3c_compile.passes.ops.weight_only import svd_weight_only_linear, weight_only_linear

DEPLOYMENT_OPS = (
    "quantize_int8",
    "dequantize_int8",
    "int8_linear",
    "int8_conv2d",
    "int8_embedding",
    "svd_linear",
    "svd_conv2d",
    "tucker2_conv2d",
    "cp_conv2d",
    "weight_only_linear",
    "svd_weight_only_linear",
)

__all__ = [
    "DEPLOYMENT_OPS",
    "FLOAT_ATEN",
    "FLOAT_OPS",
    "WEIGHT_QMAX",
    "cp_conv2d",
    "dequantize_int8",
    "fake_quantize",
    "fake_quantize_weight",
    "int8_conv2d",
    "int8_embedding",
    "int8_linear",
    "keep_top_bits",
    "quantize_int8",
    "quantize_weight",
    "svd_conv2d",
    "svd_linear",
    "svd_weight_only_linear",
    "tucker2_conv2d",
    "weight_only_linear",
]
