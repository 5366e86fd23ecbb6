"""One checkpoint, one artifact, four targets: ``python -m benchmarks.four_targets digits_vit resnet50``.

A digits network is trained as the demo trains it (its checkpoint stays in ``build/four_targets``); others have random
weights. Each is lowered once, for all targets, with an exact NPU, and every profile's logits are compared with torch's
on some images: x86-64 runs here, arm64 under QEMU, CUDA code on the GPU that the tests emulate, and the NPU's
partitions in the TOSA reference model. ``ethos-u85-256, fused`` is an artifact of its own, lowered without
``exact_npu``. ``most_steps``: the greatest difference, in steps of an int8 that holds the logits of these images (their
greatest, divided by 127). Results go to ``benchmarks/results/four_targets.json``, in place of those of the same model.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import t3c_compile as t3c
from examples.models.vision import MODELS
from t3c_compile import qemu, snapping
from t3c_compile.backends.targets import get_target
from t3c_compile.backends.tvm.cuda import library as cuda_library
from t3c_compile.backends.tvm.cuda.nvrtc import require_compiler
from t3c_compile.checkpoint import Checkpoint
from t3c_compile.demo import example
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.specialize import specialize
from t3c_compile.profile import ProfileSet
from t3c_compile.show import show

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))
from emulated_cuda import compile_emulated, load_driver  # noqa: E402

RESULTS = ROOT / "benchmarks/results/four_targets.json"
WORK = ROOT / "build/four_targets"
NPU = "ethos-u85-256"
TARGETS = ("x86_64", "arm64", "cuda-sm_90", NPU)
DIGITS = ("digits_cnn", "digits_vit")


def digits(name: str) -> tuple[Checkpoint, list[tuple[Tensor]], Tensor | None, Tensor]:
    """The checkpoint, calibration with its labels, and test images."""
    path, run = WORK / f"{name}.safetensors", example()
    if not path.exists():
        prepared = run.prepare(name.removeprefix("digits_"))
        Checkpoint(prepared.elastic, prepared.calibration[0], prepared.controller).save(path)
    data = run.load()
    return Checkpoint.load(path), [(x,) for x in data.calibration[0].split(60)], data.calibration[1], data.test[0]


def vision(name: str, side: int) -> tuple[Checkpoint, list[tuple[Tensor]], Tensor | None, Tensor]:
    """The same of a model with random weights, for images of ``side`` x ``side`` pixels."""
    path = WORK / f"{name}-{side}.safetensors"
    images = torch.randn(68, 3, side, side, generator=torch.Generator().manual_seed(1))
    if not path.exists():
        model, inputs = MODELS[name].build(False), (images[:4],)
        elastic = t3c.transform(model, inputs, t3c.Config(rank_multiple=32), calibration=[inputs], progress=True)
        Checkpoint(elastic, inputs).save(path)
    return Checkpoint.load(path), [(images[:4],)], None, images[4:]


def snapped(checkpoint: Checkpoint, calibration: list[tuple[Tensor]], labels: Tensor | None, count: int) -> ProfileSet:
    targets = [get_target(name) for name in TARGETS]
    checkpoint.model.set_attention_dtype("int8")
    with patch.object(snapping, "drop_dominated", _all if labels is None else snapping.drop_dominated):
        return t3c.snap(checkpoint.model, calibration, targets, labels, checkpoint.controller, count, progress=True)


def _all(profiles: list[Any]) -> tuple[list[Any], list[str]]:
    """Random weights do not say which profile is the better."""
    return profiles, []


def logits(path: Path, target: str, profiles: ProfileSet, images: Tensor) -> Iterator[Tensor]:
    """What ``target`` gives, profile by profile."""
    if target == "arm64":
        emulated = qemu.run_profiles(path, target, images.numpy())
        yield from (torch.from_numpy(emulated[profile.name][0]) for profile in profiles.profiles)
        return
    session = t3c.load(path, target)
    for profile in profiles.profiles:
        session.set_profile(profile.name)
        yield torch.from_numpy(session.run(images.numpy()))


@torch.no_grad()
def reference(model: ElasticGraphModule, profiles: ProfileSet, index: int, images: Tensor) -> Tensor:
    profile = profiles.profiles[index]
    graph = specialize(model, profile.options, profile.activations, profiles.store_ranks())
    return torch.cat([graph(image) for image in images.split(1)])


def rows_of(name: str, side: int, count: int, samples: int, driver: Any, folder: Path) -> list[dict[str, Any]]:
    """One row a profile and target."""
    checkpoint, calibration, labels, images = digits(name) if name in DIGITS else vision(name, side)
    images, model = images[:samples], checkpoint.model
    profiles = snapped(checkpoint, calibration, labels, count)
    expected = [reference(model, profiles, index, images) for index in range(len(profiles.profiles))]
    inputs, rows = checkpoint.example_inputs, []
    driver.t3c_be_generation(9)
    with patch.object(cuda_library, "compile_cuda", lambda source, arch: compile_emulated(source, folder)):
        path = t3c.lower(model, profiles, TARGETS, WORK / f"{name}.t3c", inputs, True, False, exact_npu=True)
        fused = t3c.lower(model, profiles, [NPU], WORK / f"{name}-fused.t3c", inputs, True, False)
        for target, way, artifact in (*((target, "", path) for target in TARGETS), (NPU, ", fused", fused)):
            began = time.monotonic()
            for index, found in enumerate(logits(artifact, target, profiles, images)):
                off, step = (found - expected[index]).abs(), float(expected[index].abs().max()) / 127
                row = {"model": name, "image": images.shape[-1], "profile": profiles.profiles[index].name}
                row |= {"target": target + way, "images": len(images), "differing": float((off > 0).float().mean())}
                rows.append(row | {"most_steps": float(off.max()) / step, "mean_steps": float(off.mean()) / step})
            print(f"{name}: {target}{way} in {time.monotonic() - began:.0f} s", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=[*DIGITS, *MODELS])
    parser.add_argument("--image", type=int, default=64, help="pixels of a side, of all but digits (default 64)")
    parser.add_argument("--profiles", type=int, default=4, help="how many at the most (default 4)")
    parser.add_argument("--images", type=int, default=64, help="how many are compared (default 64)")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    WORK.mkdir(parents=True, exist_ok=True)
    require_compiler("sm_80")  # cuda-bindings looks up functions of a driver that it finds, at its first use
    with tempfile.TemporaryDirectory() as folder:
        driver = load_driver(Path(folder))
        for name in chosen.models:
            rows = rows_of(name, chosen.image, chosen.profiles, chosen.images, driver, Path(folder))
            show(f"{name}: logits compared with torch's", rows, False)
            kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
            kept = [row for row in kept if row["model"] != name]
            RESULTS.write_text(json.dumps(kept + rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
