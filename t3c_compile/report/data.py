"""What a report shows, gathered from an artifact's manifest. Needs numpy, neither torch nor the compiler."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from t3c_compile.conformal import ConformalCertificate
from t3c_compile.manifest import Manifest, check_files, read_manifest
from t3c_compile.passes.errors import T3CError
from t3c_compile.progress import progress_bar
from t3c_compile.report.kernels import KernelTimes, kernel_times
from t3c_compile.runtime import ProfileInfo, profile_infos, refusal


class ReportError(T3CError):
    """A report cannot be made of what was given; the message says what to change."""


@dataclass(frozen=True)
class Baseline:
    """Another model to compare with: ``accuracy`` (a share), milliseconds a call and megabytes; None is not known."""

    name: str
    accuracy: float
    latency_ms: float | None = None
    size_mb: float | None = None


@dataclass(frozen=True)
class TargetReport:
    """One target of the artifact.

    Attributes:
        profiles: as a session on the target has them.
        conformal: what ``certify`` wrote, None where it has not run.
        kernels: by profile, how a call divides among kernels; None where that was not measured.
        unmeasured: why this machine cannot measure it; None where it can.
    """

    profiles: tuple[ProfileInfo, ...]
    conformal: ConformalCertificate | None
    kernels: tuple[KernelTimes, ...] | None
    unmeasured: str | None


@dataclass(frozen=True)
class Report:
    """What the page and the figures show.

    Attributes:
        name: the artifact's folder.
        quality: ``accuracy`` (top-1 on snap's calibration data), or ``agreement`` (with the full model's class) where
            the artifact was made without labels.
        layers: the elastic layers, in the model's order.
        tools: versions by tool.
    """

    name: str
    quality: str
    layers: tuple[str, ...]
    targets: Mapping[str, TargetReport]
    baselines: tuple[Baseline, ...]
    tools: Mapping[str, str]

    @property
    def profiles(self) -> tuple[ProfileInfo, ...]:
        """Of the first target; options, quality and the spectral certificate are the same on every target."""
        return next(iter(self.targets.values())).profiles

    def sensitivity(self) -> list[list[float]] | None:
        """The part of each profile's spectral bound that falls to each layer, in logit 2-norm: [layers][profiles].

        None where the artifact holds no parts.
        """
        parts = [profile.certificate.get("layers") for profile in self.profiles]
        if not all(isinstance(part, dict) and part.keys() >= set(self.layers) for part in parts):
            return None
        return [[float(part[layer]) for part in parts if part is not None] for layer in self.layers]


def read_report(
    path: str | os.PathLike[str],
    baselines: str | os.PathLike[str] | Sequence[Baseline] = (),
    measure: bool = False,
    progress: bool = False,
) -> Report:
    """Gather what is known of an artifact, every file of it checked.

    Args:
        path: the ``NAME.t3c`` folder.
        baselines: models to compare with, or a JSON file of them: a list of objects with ``name``, ``accuracy`` (0 to
            1) and one or both of ``latency_ms`` and ``size_mb``.
        measure: run every target that this machine can and time its kernels; input sizes that are free are 1.
        progress: show a progress bar.

    Raises:
        ArtifactError: it is missing, damaged or of another schema.
        ReportError: the baselines cannot be used, or ``measure`` and no target runs here.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    labelled = all("accuracy" in profile["quality"] for profile in manifest["profiles"])
    compared = tuple(baselines) if not isinstance(baselines, str | os.PathLike) else read_baselines(baselines)
    if compared and not labelled:
        raise ReportError(f"{folder} has no accuracy to compare baselines with: snap it with labels")
    reasons = {name: _unmeasured(entry) for name, entry in manifest["targets"].items()}
    if measure and all(reasons.values()):
        raise ReportError(
            f"no target of {folder} can be measured here: " + "; ".join(f"{n}: {why}" for n, why in reasons.items())
        )
    with progress_bar(progress) as bar:
        targets = {}
        for name, reason in reasons.items():
            timed = None
            if measure and reason is None:
                bar.add_task(f"measure kernels: {name}", total=None)
                timed = kernel_times(folder, name, manifest["targets"][name].get("kernels", {}))
            targets[name] = _target(manifest, name, timed, reason)
    return Report(
        name=folder.absolute().name,
        quality="accuracy" if labelled else "agreement",
        layers=tuple(manifest["profiles"][0]["options"]),
        targets=targets,
        baselines=compared,
        tools=manifest["tools"],
    )


def read_baselines(path: str | os.PathLike[str]) -> tuple[Baseline, ...]:
    """Models to compare with from a JSON file (see :func:`read_report`). Raises :class:`ReportError`."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ReportError(f"baselines {path}: {error}") from error
    if not isinstance(found, list):
        raise ReportError(f"baselines {path}: a list of objects is needed, such as [{_EXAMPLE}]")
    return tuple(_baseline(f"baselines {path}, entry {index}", entry) for index, entry in enumerate(found))


_EXAMPLE = '{"name": "ResNet-50 int8", "accuracy": 0.761, "latency_ms": 12.5, "size_mb": 25.6}'


def _baseline(place: str, entry: Any) -> Baseline:
    known = [field.name for field in fields(Baseline)]
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not set(entry) <= set(known):
        raise ReportError(f"{place}: an object with {', '.join(known)} is needed, such as {_EXAMPLE}")
    numbers = {key: value for key, value in entry.items() if key != "name" and value is not None}
    for key, value in numbers.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise ReportError(f"{place}: {key} is {value!r}, a positive number is needed")
    if not numbers.get("accuracy", 2) <= 1:
        raise ReportError(f"{place}: accuracy is a share between 0 and 1, and it is needed")
    if numbers.keys() == {"accuracy"}:
        raise ReportError(f"{place}: latency_ms or size_mb is needed")
    return Baseline(name=entry["name"], **numbers)


def _unmeasured(entry: Mapping[str, Any]) -> str | None:
    return "an NPU's kernels run on the device alone" if "npu" in entry else refusal(entry)


def _target(
    manifest: Manifest, name: str, kernels: tuple[KernelTimes, ...] | None, unmeasured: str | None
) -> TargetReport:
    entry = manifest["targets"][name]
    conformal = ConformalCertificate.from_json(entry["conformal"]) if "conformal" in entry else None
    return TargetReport(profile_infos(manifest, name), conformal, kernels, unmeasured)
