"""Energy meters: what a stretch of running took, read from the machine's own counters where it has any.

RAPL (Linux powercap), NVML and the INA3221 sensors of Jetson boards. Each measures all that draws from its rails, idle
power and other programs included. Standard library alone, and nvidia-ml-py where it is installed.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from t3c_compile.passes.errors import T3CError

# What stands as the source of an energy that was not measured; the numbers are in ``cost.py``.
MODELLED = "modelled: multiply-adds and bytes of memory at 45 nm (Horowitz, ISSCC 2014)"
_SAMPLE_SECONDS = 0.005  # between two samples of a sensor that gives power


class EnergyUnavailableError(T3CError):
    """No meter can be read here; the message says of each why."""


class Meter(Protocol):
    """Measures from ``start`` to ``stop``, which gives joules; ``source`` says what is measured."""

    source: str

    def start(self) -> None: ...

    def stop(self) -> float: ...


def open_meter(kind: str, sys: Path = Path("/sys")) -> Meter:
    """The meter of a target of ``kind`` (as in ``targets.toml``) on this machine; ``sys`` is where sysfs is mounted.

    Raises:
        EnergyUnavailableError: there is none that can be read.
    """
    meters: dict[str, list[Callable[[], Meter]]] = {
        "cpu": [lambda: Rapl(sys), lambda: Ina3221(sys)],
        "cuda": [Nvml, lambda: Ina3221(sys)],
    }
    reasons = []
    for make in meters.get(kind, []):
        try:
            return make()
        except EnergyUnavailableError as error:
            reasons.append(str(error))
    raise EnergyUnavailableError("; ".join(reasons) or f"no meter is known for targets of kind {kind}")


class Rapl:
    """Running average power limit: packages and the memory beside them, which count microjoules.

    https://docs.kernel.org/power/powercap/powercap.html. ``psys`` holds the packages, and cores lie in them: neither is
    added. A counter that wraps around once between ``start`` and ``stop`` is put right.
    """

    def __init__(self, sys: Path) -> None:
        folder = sys / "class/powercap"
        zones = {zone: _text(zone / "name") for zone in sorted(folder.glob("*-rapl:*"))}
        self._zones = [z for z, name in zones.items() if name.startswith("package") or name == "dram"]
        if not self._zones:
            raise EnergyUnavailableError(f"RAPL: {folder} has no package")
        self._counters()
        self._start: list[int] = []
        self.source = f"RAPL: {', '.join(zones[zone] for zone in self._zones)}"

    def _counters(self) -> list[int]:
        try:
            return [int((zone / "energy_uj").read_text()) for zone in self._zones]
        except PermissionError as error:
            raise EnergyUnavailableError(f"RAPL: {error.filename} is for root alone: allow reading it") from error
        except (OSError, ValueError) as error:
            raise EnergyUnavailableError(f"RAPL: {error}") from error

    def start(self) -> None:
        self._start = self._counters()

    def stop(self) -> float:
        joules = 0.0
        for zone, before, after in zip(self._zones, self._start, self._counters(), strict=True):
            spent = after - before
            if spent < 0:
                spent += int((zone / "max_energy_range_uj").read_text())
            joules += spent * 1e-6
        return joules


class Nvml:
    """The first GPU's count of millijoules; Volta and later have it.

    https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html, nvmlDeviceGetTotalEnergyConsumption.
    """

    def __init__(self) -> None:
        try:
            import pynvml
        except ImportError as error:
            raise EnergyUnavailableError("NVML: nvidia-ml-py is not installed") from error
        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            self._device = pynvml.nvmlDeviceGetHandleByIndex(0)
            self._start = self._millijoules()
            name = pynvml.nvmlDeviceGetName(self._device)
        except pynvml.NVMLError as error:
            raise EnergyUnavailableError(f"NVML: {error}") from error
        self.source = f"NVML: {name}"

    def _millijoules(self) -> int:
        return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device))

    def start(self) -> None:
        self._start = self._millijoules()

    def stop(self) -> float:
        return (self._millijoules() - self._start) * 1e-3


class Ina3221:
    """The power sensors of Jetson boards: millivolts times milliamperes, sampled by a thread and summed over time.

    VDD_IN, the whole board, where it is one of the rails; else all of them. "Jetson Linux Developer Guide", Power
    Consumption; https://docs.kernel.org/hwmon/ina3221.html.
    """

    def __init__(self, sys: Path) -> None:
        folder = sys / "bus/i2c/drivers/ina3221"
        labels = {path: _text(path) for path in sorted(folder.glob("*/hwmon/hwmon*/in*_label"))}
        # Channels 4 and on are sums of shunt voltages.
        rails = {label: path for path, label in labels.items() if path.with_name(_current(path)).exists()}
        if "VDD_IN" in rails:
            rails = {"VDD_IN": rails["VDD_IN"]}
        if not rails:
            raise EnergyUnavailableError(f"INA3221: {folder} has no rail")
        self._rails = list(rails.values())
        self._watts()
        self._joules, self._done = 0.0, threading.Event()
        self._thread: threading.Thread | None = None
        self.source = f"INA3221: {', '.join(rails)}"

    def _watts(self) -> float:
        try:
            volts = [int(path.with_name(path.name.replace("label", "input")).read_text()) for path in self._rails]
            amperes = [int(path.with_name(_current(path)).read_text()) for path in self._rails]
        except (OSError, ValueError) as error:
            raise EnergyUnavailableError(f"INA3221: {error}") from error
        return sum(v * a for v, a in zip(volts, amperes, strict=True)) * 1e-6

    def start(self) -> None:
        self._joules = 0.0
        self._done.clear()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        last, watts = time.monotonic(), self._watts()
        while True:
            finished = self._done.wait(_SAMPLE_SECONDS)
            now, power = time.monotonic(), self._watts()
            self._joules += (now - last) * (watts + power) / 2
            last, watts = now, power
            if finished:
                return

    def stop(self) -> float:
        assert self._thread is not None
        self._done.set()
        self._thread.join()
        return self._joules


def _current(label: Path) -> str:
    """The file of milliamperes beside ``inN_label``."""
    return label.name.replace("in", "curr", 1).replace("label", "input")


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
