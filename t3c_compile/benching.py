"""``bench``: what an artifact's profiles take, here or on devices, and into its manifest where that is wanted."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t3c_compile.drift import Array
from t3c_compile.manifest import SIGNATURE, ArtifactError, Manifest, check_files, read_manifest, write_manifest
from t3c_compile.measuring import CALLS, WARM_UP, latencies, made_up, measure
from t3c_compile.passes.errors import T3CError
from t3c_compile.progress import progress_bar
from t3c_compile.runtime import checked_inputs, refusal
from t3c_compile.signing import Key, private_key, sign


class BenchError(T3CError):
    """The artifact cannot be measured so; the message says why, and what can be done."""


@dataclass(frozen=True)
class Measured:
    """A profile as it was measured: milliseconds a call, as median and as 90th percentile.

    ``source`` says where and on what; ``before_ms`` is what the manifest had, and ``before`` where from. ``outputs``
    are the call's, where a device measured; where this machine did and has a meter, ``energy`` is what the manifest
    says of it.
    """

    target: str
    profile: str
    latency_ms: float
    latency_p90_ms: float
    source: str
    before_ms: float
    before: str
    outputs: tuple[Array, ...] = ()
    energy: Mapping[str, Any] | None = None

    def cost(self) -> dict[str, Any]:
        """What takes the place of a profile's estimated cost."""
        latency = {"latency_ms": self.latency_ms, "latency_p90_ms": self.latency_p90_ms, "source": self.source}
        return latency | dict(self.energy or {})


def bench(
    path: str | os.PathLike[str],
    inputs: Sequence[Array] | None = None,
    *,
    target: str | None = None,
    rpc: Sequence[str] = (),
    tracker: str | None = None,
    key: str = "",
    timeout: float = 300.0,
    save: bool = False,
    sign_key: Key | None = None,
    progress: bool = False,
) -> list[Measured]:
    """Measure every profile of an artifact, on this machine or over TVM's RPC.

    A device is sent the library and the weights, packs these itself, and times its calls itself, after some that are
    not counted. Several devices measure side by side, each another profile; one that is lost drops out, and another
    takes up what it was at.

    Args:
        path: the ``NAME.t3c`` folder.
        inputs: arrays as for ``Session.run``; one sample of random numbers (zeros for integers), free sizes 1, if None.
        target: whose library. Else the first that runs here; of an artifact for one target alone it need not be named
            for devices either.
        rpc: ``HOST:PORT`` of TVM RPC servers that measure instead of this machine, by their ``key``.
        tracker: ``HOST:PORT`` of a TVM RPC tracker, all of whose devices with that ``key`` measure.
        timeout: seconds that one profile may take on a device, with the way of the weights to it.
        save: write what was measured into the manifest, in place of the target's latencies (and energies, where this
            machine has a meter), so that budgets are held against it. The manifest is replaced in one moment.
        sign_key: an Ed25519 private key to sign the artifact with, as for ``lower``; a signed one is not saved to
            without.

    Raises:
        BenchError: there is nothing to measure with, or saving would break the signature.
        DeviceError: a device cannot be reached, or none is left.
        ProfileError: a profile does not run on the device.
        InputError, ArtifactError, SigningKeyError: as for ``load``, ``Session.run`` and ``sign``.
    """
    folder = Path(path)
    if sign_key is not None:
        private_key(sign_key)  # what is wrong shows before the long work
    if save and sign_key is None and (folder / SIGNATURE).exists():
        raise BenchError(
            f"{folder} is signed, and with other costs it is no longer what was signed: give the key to sign it again "
            "(--sign KEY), or measure without saving"
        )
    manifest = read_manifest(folder)
    name = _target(folder, manifest, target, bool(rpc or tracker))
    arrays = checked_inputs(made_up(manifest["inputs"]) if inputs is None else inputs, manifest["inputs"])
    check_files(folder, manifest)
    batch = _batch(arrays, manifest)
    if rpc or tracker:
        costs = _on_devices(folder, manifest, name, arrays, batch, rpc, tracker, key, timeout, progress)
    else:
        costs = _here(folder, manifest, name, arrays, batch, progress)
    found = [
        Measured(name, profile["name"], before_ms=cost["latency_ms"], before=cost["source"], **new)
        for profile, cost, new in zip(manifest["profiles"], manifest["targets"][name]["costs"], costs, strict=True)
    ]
    if save:
        _save(folder, manifest, name, found)
        if sign_key is not None:
            sign(folder, sign_key)
    return found


