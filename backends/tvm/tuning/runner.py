"""Kernels compiled here and measured in a process of their own, which a crash or a hang ends without ending tuning."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tvm

from t3c_compile.backends.targets import Target
from t3c_compile.backends.tvm.build import link
from t3c_compile.backends.tvm.farm.devices import Remote
from t3c_compile.backends.tvm.farm.process import MeasuringProcess
from t3c_compile.backends.tvm.pipelines import KERNEL_PIPELINE

Arguments = Sequence[tuple[tuple[int, ...], str]]
_MEASURE_SECONDS = 30.0


class Runner:
    """Measures kernels for ``target`` on ``threads`` threads, here or on a ``remote`` device.

    The measuring process is kept from one call to the next.
    """

    def __init__(self, target: Target, threads: int, remote: Remote | None = None) -> None:
        self._target, self._tvm_target = target, tvm.target.Target(dict(target.tvm))
        self._process = MeasuringProcess("t3c_compile.backends.tvm.tuning.device", remote, str(threads))
        self._libraries = 0

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.close()

    def compile(self, kernels: Mapping[str, tvm.tirx.PrimFunc]) -> Path:
        """A library of ``kernels`` by name."""
        functions = {name: kernel.with_attr("global_symbol", name) for name, kernel in kernels.items()}
        module = tvm.tirx.build(tvm.IRModule(functions), target=self._tvm_target, pipeline=KERNEL_PIPELINE)
        # A name of its own: the loader takes one path for one library.
        self._libraries += 1
        path = self._process.folder / f"{self._libraries}.so"
        link(module, self._target, path)
        return path

    def measure(
        self, library: Path, functions: Sequence[str], arguments: Arguments, rounds: int
    ) -> np.ndarray[tuple[int, int], np.dtype[np.float64]] | None:
        """Seconds a call, [rounds, functions]; None where that failed or took too long.

        Raises:
            DeviceError: the measuring process cannot be started, or its device is not there.
        """
        request = {"library": str(library), "functions": list(functions), "arguments": arguments, "rounds": rounds}
        times = self._process.ask(request, _MEASURE_SECONDS)
        return None if times is None else np.array(times)
