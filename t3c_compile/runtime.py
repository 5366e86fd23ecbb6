"""The runtime: load an artifact, run it, switch profiles between two calls.

Imports numpy and TVM's runtime library alone, neither torch nor the compiler.
"""

import os
import platform
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from t3c_compile.backends import cpu, gpu
from t3c_compile.budget import Budget, BudgetError
from t3c_compile.conformal import CertificateError, ConformalCertificate
from t3c_compile.drift import Array, drifts, logits_of
from t3c_compile.governor import HEADROOM, Governor
from t3c_compile.manifest import STORE, ArtifactError, Manifest, open_file, read_manifest
from t3c_compile.monitor import Monitor
from t3c_compile.npu import RUN, partition_runner
from t3c_compile.passes.errors import T3CError
from t3c_compile.store import read_store
from t3c_compile.virtual_machine import VirtualMachine, loading_beside

if TYPE_CHECKING:
    from t3c_compile.signing import Key

# A measured 90th percentile is taken this much larger when it is held against a budget.
LATENCY_MARGIN = 1.1


_HOW_TO_CERTIFY = "run t3c-compile certify on the artifact"


class InputError(T3CError):
    """An input of ``run`` has the wrong number, shape or dtype."""


@dataclass(frozen=True)
class ProfileInfo:
    """One profile of a loaded artifact, on the loaded target.

    ``latency_ms`` is the 90th percentile a call where it was measured, else an estimate; ``latency_source`` says which,
    and ``energy_source`` of ``energy_mj``.
    ``options`` is by layer: form, rank and bits. ``certificate`` holds ``bound`` (logit 2-norm) and its statement.
    ``drift_bound`` is the conformal bound of the drift in 2-norm, None where the target is not certified.
    """

    index: int
    name: str
    size_mb: float
    latency_ms: float
    latency_source: str
    energy_mj: float
    options: Mapping[str, Mapping[str, Any]]
    quality: Mapping[str, float]
    certificate: Mapping[str, Any]
    drift_bound: float | None = None
    energy_source: str = ""

    @property
    def needs(self) -> dict[str, float]:
        """The least limit of each cost that this profile fits: latency with its margin, where it was measured."""
        margin = LATENCY_MARGIN if self.latency_source.startswith("measured") else 1.0
        return {"latency_ms": self.latency_ms * margin, "energy_mj": self.energy_mj, "size_mb": self.size_mb}

    def fits(self, budget: Budget) -> bool:
        """Whether every limit of cost that ``budget`` names holds."""
        return not self._beyond(budget)

    def _beyond(self, budget: Budget) -> dict[str, tuple[float, float]]:
        """The limits of cost that do not hold, each with the least that would."""
        limits = {name: (getattr(budget, name), need) for name, need in self.needs.items()}
        return {name: pair for name, pair in limits.items() if pair[0] is not None and pair[1] > pair[0]}

    def excess(self, budget: Budget) -> str:
        """The limits of cost that do not hold, with the least that would, in words."""
        beyond = self._beyond(budget).items()
        return ", ".join(f"{name}={limit:g} (needs {need:.4g})" for name, (limit, need) in beyond)


