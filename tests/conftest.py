"""Fixtures that more than one test file uses."""

import os

# The networks here are tiny: threads of one test would only wait for each other, ten times longer than the work takes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import ctypes
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from certified import Small
from emulated_cuda import load_driver

from t3c_compile import qemu
from t3c_compile.backends.tvm.cuda.nvrtc import require_compiler

REPO = Path(__file__).resolve().parent.parent


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
