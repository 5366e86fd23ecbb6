"""Small variants of ``examples/models/vision.py`` through the pipeline; at full size: ``benchmarks/models.py``."""

import copy
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from nets import packed
from torch import Tensor
from tvm.runtime import vm as runtime

import t3c_compile as t3c
from t3c_compile import snapping
from t3c_compile.artifact import export_profiles, lower
from t3c_compile.backends.targets import get_target
from t3c_compile.backends.tvm.build import build_library
from t3c_compile.passes.elastic import elastic_layers
from t3c_compile.passes.specialize import specialize
from t3c_compile.profile import ProfileSet

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from examples.models.vision import MODELS

# The same layers as another's, or only more of them.
ALIKE = ("resnet101", "vit_l_16", "timm_resnet18", "timm_swin_tiny", "timm_vit_small", "timm_efficientnet_b0")
ON_ARM64 = ("timm_mobilenetv3_large",)
LOWERED = [name for name in MODELS if name not in (*ALIKE, *ON_ARM64)]
TARGETS = [get_target("x86_64"), get_target("arm64")]


def relative(found: Tensor, reference: Tensor) -> float:
    """2-norm of the difference over that of the reference."""
    return float((found - reference).norm() / reference.norm())


@cache
def transformed(name: str) -> Any:
    return t3c.transform(MODELS[name].build(True), MODELS[name].inputs(True))


@cache
def snapped(name: str) -> tuple[Any, ProfileSet]:
    """The elastic model and its least and greatest profile, whichever of them random weights make the better."""
    elastic = transformed(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapping, "drop_dominated", lambda profiles: (profiles, []))
        return elastic, t3c.snap(elastic, [MODELS[name].other_inputs(True)], TARGETS, count=2)


def greatest(profiles: ProfileSet) -> ProfileSet:
    return replace(profiles, profiles=profiles.profiles[-1:])


@torch.no_grad()
def reference(name: str, inputs: tuple[Tensor, ...]) -> Tensor:
    """What torch computes with the specialized graph of the greatest profile."""
    elastic, profiles = snapped(name)
    top = profiles.profiles[-1]
    return specialize(elastic, top.options, top.activations)(*inputs)


@pytest.mark.parametrize("name", MODELS)
def test_transform_and_a_training_step(name: str) -> None:
    builder = MODELS[name]
    model, elastic = builder.build(True), copy.deepcopy(transformed(name))
    with torch.no_grad():
        for inputs in (builder.inputs(True), builder.other_inputs(True)):
            assert relative(elastic(*inputs), model(*inputs)) < 1e-5
    assert not elastic.report.kept
    elastic.train()

    def loss() -> Tensor:
        torch.manual_seed(0)
        return builder.loss(elastic(*builder.other_inputs(True)))

    before = loss()
    before.backward()
    for layer_name, layer in elastic_layers(elastic):
        grads = [p.grad for p in layer.parameters()]
        assert all(grad is not None and bool(grad.isfinite().all()) for grad in grads), layer_name
        assert any(bool(grad.any()) for grad in grads), layer_name
    # A step that should lower the loss by 1%.
    square = sum(float(p.grad.square().sum()) for p in elastic.parameters() if p.grad is not None)
    torch.optim.SGD(elastic.parameters(), lr=0.01 * before.item() / square).step()
    assert 0.9 * before.item() < loss().item() < before.item()


@pytest.mark.parametrize("name", LOWERED)
def test_lowered_for_x86_64(name: str, tmp_path: Path) -> None:
    """The greatest profile at two batch sizes; equal to torch's specialized graph but for rounding in float stages."""
    builder = MODELS[name]
    elastic, profiles = snapped(name)
    programs, store = export_profiles(elastic, greatest(profiles), builder.inputs(True))
    library = build_library(programs, TARGETS[0], tmp_path / "model.so")
    assert all(how.startswith(("kernel template: ", "default: ")) for how in library.kernels.values()), library.kernels
    machine = runtime.VirtualMachine(tvm.runtime.load_module(str(library.path)), tvm.cpu())
    tensors = packed(machine, library, store)
    for inputs in (builder.inputs(True), builder.other_inputs(True)):
        found = machine["profile_0"](*(tvm.runtime.tensor(x.numpy()) for x in inputs), tensors).numpy()
        expected = reference(name, inputs)
        assert relative(torch.from_numpy(found), expected) < 1e-5
    # Different images give different logits: a constant would pass otherwise.
    assert float(expected.std(0).mean()) > 0.05 * float(expected.std())


@pytest.mark.parametrize("name", ON_ARM64)
def test_lowered_for_arm64(name: str, tmp_path: Path, arm64: ModuleType) -> None:
    builder = MODELS[name]
    elastic, profiles = snapped(name)
    inputs = builder.other_inputs(True)
    path = lower(elastic, greatest(profiles), ["arm64"], tmp_path / "model.t3c", builder.inputs(True))
    np.save(tmp_path / "x.npy", inputs[0].numpy())
    code = (
        "import sys, numpy, t3c_compile as t3c; s = t3c.load(sys.argv[1]); x = numpy.load(sys.argv[2]);"
        "assert s.target == 'arm64'; numpy.save(sys.argv[3], s.run(x))"
    )
    done = arm64.run_python(["-c", code, str(path), str(tmp_path / "x.npy"), str(tmp_path / "y.npy")])
    assert done.returncode == 0, done.stderr
    assert relative(torch.from_numpy(np.load(tmp_path / "y.npy")), reference(name, inputs)) < 1e-5