def is_full(options: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the profile of these options, by layer, is the full model in float32."""
    return all(option["bits"] == 32 for option in options.values())


def choose(profiles: Sequence[ProfileInfo], budget: Budget) -> ProfileInfo:
    """The greatest profile that fits; where ``budget`` names a drift, the least that fits and is certified to meet it.

    Raises:
        BudgetError: none does; the message says the least that can be met.
        CertificateError: the budget names a drift and the artifact has no certificate.
    """
    fitting = [profile for profile in profiles if profile.fits(budget)]
    if not fitting:
        name, excess = profiles[0].name, profiles[0].excess(budget)
        raise BudgetError(f"no profile fits the budget: {excess} is below the least profile, {name}")
    if budget.max_drift is None:
        return fitting[-1]
    certified = [(profile.drift_bound, profile) for profile in fitting if profile.drift_bound is not None]
    if not certified:
        raise CertificateError(f"a budget of max_drift needs a certificate: {_HOW_TO_CERTIFY}")
    for bound, profile in certified:
        if bound <= budget.max_drift:
            return profile
    bound, best = min(certified, key=lambda pair: pair[0])
    raise BudgetError(
        f"no profile fits the budget: max_drift={budget.max_drift:g} is below the least drift that can be had, "
        f"{bound:.4g} with {best.name}"
    )


def checked_inputs(inputs: Sequence[Array], expected: Sequence[Mapping[str, Any]]) -> list[Array]:
    """``inputs``, contiguous, where they are as the manifest describes them; otherwise :class:`InputError`."""
    if len(inputs) != len(expected):
        raise InputError(f"{len(inputs)} inputs given, the model takes {len(expected)}")
    free: dict[str, int] = {}
    for array, entry in zip(inputs, expected, strict=True):
        name, shape = entry["name"], entry["shape"]
        if not isinstance(array, np.ndarray) or str(array.dtype) != entry["dtype"]:
            found = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
            raise InputError(f"input {name!r} is {found}, the model takes a numpy array of {entry['dtype']}")
        same = len(array.shape) == len(shape) and all(
            size == free.setdefault(want, size) if isinstance(want, str) else size == want
            for size, want in zip(array.shape, shape, strict=True)
        )
        if not same or 0 in array.shape:
            raise InputError(f"input {name!r} has shape {list(array.shape)}, the model takes {shape}")
    return [np.ascontiguousarray(array) for array in inputs]


class Session:
    """A loaded artifact. Thread-safe: calls take turns, and each runs one profile from start to end."""

    def __init__(self, folder: Path, manifest: Manifest, target: str) -> None:
        entry = here(manifest["targets"][target])
        self.target: str = target
        self.inputs: list[dict[str, Any]] = manifest["inputs"]
        self.profiles: tuple[ProfileInfo, ...] = profile_infos(manifest, target)
        certificate = entry.get("conformal")
        self._certificate = None if certificate is None else ConformalCertificate.from_json(certificate)
        self._monitor: Monitor | None = None
        self._governor: Governor | None = None
        # Milliseconds: their ratios are steadier than those of the 90th percentiles.
        self._medians: list[float] = [cost["latency_ms"] for cost in entry["costs"]]
        self._active = self.profiles[-1]
        self._lock = threading.Lock()
        on_gpu = entry.get("kind") == "cuda"
        with loading_beside(on_gpu), open_file(folder, manifest, STORE) as file:
            store = read_store(file)
        missing = [name for names in entry["packs"].values() for name in names if name not in store]
        if missing:
            raise ArtifactError(f"{folder / STORE} lacks tensors: {', '.join(missing)}")
        self._memory: tuple[int, tuple[tuple[int, ...], ...]] | None = None
        # An NPU is compiled for one sample.
        self._sample_by_sample = "npu" in entry and any("batch" in x["shape"] for x in self.inputs)
        functions = {RUN: partition_runner(folder, manifest, target)} if "npu" in entry else {}
        # The system opens a library by its name: it is hashed just before.
        open_file(folder, manifest, entry["library"]).close()
        try:
            # A bare name would be looked for elsewhere.
            self._machine = VirtualMachine((folder / entry["library"]).absolute(), functions, on_gpu)
            self._functions = [self._machine[name] for name in entry["functions"]]
            # Packed once, for all profiles, and pages of the store are let go as that goes on.
            packed: list[Any] = []
            for function, names in entry["packs"].items():
                packed += self._machine[function](*(self._machine.tensor(store[name]) for name in names))
                store.drop_pages()
            self._weights = self._machine.tuple(packed)
        except Exception as error:
            # TVM raises what it likes; whatever it is, library and manifest do not belong together.
            raise ArtifactError(f"{folder / entry['library']} cannot be loaded: {error}") from error

    @property
    def active(self) -> ProfileInfo:
        """The profile the next call without a budget runs."""
        governor = self._governor
        return self._active if governor is None else self.profiles[governor.level]

    def set_budget(self, budget: Budget) -> ProfileInfo:
        """Make the profile that :func:`choose` finds active and return it; :class:`BudgetError` when none fits.

        Switching copies no weight: every profile reads its prefix of the same packed tensors. A governor is ended.
        """
        profile = choose(self.profiles, budget)
        self._active, self._governor = profile, None
        return profile

    def set_profile(self, name: str) -> ProfileInfo:
        """Make the profile called ``name`` active, and end a governor; :class:`BudgetError` names those there are."""
        for profile in self.profiles:
            if profile.name == name:
                self._active, self._governor = profile, None
                return profile
        raise BudgetError(f"there is no profile {name!r}; there are {', '.join(p.name for p in self.profiles)}")

    def monitor(self, fraction: float = 0.01, significance: float = 0.01, seed: int = 0) -> Monitor:
        """From now on also run the greatest profile in a ``fraction`` of the calls, in place of an earlier monitor.

        The first time that the drifts seen contradict the certificate at level ``significance``, a
        :class:`~t3c_compile.monitor.DriftWarning` is given: inputs are not distributed as the calibration samples.
        The calls are drawn by ``seed``. A fraction of 0 ends the watch. Where the greatest profile is not the full
        model, a warning says what is not seen.

        Raises:
            CertificateError: the artifact is not certified for this target.
        """
        certificate = self._certified()
        bounds = [entry.to_greatest for entry in certificate.profiles]
        self._monitor = Monitor(bounds, certificate.alpha, fraction, significance, seed)
        greatest = self.profiles[-1]
        if fraction and not is_full(greatest.options):
            warnings.warn(
                f"the monitor compares with {greatest.name}, which is not the full model: inputs that make both drift "
                "alike are not seen; an artifact from snap(..., full_model=True) sees them",
                UserWarning,
                stacklevel=2,
            )
        return self._monitor

    def governor(self, slo_ms: float, violations: float = 0.01) -> Governor:
        """From now on a :class:`~t3c_compile.governor.Governor` chooses the profile of every call, in place of an
        earlier one: the greatest that keeps calls within ``slo_ms``, from :meth:`run` called to its return, waiting for
        other threads included. It begins with a lesser one, and rises as calls show what interrupts them. Ended by
        :meth:`set_budget`, :meth:`set_profile`, or a call with a budget.

        Args:
            slo_ms: milliseconds a call may take.
            violations: the share of calls that may take longer. A profile is raised after ``1 / violations`` calls of
                which none would have been late, so the fewer may be late, the longer a greater profile waits.

        Raises:
            T3CError: one of the two is out of range.
        """
        roomy = Budget(latency_ms=slo_ms / HEADROOM) if slo_ms > 0 else Budget()
        fitting = [profile.index for profile in self.profiles if profile.fits(roomy)]
        self._governor = Governor(self._medians, slo_ms, violations, max(fitting, default=0))
        return self._governor

    def watch(self, instrument: Callable[..., int]) -> None:
        """Have ``instrument`` called around every step of a call; see :meth:`VirtualMachine.watch`."""
        self._machine.watch(instrument)

    def _certified(self) -> ConformalCertificate:
        if self._certificate is None:
            raise CertificateError(f"target {self.target} has no conformal certificate: {_HOW_TO_CERTIFY}")
        return self._certificate

    def run(
        self, *inputs: Array, budget: Budget | None = None, certificate: "bool | Literal['compared']" = False
    ) -> Any:
        """Run the active profile, after :meth:`set_budget` when ``budget`` is given.

        Args:
            inputs: numpy arrays as the manifest's ``inputs`` describe them (:attr:`inputs`).
            certificate: return the bounds that apply to these inputs in this profile too. ``compared`` runs the
                greatest profile as well, which takes its time: bounds are then how far the two are apart on these
                inputs and how far the greatest may drift itself, and go with the drift of each input.

        Returns:
            The model's output as a numpy array, or a tuple of them; with ``certificate`` a pair of that and
            :class:`~t3c_compile.conformal.InputBounds`.

        Raises:
            InputError: wrong number, shape or dtype of inputs.
            BudgetError: no profile fits the budget.
            CertificateError: ``certificate``, or a budget of drift, and the artifact is not certified for this target.
        """
        began = time.perf_counter()
        # A call that is refused changes nothing.
        arrays = checked_inputs(inputs, self.inputs)
        if certificate not in (True, False, "compared"):
            raise CertificateError(f"certificate={certificate!r} must be True, False or 'compared'")
        certified = self._certified() if certificate else None
        governor = self._governor if budget is None else None
        profile = self.active if budget is None else self.set_budget(budget)
        with self._lock:
            outputs = self._call(profile.index, arrays)
            if governor is not None:
                governor.observe(profile.index, 1e3 * (time.perf_counter() - began))
            monitor = self._monitor
            if monitor is not None and not monitor.chooses(profile.index):
                monitor = None
            compared = certificate == "compared" and profile is not self.profiles[-1]
            greatest = self._call(len(self.profiles) - 1, arrays) if monitor or compared else None
            if monitor is not None:
                monitor.observe(profile.index, drifts(logits_of(greatest), logits_of(outputs))["l2"])
        if certified is None:
            return outputs
        if compared:
            return outputs, certified.compared_bounds(profile.index, outputs, greatest)
        return outputs, certified.bounds(profile.index, outputs)

    def _call(self, index: int, arrays: list[Array]) -> Any:
        if not self._sample_by_sample:
            return self._call_once(index, arrays)
        samples = [self._call_once(index, [x[i : i + 1] for x in arrays]) for i in range(len(arrays[0]))]
        if isinstance(samples[0], tuple):
            return tuple(np.concatenate(parts) for parts in zip(*samples, strict=True))
        return np.concatenate(samples)

    def _call_once(self, index: int, arrays: list[Array]) -> Any:
        memory = index, tuple(array.shape for array in arrays)
        if memory != self._memory:
            # What calls of another profile or other sizes have left is of no use to this one.
            self._machine.release_memory()
            self._memory = memory
        tensors = [self._machine.tensor(array) for array in arrays]
        return self._machine.array(self._functions[index](*tensors, self._weights))


def load(path: str | os.PathLike[str], target: str | None = None, verify: "Key | None" = None) -> Session:
    """Load an artifact for this machine.

    The store is read as it was hashed; the library is hashed just before the system opens it by its path. Who may
    write to the folder while it is loaded may run code in this process, as who may write to Python's packages may.

    Args:
        path: the ``NAME.t3c`` folder.
        target: the target to load when several of the artifact's fit this machine; the first that does by default.
        verify: load only what the owner of this public key has signed: a PEM file, or its content as bytes. Needs the
            package ``cryptography``.

    Raises:
        ArtifactError: missing, damaged or of a newer schema, or no target of it runs here.
        SignatureError: (an ArtifactError) it is not signed with the key that belongs to ``verify``.
    """
    folder = Path(path)
    if verify is None:
        manifest = read_manifest(folder)
    else:
        from t3c_compile.signing import verified_manifest

        manifest = verified_manifest(folder, verify)
    refusals = {name: refusal(here(entry)) for name, entry in manifest["targets"].items() if target in (None, name)}
    for name, reason in refusals.items():
        if reason is None:
            return Session(folder, manifest, name)
    if not refusals:
        raise ArtifactError(f"{folder} has no target {target!r}; it has {', '.join(manifest['targets'])}")
    raise ArtifactError(
        f"no target of {folder} runs here: " + "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
    )


def here(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """A target's entry with the library for this machine: where it is an NPU's, another than the device's may simulate
    it."""
    fitting = [other for other in entry.get("simulated", []) if refusal(other) is None]
    return {**entry, **fitting[0]} if fitting else entry


def refusal(entry: Mapping[str, Any]) -> str | None:
    """Why this machine cannot run a target's library; None when it can."""
    machine = platform.machine().replace("AMD64", "x86_64").replace("arm64", "aarch64")
    if entry["machine"] != machine:
        return f"it is for {entry['machine']}, this is {machine}"
    missing = [feature for feature in entry["features"] if feature not in cpu.features()]
    if missing:
        return f"this CPU lacks {', '.join(missing)}"
    return gpu.refusal(entry["arch"]) if entry.get("kind") == "cuda" else None


def profile_infos(manifest: Manifest, target: str) -> tuple[ProfileInfo, ...]:
    """The profiles of a manifest on one of its targets; none of the artifact's other files is opened."""
    costs = manifest["targets"][target]["costs"]
    bounds = manifest["targets"][target].get("conformal", {}).get("profiles", [{}] * len(costs))
    return tuple(
        ProfileInfo(
            index=index,
            name=profile["name"],
            size_mb=profile["size_bytes"] / 1e6,
            latency_ms=cost.get("latency_p90_ms", cost["latency_ms"]),
            latency_source=cost["source"],
            energy_mj=cost["energy_mj"],
            options=profile["options"],
            quality=profile["quality"],
            certificate=profile["certificate"],
            energy_source=cost.get("energy_source", ""),
            drift_bound=bound["drift"]["l2"] if bound else None,
        )
        for index, (profile, cost, bound) in enumerate(zip(manifest["profiles"], costs, bounds, strict=True))
    )
