"""Latency and energy of an artifact's profiles, measured in a process of its own.

Beside the threads of torch and of the compiler, which spin while they wait, a call takes several times as long.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t3c_compile.energy import MODELLED, EnergyUnavailableError, Meter, open_meter
from t3c_compile.runtime import Session, load

WARM_UP, CALLS = 5, 50
_ENERGY_SECONDS = 0.5  # meters count in milliseconds and millijoules


def measure(artifact: Path, target: str, kind: str, inputs: list[np.ndarray[Any, Any]]) -> list[dict[str, Any]]:
    """``latency_ms`` (median) and ``latency_p90_ms`` of every profile on ``inputs``, in their order.

    Where this machine has a meter for a target of ``kind``, ``energy_mj`` of a call too; ``energy_source`` names it, or
    says why there is none.

    Raises:
        RuntimeError: the process that measures failed; the message is what it wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "inputs.npz"
        np.savez(given, *inputs)
        command = [sys.executable, "-m", "t3c_compile.measuring", str(artifact), target, kind, str(given)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring {artifact} for {target} failed: {done.stderr.strip()}")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def made_up(inputs: Sequence[Mapping[str, Any]]) -> list[np.ndarray[Any, Any]]:
    """One sample for ``inputs`` as a manifest has them, free sizes 1: random numbers, but zeros where an input holds
    integers, since any other may be no row of a table."""
    generator = np.random.default_rng(0)
    found = []
    for entry in inputs:
        shape = [1 if isinstance(size, str) else size for size in entry["shape"]]
        floating = np.issubdtype(np.dtype(entry["dtype"]), np.floating)
        found.append((generator.standard_normal(shape) if floating else np.zeros(shape)).astype(entry["dtype"]))
    return found


def latencies(milliseconds: Sequence[float]) -> dict[str, Any]:
    """A profile's, of the times of its calls."""
    return {
        "latency_ms": round(float(np.median(milliseconds)), 5),
        "latency_p90_ms": round(float(np.percentile(milliseconds, 90)), 5),
    }


def _milliseconds(session: Session, inputs: list[np.ndarray[Any, Any]]) -> float:
    start = time.perf_counter()
    session.run(*inputs)
    return 1e3 * (time.perf_counter() - start)


def _energy(session: Session, inputs: list[np.ndarray[Any, Any]], meter: Meter) -> dict[str, Any]:
    calls, end = 0, time.perf_counter() + _ENERGY_SECONDS
    meter.start()
    while time.perf_counter() < end:
        session.run(*inputs)
        calls += 1
    energy = 1e3 * meter.stop() / calls
    return {"energy_mj": energy, "energy_source": f"measured: {meter.source}, idle power included"}


def _main(artifact: str, target: str, kind: str, given: str) -> None:
    session = load(artifact, target)
    with np.load(given) as arrays:
        inputs = [arrays[f"arr_{index}"] for index in range(len(arrays.files))]
    meter: Meter | None = None
    try:
        meter, why = open_meter(kind), ""
    except EnergyUnavailableError as error:
        why = str(error)
    found: list[dict[str, Any]] = []
    for profile in session.profiles:
        session.set_profile(profile.name)
        times = [_milliseconds(session, inputs) for _ in range(WARM_UP + CALLS)][WARM_UP:]
        energy = _energy(session, inputs, meter) if meter else {"energy_source": f"{MODELLED}; {why}"}
        found.append(latencies(times) | energy)
    print(json.dumps(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])
