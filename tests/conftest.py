"""Fixtures that more than one test file uses."""

import os

# The networks here are tiny: threads of one test would only wait for each other, ten times longer than the work takes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import ctypes
import gc
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import psutil
import pytest
from certified import Small
from emulated_cuda import load_driver

from t3c_compile import qemu
from t3c_compile.backends.tvm.cuda.nvrtc import require_compiler

REPO = Path(__file__).resolve().parent.parent
# What torch and TVM hold is long-lived: looking through all of it again and again took a twentieth of the time.
gc.set_threshold(100_000, 20, 20)


# Files that take half a minute and more go first: at the end no process of the tests waits long for another.
_LONG = (
    "onnx", "models_vision", "models_language", "runner", "artifact", "mlir", "tune", "transform", "float_stages",
    "layers", "distributed", "torch_backend", "transform_resume", "ethosu", "snap", "targets",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in _LONG)


@pytest.fixture(scope="session")
def arm64() -> ModuleType:
    """`t3c_compile.qemu`, ready to run arm64 Python; builds the arm64 system when it is not there yet."""
    if qemu.unavailable():
        script = [sys.executable, str(REPO / "scripts/arm64_root.py")]
        built = subprocess.run(script, capture_output=True, text=True)
        reason = built.stderr.strip() or qemu.unavailable()
        if reason:
            # Where every test must run, one that cannot is a failure.
            (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"arm64: {reason}")
    return qemu


@pytest.fixture(scope="session")
def cuda_driver(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The driver of a GPU on the processor; a process has one."""
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a GPU here, and two drivers do not go into one process: run benchmarks/cuda_check.py")
    # cuda-bindings looks up functions of a driver that it finds, at its first use.
    require_compiler("sm_80")
    return load_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A small artifact to certify; copies are taken of it."""
    return Small(tmp_path_factory.mktemp("small"))


# Three arm64 servers from one start of Python, each with its sessions in a group of processes of its own.
_SERVERS = """
import os, socket, sys
from tvm.rpc.server import _listen_loop
for _ in range(3):
    listening = socket.create_server(("127.0.0.1", 0))
    pid = os.fork()
    if not pid:
        os.setpgid(0, 0)
        port = listening.getsockname()[1]
        _listen_loop(listening, port, "board", ("127.0.0.1", int(sys.argv[1])), "", None)
    print(pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def tracker() -> str:
    """A TVM tracker on the loopback interface, in a thread that ends with the tests."""
    from tvm.rpc.tracker import _tracker_server

    listening = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_tracker_server, args=(listening, "stop"), daemon=True).start()
    return f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def boards(arm64: ModuleType, tracker: str) -> Iterator[list[int]]:
    """Process ids of three arm64 RPC servers that the tracker has."""
    command = arm64.command(["-c", _SERVERS, tracker.rpartition(":")[2]])
    environment = arm64.environment({"TVM_NUM_THREADS": "1"})
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pids = [int(process.stdout.readline()) for _ in range(3)]
        try:
            while _registered(tracker) < 3:
                time.sleep(0.1)
            yield pids
        finally:
            for pid in pids:
                if psutil.pid_exists(pid):
                    os.killpg(pid, signal.SIGKILL)


def _registered(tracker: str) -> int:
    from t3c_compile.backends.tvm.farm.devices import DeviceError, find_devices

    try:
        return len(find_devices(tracker=tracker, key="board"))
    except DeviceError:
        return 0
