"""The process that measures kernels: libraries and arguments come in, times go out (``farm.session``)."""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from t3c_compile.backends.tvm.farm.session import serve

import tvm  # isort: skip  # after what keeps torch out of it

_SAMPLE = 1e-3  # seconds a sample takes: few enough to fall between the time slices of other programs


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


def _main(kind: str, address: str, key: str, threads: str) -> None:
    # Unless told, TVM takes every other core for a second thread of the one before; only the variable tells it.
    os.environ["TVM_NUM_THREADS"] = threads
    if kind == "local" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: int(threads)]))

    def check(session: Any) -> None:
        found = session.get_function("runtime.NumThreads")()
        if found != int(threads):
            sys.exit(
                f"the device runs {found} threads, not {threads}: start its RPC server with TVM_NUM_THREADS={threads}"
            )

    serve(kind, address, key, _times, check)


if __name__ == "__main__":
    _main(*sys.argv[1:])
