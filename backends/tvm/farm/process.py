"""A process that measures on a device, kept from one request to the next: a crash or a hang there ends no more."""

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from t3c_compile.backends.tvm.farm.devices import DeviceError, Remote

_START_SECONDS, _CONNECT_SECONDS, _END_SECONDS = 120.0, 20.0, 5.0


class MeasuringProcess:
    """Runs ``module``, which answers requests through ``session.serve``, for a ``remote`` device or this machine.

    ``folder`` is a temporary one for its files.
    """

    def __init__(self, module: str, remote: Remote | None, *arguments: str) -> None:
        kind = "local" if remote is None else "tracker" if remote.tracker else "server"
        where = ("", "") if remote is None else (remote.address, remote.key)
        self._command = [sys.executable, "-m", module, kind, *where, *arguments]
        self._remote = remote
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="t3c-measure-")
        self.folder = Path(self._folder.name)
        self._errors = self.folder / "errors.txt"

    def close(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            # Without requests to come it ends by itself, and takes its own files away.
            self._process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_SECONDS)
        self._stop()
        self._folder.cleanup()

    def ask(self, request: Mapping[str, Any], seconds: float) -> Any:
        """The answer to ``request``, both JSON; None where it failed or took more than ``seconds``: :meth:`said` why.

        Raises:
            DeviceError: the process cannot be started, or its device is not there.
        """
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({**request, "seconds": round(seconds)}).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            self._stop()
            return None
        if not _line(process.stdout, _CONNECT_SECONDS):
            self._stop()
            raise DeviceError(f"{self._remote or 'this machine'}: the device does not answer: {self.said()}")
        # The server ends the session itself; the rest is for a device that is cut off.
        answer = _line(process.stdout, seconds + _END_SECONDS)
        if not answer:
            self._stop()
            return None
        return json.loads(answer)

    def said(self) -> str:
        """The last line that the process wrote to its standard error."""
        said = self._errors.read_text(errors="replace").strip()
        return said.splitlines()[-1] if said else "no answer in time"

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
            raise DeviceError(f"the measuring process did not start: {self.said()}")
        return self._process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _line(stream: IO[bytes], seconds: float) -> bytes:
    """The next line; empty where none comes in ``seconds`` or the writer is gone."""
    ready, _, _ = select.select([stream], [], [], seconds)
    return stream.readline() if ready else b""
