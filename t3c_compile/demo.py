"""The demo: digits, from training to an artifact that runs on x86-64 and, under QEMU, on arm64."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from rich.console import Console

from t3c_compile import qemu
from t3c_compile.artifact import lower
from t3c_compile.backends.targets import get_target
from t3c_compile.manifest import read_manifest
from t3c_compile.passes.errors import T3CError
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.specialize import specialize
from t3c_compile.profile import ProfileSet
from t3c_compile.runtime import load
from t3c_compile.show import show, summarize_options
from t3c_compile.snapping import snap

TARGETS = ("x86_64", "arm64")

# How far the logits of one image may be from torch's; they are equal to the bit wherever it was tried.
_AGREEMENT = 1e-3


@dataclass(frozen=True)
class DemoResult:
    """What one digits model came to; ``rows`` has one entry a profile, from least to greatest."""

    path: Path
    float_accuracy: float
    images: int
    rows: list[dict[str, Any]]
    seconds: float


def demo(models: Sequence[str], seed: int, output: Path, as_json: bool) -> None:
    """Train, snap, lower and run each digits model; print a table of what every profile did on the test split."""
    rows = []
    for name in models:
        result = run_demo(name, seed, output, Console(stderr=True))
        rows += [{"model": name, **row} for row in result.rows]
        if not as_json:
            title = f"{result.path}: float32 accuracy {result.float_accuracy:.2%} on {result.images} test images"
            show(f"{title}, {result.seconds:.0f} s", result.rows, as_json)
    if as_json:
        show("", rows, as_json)


def run_demo(name: str, seed: int, output: Path, console: Console) -> DemoResult:
    """The whole of it for ``cnn`` or ``vit``, from training to the artifact run on every target."""
    run = example()
    output.mkdir(parents=True, exist_ok=True)
    began, progress = time.monotonic(), console.is_terminal
    console.print(f"[bold]{name}[/]: training on digits")
    prepared = run.prepare(name, seed=seed, progress=progress)
    test, truth = prepared.data.test
    accuracy = run.accuracy(prepared.float_model, (test, truth))
    labels = prepared.data.calibration[1]
    targets = [get_target(target) for target in TARGETS]
    profiles = snap(prepared.elastic, prepared.calibration, targets, labels, prepared.controller, progress=progress)
    console.print(f"{name}: lowering {len(profiles.profiles)} profiles to {', '.join(TARGETS)}")
    path = lower(prepared.elastic, profiles, targets, output / f"{name}.t3c", prepared.calibration[0], progress)
    rows = run_everywhere(prepared.elastic, profiles, path, test, truth, console)
    return DemoResult(path, accuracy, len(truth), rows, time.monotonic() - began)


def run_everywhere(
    elastic: ElasticGraphModule,
    profiles: ProfileSet,
    path: Path,
    test: torch.Tensor,
    truth: torch.Tensor,
    console: Console,
) -> list[dict[str, Any]]:
    """One row a profile: size, accuracy on test, latency, and the differences between torch, x86-64 and arm64."""
    session = load(path, "x86_64")
    images = test.numpy()
    emulated = on_arm64(path, images, console)
    dense = read_manifest(path)["model"]["dense_int8_bytes"]
    with torch.no_grad():
        full = elastic.eval()(test).numpy()
    rows = []
    for profile, info in zip(profiles.profiles, session.profiles, strict=True):
        session.set_profile(info.name)
        logits = session.run(images)
        reference = reference_logits(elastic, profiles, info.index, test)
        rows.append(
            {"profile": info.name, **summarize_options(info.options)}
            | {"size_kb": info.size_mb * 1e3, "of_int8_dense": profile.size_bytes / dense}
            | {"accuracy": float((logits.argmax(1) == truth.numpy()).mean()), "x86_64_ms": info.latency_ms}
            | {"drift": float(np.linalg.norm(logits - full, axis=1).mean()), "certificate": info.certificate["bound"]}
            | {"x86_64_error": relative_error(logits, reference)}
            | {"arm64_error": None if emulated is None else relative_error(emulated[info.name], reference)}
        )
    return rows


def on_arm64(path: Path, images: Any, console: Console) -> dict[str, Any] | None:
    """Logits of every profile from the arm64 library under QEMU; None, and the reason printed, where it cannot run."""
    reason = qemu.unavailable()
    if reason is not None:
        console.print(f"arm64 was compiled and not run: {reason}")
        return None
    return {name: outputs[0] for name, outputs in qemu.run_profiles(path, "arm64", images).items()}


def reference_logits(elastic: ElasticGraphModule, profiles: ProfileSet, index: int, test: torch.Tensor) -> Any:
    """What torch computes with the specialized graph of one profile."""
    profile = profiles.profiles[index]
    graph = specialize(elastic, profile.options, profile.activations, profiles.store_ranks())
    with torch.no_grad():
        return graph(test).numpy()


def relative_error(found: Any, reference: Any) -> float:
    """2-norm of the difference over that of the reference, for the image where it is greatest."""
    errors = np.linalg.norm(found - reference, axis=1) / np.linalg.norm(reference, axis=1)
    if errors.max() > _AGREEMENT:
        raise T3CError(f"a compiled library's logits differ from torch's by {errors.max():.1e} of their size")
    return float(errors.max())


def example() -> ModuleType:
    """``examples/digits/run.py``; examples are not installed, so the demo needs the source tree."""
    places = [base / "examples" / "digits" for base in (Path.cwd(), Path(__file__).resolve().parents[1])]
    folder = next((place for place in places if (place / "run.py").exists()), None)
    if folder is None:
        raise T3CError("the demo needs examples/digits of the source tree: run it from a checkout")
    sys.path.insert(0, str(folder))
    import run  # type: ignore[import-not-found]

    return run  # type: ignore[no-any-return]
