"""Run Python for arm64 on any Linux machine, under QEMU's user-mode emulation.

An artifact compiled for an arm64 device is checked here before it meets the device: its results are the
device's, its times mean nothing. `make arm64-root` builds the arm64 Python this needs.
"""

import atexit
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from t3c_compile.passes.errors import T3CError

__all__ = ["command", "emulator", "environment", "find_root", "run_profiles", "run_python", "unavailable"]

PACKAGE = Path(__file__).resolve().parent


def find_root() -> Path | None:
    """The folder of the arm64 system: `T3C_ARM64_ROOT`, or `build/arm64-root` here or beside the sources."""
    named = os.environ.get("T3C_ARM64_ROOT")
    default = Path("build", "arm64-root")
    places = [Path(named)] if named else [default, PACKAGE.parent / default]
    return next((p.absolute() for p in places if (p / "usr/bin/python3").exists()), None)


def unavailable() -> str | None:
    """Why arm64 programs cannot run here; None when they can."""
    if emulator() is None:
        return "qemu-aarch64 is not installed (on Debian: apt-get install qemu-user)"
    if find_root() is None:
        named = os.environ.get("T3C_ARM64_ROOT")
        return f"no arm64 Python at {named or 'build/arm64-root'} (`make arm64-root` builds one)"
    return None


def command(args: Sequence[str], *, cpu: str = "max") -> list[str]:
    """The command that runs arm64 Python with `args`; `cpu` is QEMU's name for one, such as `cortex-a76`."""
    if reason := unavailable():
        raise RuntimeError(f"cannot run arm64 programs: {reason}")
    root = find_root()
    return [str(emulator()), "-L", str(root), "-cpu", cpu, f"{root}/usr/bin/python3", *args]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables for `command`: the arm64 libraries and this package on the path, TVM's runtime alone."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    return kept | {
        "LANG": "C.UTF-8",
        "PYTHONNOUSERSITE": "1",
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": f"{find_root()}/site:{_package_link()}",
        "TVM_USE_RUNTIME_LIB": "1",
        **(extra or {}),
    }


def run_python(
    args: Sequence[str],
    *,
    cpu: str = "max",
    timeout: float = 600.0,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run arm64 Python with `args` to its end; its text output is captured, its exit status not checked."""
    return subprocess.run(
        command(args, cpu=cpu), env=environment(env), cwd=cwd, timeout=timeout, capture_output=True, text=True
    )


# All that the device is given: the artifact and the inputs of one call.
_EVERY_PROFILE = """
import sys, numpy, t3c_compile
session, given, found = t3c_compile.load(sys.argv[1], sys.argv[2]), numpy.load(sys.argv[3]), {}
inputs = [given[f"arr_{i}"] for i in range(len(given.files))]
for profile in session.profiles:
    session.set_profile(profile.name)
    result = session.run(*inputs)
    for i, value in enumerate(result if isinstance(result, tuple) else (result,)):
        found[f"{profile.name}.{i}"] = value
numpy.savez(sys.argv[4], **found)
"""


def run_profiles(artifact: Path, target: str, *inputs: Any) -> dict[str, list[Any]]:
    """What every profile of an artifact gives for the numpy arrays `inputs`, run from the library for `target`: a list
    of outputs by profile. Raises T3CError, with what was printed, where that fails."""
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        given, results = Path(folder, "x.npz"), Path(folder, "y.npz")
        np.savez(given, *inputs)
        done = run_python(["-c", _EVERY_PROFILE, str(artifact.absolute()), target, str(given), str(results)])
        if done.returncode:
            raise T3CError(f"the library for {target} failed under QEMU:\n{done.stderr}")
        outputs: dict[str, list[Any]] = {}
        with np.load(results) as found:
            for name in found.files:
                outputs.setdefault(name.rpartition(".")[0], []).append(found[name])
    return outputs


def emulator() -> str | None:
    """The path of QEMU's arm64 emulator, if it is installed."""
    return shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")


@functools.cache
def _package_link() -> str:
    # The folder this package lies in may hold this machine's own numpy: let arm64 see the package alone.
    folder = tempfile.mkdtemp(prefix="t3c-arm64-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    package = Path(folder, "t3c_compile")
    package.mkdir()
    beside = (p for p in (PACKAGE.parent / "passes", PACKAGE.parent / "backends") if p.exists())
    for name, entry in {entry.name: entry for entry in (*PACKAGE.iterdir(), *beside)}.items():
        (package / name).symlink_to(entry)
    return folder