def _target(folder: Path, manifest: Manifest, wanted: str | None, remote: bool) -> str:
    """The target to measure."""
    entries = manifest["targets"]
    if wanted is not None and wanted not in entries:
        raise ArtifactError(f"{folder} has no target {wanted!r}; it has {', '.join(entries)}")
    names = list(entries) if wanted is None else [wanted]
    if remote:
        if len(names) > 1:
            raise BenchError(f"{folder} has targets {', '.join(names)}: name the one that the devices are (--target)")
        if entries[names[0]]["kind"] != "cpu":
            raise BenchError(
                f"target {names[0]} is of kind {entries[names[0]]['kind']}, and over RPC only CPUs are measured: run "
                "`t3c-compile bench` on the device"
            )
        return names[0]
    refusals = {name: _refusal(entries[name]) for name in names}
    for name, reason in refusals.items():
        if reason is None:
            return name
    raise BenchError(
        f"no target of {folder} can be measured here: "
        + "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
        + ". Name devices that run it (--rpc HOST:PORT, or --tracker HOST:PORT --key KEY)"
    )


def _refusal(entry: Mapping[str, Any]) -> str | None:
    return "an NPU's costs are its compiler's estimate" if "npu" in entry else refusal(entry)


def _batch(arrays: Sequence[Array], manifest: Manifest) -> str:
    """The sizes of what was measured, in words: those that are free are what times depend on."""
    free = {
        name: size
        for array, entry in zip(arrays, manifest["inputs"], strict=True)
        for size, name in zip(array.shape, entry["shape"], strict=True)
        if isinstance(name, str)
    }
    return ", ".join(f"{name} {size}" for name, size in free.items()) or "the model's inputs"


def _here(
    folder: Path, manifest: Manifest, target: str, arrays: list[Array], batch: str, progress: bool
) -> list[dict[str, Any]]:
    with progress_bar(progress) as bar:
        bar.add_task("measure", total=None)
        found = measure(folder, target, manifest["targets"][target]["kind"], arrays)
    source = f"measured on {platform.node()}, {batch}, {CALLS} calls"
    return [
        {
            "latency_ms": row.pop("latency_ms"),
            "latency_p90_ms": row.pop("latency_p90_ms"),
            "source": source,
            # Without a meter the modelled energy stays.
            "energy": row if "energy_mj" in row else None,
        }
        for row in found
    ]


def _on_devices(
    folder: Path,
    manifest: Manifest,
    target: str,
    arrays: list[Array],
    batch: str,
    rpc: Sequence[str],
    tracker: str | None,
    key: str,
    timeout: float,
    progress: bool,
) -> list[dict[str, Any]]:
    # TVM's Python package takes a second to load.
    from t3c_compile.backends.tvm.farm.devices import find_devices
    from t3c_compile.backends.tvm.farm.profiles import measure_profiles

    names = [profile["name"] for profile in manifest["profiles"]]
    remotes = [device for device in find_devices(rpc, tracker, key) if device is not None]
    with progress_bar(progress) as bar:
        task = bar.add_task("measure", total=len(names))
        found = measure_profiles(
            folder, target, names, arrays, remotes, WARM_UP, CALLS, timeout, lambda: bar.advance(task)
        )
    return [
        latencies([1e3 * seconds for seconds in times.seconds])
        | {
            "source": f"measured on {times.device} over RPC, {times.threads} threads, {batch}, {CALLS} calls",
            "outputs": times.outputs,
        }
        for times in found
    ]


def _save(folder: Path, measured: Manifest, target: str, found: Sequence[Measured]) -> None:
    """Put the costs into the manifest as it stands there now, which may have been certified meanwhile."""
    manifest = read_manifest(folder)
    if manifest["files"] != measured["files"]:
        raise ArtifactError(f"{folder} was replaced while it was being measured: measure it again")
    for cost, profile in zip(manifest["targets"][target]["costs"], found, strict=True):
        cost |= profile.cost()
    write_manifest(folder, manifest)
