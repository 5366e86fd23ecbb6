"""The process that measures: libraries and arguments come in as JSON lines, times go out.

It runs kernels on this machine, or on a device where ``python -m tvm.exec.rpc_server`` (or the same of TVM's C++
runtime) runs. A remote device has a session for each request, which the server ends itself when it takes too long: a
kernel that hangs costs no device. Each request is answered by two lines: that the device is there, and the times.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.modules["torch"] = None  # type: ignore[assignment]  # TVM would load it, for nothing

import tvm  # noqa: E402
from tvm import rpc  # noqa: E402

_SAMPLE = 1e-3  # seconds a sample takes: few enough to fall between the time slices of other programs


def _opener(kind: str, address: str, key: str) -> Callable[[int], Any]:
    """What opens a session of at most so many seconds; ``kind`` is local, server or tracker."""
    if kind == "local":
        return lambda seconds: rpc.LocalSession()
    host, _, port = address.rpartition(":")
    if kind == "server":
        return lambda seconds: rpc.connect(host, int(port), key, session_timeout=seconds)
    # It waits until a device is free; the parent does not wait for ever.
    return lambda seconds: rpc.connect_tracker(host, int(port)).request(key, session_timeout=seconds, max_retry=1)


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


def _main(threads: str, kind: str, address: str, key: str) -> None:
    # Unless told, TVM takes every other core for a second thread of the one before; only the variable tells it.
    os.environ["TVM_NUM_THREADS"] = threads
    if kind == "local" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: int(threads)]))
    open_session = _opener(kind, address, key)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        session = open_session(request["seconds"])
        found = session.get_function("runtime.NumThreads")()
        if found != int(threads):
            sys.exit(
                f"the device runs {found} threads, not {threads}: start its RPC server with TVM_NUM_THREADS={threads}"
            )
        print("connected", flush=True)
        times = None
        try:
            times = _times(session, request)
        except Exception:
            # What ends a session: a kernel that crashes or hangs, or a device that is lost.
            traceback.print_exc()
        del session
        print(json.dumps(times), flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
