"""The shape of the paper's tables (T3C, arXiv 2601.01299) on the tasks at hand: ``docs/paper.md``.

    python -m benchmarks.paper --tasks digits_cnn digits_vit text lm --seeds 3
    python -m benchmarks.paper --tasks image_folder --data imagenet --model resnet50 --weights resnet50.pth
    python -m benchmarks.paper --tasks digits_cnn --seeds 1 --ablations --steps

Each (task, seed, method) is one JSON line in ``benchmarks/results/paper.json`` and is not run again until its line is
removed; then the artifacts of one task and seed are timed in turn. What was compressed stays in ``build/paper``.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TVM_NUM_THREADS", "1")

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.paper import t3c
from benchmarks.paper.baselines import BASELINES
from benchmarks.paper.deploy import drift, logits_of, lower, torch_logits
from benchmarks.paper.latency import BATCH, INPUT
from benchmarks.paper.table import write_page
from benchmarks.paper.tasks import TASKS, Task, glue_task, image_folder_task, numpy_inputs, text_file_task, with_epochs
from benchmarks.paper.training import Start, trained_float

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "paper.json"
WORK = ROOT / "build" / "paper"
PAGE = ROOT / "docs" / "paper.md"
FROM_PATHS = ("image_folder", "text_file", "glue")
_ROUNDS = 40
Cell = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=(*TASKS, *FROM_PATHS))
    parser.add_argument("--methods", nargs="*", default=[*BASELINES, "t3c"], choices=(*BASELINES, "t3c"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="of fine-tuning, instead of the task's")
    parser.add_argument("--float-epochs", type=int, help="of the float32 model, instead of the task's")
    parser.add_argument("--ablations", action="store_true", help="T3C without one of its parts, too")
    parser.add_argument("--steps", action="store_true", help="time a training step, too")
    parser.add_argument("--untimed", action="store_true", help="leave timing to a run without this, on a quiet machine")
    parser.add_argument("--data", type=Path, help="where the data of image_folder, text_file or glue lies")
    parser.add_argument("--model", default="resnet50", help="of image_folder: a name torchvision knows")
    parser.add_argument("--weights", type=Path, help="of image_folder: the float32 model's state dict")
    parser.add_argument("--side", type=int, default=224, help="of image_folder: pixels")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    if arguments.data is None and set(arguments.tasks) & set(FROM_PATHS):
        parser.error("--data: say where the data lies")
    # The models are small, and the machine may be shared: on one thread the times are what they are.
    torch.set_num_threads(1)
    tasks = [with_epochs(_task(name, arguments), arguments.epochs, arguments.float_epochs) for name in arguments.tasks]
    ablations = [name for name in t3c.VARIANTS if name != "t3c"] if arguments.ablations else []
    console = Console(stderr=True)
    with Progress(console=console) as bar:
        methods = [*arguments.methods, *ablations]
        whole = bar.add_task("paper", total=len(tasks) * arguments.seeds * (len(methods) + 1 + arguments.steps))
        # Every task has something to show after the first seed.
        for seed in range(arguments.seeds):
            for task in tasks:
                run = Run(task, seed, arguments.results, lambda text: bar.update(whole, description=text), console)
                run.methods(methods, lambda: bar.advance(whole))
                if not arguments.untimed:
                    run.latency()
                if arguments.steps:
                    run.steps()
                bar.advance(whole, 1 + arguments.steps)
    write_page(read(arguments.results), arguments.page)


def _task(name: str, arguments: argparse.Namespace) -> Task:
    if name == "image_folder":
        return image_folder_task(arguments.data, arguments.model, arguments.weights, arguments.side)
    return {**TASKS, "text_file": lambda: text_file_task(arguments.data), "glue": lambda: glue_task(arguments.data)}[
        name
    ]()


def read(results: Path) -> list[Cell]:
    """The latest cell of every task, seed and method."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    return list({(c["task"], c["seed"], c["method"]): c for c in map(json.loads, lines)}.values())


