"""Start-up and memory of a session, ours against int8 engines: a process loads a prepared model and runs it once.

    python -m benchmarks.startup [--models resnet50 vit_b_16] [--threads 2]

Engines take turns, each time in a fresh process; figures are medians over rounds. ``import_ms`` is what loading the
engine's library takes, ``start_ms`` the time from loading the model to its first output, ``peak_mb`` the greatest
resident memory of the process after ten calls, files that are mapped included. Models are those of
``benchmarks/latency.py``, and are prepared where they are not yet. Results go to ``benchmarks/results/startup.json``.
"""

import argparse
import json
import os
import subprocess
import sys
from statistics import median
from typing import Any

from rich.progress import Progress

from benchmarks.latency import ROOT, prepared
from t3c_compile.show import show

RESULTS = ROOT / "benchmarks/results/startup.json"
ENGINES = ("t3c_dense", "onnxruntime_int8", "openvino_int8")
_ROUNDS, _CALLS = 7, 10

_PROGRAM = """
import json, sys, time
from importlib import import_module
from pathlib import Path
from benchmarks.engines import open_engine
engine, model, folder, threads = sys.argv[1:5]
begun = time.perf_counter()
import_module({"t3c": "t3c_compile.runtime"}.get(name := engine.partition("_")[0], name))
imported = time.perf_counter()
call = open_engine(engine, model, Path(folder), int(threads))
call()
first = time.perf_counter()
for _ in range(int(sys.argv[5])):
    call()
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([1e3 * (imported - begun), 1e3 * (first - imported), int(peak.split()[1]) / 1e3]))
"""


def measure(engine: str, model: str, folder: str, threads: int) -> list[float]:
    """Milliseconds of importing and of starting, and megabytes at the peak, of one process."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TVM_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", _PROGRAM, engine, model, folder, str(threads), str(_CALLS)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50", "vit_b_16"])
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    results: list[dict[str, Any]] = []
    with Progress(transient=True) as bar:
        for model in chosen.models:
            folders = {engine: str(prepared(engine, model, 1)) for engine in ENGINES}
            times: dict[str, list[list[float]]] = {engine: [] for engine in ENGINES}
            for _ in bar.track(range(_ROUNDS), description=model):
                for engine, folder in folders.items():
                    times[engine].append(measure(engine, model, folder, chosen.threads))
            medians = {engine: [median(column) for column in zip(*rows, strict=True)] for engine, rows in times.items()}
            peer = medians["onnxruntime_int8"]
            for engine, (imported, start, peak) in medians.items():
                row = {"model": model, "threads": chosen.threads, "load": round(os.getloadavg()[0], 2)}
                row |= {"engine": engine, "import_ms": imported, "start_ms": start, "peak_mb": peak}
                results.append(row | {"start_of_onnxruntime": start / peer[1], "peak_of_onnxruntime": peak / peer[2]})
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    show("start-up and memory, medians", results, False)


if __name__ == "__main__":
    main()
