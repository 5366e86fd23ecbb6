"""Rows that a model moves and moves back stay where they lie, and results are torch's to the bit."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from test_fuse import Layer, build, ops, program, quantize, run
from torch import Tensor, nn

from t3c_compile.backends.tvm.prepare import prepare

aten = torch.ops.aten


class TokensFirst(nn.Module):
    """Self-attention as torch's ``MultiheadAttention`` calls it: tokens before the batch, heads joined with the batch,
    and rows of all samples as one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.end = Layer(32, 96), Layer(32, 32)
        self.weight, self.bias = nn.Parameter(torch.rand(32) + 0.5), nn.Parameter(torch.randn(32))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        y = ops.layer_norm_f32(x, self.weight, self.bias, 1e-5).permute(1, 0, 2)
        parts = self.both(quantize(y)).unflatten(-1, (3, width)).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
        q, k, v = (
            parts[i].reshape(tokens, batch * 2, 16).transpose(0, 1).reshape(batch, 2, tokens, 16) for i in range(3)
        )
        y = ops.attention_int8(q, k, v, None, False, 0.25)
        y = self.end(quantize(y.permute(2, 0, 1, 3).reshape(tokens * batch, width)))
        return ops.layer_norm_f32(y.reshape(tokens, batch, width).transpose(0, 1) + x, self.weight, self.bias, 1e-5)


class Moved(nn.Module):
    """Moves that nothing undoes, and rows of which an op sees some."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        every = self.layer(quantize(x.transpose(0, 1)))
        first = self.layer(quantize(x.permute(1, 2, 0, 3)[0]))
        return every.transpose(0, 2) + first[:, :, None]


class Twice(nn.Module):
    """Attention whose result is read as it is and rounded, heads first and tokens first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.heads = Layer(32, 32), Layer(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 16)).transpose(1, 2)
        y, z = ops.attention_f32(q, q, q, None, False, 0.25), ops.attention_int8(q, q, -q, None, False, 0.25)
        one = self.layer(quantize(y.transpose(1, 2).flatten(2))) + y.transpose(1, 2).flatten(2)
        return one + self.heads(quantize(z)).transpose(1, 2).flatten(2)


class Thin(nn.Module):
    """Rows of one element."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.gelu_f32(x.transpose(0, 1)).transpose(0, 1) * 2


def moves(model: nn.Module, x: Tensor) -> list[list[int]]:
    graph = prepare({"main": program(model, x)})["main"].graph
    return [node.args[1] for node in graph.nodes if node.target == aten.permute.default]


NETS = [(TokensFirst, (7, 32)), (Twice, (7, 32)), (Moved, (5, 3, 12)), (Thin, (5, 1))]


@pytest.mark.parametrize(("net", "shape"), NETS)
@pytest.mark.parametrize("batch", [1, 3])
def test_results_are_torchs(net: type[nn.Module], shape: tuple[int, ...], batch: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = net()
    library, vm = build(model, torch.randn(2, *shape), tmp_path / "m.so", "x86_64")
    x = 3 * torch.randn(batch, *shape)
    np.testing.assert_array_equal(run(model, library, vm, x), model(x).detach().numpy())


def test_tokens_stay_within_their_samples(tmp_path: Path) -> None:
    """No kernel moves or rounds rows: the residual is added where the layer ends, and attention and norm write int8."""
    torch.manual_seed(0)
    library, _ = build(TokensFirst(), torch.randn(2, 7, 32), tmp_path / "m.so", "x86_64")
    kernels = Counter(how.removeprefix("kernel template: ") for how in library.kernels.values())
    assert kernels == {"layer_norm": 2, "int8_linear": 2, "attention": 1, "pack_words": 2}
    # After attention, which writes tokens first itself; and of what it reads, as it lies.
    assert [0, 2, 1, 3] in moves(TokensFirst(), torch.randn(2, 7, 32))


def test_what_is_not_undone_stays() -> None:
    assert moves(Moved(), torch.randn(2, 5, 3, 12))
