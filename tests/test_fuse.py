"""What kernels take over from the nodes after them: the plan, the kernels left, and the same bits as torch's."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from nets import packed
from torch import Tensor, nn
from tvm.runtime import vm as runtime

import t3c_compile.passes.ops  # noqa: F401  (registers the ops)
from t3c_compile.backends import cpu
from t3c_compile.backends.targets import get_target
from t3c_compile.backends.tvm.build import Library, build_library
from t3c_compile.backends.tvm.fuse import fuse
from t3c_compile.backends.tvm.prepare import prepare

NO_AMX = pytest.mark.skipif(
    not cpu.features().issuperset(get_target("x86_64-amx").features), reason="this processor has no AMX"
)
ops = torch.ops.t3c


class Layer(nn.Module):
    """A quantized linear of random integers, or a convolution where ``kernel`` is given."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 0, bias: bool = True) -> None:
        super().__init__()
        shape = (outputs, inputs, kernel, kernel) if kernel else (outputs, inputs)
        self.register_buffer("weight", torch.randint(-119, 120, shape, dtype=torch.int8))
        self.register_buffer("scale", torch.rand(outputs) * 1e-2)
        self.bias = nn.Parameter(torch.randn(outputs)) if bias else None

    def forward(self, q: Tensor) -> Tensor:
        if self.weight.dim() == 2:
            return ops.int8_linear(q, self.weight, self.scale, self.bias, 0.03, 4, 8)
        pad = [self.weight.shape[2] // 2] * 2
        return ops.int8_conv2d(q, self.weight, self.scale, self.bias, 0.03, 4, [1, 1], pad, [1, 1], 1, 8)


def quantize(x: Tensor, scale: float = 0.03, zero_point: int = 4) -> Tensor:
    return ops.quantize_int8(x, scale, zero_point)


class Bottleneck(nn.Module):
    """Results that are read as int8 alone, as int8 of two scales and float32, and added to; ragged widths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Layer(12, 9, 1), Layer(9, 9, 3, bias=False), Layer(9, 12, 1)
        self.beside, self.other = Layer(12, 12, 1, bias=False), Layer(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        q = quantize(x)
        y = self.second(quantize(torch.relu(self.first(q))))
        y = self.third(quantize(nn.functional.hardswish(y)))
        y = torch.relu(y + self.beside(q))
        return self.other(quantize(y)) + self.other(quantize(y, 0.05, -3)) + ops.mean_f32(y, [1], True)


class Mlp(nn.Module):
    """A transformer's second half: norm, two layers, a residual; and a value that two nodes read."""

    def __init__(self, act: str) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(21), act
        self.up, self.down, self.twice = Layer(21, 50), Layer(50, 21, bias=False), Layer(21, 21)

    def forward(self, x: Tensor) -> Tensor:
        normed = ops.layer_norm_f32(x, self.norm.weight, self.norm.bias, 1e-5)
        x = x + self.down(quantize(getattr(ops, self.act)(self.up(quantize(normed)))))
        y = self.twice(quantize(x))
        return torch.relu(y) + ops.sigmoid_f32(y)


def program(model: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=64)
    return torch.export.export(model.eval(), (x,), dynamic_shapes=({0: batch},))


def build(model: nn.Module, x: Tensor, path: Path, target: str) -> tuple[Library, runtime.VirtualMachine]:
    library = build_library({"main": program(model, x)}, get_target(target), path)
    return library, runtime.VirtualMachine(tvm.runtime.load_module(str(path)), tvm.cpu())


def run(model: nn.Module, library: Library, vm: runtime.VirtualMachine, x: Tensor) -> np.ndarray:
    state = model.state_dict()
    tensors = packed(vm, library, state)
    return vm["main"](tvm.runtime.tensor(x.numpy()), tensors).numpy()


@pytest.mark.parametrize("target", ["x86_64", "x86_64-v3"])
@pytest.mark.parametrize("size", [(3, 5), (7, 7), (14, 14), (9, 40)])
def test_convolutions(target: str, size: tuple[int, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Bottleneck()
    library, vm = build(model, torch.randn(2, 12, *size), tmp_path / "m.so", target)
    for batch in (1, 3):
        x = 3 * torch.randn(batch, 12, *size)
        np.testing.assert_array_equal(run(model, library, vm, x), model(x).detach().numpy())


@pytest.mark.parametrize("target", ["x86_64", "x86_64-v3", pytest.param("x86_64-amx", marks=NO_AMX)])
@pytest.mark.parametrize("act", ["gelu_f32", "gelu_tanh_f32", "silu_f32", "tanh_f32"])
def test_linears(target: str, act: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Mlp(act)
    library, vm = build(model, torch.randn(2, 13, 21), tmp_path / "m.so", target)
    for batch in (1, 5):
        x = 3 * torch.randn(batch, 13, 21)
        np.testing.assert_array_equal(run(model, library, vm, x), model(x).detach().numpy())


def test_the_plan() -> None:
    """Each kernel's steps and results."""
    torch.manual_seed(0)
    prepared = prepare({"main": program(Bottleneck(), torch.randn(2, 12, 7, 7))})["main"]
    found = [(f.finish.steps, f.finish.floats, f.finish.quantized) for f in fuse(prepared.graph)]
    assert found == [
        (("relu",), False, 1),  # first
        (("hardswish",), False, 1),  # second
        (("add", "relu"), True, 2),  # third
        ((), True, 0),  # beside
        (("add",), True, 0),  # other; the mean has another shape
        ((), True, 0),  # other, called again
    ]


def test_no_pass_over_memory_is_left(tmp_path: Path) -> None:
    """In the second half of a block the only element-wise kernels are those of the last line, which two nodes read."""
    torch.manual_seed(1)
    library, _ = build(Mlp("gelu_f32"), torch.randn(2, 13, 21), tmp_path / "m.so", "x86_64")
    kernels = Counter(how.removeprefix("kernel template: ") for how in library.kernels.values())
    assert kernels == {"layer_norm": 1, "int8_linear": 3, "default: elementwise": 1, "pack_words": 3}
