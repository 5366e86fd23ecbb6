"""Fixtures that more than one test file uses."""

import os

# The networks here are tiny: threads of one test would only wait for each other, ten times longer than the work takes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from certified import Small

from t3c_compile import qemu

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
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A small artifact to certify; copies are taken of it."""
    return Small(tmp_path_factory.mktemp("small"))
