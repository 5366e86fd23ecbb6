"""The profiles of an artifact, measured on devices side by side."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Condition
from typing import Any

import numpy as np

from t3c_compile.backends.tvm.farm.devices import DeviceError, Remote
from t3c_compile.backends.tvm.farm.process import MeasuringProcess
from t3c_compile.backends.tvm.farm.side_by_side import side_by_side
from t3c_compile.passes.errors import T3CError

Array = np.ndarray[Any, Any]

# A profile at which two sessions ended is not tried again: it would take every device.
_TRIES = 2


class ProfileError(T3CError):
    """A profile does not run on the device; the message holds what the measuring process wrote."""


@dataclass(frozen=True)
class ProfileTimes:
    """What a device found of a profile: ``seconds`` of each call, on ``threads`` threads, and the ``outputs``."""

    seconds: tuple[float, ...]
    threads: int
    device: str
    outputs: tuple[Array, ...]


def measure_profiles(
    folder: Path,
    target: str,
    names: Sequence[str],
    inputs: Sequence[Array],
    remotes: Sequence[Remote],
    warm_up: int,
    calls: int,
    timeout: float,
    done: Callable[[], None] = lambda: None,
) -> list[ProfileTimes]:
    """Every profile (called ``names``, in order) of the artifact at ``folder``, measured on ``inputs``.

    Each of ``remotes`` measures another profile beside the others. A device that is lost drops out, and another takes
    up what it was at. ``timeout``: seconds that a profile may take on a device, with the way of the weights to it.

    Raises:
        DeviceError: no device is left.
        ProfileError: two sessions ended, or took too long, at one profile.
    """
    waiting, tries = list(range(len(names))), [0] * len(names)
    found: dict[int, ProfileTimes] = {}
    wrong: list[ProfileError] = []
    with ExitStack() as stack:
        processes: list[tuple[Remote, MeasuringProcess]] = []
        for remote in remotes:
            process = MeasuringProcess(f"{__package__}.board", remote, str(folder), target)
            stack.callback(process.close)
            processes.append((remote, process))

        def take() -> int | None:
            return waiting.pop(0) if waiting and not wrong else None

        def work(worker: tuple[Remote, MeasuringProcess], index: int) -> None:
            remote, process = worker
            files = {what: str(process.folder / f"{what}.npz") for what in ("inputs", "outputs")}
            np.savez(files["inputs"], *inputs)
            answer = process.ask({"profile": index, "warm_up": warm_up, "calls": calls, **files}, timeout)
            if answer is None:
                tries[index] += 1
                if tries[index] == _TRIES:
                    said = f"{remote}: profile {names[index]} does not run there: {process.said()}"
                    wrong.append(ProfileError(f"{said}. Is it a device for target {target}, with memory enough?"))
                return
            with np.load(files["outputs"], allow_pickle=False) as given:
                outputs = tuple(given[f"arr_{place}"] for place in range(len(given.files)))
            found[index] = ProfileTimes(tuple(answer["seconds"]), answer["threads"], str(remote), outputs)

        def end(index: int, lost: bool) -> None:
            if index in found:
                done()
            else:
                waiting.insert(0, index)

        try:
            side_by_side(processes, Condition(), take, work, end)
        except DeviceError as error:
            raise DeviceError(f"{error}: {len(found)} of {len(names)} profiles were measured") from error
    if wrong:
        raise wrong[0]
    return [found[index] for index in range(len(names))]
