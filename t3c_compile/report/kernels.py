"""How the time of a call divides among the kernels of a compiled library, measured in a process of its own.

TVM's virtual machine calls an instrument before and after every step. Calling it takes time too: as much as the
shortest step is taken off every one. What is left of it shows in kernels of a microsecond or less.
"""

import json
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from t3c_compile.measuring import made_up
from t3c_compile.passes.errors import T3CError
from t3c_compile.runtime import Session, load

_WARM_UP, _CALLS, _SECONDS = 3, 50, 2.0


class KernelTimingError(T3CError):
    """The process that times kernels failed; the message is what it wrote."""


@dataclass(frozen=True)
class Kernel:
    """One kernel in a call of one profile: ``us`` microseconds in all its ``calls``.

    ``family`` is its name without the number that tells shapes apart; ``schedule`` says how it was compiled.
    """

    name: str
    family: str
    schedule: str
    calls: float
    us: float


@dataclass(frozen=True)
class KernelTimes:
    """Medians of a call of one profile: ``call_us`` microseconds as a whole, unwatched, and its kernels, those with the
    most time first. What kernels do not account for is the virtual machine's and Python's."""

    call_us: float
    inputs: str
    kernels: tuple[Kernel, ...]


def kernel_times(artifact: Path, target: str, schedules: Mapping[str, str]) -> tuple[KernelTimes, ...]:
    """The kernels of every profile on random inputs: one sample, and 1 for every other size that is free; whole numbers
    are 0.

    Raises:
        KernelTimingError: the library does not run here.
    """
    command = [sys.executable, "-m", "t3c_compile.report.kernels", str(artifact), target]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise KernelTimingError(f"timing the kernels of {artifact} for {target} failed: {done.stderr.strip()}")
    return tuple(
        KernelTimes(
            profile["call_us"],
            profile["inputs"],
            tuple(
                Kernel(name, re.sub(r"_?\d+$", "", name), schedules.get(name, ""), *times)
                for name, times in sorted(profile["steps"].items(), key=lambda step: -step[1][1])
            ),
        )
        for profile in json.loads(done.stdout)
    )


class _Watch:
    """An instrument of the virtual machine: microseconds of every step, by name."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = defaultdict(list)
        self._began = 0.0

    def __call__(self, function: Any, name: str, before: bool, result: Any, *arguments: Any) -> int:
        now = time.perf_counter()
        if not before:
            self.spent[name].append(1e6 * (now - self._began))
        self._began = time.perf_counter()
        return 0  # go on and run the step

    def steps(self, calls: int) -> dict[str, tuple[float, float]]:
        """Times that each kernel ran, and its microseconds, in one call."""
        overhead = min(float(np.median(times)) for times in self.spent.values())
        return {
            name: (len(times) / calls, len(times) / calls * (float(np.median(times)) - overhead))
            for name, times in self.spent.items()
            if not name.startswith("vm.builtin.")
        }


def _calls(session: Session, inputs: list[np.ndarray[Any, Any]]) -> list[float]:
    """Microseconds of calls, after a warm-up, until there are enough of them or time is up."""
    times: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(times) < _CALLS and (len(times) < 3 or time.perf_counter() < end):
        start = time.perf_counter()
        session.run(*inputs)
        times.append(1e6 * (time.perf_counter() - start))
    return times


def _main(artifact: str, target: str) -> None:
    session = load(artifact, target)
    inputs = made_up(session.inputs)
    shapes = ", ".join(f"{e['name']} {x.dtype}{list(x.shape)}" for e, x in zip(session.inputs, inputs, strict=True))
    found: list[dict[str, Any]] = []
    for profile in session.profiles:
        session.set_profile(profile.name)
        for _ in range(_WARM_UP):
            session.run(*inputs)
        found.append({"call_us": float(np.median(_calls(session, inputs))), "inputs": shapes})
    # There is no way to take an instrument off again: whole calls come first.
    watch = _Watch()
    session.watch(watch)
    for profile, entry in zip(session.profiles, found, strict=True):
        session.set_profile(profile.name)
        session.run(*inputs)
        watch.spent.clear()
        entry["steps"] = watch.steps(len(_calls(session, inputs)))
    print(json.dumps(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])
