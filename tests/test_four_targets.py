"""One artifact for a CPU, a board, a GPU and an NPU: with an exact NPU all give the same bits, in every profile."""

import ctypes
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from emulated_cuda import compile_emulated
from ethosu_nets import settled
from torch import Tensor, nn

import t3c_compile as t3c
from examples.digits.models import Attention
from t3c_compile import artifact, cli
from t3c_compile.backends.tvm.cuda import library as cuda_library
from t3c_compile.manifest import read_manifest
from t3c_compile.passes.specialize import specialize
from t3c_compile.profile import Profile, ProfileSet

TARGETS = ["x86_64", "arm64", "cuda-sm_90", "ethos-u85-256"]


@pytest.fixture
def gpu(cuda_driver: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An emulated one of compute capability 9.0."""
    monkeypatch.setattr(cuda_library, "compile_cuda", lambda source, arch: compile_emulated(source, tmp_path))
    cuda_driver.t3c_be_generation(9)
    yield
    cuda_driver.t3c_be_generation(8)


class Digits(nn.Module):
    """Images [N, 1, 8, 8] to logits [N, 10]: a convolution, attention, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, 2, 1)
        self.attention = Attention(32, 2)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.relu(self.stem(x)).flatten(2).transpose(1, 2)
        return self.head((tokens + self.attention(tokens)).mean(1))


def data() -> list[tuple[Tensor, Tensor]]:
    """What the command line calibrates with."""
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(64, 1, 8, 8, generator=generator), torch.randint(10, (64,), generator=generator))]


def test_all_targets_of_an_artifact_agree(
    gpu: None, arm64: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    ((x, _),) = data()
    elastic = t3c.transform(settled(Digits(), x), (x,), calibration=[(x,)])
    checkpoint, path = tmp_path / "digits.safetensors", tmp_path / "m.t3c"
    t3c.Checkpoint(elastic, (x,)).save(checkpoint)
    # What measures is another process, and the GPU is in this one.
    monkeypatch.setattr(artifact, "_measure", lambda *_: None)
    named = [word for name in TARGETS for word in ("--target", name)]
    options = ["--data", "test_four_targets:data", "--attention", "int8", "--profiles", "2", "--exact-npu"]
    assert cli.main(["lower", str(checkpoint), *named, *options, "-o", str(path)]) == 0
    manifest = read_manifest(path)
    assert list(manifest["targets"]) == TARGETS
    assert manifest["targets"]["ethos-u85-256"]["npu"]["exact"]
    assert manifest["inputs"][0]["shape"] == ["batch", 1, 8, 8]
    assert {str(file.relative_to(path)) for file in path.rglob("*.*")} - {"manifest.json"} == set(manifest["files"])

    elastic.set_attention_dtype("int8")
    emulated = arm64.run_profiles(path, "arm64", x.numpy())
    profiles = ProfileSet([Profile.from_json(entry) for entry in manifest["profiles"]], manifest["model"]["order"])
    seen = set()
    for profile in profiles.profiles:
        graph = specialize(elastic, profile.options, profile.activations, profiles.store_ranks())
        with torch.no_grad():
            expected = graph(x).numpy()
        found = {"arm64": emulated[profile.name][0]}
        for target in ("x86_64", "cuda-sm_90", "ethos-u85-256"):
            session = t3c.load(path, target)
            session.set_profile(profile.name)
            found[target] = session.run(x.numpy())
        for target, logits in found.items():
            np.testing.assert_array_equal(logits, expected, err_msg=f"{target}, {profile.name}")
        seen.add(expected.tobytes())
    assert len(seen) == len(profiles.profiles) == 2
