"""How near to memory speed the weight-only kernels run on one row: ``python -m benchmarks.gemv THREADS``.

``read`` sums a buffer of 512 MB. Each product runs over copies of its weight, 256 MB in all, one after the other, so
that no cache holds them. All take turns; a figure is the median over rounds, in 1e9 bytes of weights a second. Prints
one JSON line.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import tvm
from tvm.tirx.script.builder import ir as T

from t3c_compile.backends.targets import host_target
from t3c_compile.backends.tvm.kernels import weight_only
from t3c_compile.backends.tvm.kernels.emit import Index, accumulators, fill, for_each, load, prim_func, store
from t3c_compile.backends.tvm.kernels.isa import isa_for
from t3c_compile.backends.tvm.pipelines import KERNEL_PIPELINE

# TinyLlama-1.1B's: inputs, outputs.
SHAPES = ((2048, 2048), (2048, 5632), (5632, 2048), (2048, 32000))
_READ_BYTES, _COPIES_BYTES, _ROUNDS, _TASKS = 1 << 29, 1 << 28, 15, 64

Run = Callable[[], int]


def _compiled(kernel: Any) -> Any:
    target = host_target()
    module = tvm.IRModule({"kernel": kernel.with_attr("global_symbol", "kernel")})
    return tvm.tirx.build(module, target=tvm.target.Target(dict(target.tvm)), pipeline=KERNEL_PIPELINE)["kernel"]


def read() -> Run:
    """Sums of int32 vectors, eight at once."""
    lanes, count, words = isa_for(host_target()).lanes, 8, _READ_BYTES // 4
    with prim_func("read") as function:
        x, y = function.args(x=((words,), "int32"), y=((_TASKS, lanes), "int32"))

        @for_each(_TASKS, words)
        def _(task: Index) -> None:
            sums = accumulators(1, count, lanes, "int32")[0]
            for cell in sums:
                store(cell, 0, fill(T.int32(0), lanes), lanes)
            with T.serial(0, words // _TASKS // (count * lanes)) as i:
                for j, cell in enumerate(sums):
                    at = task * (words // _TASKS) + (i * count + j) * lanes
                    store(cell, 0, load(cell, 0, lanes) + load(x, at, lanes), lanes)
            total = load(sums[0], 0, lanes)
            for cell in sums[1:]:
                total = total + load(cell, 0, lanes)
            store(y, task * lanes, total, lanes)

    kernel = _compiled(function.func)
    buffer = tvm.runtime.tensor(np.ones(words, np.int32))
    result = tvm.runtime.tensor(np.zeros((_TASKS, lanes), np.int32))

    def run() -> int:
        kernel(buffer, result)
        return _READ_BYTES

    run()
    assert int(result.numpy().sum()) == words
    return run


def gemv(inputs: int, outputs: int, bits: int) -> Run:
    """One row times random weights."""
    spec = weight_only.WeightOnlySpec((1,), inputs, outputs, bits)
    kernel = _compiled(weight_only.weight_only_linear(isa_for(host_target()), spec))
    packing = weight_only.weight_packing((outputs, inputs), bits)
    size = int(np.prod(packing.shape)) * np.dtype(packing.packed_dtype).itemsize
    random = np.random.default_rng(0)
    bytes_ = random.integers(-119, 120, size, np.int8).view(packing.packed_dtype).reshape(packing.shape)
    weights = [tvm.runtime.tensor(bytes_) for _ in range(-(-_COPIES_BYTES // size))]
    x = tvm.runtime.tensor(random.standard_normal((1, inputs), np.float32))
    scale, y = (tvm.runtime.tensor(np.ones(shape, np.float32)) for shape in ((outputs,), (1, outputs)))

    def run() -> int:
        for weight in weights:
            kernel(x, weight, scale, y)
        return size * len(weights)

    return run


def main(threads: int) -> None:
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:threads]))
    runs = {"read": read()}
    for bits in (8, 4):
        runs |= {f"{inputs}x{outputs} int{bits}": gemv(inputs, outputs, bits) for inputs, outputs in SHAPES}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(_ROUNDS + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            size = run()
            if round_:  # the first warms up
                found[name].append(size / (time.perf_counter() - start) / 1e9)
    print(json.dumps({name: {"median": median(rates), "most": max(rates)} for name, rates in found.items()}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
