"""The process that measures: libraries and arguments come in as JSON lines, times go out.

It runs kernels on this machine, or on a device where ``python -m tvm.exec.rpc_server`` (or the same of TVM's C++
runtime) runs.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import rpc

_SAMPLE = 1e-3  # seconds a sample takes: few enough to fall between the time slices of other programs


def _session(device: str | None, key: str) -> Any:
    if device is None:
        return rpc.LocalSession()
    host, _, port = device.rpartition(":")
    return rpc.connect(host, int(port), key)


def _tensors(session: Any, arguments: list[tuple[list[int], str]]) -> list[Any]:
    """Seeded values: any int8; small floats, so that no scale makes a sum overflow."""
    random = np.random.default_rng(0)
    arrays = [
        random.uniform(0.001, 0.01, shape).astype(dtype)
        if dtype == "float32"
        else random.integers(0, 120, shape).astype(dtype)
        for shape, dtype in arguments
    ]
    return [tvm.runtime.tensor(array, session.cpu()) for array in arrays]


def _times(session: Any, request: dict[str, Any]) -> list[list[float]]:
    """Seconds a call of each function, one sample a round; in a round all are measured in turn."""
    path = Path(request["library"])
    session.upload(str(path))
    module = session.load_module(path.name)
    session.remove(path.name)
    tensors = _tensors(session, request["arguments"])
    evaluators = []
    for name in request["functions"]:
        once = module.time_evaluator(name, session.cpu(), number=1)(*tensors).results[0]
        number = max(1, min(1000, round(_SAMPLE / max(once, 1e-7))))
        evaluators.append(module.time_evaluator(name, session.cpu(), number=number))
    return [[evaluate(*tensors).results[0] for evaluate in evaluators] for _ in range(request["rounds"])]


def _main(threads: str, device: str = "", key: str = "") -> None:
    if not device and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: int(threads)]))
    session = _session(device or None, key)
    session.get_function("runtime.config_threadpool")(1, int(threads))
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(_times(session, json.loads(line))), flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
