"""Every model of ``examples/models`` through the whole pipeline: the table of ``docs/models.md``.

    python benchmarks/models.py                                  # all models, all columns, full size: hours
    python benchmarks/models.py --models resnet50 --columns capture,transform,x86_64
    python benchmarks/models.py --small                          # small variants, minutes; into a file of their own

Each cell is one JSON line in ``benchmarks/results/models.json`` and is not run again until its line is removed or
``--again`` is given. A row runs in a process of its own; where that dies, the cell says so and the row goes on.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from models_page import write_page
from rich.console import Console
from rich.progress import Progress

REPO = Path(__file__).resolve().parents[1]
RESULTS = REPO / "benchmarks" / "results"
WORK = REPO / "build" / "models"
COLUMNS = (
    "capture",
    "transform",
    "train step",
    "snap",
    "specialize",
    "x86_64",
    "arm64",
    "dynamic shapes",
    "ONNX",
    "torch",
    "linalg-on-tensors",
    "tosa",
    "stablehlo",
)
MODELS = (
    "resnet50",
    "resnet101",
    "vit_b_16",
    "vit_l_16",
    "swin_t",
    "bert_base",
    "roberta_base",
    "distilbert",
    "tinyllama",
    "timm_resnet18",
    "timm_vit_small",
    "timm_swin_tiny",
    "timm_convnext_tiny",
    "timm_mobilenetv3_large",
    "timm_efficientnet_b0",
)
Cell = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=_names(MODELS), default=list(MODELS), help="names, separated by commas")
    parser.add_argument("--columns", type=_names(COLUMNS), default=list(COLUMNS), help="names, separated by commas")
    parser.add_argument("--small", action="store_true", help="the small variants")
    parser.add_argument("--again", action="store_true", help="run cells that have a result too")
    parser.add_argument("--timeout", type=float, default=60.0, help="minutes a cell may take")
    arguments = parser.parse_args()
    results = RESULTS / ("models-small.json" if arguments.small else "models.json")
    results.parent.mkdir(exist_ok=True)
    console = Console(stderr=True)
    total = len(arguments.models) * len(arguments.columns)
    with Progress(console=console) as bar:
        task = bar.add_task("models", total=total)
        for model in arguments.models:
            done = set() if arguments.again else {c["column"] for c in read(results) if c["model"] == model}
            wanted = [column for column in arguments.columns if column not in done]
            bar.advance(task, len(arguments.columns) - len(wanted))
            for cell in _row(
                model, wanted, arguments.small, 60 * arguments.timeout, lambda c: bar.update(task, description=c)
            ):
                _append(results, cell)
                console.print(f"{model} {cell['column']}: {cell.get('reason') or cell['result']} ({cell['seconds']} s)")
                bar.advance(task)
    if not arguments.small:
        write_page(read(results), MODELS, COLUMNS, REPO / "docs" / "models.md")


def _names(known: tuple[str, ...]) -> Any:
    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
        return names

    return parse


def read(results: Path) -> list[Cell]:
    """The latest cell of every model and column."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    return list({(cell["model"], cell["column"]): cell for cell in map(json.loads, lines)}.values())


def _append(results: Path, cell: Cell) -> None:
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(cell) + "\n")


def _row(model: str, columns: list[str], small: bool, timeout: float, starts: Any) -> Iterator[Cell]:
    """The cells of ``columns``; one that kills its process is a cell with the reason, and another process goes on."""
    WORK.mkdir(parents=True, exist_ok=True)
    left = list(columns)
    while left:
        command = [sys.executable, str(Path(__file__).parent / "models_row.py"), model, ",".join(left)]
        log = WORK / f"{model}.log"
        with log.open("a", encoding="utf-8") as file:
            child = subprocess.Popen(
                command + ["--small"] * small, stdout=subprocess.PIPE, stderr=file, text=True, start_new_session=True
            )
        lines: Queue[str | None] = Queue()
        threading.Thread(target=_forward, args=(child.stdout, lines), daemon=True).start()
        died = f"its process ended before it was done, see {log.relative_to(REPO)}"
        while left:
            starts(f"{model}: {left[0]}")
            try:
                line = lines.get(timeout=timeout)
            except Empty:
                died = f"not done in {timeout / 60:.0f} minutes"
                break
            if line is None:
                break
            cell = json.loads(line)
            left.remove(cell["column"])
            yield cell
        if left:
            _end(child)
            if child.returncode == -signal.SIGKILL and not died.startswith("not done"):
                died = "its process was killed, as the kernel does where memory runs out"
            yield {"model": model, "column": left.pop(0), "small": small, "reason": died, "seconds": None}
        child.wait()


def _forward(stream: Any, lines: "Queue[str | None]") -> None:
    for line in stream:
        # What libraries print on standard output is not ours.
        if line.startswith('{"model"'):
            lines.put(line)
    lines.put(None)


def _end(child: "subprocess.Popen[str]") -> None:
    """End a row's process and what it started, and wait for it."""
    try:
        child.wait(timeout=5)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGTERM)
        child.wait()


if __name__ == "__main__":
    main()
