"""How near to memory speed the weight-only kernels run on one row: ``python -m benchmarks.gemv THREADS``.

``read`` sums 512 MB, 4 MB a call. Each product runs over copies of its weight, 256 MB in all, one after the other, so
that no cache holds them. All take turns. Prints one JSON line: the median over calls, in 1e9 bytes of weights a second,
and what one call in fifty reaches, for machines that are never quiet for long.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
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
_READ_BYTES, _READ_CALLS, _COPIES_BYTES, _ROUNDS, _TASKS = 1 << 22, 128, 1 << 28, 15, 64

# Bytes a call reads, and calls that read others in turn.
Case = tuple[int, list[Callable[[], None]]]


def compiled(kernel: Any) -> Any:
    """A PrimFunc for this machine."""
    target = host_target()
    module = tvm.IRModule({"kernel": kernel.with_attr("global_symbol", "kernel")})
    return tvm.tirx.build(module, target=tvm.target.Target(dict(target.tvm)), pipeline=KERNEL_PIPELINE)["kernel"]


def read() -> Case:
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

    kernel = compiled(function.func)
    buffers = [tvm.runtime.tensor(np.ones(words, np.int32)) for _ in range(_READ_CALLS)]
    result = tvm.runtime.tensor(np.zeros((_TASKS, lanes), np.int32))
    kernel(buffers[0], result)
    assert int(result.numpy().sum()) == words
    return _READ_BYTES, [partial(kernel, buffer, result) for buffer in buffers]


def gemv(inputs: int, outputs: int, bits: int) -> Case:
    """One row times random weights."""
    spec = weight_only.WeightOnlySpec((1,), inputs, outputs, bits)
    kernel = compiled(weight_only.weight_only_linear(isa_for(host_target()), spec))
    packing = weight_only.weight_packing((outputs, inputs), bits)
    size = int(np.prod(packing.shape))
    random = np.random.default_rng(0)
    bytes_ = random.integers(-119, 120, packing.shape, np.int8)
    weights = [tvm.runtime.tensor(bytes_) for _ in range(-(-_COPIES_BYTES // size))]
    x = tvm.runtime.tensor(random.standard_normal((1, inputs), np.float32))
    scale, y = (tvm.runtime.tensor(np.ones(shape, np.float32)) for shape in ((outputs,), (1, outputs)))
    return size, [partial(kernel, x, weight, scale, y) for weight in weights]


def main(threads: int) -> None:
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:threads]))
    cases = {"read": read()}
    for bits in (8, 4):
        cases |= {f"{inputs}x{outputs} int{bits}": gemv(inputs, outputs, bits) for inputs, outputs in SHAPES}
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(_ROUNDS):
        for name, (size, calls) in cases.items():
            for call in calls:
                start = time.perf_counter()
                call()
                found[name].append(size / (time.perf_counter() - start) / 1e9)
    rates = {name: np.percentile(rate, (50, 98)) for name, rate in found.items()}
    print(json.dumps({name: {"median": float(rate[0]), "quiet": float(rate[1])} for name, rate in rates.items()}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