class Run:
    """The cells of one task and seed."""

    def __init__(self, task: Task, seed: int, results: Path, says: Callable[[str], None], console: Console) -> None:
        self.task, self.seed, self.results, self.says, self.console = task, seed, results, says, console
        self.folder = WORK / f"{task.name}-{seed}-{task.float_epochs}-{task.epochs}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.results.parent.mkdir(parents=True, exist_ok=True)
        self._start: Start | None = None

    def start(self) -> Start:
        if self._start is None:
            self.says(f"{self.task.name}, seed {self.seed}: float32 training")
            self._start = trained_float(self.task, self.seed, self.folder / "float.safetensors")
        return self._start

    def cells(self) -> dict[str, Cell]:
        """What is there with these numbers of epochs."""
        epochs = [self.task.float_epochs, self.task.epochs]
        here = [c for c in read(self.results) if (c["task"], c["seed"]) == (self.task.name, self.seed)]
        return {cell["method"]: cell for cell in here if cell["epochs"] == epochs}

    def methods(self, names: list[str], done: Callable[[], None]) -> None:
        """Run what is not there; and again what has to be timed and whose artifact is gone."""
        found = self.cells()
        timed = set(found.get("latency", {}).get("methods", ()))
        for name in names:
            gone = name not in timed and not (self.folder / f"{name}.t3c").exists()
            if name not in found or (gone and not _ablation(name)):
                self._cell(name, self._method(name))
            done()

    def _method(self, name: str) -> Callable[[], Cell]:
        path = self.folder / f"{name}.t3c"
        if name in t3c.VARIANTS:
            return lambda: t3c.run(self.start(), t3c.VARIANTS[name], None if _ablation(name) else path)
        return lambda: self._baseline(name, path)

    def _baseline(self, name: str, path: Path) -> Cell:
        start = self.start()
        compressed = BASELINES[name].compress(start)
        size = lower(compressed, self.task, path)
        logits = logits_of(path, self.task)
        moved = drift(logits, torch_logits(start.model, self.task))
        score = self.task.score(logits, self.task.labels(self.task.test))
        store = (path / "weights.safetensors").stat().st_size
        return {
            "score": score,
            "size_bytes": size,
            "store_bytes": store,
            "drift": float(moved.mean()),
            **compressed.facts,
        }

    def latency(self) -> None:
        """Time all artifacts of this task and seed, unless these have been timed."""
        methods = sorted(path.stem for path in self.folder.glob("*.t3c"))
        if methods and methods != self.cells().get("latency", {}).get("methods"):
            self._cell("latency", lambda: {"methods": methods, "times": self._times()})

    def _times(self) -> Cell:
        np.save(self.folder / INPUT, next(numpy_inputs(self.task.test, BATCH)))
        command = [sys.executable, "-m", "benchmarks.paper.latency", str(self.folder), str(_ROUNDS)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        if done.returncode:
            raise RuntimeError(f"timing {self.folder} failed: {done.stderr.strip()}")
        times: Cell = json.loads(done.stdout)
        return times

    def steps(self) -> None:
        if "steps" not in self.cells():
            self._cell("steps", lambda: t3c.steps(self.start()))

    def _cell(self, name: str, make: Callable[[], Cell]) -> None:
        self.says(f"{self.task.name}, seed {self.seed}: {name}")
        began = time.monotonic()
        cell = {"task": self.task.name, "seed": self.seed, "method": name, "metric": self.task.metric}
        cell |= {"epochs": [self.task.float_epochs, self.task.epochs], **make()}
        cell["seconds"] = round(time.monotonic() - began, 1)
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(cell) + "\n")
        self.console.print(f"{self.task.name}, seed {self.seed}: {name} ({cell['seconds']} s)", highlight=False)


def _ablation(name: str) -> bool:
    return name.startswith("t3c-")


if __name__ == "__main__":
    main()
