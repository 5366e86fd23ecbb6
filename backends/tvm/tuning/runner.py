"""Kernels compiled here and measured in a process of their own, which a crash or a hang ends without ending tuning."""

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import tvm

from t3c_compile.backends.targets import Target
from t3c_compile.backends.tvm.build import link
from t3c_compile.backends.tvm.pipelines import KERNEL_PIPELINE
from t3c_compile.passes.errors import T3CError

Arguments = Sequence[tuple[tuple[int, ...], str]]
_START_SECONDS, _CONNECT_SECONDS, _MEASURE_SECONDS, _END_SECONDS = 120.0, 20.0, 30.0, 5.0


class DeviceError(T3CError):
    """Kernels cannot be measured; the message holds what the measuring process wrote."""


@dataclass(frozen=True)
class Remote:
    """A TVM RPC server at ``address`` (``HOST:PORT``), or any device of the ``tracker`` there; by ``key``."""

    address: str
    key: str = ""
    tracker: bool = False


class Runner:
    """Measures kernels for ``target`` on ``threads`` threads, here or on a ``remote`` device.

    The measuring process is kept from one call to the next.
    """

    def __init__(self, target: Target, threads: int, remote: Remote | None = None) -> None:
        self._target, self._tvm_target = target, tvm.target.Target(dict(target.tvm))
        self._command = [sys.executable, "-m", "t3c_compile.backends.tvm.tuning.device", str(threads)]
        if remote is None:
            self._command += ["local", "", ""]
        else:
            self._command += ["tracker" if remote.tracker else "server", remote.address, remote.key]
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="t3c-tune-")
        self._errors = Path(self._folder.name) / "errors.txt"
        self._libraries = 0

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.stdin is not None:
            # Without requests to come it ends by itself, and takes its own files away.
            self._process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_SECONDS)
        self._stop()
        self._folder.cleanup()

    def compile(self, kernels: Mapping[str, tvm.tirx.PrimFunc]) -> Path:
        """A library of ``kernels`` by name."""
        functions = {name: kernel.with_attr("global_symbol", name) for name, kernel in kernels.items()}
        module = tvm.tirx.build(tvm.IRModule(functions), target=self._tvm_target, pipeline=KERNEL_PIPELINE)
        # A name of its own: the loader takes one path for one library.
        self._libraries += 1
        path = Path(self._folder.name) / f"{self._libraries}.so"
        link(module, self._target, path)
        return path

    def measure(
        self, library: Path, functions: Sequence[str], arguments: Arguments, rounds: int
    ) -> np.ndarray[tuple[int, int], np.dtype[np.float64]] | None:
        """Seconds a call, [rounds, functions]; None where that failed or took too long.

        Raises:
            DeviceError: the measuring process cannot be started, or its device is not there.
        """
        process = self._process or self._start()
        request = {"library": str(library), "functions": list(functions), "arguments": arguments, "rounds": rounds}
        request["seconds"] = round(_MEASURE_SECONDS)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            self._stop()
            return None
        if not _line(process.stdout, _CONNECT_SECONDS):
            self._stop()
            raise DeviceError(f"the device does not answer: {self._said()}")
        # The server ends the session itself; the rest is for a device that is cut off.
        answer = _line(process.stdout, _MEASURE_SECONDS + _END_SECONDS)
        if not answer:
            self._stop()
            return None
        times = json.loads(answer)
        return None if times is None else np.array(times)

    def _start(self) -> "subprocess.Popen[bytes]":
        with self._errors.open("wb") as file:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                bufsize=0,
                # It starts in a seventh of the time without the compiler and without torch.
                env=os.environ | {"TVM_USE_RUNTIME_LIB": "1"},
            )
        assert self._process.stdout is not None
        if not _line(self._process.stdout, _START_SECONDS):
            self._stop()
            raise DeviceError(f"the measuring process did not start: {self._said()}")
        return self._process

    def _said(self) -> str:
        """The last line that the measuring process wrote to its standard error."""
        said = self._errors.read_text(errors="replace").strip()
        return said.splitlines()[-1] if said else "no answer in time"

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _line(stream: IO[bytes], seconds: float) -> bytes:
    """The next line; empty where none comes in ``seconds`` or the writer is gone."""
    ready, _, _ = select.select([stream], [], [], seconds)
    return stream.readline() if ready else b""
