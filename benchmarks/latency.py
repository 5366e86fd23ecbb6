"""Latency of whole networks on this machine's CPU, ours against torch and the int8 engines people use.

    python -m benchmarks.latency [--models resnet50 vit_b_16 bert_base] [--batch 1 8] [--threads 1 2] [--engines ...]

Every engine runs in a process of its own, on as many cores as threads; engines take turns, and the ones that wait are
stopped, so that no thread pool spins beside the one measured. A figure is the median over rounds of a round's median.
``error`` is the relative 2-norm of the logits' difference from torch's in float32 (weights are random, so that of
factorized profiles says nothing of a trained model). ``of_best`` is the ratio to the best int8 peer of the same run.
Results go to ``benchmarks/results/latency.json``, in place of those of the same CPU, model, batch and threads; prepared
models stay in ``build/latency``.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from rich.progress import Progress

from benchmarks.engines import ENGINES, INT8_PEERS, cpu_name
from t3c_compile.show import show

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/latency.json"
_ROUNDS, _WARM_UP, _ROUND_MS = 9, 3, 400


class Engine:
    """The process of one engine, stopped unless it is its turn; ``module`` is what it runs."""

    def __init__(self, engine: str, model: str, folder: Path, threads: int, module: str = "benchmarks.engines") -> None:
        self.name = engine
        count = str(threads)
        environment = {**os.environ, "OMP_NUM_THREADS": count, "TVM_NUM_THREADS": count, "TVM_LOG_DEBUG": ""}
        command = [sys.executable, "-m", module, engine, model, str(folder), count]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.error: float = self._answer()["error"]
        self.calls = max(3, round(_ROUND_MS / median(self._times(_WARM_UP))))
        self.times: list[float] = []
        self.process.send_signal(signal.SIGSTOP)

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            # Some engines greet on standard output.
            if line.startswith(("{", "[")):
                return json.loads(line)
        raise RuntimeError(f"{self.name} ended with exit code {self.process.wait()}")

    def _times(self, calls: int, clock: str = "run") -> list[float]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{clock} {calls}\n")
        self.process.stdin.flush()
        times: list[float] = self._answer()
        return times

    def turn(self) -> None:
        """One round: warm up, measure."""
        self.process.send_signal(signal.SIGCONT)
        self._times(_WARM_UP)
        self.times.append(median(self._times(self.calls)))
        self.process.send_signal(signal.SIGSTOP)

    def processor_time(self) -> float:
        """Median time that a call has the processor, which other programs on the machine hardly move."""
        self.process.send_signal(signal.SIGCONT)
        found = median(self._times(self.calls, "cpu"))
        self.process.send_signal(signal.SIGSTOP)
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def prepared(engine: str, model: str, batch: int, module: str = "benchmarks.engines") -> Path:
    """The folder of an engine's form of a model, made by ``module`` in a process of its own when it is not there."""
    folder = ROOT / "build/latency" / f"{model}-b{batch}" / engine
    done = folder / "done"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        code = (
            f"import sys, pathlib; from {module} import prepare; "
            "prepare(sys.argv[1], sys.argv[2], int(sys.argv[3]), pathlib.Path(sys.argv[4]))"
        )
        command = [sys.executable, "-c", code, engine, model, str(batch), str(folder)]
        log = folder / "prepare.log"
        with log.open("w") as file:
            failed = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
        if failed:
            raise RuntimeError(f"{log.read_text().strip().splitlines()[-1]} ({log.relative_to(ROOT)})")
        done.touch()
    return folder


@contextmanager
def measured(
    engines: list[str], model: str, batch: int, threads: int, bar: Progress, module: str = "benchmarks.engines"
) -> Iterator[tuple[list[Engine], list[dict[str, Any]]]]:
    """The engines after all rounds, closed at the end, and for each that does not run a row with the reason."""
    case = f"{model}, batch {batch}, {threads} threads"
    opened: list[Engine] = []
    reasons: list[dict[str, Any]] = []
    try:
        for name in engines:
            task = bar.add_task(f"{case}: {name}", total=None)
            try:
                opened.append(Engine(name, model, prepared(name, model, batch, module), threads, module))
            except RuntimeError as error:
                reasons.append({"engine": name, "reason": str(error)})
            bar.remove_task(task)
        for _ in bar.track(range(_ROUNDS), description=case):
            for engine in opened:
                engine.turn()
        yield opened, reasons
    finally:
        for engine in opened:
            engine.close()


def compare(model: str, batch: int, threads: int, engines: list[str], bar: Progress) -> list[dict[str, Any]]:
    """One table: rows by engine, slowest first."""
    with measured(engines, model, batch, threads, bar) as (open_engines, rows):
        best = min((median(e.times) for e in open_engines if e.name in INT8_PEERS), default=None)
    for engine in open_engines:
        p50 = median(engine.times)
        rows.append(
            {
                "engine": engine.name,
                "ms": p50,
                "least": min(engine.times),
                "most": max(engine.times),
                "of_best": best and p50 / best,
                "error": engine.error,
            }
        )
    load = round(os.getloadavg()[0], 2)
    case = {"cpu": cpu_name(), "model": model, "batch": batch, "threads": threads, "load": load}
    return [case | row for row in sorted(rows, key=lambda row: -row.get("ms", 1e9))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50", "vit_b_16", "bert_base"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    chosen = parser.parse_args()
    kept: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    results: list[dict[str, Any]] = []
    with Progress(transient=True) as bar:
        for model in chosen.models:
            for batch in chosen.batch:
                for threads in chosen.threads:
                    case = (cpu_name(), model, batch, threads)
                    kept = [row for row in kept if (row["cpu"], row["model"], row["batch"], row["threads"]) != case]
                    results += compare(model, batch, threads, chosen.engines, bar)
                    RESULTS.parent.mkdir(exist_ok=True)
                    RESULTS.write_text(json.dumps(kept + results, indent=1) + "\n", encoding="utf-8")
    for reason in (row for row in results if "reason" in row):
        print(f"{reason['model']}, {reason['engine']}: not run: {reason['reason']}")
    show("latency, median of rounds", [row for row in results if "ms" in row], False)


if __name__ == "__main__":
    main()
