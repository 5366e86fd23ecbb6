"""Devices over RPC: many measure side by side, and one that is lost loses nothing."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tvm

from t3c_compile.backends.targets import get_target
from t3c_compile.backends.tvm.farm.devices import DeviceError, Remote, find_devices
from t3c_compile.backends.tvm.kernels.isa import isa_for
from t3c_compile.backends.tvm.kernels.linear import LinearSpec
from t3c_compile.backends.tvm.tuning.records import Record, RecordsFile, read
from t3c_compile.backends.tvm.tuning.runner import Runner
from t3c_compile.backends.tvm.tuning.search import Search
from t3c_compile.backends.tvm.tuning.workload import Workload
from t3c_compile.cli import main


def test_a_farm_of_boards_loses_one_and_nothing_else(boards: list[int], tracker: str, tmp_path: Path) -> None:
    target = get_target("arm64")
    workload = Workload(isa_for(target), LinearSpec((3,), 8, 16, 8))
    (product,) = workload.products({})
    file = RecordsFile(tmp_path / "records.jsonl", "arm64")
    killed: list[int] = []

    def kill_one_at_work() -> None:
        """The first board that has a session once something is recorded, in the middle of it."""
        while not killed:
            busy = [pid for pid in boards if psutil.Process(pid).children()] if file.records else []
            if busy:
                os.killpg(busy[0], signal.SIGKILL)
                killed.append(busy[0])
            time.sleep(0.005)

    killer = threading.Thread(target=kill_one_at_work, daemon=True)
    with ExitStack() as stack:
        devices = find_devices(tracker=tracker, key="board")
        assert devices == [Remote(tracker, "board", tracker=True)] * 3
        runners = [stack.enter_context(Runner(target, 1, device)) for device in devices]
        found = Search({workload: 1}, target, file, runners, 1, {}, lambda _: ())
        killer.start()
        found.baseline(lambda number, count: None)
        found.run(1e9, lambda elapsed: None)
    killer.join(1)
    assert len(killed) == 1
    (records,) = read(file.path)[0].values()
    tiles = [record.tiles for record in records]
    assert len(tiles) == len(set(tiles))
    assert set(tiles) == {(), *((tile,) for tile in product.candidates(1) if tile != product.default)}
    assert all(record.seconds is not None and record.seconds > 0 for record in records)


class Simulated(Runner):
    """A device that takes as long for every kernel, and is gone where ``lost`` says so of the kernels it is given."""

    def __init__(self, lost: Callable[[list[str]], bool]) -> None:
        self._lost = lost
        self._kernels: dict[str, str] = {}
        self.measured = 0

    def compile(self, kernels: Mapping[str, tvm.tirx.PrimFunc]) -> Path:
        self._kernels = {name: str(kernel.attrs["t3c.schedule"]) for name, kernel in kernels.items()}
        return Path()

    def measure(self, library: Path, functions: Sequence[str], arguments: Any, rounds: int) -> Any:
        if self._lost([self._kernels[name] for name in functions]):
            raise DeviceError("the device does not answer")
        self.measured += 1
        return np.ones((rounds, len(functions)))


def finished(path: Path, runners: Sequence[Runner]) -> list[Record]:
    """The records of a search of three workloads."""
    target = get_target("x86_64-v3")
    workloads = {Workload(isa_for(target), LinearSpec((7,), 32, 16 * n, 8)): 1 for n in (1, 2, 3)}
    file = RecordsFile(path, "test")
    search = Search(workloads, target, file, runners, 1, {}, lambda _: ())
    search.baseline(lambda number, count: None)
    search.run(1e9, lambda elapsed: None)
    return [record for group in file.records.values() for record in group]


def test_what_a_lost_device_was_at_is_measured_by_the_others(tmp_path: Path) -> None:
    alone = finished(tmp_path / "alone.jsonl", [Simulated(lambda kernels: False)])
    for after in (0, 1, 2):
        calls = iter(range(10**6))
        gone = Simulated(lambda kernels, calls=calls, after=after: next(calls) >= after)  # type: ignore[misc]
        # So slow that the first one has its turns.
        others = [Simulated(lambda kernels: time.sleep(0.02) is not None) for _ in range(2)]
        together = finished(tmp_path / f"{after}.jsonl", [gone, *others])
        assert sorted(together, key=str) == sorted(alone, key=str)
        assert gone.measured == after
        assert any(other.measured for other in others)


def test_devices_measure_side_by_side(tmp_path: Path) -> None:
    """None of three goes on with its first workload before all are at theirs."""
    together = threading.Barrier(3)

    def first_waits() -> Callable[[list[str]], bool]:
        calls = iter(range(10**6))
        return lambda kernels: next(calls) == 0 and together.wait(60) < 0

    assert finished(tmp_path / "farm.jsonl", [Simulated(first_waits()) for _ in range(3)])


def test_a_kernel_that_takes_devices_with_it_is_recorded_as_failed(tmp_path: Path) -> None:
    """It takes one as one of many candidates, then one by itself, and none of the rest."""
    alone = finished(tmp_path / "alone.jsonl", [Simulated(lambda kernels: False)])
    poison = next(record for record in alone if record.tiles)
    (tile,) = poison.tiles

    def lost(kernels: list[str]) -> bool:
        return any(kernel.endswith(f"tuned {tile}") for kernel in kernels)

    found = finished(tmp_path / "farm.jsonl", [Simulated(lost) for _ in range(8)])
    assert {record.tiles for record in found if record.seconds is None} == {poison.tiles}
    assert len(found) == len(alone)
    with pytest.raises(DeviceError, match="does not answer; no device is left, what was measured is recorded"):
        finished(tmp_path / "one.jsonl", [Simulated(lost)])


def test_where_no_device_is(tmp_path: Path, tracker: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DeviceError, match=r"no device with key 'board' \(keys: none\): start one"):
        find_devices(tracker=tracker, key="board")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        free = listening.getsockname()[1]
    with pytest.raises(DeviceError, match=rf"the tracker at 127.0.0.1:{free} cannot be reached: .*refused"):
        find_devices(tracker=f"127.0.0.1:{free}", key="board")
    with pytest.raises(
        DeviceError, match=rf"server at 127.0.0.1:{free} cannot be reached: .*refused.*rpc_server .*{free}"
    ):
        find_devices([f"127.0.0.1:{free}"])
    with pytest.raises(DeviceError, match=f"what listens at {tracker} is no TVM RPC server"):
        find_devices([tracker])
    with pytest.raises(DeviceError, match="'board' is no HOST:PORT"):
        find_devices(["board"])
    assert find_devices() == [None]
    # Before the model is even looked for.
    tune = ["tune", "gone.pt", "--data", "gone:data", "--records", str(tmp_path / "r"), "--target", "arm64"]
    for option, what in (("--rpc", "RPC server"), ("--tracker", "tracker")):
        assert main([*tune, option, f"127.0.0.1:{free}"]) == 1
        assert f"error: the {what} at 127.0.0.1:{free} cannot be reached: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*tune, "--rpc", "a:1", "--tracker", "b:2"])
    assert "not allowed with argument" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
