"""How near to the core's peak the int8 and float32 products run: ``python -m benchmarks.gemm [--bits 8 7]``.

The peak is measured beside them: the same dot product (int8) or fused multiply-add (float32) on registers and a few
cached bytes. Products are whole kernels with their epilogue: int8 reads and writes int8, float32 reads and writes
float32; weights are packed and lie in cache as far as they fit. Every round runs each once, in turn; a figure is the
share of the median peak that the median round reached. Results go to ``benchmarks/results/gemm.json``, in place of
those of the same CPU. Weights of fewer bits are compared with the peak at 8.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tvm
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tvm.tirx.script.builder import ir as T

from benchmarks.engines import cpu_name
from benchmarks.gemv import compiled
from t3c_compile.backends.targets import host_target
from t3c_compile.backends.tvm.kernels.emit import accumulators, fill, load, prim_func, store
from t3c_compile.backends.tvm.kernels.finish import Finish
from t3c_compile.backends.tvm.kernels.floats import float_linear
from t3c_compile.backends.tvm.kernels.isa import isa_for
from t3c_compile.backends.tvm.kernels.linear import LinearSpec
from t3c_compile.backends.tvm.kernels.pack import lanes_of_matrix, words_of_matrix
from t3c_compile.backends.tvm.tuning.peak import peak, peak_arguments, peak_operations
from t3c_compile.backends.tvm.tuning.workload import Workload

RESULTS = Path(__file__).parent / "results/gemm.json"
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 197, 256, 512)
SHAPES = ((768, 768), (768, 3072), (3072, 768))  # inputs, outputs: ViT-B/16's and BERT-base's
_ROUNDS, _ROUND_SECONDS, _FLOAT_STEPS = 15, 0.02, 1 << 14

# Operations a call does, and the call.
Case = tuple[int, Callable[[], None]]


def _call(kernel: Any, arguments: list[Any]) -> Callable[[], None]:
    return partial(kernel, *map(tvm.runtime.tensor, arguments))


def int8_peak() -> Case:
    isa = isa_for(host_target())
    arguments = [np.ones(shape, dtype) for shape, dtype in peak_arguments(isa)]
    return peak_operations(isa), _call(compiled(peak(isa)), arguments)


def float_peak() -> Case:
    """A tile of float32 accumulators, as many as the kernels use, and two operands that stay in registers."""
    isa = isa_for(host_target())
    with prim_func("float_peak") as function:
        x, y = function.args(x=((2 * isa.lanes,), "float32"), y=((isa.registers * isa.lanes,), "float32"))
        acc = accumulators(1, isa.registers, isa.lanes, "float32")[0]
        for cell in acc:
            store(cell, 0, fill(T.float32(0), isa.lanes), isa.lanes)
        a, b = T.bind(load(x, 0, isa.lanes)), T.bind(load(x, isa.lanes, isa.lanes))
        with T.serial(0, _FLOAT_STEPS):
            for cell in acc:
                store(cell, 0, T.fma(a, b, load(cell, 0, isa.lanes)), isa.lanes)
        for i, cell in enumerate(acc):
            store(y, i * isa.lanes, load(cell, 0, isa.lanes), isa.lanes)
    x, y = np.ones(2 * isa.lanes, np.float32), np.zeros(isa.registers * isa.lanes, np.float32)
    return 2 * _FLOAT_STEPS * isa.registers * isa.lanes, _call(compiled(function.func), [x, y])


def int8_product(bits: int, rows: int, inputs: int, outputs: int) -> Case:
    isa, random = isa_for(host_target()), np.random.default_rng(0)
    # As weights are: what AVX2 does with narrow ones depends on how large their neighbours are.
    weights = random.normal(0, 34, words_of_matrix(isa, (outputs, inputs)).shape)
    spec = LinearSpec((rows,), inputs, outputs, bits, bias=True, finish=Finish((), floats=False, quantized=1))
    arguments = [
        random.integers(-128, 128, (rows, inputs), np.int8),
        np.array([0.02, -3], np.float32),
        weights.clip(-119, 119).astype(np.int8),
        np.full(outputs, 1e-3, np.float32),
        np.ones(outputs, np.float32),
        np.array([20, 0], np.float32),
        np.zeros((rows, outputs), np.int8),
    ]
    return 2 * rows * inputs * outputs, _call(compiled(Workload(isa, spec).kernel()), arguments)


def float_product(rows: int, inputs: int, outputs: int) -> Case:
    random, shape = np.random.default_rng(0), lanes_of_matrix((outputs, inputs), "float32").shape
    kernel = compiled(float_linear(isa_for(host_target()), (rows,), inputs, outputs, True))
    sizes = ((rows, inputs), shape, (outputs,), (rows, outputs))
    return 2 * rows * inputs * outputs, _call(kernel, [random.standard_normal(size, np.float32) for size in sizes])


def rates(cases: dict[str, Case]) -> dict[str, float]:
    """Median operations a second of each."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in track(range(_ROUNDS), description="rounds", transient=True):
        for name, (operations, call) in cases.items():
            call()
            calls, start = 0, time.perf_counter()
            while (spent := time.perf_counter() - start) < _ROUND_SECONDS:
                call()
                calls += 1
            found[name].append(operations * calls / spent)
    return {name: median(rate) for name, rate in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bits", type=int, nargs="+", default=[8], help="of the weights of integer products")
    arguments = parser.parse_args()
    threads = arguments.threads
    os.environ["TVM_NUM_THREADS"] = str(threads)
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:threads]))
    console, cpu = Console(), cpu_name()
    results = [result for result in json.loads(RESULTS.read_text()) if result["cpu"] != cpu] if RESULTS.exists() else []
    makers: tuple[tuple[str, Case, Callable[[int, int, int], Case]], ...] = (
        *((f"int{bits}", int8_peak(), partial(int8_product, bits)) for bits in arguments.bits),
        ("float32", float_peak(), float_product),
    )
    for dtype, of_core, product in makers:
        cases = {f"{m}x{k}x{n}": product(m, k, n) for m in ROWS for k, n in SHAPES}
        found = rates({"peak": of_core, **cases})
        top = threads * found["peak"]
        table = Table("rows", *(f"{k} to {n}" for k, n in SHAPES), title=f"{dtype}: share of {top / 1e9:.0f} Gop/s")
        for m in ROWS:
            table.add_row(str(m), *(f"{found[f'{m}x{k}x{n}'] / top:.0%}" for k, n in SHAPES))
        console.print(table)
        shares = {name: round(found[name] / top, 3) for name in cases}
        found_here = {"dtype": dtype, "threads": threads, "peak_gops": round(top / 1e9, 1), "shares": shares}
        results.append({"cpu": cpu} | found_here)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
