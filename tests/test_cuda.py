"""CUDA targets without a GPU: code is compiled by NVRTC, and what it says is run on the CPU (``emulated_cuda``)."""

import ctypes
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cuda_cases import CudaCases
from emulated_cuda import compile_emulated
from nets import conv_net
from safetensors.numpy import load_file

import t3c_compile
from t3c_compile import ArtifactError, snapping
from t3c_compile.artifact import lower
from t3c_compile.backends import gpu
from t3c_compile.backends.targets import UnknownTargetError, get_target
from t3c_compile.backends.tvm.build import Library, build_library
from t3c_compile.backends.tvm.cuda import gemm
from t3c_compile.backends.tvm.cuda import library as cuda_library
from t3c_compile.backends.tvm.cuda.nvrtc import CudaCompilerError, compile_cuda, require_compiler
from t3c_compile.backends.tvm.lowering import UnsupportedOpError
from t3c_compile.manifest import STORE, read_manifest, write_manifest
from t3c_compile.passes import ops
from t3c_compile.passes.specialize import specialize
from t3c_compile.transforming import transform
from t3c_compile.virtual_machine import VirtualMachine

MMA = b"mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"


class Lowered:
    """A network and its profiles for every target here."""

    def __init__(self, model: torch.nn.Module, inputs: tuple[torch.Tensor], count: int) -> None:
        self.elastic, self.inputs = transform(model.eval(), inputs), inputs
        targets = [get_target(name) for name in ("x86_64", "a100", "jetson-orin", "h100")]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(snapping, "drop_dominated", lambda profiles: (profiles, []))
            calibration = [(torch.randn(16, *inputs[0].shape[1:]),)]
            self.profiles = snapping.snap(self.elastic, calibration, targets, count=count)

    def lower(self, targets: list[str], path: Path) -> Path:
        return lower(self.elastic, self.profiles, targets, path, self.inputs, measured=False)


@pytest.fixture(scope="module")
def layer() -> Lowered:
    torch.manual_seed(0)
    return Lowered(torch.nn.Sequential(torch.nn.Linear(160, 128)), (torch.randn(3, 160),), count=1)


