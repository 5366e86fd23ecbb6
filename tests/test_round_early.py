"""Rounding moves before max pooling, whose kernel then reads and writes int8; results are torch's to the bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_fuse import NO_AMX, Layer, build, ops, program, quantize, run
from torch import Tensor, nn

from t3c_compile.backends.tvm.prepare import prepare

INT8, FLOAT32 = torch.int8, torch.float32


class Stem(nn.Module):
    """Two layers read what is pooled, rounded by each; the first of them may have a scale of its own."""

    def __init__(self, scale: float, ceil: bool = False, dilation: int = 1) -> None:
        super().__init__()
        self.scale, self.pool = scale, nn.MaxPool2d(3, 2, 1, dilation, ceil_mode=ceil)
        self.stem, self.one, self.other = Layer(5, 70, 3), Layer(70, 8, 1), Layer(70, 8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(torch.relu(self.stem(quantize(x))))
        return self.one(quantize(y, self.scale)) + self.other(quantize(y))


class Read(Stem):
    """Something else reads the images before they are pooled."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(quantize(x)))
        return self.one(quantize(self.pool(y))) + ops.mean_f32(y, [1, 2, 3], True)


def pooled_dtypes(model: nn.Module) -> list[torch.dtype]:
    graph = prepare({"main": program(model, torch.randn(2, 5, 9, 14))})["main"].graph
    return [node.meta["val"].dtype for node in graph.nodes if node.target == torch.ops.aten.max_pool2d.default]


@pytest.mark.parametrize(
    ("model", "dtype"), [(Stem(0.03), INT8), (Stem(0.05), FLOAT32), (Read(0.03), FLOAT32)], ids=("alike", "two", "read")
)
def test_pooled_as_int8_where_nothing_else_reads(model: nn.Module, dtype: torch.dtype) -> None:
    assert pooled_dtypes(model) == [dtype]


@pytest.mark.parametrize("target", ["x86_64", "x86_64-v3", pytest.param("x86_64-amx", marks=NO_AMX)])
@pytest.mark.parametrize("case", [(Stem, 0.03), (Stem, 0.05), (Stem, 0.03, True), (Stem, 0.03, False, 2), (Read, 0.03)])
def test_results_are_torchs(case: tuple[Any, ...], target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, *options = case
    model = net(*options)
    library, vm = build(model, torch.randn(2, 5, 9, 14), tmp_path / "m.so", target)
    for batch in (1, 3):
        x = 3 * torch.randn(batch, 5, 9, 14)
        x[0, :, 4] = float("inf")
        np.testing.assert_array_equal(run(model, library, vm, x), model(x).detach().numpy())
