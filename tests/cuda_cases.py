"""One network that has every kernel of the CUDA backend in it, with ragged sizes: each result is one of its outputs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t3c_compile.passes import ops

t3c = torch.ops.t3c


def _weights(*shape: int) -> Tensor:
    return torch.randint(-119, 120, shape, dtype=torch.int8)


class CudaCases(nn.Module):
    """Of free size is the first dimension of both inputs; what is made of stored tensors alone has fixed sizes.

    Ranks are below those stored; widths are 4, 6 and 8 bits.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        for name, shape in {
            "w": (50, 36),
            "wide": (130, 96),
            "v": (40, 36),
            "u": (40, 50),
            "conv": (24, 16, 3, 3),
            "three": (10, 3, 5, 5),
            "grouped": (12, 6, 3, 3),
            "depth": (16, 1, 3, 3),
            "cv": (20, 16),
            "core": (28, 20, 3, 2),
            "cu": (28, 18),
            "square": (20, 18),
            "taps": (20, 3, 3),
            "table": (11, 20),
            "many": (150, 96),
        }.items():
            self.register_buffer(name, _weights(*shape))
            self.register_buffer(f"{name}_scale", torch.rand(shape[0]) * 1e-2)
        self.register_buffer("gain", torch.rand(64) * 2)
        self.register_buffer("bias", torch.randn(130))
        self.register_buffer("tokens", torch.randint(0, 11, (2, 7)))
        self.register_buffer("rows", torch.randn(5, 96))
        self.register_buffer("places", torch.tensor([4, 0]))
        self.float_linear = nn.Linear(36, 21)
        self.ln = nn.LayerNorm(36)

    def forward(self, x: Tensor, images: Tensor) -> dict[str, Tensor]:
        """x: [n, 9, 36]; images: [n, 16, 9, 7]."""
        q = ops.quantize_int8(x, 0.02, -7)
        p = ops.quantize_int8(images, 0.02, 5)
        y: dict[str, Tensor] = {}
        y["linear"] = ops.int8_linear(q, self.w, self.w_scale, self.bias[:50], 0.02, -7, 4)
        gelu = t3c.gelu_f32(ops.int8_linear(q, self.w, self.w_scale, None, 0.02, -7, 8) + y["linear"])
        y["finished"] = ops.dequantize_int8(ops.quantize_int8(gelu, 0.03, 3), 0.03, 3)
        # A square of fixed size, from the store: 32-bit places, and tiles by size.
        y["fixed"] = ops.int8_linear(self.many, self.wide, self.wide_scale, self.bias, 0.02, 9, 6)
        chain = (self.v, self.u, self.v_scale, self.gain[:50], self.bias[:50], 0.02, -7, 0.05, 19, 4)
        y["chain"] = ops.svd_linear(q, *chain)
        y["chain_plain"] = ops.svd_linear(q, self.v, self.u, self.v_scale, None, None, 0.02, -7, 0.05, 40, 8)
        dense = (0.02, 5, [2, 1], [1, 2], [1, 2])
        y["conv"] = F.relu(ops.int8_conv2d(p, self.conv, self.conv_scale, self.bias[:24], *dense, 1, 4))
        few = ops.quantize_int8(images[:, :3], 0.01, 11)
        y["few_channels"] = ops.int8_conv2d(
            few, self.three, self.three_scale, None, 0.01, 11, [1, 1], [2, 2], [1, 1], 1, 8
        )
        ungrouped = ops.quantize_int8(images[:, :12], 0.02, 5)
        y["grouped"] = ops.int8_conv2d(
            ungrouped, self.grouped, self.grouped_scale, None, 0.02, 5, [1, 1], [1, 1], [1, 1], 2, 6
        )
        y["depthwise"] = ops.int8_conv2d(
            p, self.depth, self.depth_scale, self.bias[:16], 0.02, 5, [2, 2], [1, 1], [1, 1], 16, 4
        )
        c = (self.cv_scale, self.core_scale, self.gain[:18], self.bias[:18], 0.02, 5, 0.03, 0.04)
        y["tucker2"] = ops.tucker2_conv2d(p, self.cv, self.core, self.cu, *c, [1, 2], [1, 0], [1, 1], 23, 6)
        s = self.cv_scale
        y["cp"] = ops.cp_conv2d(
            p, self.cv, self.taps, self.square, s, s, None, None, *c[4:], [2, 1], [1, 1], [1, 1], 18, 4
        )
        y["svd_conv"] = ops.svd_conv2d(p, self.cv, self.square, s, self.gain[:18], None, 0.02, 5, 0.03, [2, 2], 16, 8)
        y["pooled"] = F.max_pool2d(images.relu(), 3, 2, 1)
        pooled = ops.quantize_int8(F.max_pool2d(images.tanh(), 3, 2, 1), 0.01, 3)
        y["pooled_rounded"] = ops.dequantize_int8(pooled, 0.01, 3)
        y["mean_images"] = t3c.mean_f32(images, [2, 3], False)
        y["mean_rows"] = t3c.mean_f32(x, [1], True)
        y["layer_norm"] = t3c.layer_norm_f32(x, self.ln.weight, self.ln.bias, 1e-5)
        y["rms_norm"] = t3c.rms_norm_f32(x, None, 1e-5)
        y["softmax"] = t3c.softmax_f32(x)
        y["matmul"] = t3c.matmul_f32(x, x.transpose(1, 2).contiguous())
        heads = x.reshape(-1, 9, 2, 18).transpose(1, 2)
        y["attention"] = t3c.attention_f32(heads, heads * 2, heads[..., :11] + 1, None, True, 0.3)
        wide = x[..., :32].reshape(-1, 9, 2, 16).transpose(1, 2)
        mask = x[:, None, :, :9] > 0
        y["attention_int8"] = t3c.attention_int8(wide, wide[:, :1] * 3, wide[:, :1] + 1, mask, False, 0.3)
        y["attention_added"] = t3c.attention_int8(wide, wide + 1, wide * 2, x[:, None, :, :9], True, 0.2)
        heads_last = t3c.attention_int8(wide, wide * 2, wide, None, True, 0.3).transpose(1, 2).flatten(2)
        y["attention_rounded"] = ops.dequantize_int8(ops.quantize_int8(heads_last, 0.02, -4), 0.02, -4)
        y["embedding"] = ops.int8_embedding(self.tokens, self.table, self.table_scale, 6)
        y["cumsum"] = torch.cumsum(self.tokens, 1)
        y["index_copy"] = self.rows.index_copy(0, self.places, self.rows[1:3] * 2)
        for name in ("exp", "erf", "tanh", "sigmoid", "silu", "gelu_tanh"):
            y[name] = getattr(t3c, f"{name}_f32")(x)
        # Sums of real numbers, for which torch has an order of its own.
        y["~float_linear"] = self.float_linear(x)
        y["~weight_only"] = ops.weight_only_linear(x, self.w, self.w_scale, self.bias[:50], 4)
        y["~weight_only_chain"] = ops.svd_weight_only_linear(x, self.v, self.u, self.v_scale, self.bias[:50], 29, 6)
        y["~float_conv"] = F.conv2d(images, self.conv.float())
        return y