@pytest.fixture(scope="module")
def compiled(layer: Lowered, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layer.lower(["x86_64", "h100", "jetson-orin"], tmp_path_factory.mktemp("cuda") / "net.t3c")


def test_an_artifact_for_a_cpu_and_a_gpu(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, manifest = compiled, read_manifest(compiled)
    entries = manifest["targets"]
    assert entries["h100"]["kind"] == "cuda"
    assert entries["h100"]["arch"] == "sm_90"
    assert entries["h100"]["features"] == list(get_target("x86_64-v3").features)
    assert all("datasheet" in cost["source"] for cost in entries["h100"]["costs"])
    assert sorted(name for name in manifest["files"] if not name.startswith("lib/")) == [STORE]
    stored = set(load_file(path / STORE))
    for entry in entries.values():
        # Each stored tensor is read once, for all profiles.
        read = [name for names in entry["packs"].values() for name in names]
        assert len(read) == len(set(read))
        assert set(read) <= stored
    code = (path / entries["h100"]["library"]).read_bytes()
    assert b"\x7fELF" in code[4:]
    assert b"cubin" in code
    assert b"__global__" not in code

    monkeypatch.setattr(gpu, "_DRIVER", "libno-driver.so.1")
    message = (
        r"no target of .*net.t3c runs here: h100: it needs an NVIDIA GPU of compute capability 9.0, and there is no "
        r"NVIDIA driver \(libno-driver.so.1\) here: load the artifact on a machine that has one, or lower for this"
    )
    with pytest.raises(ArtifactError, match=message):
        t3c_compile.load(path, "h100")
    assert t3c_compile.load(path).target == "x86_64"


def test_a_damaged_architecture(compiled: Path, tmp_path: Path) -> None:
    manifest = read_manifest(compiled)
    manifest["targets"]["h100"]["arch"] = "../x"
    write_manifest(tmp_path, manifest)
    with pytest.raises(ArtifactError, match="h100/arch is no architecture of a GPU"):
        read_manifest(tmp_path)


def test_a_board_with_an_arm_host(compiled: Path) -> None:
    entry = read_manifest(compiled)["targets"]["jetson-orin"]
    assert (entry["machine"], entry["arch"]) == ("aarch64", "sm_87")
    code = (compiled / entry["library"]).read_bytes()
    assert int.from_bytes(code[18:20], "little") == 183  # ELF's number for it
    assert b"\x7fELF" in code[4:]
    with pytest.raises(ArtifactError, match="jetson-orin: it is for aarch64, this is"):
        t3c_compile.load(compiled, "jetson-orin")


def test_what_is_refused(layer: Lowered, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UnknownTargetError, match="cuda-sm_75: the kernels multiply int8 on tensor cores as sm_80 and"):
        get_target("cuda-sm_75")
    plain = get_target("cuda-sm_89")
    assert plain.tvm["arch"] == "sm_89"
    assert "of a100: nothing is known" in plain.cost_source

    class Unknown(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.matrix_exp(x)

    program = torch.export.export(Unknown(), (torch.randn(3, 3),))
    with pytest.raises(UnsupportedOpError, match="linalg_matrix_exp"):
        build_library({"main": program}, plain, tmp_path / "never.so")
    with pytest.raises(CudaCompilerError, match="NVRTC refuses the code for sm_89"):
        compile_cuda('extern "C" __global__ void f() { nothing(); }', "sm_89")
    with pytest.raises(CudaCompilerError, match="NVRTC refuses the code for sm_1"):
        compile_cuda('extern "C" __global__ void f() {}', "sm_1")
    with pytest.raises(CudaCompilerError, match="for sm_999"):
        require_compiler("sm_999")
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(
        CudaCompilerError, match=r"compiling for sm_89 needs NVRTC.*t3c-compile\[cuda\].*no GPU is needed"
    ):
        compile_cuda("", "sm_89")
    with pytest.raises(CudaCompilerError, match="needs NVRTC"):
        layer.lower(["h100"], tmp_path / "never.t3c")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="TVM packs CUDA modules in another way"):
        cuda_library.with_binary(bytes(8) + b"\x01" + bytes(40), lambda _: b"")


@pytest.fixture(scope="module")
def emulator(cuda_driver: ctypes.CDLL, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.CDLL]:
    """A GPU of compute capability 8.0, on the processor; what is lowered meanwhile is compiled for it."""
    folder = tmp_path_factory.mktemp("emulator")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_library, "compile_cuda", lambda source, arch: compile_emulated(source, folder))
        yield cuda_driver


@pytest.fixture(scope="module")
def cases(emulator: ctypes.CDLL, tmp_path_factory: pytest.TempPathFactory) -> tuple[CudaCases, Library]:
    model = CudaCases().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    inputs = torch.randn(3, 9, 36), torch.randn(3, 16, 9, 7)
    program = torch.export.export(model, inputs, dynamic_shapes=({0: batch}, {0: batch}), strict=False)
    path = tmp_path_factory.mktemp("cases") / "cases.so"
    return model, build_library({"main": program}, get_target("a100"), path)


@pytest.mark.parametrize(("batch", "backwards"), [(3, False), (1, True)])
def test_every_kernel_gives_the_reference(
    cases: tuple[CudaCases, Library], emulator: ctypes.CDLL, batch: int, backwards: bool
) -> None:
    """Bit for bit, with the threads of a block in order and in reverse between barriers."""
    model, library = cases
    machine = VirtualMachine(library.path, {}, on_gpu=True)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    tensors: list[Any] = []
    for function, names in library.packs.items():
        tensors += machine[function](*(machine.tensor(state[name]) for name in names))
    torch.manual_seed(batch)
    inputs = torch.randn(batch, 9, 36), torch.randn(batch, 16, 9, 7)
    emulator.t3c_run_backwards(backwards)
    found = machine.array(machine["main"](*(machine.tensor(x.numpy()) for x in inputs), machine.tuple(tensors)))
    emulator.t3c_run_backwards(False)
    with torch.no_grad():
        expected = model(*inputs)
    for (name, reference), result in zip(expected.items(), found, strict=True):
        if name.startswith("~"):
            np.testing.assert_allclose(result, reference.numpy(), rtol=1e-5, atol=1e-3, err_msg=name)
        else:
            np.testing.assert_array_equal(result, reference.numpy(), err_msg=name)


def test_nothing_is_unscheduled(cases: tuple[CudaCases, Library]) -> None:
    kernels = cases[1].kernels
    assert all(how.startswith(("kernel template: ", "default: a thread for each")) for how in kernels.values())
    assert sum(how.startswith("kernel template: cuda_") for how in kernels.values()) >= 35


@dataclass(frozen=True)
class Network:
    """A network lowered for the emulated GPU, and the CUDA code of its library."""

    lowered: Lowered
    path: Path
    source: str


@pytest.fixture(scope="module")
def network(emulator: ctypes.CDLL, tmp_path_factory: pytest.TempPathFactory) -> Network:
    lowered, sources = Lowered(*conv_net(), count=2), []
    folder = tmp_path_factory.mktemp("network")

    def record(source: str, arch: str) -> bytes:
        sources.append(source)
        return compile_emulated(source, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_library, "compile_cuda", record)
        path = lowered.lower(["a100"], folder / "net.t3c")
    return Network(lowered, path, sources[0])


def test_a_session_on_the_gpu(network: Network) -> None:
    """TVM's CUDA runtime, the library's host code and every kernel of a network: torch's bits, in every profile."""
    session, profiles = t3c_compile.load(network.path), network.lowered.profiles
    for batch in (1, 6):
        x = torch.randn(batch, 1, 8, 8)
        results = []
        for profile in profiles.profiles:
            session.set_profile(profile.name)
            results.append(session.run(x.numpy()))
            graph = specialize(network.lowered.elastic, profile.options, profile.activations, profiles.store_ranks())
            with torch.no_grad():
                np.testing.assert_array_equal(results[-1], graph(x).numpy())
        assert not np.array_equal(*results)
    message = "compute capability 9.0 or a later one of its generation, and this GPU's is 8.0: lower for cuda-sm_80"
    assert message in str(gpu.refusal("sm_90"))
    assert gpu.refusal("sm_80") is None


def test_a_network_compiles(network: Network) -> None:
    ptx = compile_cuda(network.source, "sm_80", ptx=True)
    assert b".target sm_80" in ptx
    assert MMA in ptx
    # Of products and sums nothing is joined but where the code says so, and no division is an estimate.
    assert not any(word in ptx for word in (b"div.approx", b"div.full", b"sqrt.approx", b".ftz"))


class Tiles(torch.nn.Module):
    """A product for each tile there is, of sizes that leave a part of it empty."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(len(gemm.TILES)):
            self.register_buffer(f"weight{i}", torch.randint(-119, 120, (130 + i, 96), dtype=torch.int8))
            self.register_buffer(f"scale{i}", torch.rand(130 + i) * 1e-2)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        q = ops.quantize_int8(x, 0.03, -3)
        weights = [(getattr(self, f"weight{i}"), getattr(self, f"scale{i}")) for i in range(len(gemm.TILES))]
        # What a call returns is not captured.
        return [2 * ops.int8_linear(q, weight, scale, None, 0.03, -3, 6) for weight, scale in weights]


def test_all_tiles_in_a_captured_graph(emulator: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA graphs a call of known sizes is captured once, then launched; inputs of later calls count."""
    monkeypatch.setattr(gemm, "choose_tile", lambda rows, columns, batch: gemm.TILES[columns - 130])
    model = Tiles()
    program = torch.export.export(model, (torch.randn(150, 96),))
    library = build_library({"main": program}, get_target("a100"), tmp_path / "tiles.so", cuda_graphs=True)
    machine = VirtualMachine(library.path, {}, on_gpu=True)
    (pack,) = library.packs
    stored = [machine.tensor(model.state_dict()[name].numpy()) for name in library.packs[pack]]
    weights = machine.tuple(list(machine[pack](*stored)))
    launched = ctypes.c_int.in_dll(emulator, "t3c_graphs_launched")
    before = launched.value
    for _ in range(3):
        x = torch.randn(150, 96)
        found = machine.array(machine["main"](machine.tensor(x.numpy()), weights))
        for result, expected in zip(found, model(x), strict=True):
            np.testing.assert_array_equal(result, expected)
    assert launched.value - before >= 2
