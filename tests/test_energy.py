"""Energy meters on trees like those of sysfs, and what this machine answers."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from t3c_compile import measuring
from t3c_compile.energy import MODELLED, EnergyUnavailableError, Ina3221, Nvml, open_meter


def write(folder: Path, files: dict[str, Any]) -> None:
    for name, value in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")


def zone(sys: Path, place: str, name: str, microjoules: int) -> Path:
    folder = sys / "class/powercap" / place
    write(folder, {"name": name, "energy_uj": microjoules, "max_energy_range_uj": 262_143_328_850})
    return folder / "energy_uj"


def rail(sys: Path, number: int, label: str, millivolts: int, milliamperes: int) -> None:
    values = {f"in{number}_label": label, f"in{number}_input": millivolts, f"curr{number}_input": milliamperes}
    write(sys / "bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3", values)


def test_rapl_sums_packages_and_memory_and_wraps(tmp_path: Path) -> None:
    first = zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 262_143_000_000)
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 5)
    cores = zone(tmp_path, "intel-rapl:0:0", "core", 0)
    board = zone(tmp_path, "intel-rapl:2", "psys", 0)
    meter = open_meter("cpu", tmp_path)
    assert meter.source == "RAPL: package-0, dram, package-1"
    for _ in range(2):
        first.write_text("1000000\n")
        second.write_text("262143000000\n")
        memory.write_text("5\n")
        meter.start()
        first.write_text("3500000\n")
        second.write_text("671150\n")  # around once: 328850 to the end of the range, then these
        memory.write_text("250005\n")
        cores.write_text("99000000\n")
        board.write_text("99000000\n")
        assert meter.stop() == pytest.approx(2.5 + 1.0 + 0.25)


def test_rapl_that_is_for_root_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    read = Path.read_text

    def refused(path: Path, *args: Any, **kwargs: Any) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(
        EnergyUnavailableError, match=r"RAPL: .*/energy_uj is for root alone.*; INA3221: .* has no rail"
    ):
        open_meter("cpu", tmp_path)


def test_ina_integrates_power_over_time(tmp_path: Path) -> None:
    rail(tmp_path, 1, "VDD_GPU_SOC", 5000, 400)
    rail(tmp_path, 2, "VDD_CPU_CV", 5000, 600)
    write(tmp_path / "bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3", {"in7_label": "sum of shunt voltages"})
    meter = open_meter("cpu", tmp_path)
    assert meter.source == "INA3221: VDD_GPU_SOC, VDD_CPU_CV"
    for amperes, watts in ((600, 5.0), (1600, 10.0)):
        rail(tmp_path, 2, "VDD_CPU_CV", 5000, amperes)
        began = time.monotonic()
        meter.start()
        time.sleep(0.1)
        joules = meter.stop()
        # Nothing that is not between the two calls, and all that is, but for starting a thread.
        assert 0.1 * watts * 0.8 <= joules <= (time.monotonic() - began) * watts
    rail(tmp_path, 3, "VDD_IN", 19000, 1000)
    assert Ina3221(tmp_path).source == "INA3221: VDD_IN"


def test_nvml_counts_of_the_first_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([7_000, 7_000, 9_500])
    error = type("NVMLError", (Exception,), {})
    fake = SimpleNamespace(
        NVMLError=error,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: ("gpu", index),
        nvmlDeviceGetName=lambda device: "Some GPU",
        nvmlDeviceGetTotalEnergyConsumption=lambda device: next(counts),
    )
    monkeypatch.setitem(__import__("sys").modules, "pynvml", fake)
    meter = open_meter("cuda", tmp_path)
    assert isinstance(meter, Nvml)
    assert meter.source == "NVML: Some GPU"
    meter.start()
    assert meter.stop() == pytest.approx(2.5)

    def missing() -> None:
        raise error("Driver Not Loaded")

    fake.nvmlInit = missing
    with pytest.raises(EnergyUnavailableError, match=r"NVML: Driver Not Loaded; INA3221: .* has no rail"):
        open_meter("cuda", tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    with pytest.raises(EnergyUnavailableError, match="NVML: nvidia-ml-py is not installed; INA3221"):
        open_meter("cuda", tmp_path)
    rail(tmp_path, 1, "VDD_IN", 19000, 1000)
    assert open_meter("cuda", tmp_path).source == "INA3221: VDD_IN"


def test_an_npu_has_no_meter() -> None:
    with pytest.raises(EnergyUnavailableError, match="no meter is known for targets of kind ethos-u"):
        open_meter("ethos-u")


def test_energy_of_one_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Joules of a stretch of calls over their number: here each takes 2 mJ."""
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    calls: list[int] = []

    def run(x: Any) -> None:
        calls.append(len(x))
        counter.write_text(f"{2000 * len(calls)}\n")

    session = SimpleNamespace(profiles=[SimpleNamespace(name="p0")], set_profile=lambda name: None, run=run)
    monkeypatch.setattr(measuring, "load", lambda artifact, target: session)
    monkeypatch.setattr(measuring, "open_meter", lambda kind: open_meter(kind, tmp_path))
    monkeypatch.setattr(measuring, "_ENERGY_SECONDS", 8)
    monkeypatch.setattr(measuring.time, "perf_counter", iter(range(10**6)).__next__)
    np.savez(tmp_path / "x.npz", np.zeros((1, 64), np.float32))
    measuring._main("net.t3c", "x86_64", "cpu", str(tmp_path / "x.npz"))
    (row,) = json.loads(capsys.readouterr().out)
    assert row["energy_mj"] == pytest.approx(2.0)
    assert row["energy_source"] == "measured: RAPL: package-0, idle power included"
    measuring._main("net.t3c", "x86_64", "ethos-u", str(tmp_path / "x.npz"))
    (row,) = json.loads(capsys.readouterr().out)
    assert row["energy_source"] == f"{MODELLED}; no meter is known for targets of kind ethos-u"
    assert "energy_mj" not in row
