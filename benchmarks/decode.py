"""Decoding at memory speed: what of the machine's bandwidth the weight-only kernels reach, and one decoding step of a
Llama of TinyLlama-1.1B's widths, ours against ONNX Runtime (MatMulNBits) and OpenVINO (NNCF's compress_weights).

    python -m benchmarks.decode [--threads 1 2] [--layers 4] [--engines ...]

Bandwidth is measured by ``benchmarks/gemv.py``. Engines take turns in processes of their own, as in
``benchmarks/latency.py``; a figure is the median over rounds of a round's median, ``cpu_ms`` the time that the
engine's threads had the processor (of several threads, also while they wait for each other). ``of_best_peer`` is the
ratio to the better peer at the same width. ``error`` is the relative 2-norm of the difference of the logits from
torch's in float32: weights are random, and at 4 bits ours have one scale an output, the peers' one for 32 or 128
inputs. Results go to ``benchmarks/results/decode.json``, in place of those of the same numbers of threads; prepared
models stay in ``build/latency``.
"""

import argparse
import json
import os
import subprocess
import sys
from statistics import median
from typing import Any

from rich.progress import Progress

from benchmarks.decode_engines import ENGINES
from benchmarks.latency import ROOT, measured
from t3c_compile.show import show

RESULTS = ROOT / "benchmarks/results/decode.json"
_MODULE = "benchmarks.decode_engines"

Row = dict[str, Any]


def bandwidth(threads: int) -> list[Row]:
    """Bytes a second of the read loop and of each product, and its share of the loop's."""
    environment = {**os.environ, "TVM_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "benchmarks.gemv", str(threads)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    return [
        {"threads": threads, "what": name, "median": rate["median"], "quiet": rate["quiet"]}
        | {"of_read": rate["median"] / found["read"]["median"], "quiet_of_read": rate["quiet"] / found["read"]["quiet"]}
        for name, rate in found.items()
    ]


def steps(layers: int, threads: int, engines: list[str], bar: Progress) -> list[Row]:
    """Milliseconds a step by engine, slowest first; a reason where one could not be run."""
    model = f"tinyllama-{layers}"
    with measured(engines, model, 1, threads, bar, _MODULE) as (opened, rows):
        processor = {engine.name: engine.processor_time() for engine in opened}
    for engine in opened:
        row = {"engine": engine.name, "ms": median(engine.times), "cpu_ms": processor[engine.name]}
        for name, of in (("ms", {e.name: median(e.times) for e in opened}), ("cpu_ms", processor)):
            width = engine.name.rpartition("_")[2]
            peers = [time for peer, time in of.items() if peer.endswith(width) and not peer.startswith("t3c")]
            row[f"{name}_of_best_peer"] = of[engine.name] / min(peers) if peers else None
        rows.append(row | {"error": engine.error})
    case = {"layers": layers, "threads": threads, "load": round(os.getloadavg()[0], 2)}
    return [case | row for row in sorted(rows, key=lambda row: -row.get("ms", 1e9))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--layers", type=int, default=4, help="of the decoder (default 4; TinyLlama-1.1B has 22)")
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=list(ENGINES))
    chosen = parser.parse_args()
    kept: dict[str, list[Row]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rates, times = (
        [row for row in kept.get(part, []) if row["threads"] not in chosen.threads] for part in ("bandwidth", "steps")
    )
    with Progress(transient=True) as bar:
        for threads in bar.track(chosen.threads, description="bandwidth"):
            rates += bandwidth(threads)
        for threads in chosen.threads:
            times += steps(chosen.layers, threads, chosen.engines, bar)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"bandwidth": rates, "steps": times}, indent=1) + "\n", encoding="utf-8")
    for row in (row for row in times if "reason" in row):
        print(f"{row['engine']}: not run: {row['reason']}")
    show("weights read, 1e9 bytes a second", rates, False)
    show("one decoding step, median of rounds", [row for row in times if "ms" in row], False)


if __name__ == "__main__":
    main()
