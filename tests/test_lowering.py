"""Whole graphs through TVM: profiles that share one set of tensors, run by the VM and held against torch."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from nets import packed
from torch import Tensor, nn
from tvm.runtime import vm as runtime

import t3c_compile.passes.ops  # noqa: F401  (registers the ops)
from t3c_compile.backends.targets import get_target
from t3c_compile.backends.tvm.build import Library, build_library
from t3c_compile.backends.tvm.kernels.isa import isa_for
from t3c_compile.backends.tvm.lowering import UnsupportedOpError

ops = torch.ops.t3c


def weights(*shape: int) -> Tensor:
    return torch.randint(-119, 120, shape, dtype=torch.int8)


class SvdLinear(nn.Module):
    """A specialized layer: the store's factors at their greatest rank, read at ``rank``."""

    def __init__(self, inputs: int, outputs: int, max_rank: int) -> None:
        super().__init__()
        self.rank, self.bits = max_rank, 8
        self.register_buffer("v", weights(max_rank, inputs))
        self.register_buffer("u", weights(max_rank, outputs))
        self.register_buffer("mid_scale", torch.rand(max_rank) * 1e-3 + 1e-4)
        self.register_buffer("out_gain", torch.rand(outputs) * 1e-2)
        self.bias = nn.Parameter(torch.randn(outputs) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        q = ops.quantize_int8(x, 0.03, 4)
        return ops.svd_linear(
            q, self.v, self.u, self.mid_scale, self.out_gain, self.bias, 0.03, 4, 0.02, self.rank, self.bits
        )


class Transformer(nn.Module):
    """One block and a classifier."""

    def __init__(self, width: int = 48, heads: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = SvdLinear(width, 3 * width, 32)
        self.up, self.down = SvdLinear(width, 100, 24), SvdLinear(100, width, 40)
        self.register_buffer("head", weights(classes, width))
        self.register_buffer("head_scale", torch.rand(classes) * 1e-2)
        self.out = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        x = x + attended.transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        x = x.mean(1)
        return self.out(x) + ops.weight_only_linear(x, self.head, self.head_scale, None, 6)


class ConvNet(nn.Module):
    """A float stem, every form of quantized convolution, pooling, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.rank, self.bits = 24, 8
        self.stem = nn.Conv2d(3, 24, 3, 2, 1)
        self.norm = nn.BatchNorm2d(24)
        self.pool = nn.MaxPool2d(3, 2, 1)
        for name, shape in {
            "v": (24, 24),
            "core": (24, 24, 3, 3),
            "u": (24, 24),
            "cp_core": (24, 3, 3),
            "depth": (24, 1, 3, 3),
            "dense": (36, 24, 1, 1),
        }.items():
            self.register_buffer(name, weights(*shape))
        self.register_buffer("mid_scale", torch.rand(24) * 1e-2)
        self.register_buffer("core_scale", torch.rand(24) * 1e-3)
        self.register_buffer("gain", torch.rand(24) * 1e-2)
        self.register_buffer("scale", torch.rand(36) * 1e-2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.norm(self.stem(x))))
        q = ops.quantize_int8(x, 0.02, -100)
        chain = (self.mid_scale, self.core_scale, self.gain, None, 0.02, -100, 0.03, 0.04, [1, 1], [1, 1], [1, 1])
        y = ops.tucker2_conv2d(q, self.v, self.core, self.u, *chain, self.rank, self.bits)
        z = ops.cp_conv2d(q, self.v, self.cp_core, self.u, *chain, self.rank, self.bits)
        q = ops.quantize_int8(torch.relu(x + y + z), 0.05, -128)
        w = ops.svd_conv2d(q, self.v, self.u, self.mid_scale, self.gain, None, 0.05, -128, 0.03, [2, 2], self.rank, 8)
        q = ops.quantize_int8(w, 0.05, 0)
        d = ops.int8_conv2d(q, self.depth, self.gain, None, 0.05, 0, [1, 1], [1, 1], [1, 1], 24, self.bits)
        q = ops.quantize_int8(d, 0.05, 0)
        y = ops.int8_conv2d(q, self.dense, self.scale, None, 0.05, 0, [1, 1], [0, 0], [1, 1], 1, 4)
        return nn.functional.adaptive_avg_pool2d(y, 1).flatten(1)


def set_profile(model: nn.Module, rank: int, bits: int) -> nn.Module:
    """``model`` at a profile: the tensors stay, rank and bits change."""
    for module in model.modules():
        if hasattr(module, "rank"):
            module.rank = min(rank, int(module.v.shape[0]))
            module.bits = bits
    return model


PROFILES = {"profile_0": (8, 4), "profile_1": (19, 6), "profile_2": (64, 8)}


class Built:
    """A library, its VM and the tensors of one model."""

    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        path: Path,
        dynamic: bool,
        target: str = "x86_64",
        profiles: Iterable[str] = PROFILES,
    ) -> None:
        self.model = model.eval()
        shapes = ({0: torch.export.Dim("batch", min=1, max=64)},) if dynamic else None
        programs = {
            name: torch.export.export(set_profile(model, *PROFILES[name]), (example,), dynamic_shapes=shapes)
            for name in profiles
        }
        self.library: Library = build_library(programs, get_target(target), path)
        self.vm = runtime.VirtualMachine(tvm.runtime.load_module(str(path)), tvm.cpu())
        state = model.state_dict()
        self.tensors = packed(self.vm, self.library, state)

    def run(self, profile: str, x: Tensor) -> np.ndarray:
        return self.vm[profile](tvm.runtime.tensor(x.numpy()), self.tensors).numpy()

    def reference(self, profile: str, x: Tensor) -> np.ndarray:
        with torch.no_grad():
            return set_profile(self.model, *PROFILES[profile])(x).numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lowering")


@pytest.fixture(scope="module")
def transformer(folder: Path) -> Built:
    torch.manual_seed(0)
    return Built(Transformer(), torch.randn(2, 13, 48), folder / "transformer.so", dynamic=True)


@pytest.fixture(scope="module")
def convnet(folder: Path) -> Built:
    torch.manual_seed(1)
    return Built(ConvNet(), torch.randn(1, 3, 31, 30), folder / "convnet.so", dynamic=False)


def assert_like(result: np.ndarray, reference: np.ndarray) -> None:
    # A float that lands on the other side of a rounding moves one int8 step in a later layer: hence a looser bound here
    # than for kernels alone.
    np.testing.assert_allclose(result, reference, rtol=1e-3, atol=2e-3 * np.abs(reference).max())


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_transformer_with_any_batch(transformer: Built, profile: str, batch: int) -> None:
    x = torch.randn(batch, 13, 48)
    assert_like(transformer.run(profile, x), transformer.reference(profile, x))


@pytest.mark.parametrize("profile", PROFILES)
def test_convnet(convnet: Built, profile: str) -> None:
    x = torch.randn(1, 3, 31, 30)
    assert_like(convnet.run(profile, x), convnet.reference(profile, x))


def test_profiles_differ(transformer: Built) -> None:
    """The bound above could not hold if one profile's code ran for another."""
    x = torch.randn(2, 13, 48)
    low, high = transformer.reference("profile_0", x), transformer.reference("profile_2", x)
    assert np.abs(low - high).max() > 0.02 * np.abs(high).max()


def test_convnet_with_dynamic_batch_on_avx2(folder: Path) -> None:
    torch.manual_seed(2)
    built = Built(ConvNet(), torch.randn(2, 3, 16, 16), folder / "dynamic.so", True, "x86_64-v3", ["profile_1"])
    for batch in (1, 3):
        x = torch.randn(batch, 3, 16, 16)
        assert_like(built.run("profile_1", x), built.reference("profile_1", x))


def test_nothing_is_unscheduled(transformer: Built, convnet: Built) -> None:
    for built in (transformer, convnet):
        report = built.library.kernels
        assert report
        assert all(how.startswith(("kernel template: ", "default: ")) for how in report.values()), report
    assert "kernel template: svd_linear" in transformer.library.kernels.values()


def test_library_describes_itself(transformer: Built) -> None:
    library = transformer.library
    assert library.functions == tuple(PROFILES)
    assert {name for names in library.packs.values() for name in names} == set(transformer.model.state_dict())
    (only,) = library.inputs
    assert (only.name, only.shape[1:], only.dtype) == ("x", (13, 48), "float32")
    assert isinstance(only.shape[0], str)


def test_profiles_share_their_tensors(transformer: Built) -> None:
    """One packed buffer a factor, whatever the number of profiles; one a width where they are rounded at load."""
    library, factors, other_widths = transformer.library, 6, {bits for _, bits in PROFILES.values()} - {8}
    copies = factors * len(other_widths) if isa_for(get_target("x86_64")).rounds_at_load else 0
    assert len(transformer.tensors) == sum(map(len, library.packs.values())) + copies
    assert any(how.startswith("kernel template: pack") for how in library.kernels.values())


def test_build_is_deterministic(folder: Path) -> None:
    torch.manual_seed(3)
    program = torch.export.export(Transformer().eval(), (torch.randn(1, 5, 48),))
    paths = [folder / f"same{i}.so" for i in range(2)]
    libraries = [build_library({"profile_0": program}, get_target("x86_64"), path) for path in paths]
    assert libraries[0].kernels == libraries[1].kernels
    assert paths[0].read_bytes() == paths[1].read_bytes()


_RUN_WITHOUT_COMPILER = """
import json, sys
import numpy as np
import tvm
from tvm.runtime import vm as runtime
path, function, pack, arrays, out = sys.argv[1:]
data = np.load(arrays)
machine = runtime.VirtualMachine(tvm.runtime.load_module(path), tvm.cpu())
raw = [tvm.runtime.tensor(data[f"raw{i}"]) for i in range(len(data.files) - 1)]
np.save(out, machine[function](tvm.runtime.tensor(data["x"]), machine[pack](*raw)).numpy())
print(json.dumps({"compiler": any("libtvm_compiler" in line for line in open("/proc/self/maps"))}))
"""


def test_runs_with_the_runtime_library_alone(transformer: Built, folder: Path) -> None:
    library, x = transformer.library, torch.randn(2, 13, 48)
    state = transformer.model.state_dict()
    [(pack, names)] = library.packs.items()
    raw = {f"raw{i}": state[name].numpy() for i, name in enumerate(names)}
    np.savez(folder / "arrays.npz", x=x.numpy(), **raw)
    out = folder / "out.npy"
    args = [str(library.path), "profile_1", pack, str(folder / "arrays.npz"), str(out)]
    environment = os.environ | {"TVM_USE_RUNTIME_LIB": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _RUN_WITHOUT_COMPILER, *args],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == {"compiler": False}
    assert_like(np.load(out), transformer.reference("profile_1", x))


class Unsupported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), _Exotic())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class _Exotic(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(torch.special.i0(x))


@pytest.mark.parametrize("height", [1, 2, 3])
@pytest.mark.parametrize("width", [2, 5])
def test_a_padded_float_convolution_of_few_pixels(folder: Path, height: int, width: int) -> None:
    """Rows shorter than a vector: the padding's condition differs within it."""
    torch.manual_seed(4)
    conv, x = torch.nn.Conv2d(16, 16, 3, padding=1), torch.randn(1, 16, height, width)
    program = torch.export.export(conv, (x,))
    library = build_library({"f": program}, get_target("x86_64"), folder / f"conv{height}{width}.so")
    machine = runtime.VirtualMachine(tvm.runtime.load_module(str(library.path)), tvm.cpu())
    weights = packed(machine, library, program.state_dict)
    found = machine["f"](tvm.runtime.tensor(x.numpy()), weights).numpy()
    np.testing.assert_allclose(found, conv(x).detach().numpy(), rtol=1e-5, atol=1e-5)


def test_unsupported_ops_are_all_named(tmp_path: Path) -> None:
    program = torch.export.export(Unsupported(), (torch.randn(4, 4),))
    with pytest.raises(UnsupportedOpError) as caught:
        build_library({"profile_0": program}, get_target("x86_64"), tmp_path / "never.so")
    message = str(caught.value)
    assert "special_bessel_j0" in message
    assert "i0" in message
    assert "inner.1" in message
    assert "CONVERTERS" in message


def test_an_op_that_tvm_knows_and_cannot_compile_is_named(tmp_path: Path) -> None:
    class TopK(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.topk(x, 2).values

    program = torch.export.export(TopK(), (torch.randn(4, 4),))
    with pytest.raises(UnsupportedOpError, match=r"no code for R\.topk(.|\n)*CONVERTERS"):
        build_library({"profile_0": program}, get_target("x86_64"), tmp_path / "never.so")


def test_no_program_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no program"):
        build_library({}, get_target("x86_64"), tmp_path / "never.so")
