"""``docs/models.md`` from the cells that ``benchmarks/models.py`` has."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

_HEAD = """# Models through the pipeline

Written by `python benchmarks/models.py` from `benchmarks/results/models.json`; run it again rather than edit this page.
Models are those of `examples/models`, at full size, with random weights; `--small` does the same with small variants.

A cell has its error and its seconds, or the number of the reason below why it cannot; an empty one was not run. An
error is relative: the 2-norm of the difference of all outputs, divided by that of the reference.

- **capture**: `torch.export` in eval and in train mode; error against the model.
- **transform**: all passes, at full rank and 32 bits; error against the model; elastic layers, and kept ones.
- **train step**: one step of gradient descent in train mode, of a size that should lower the loss by 1%; every elastic
  layer has a finite gradient that is not zero.
- **snap**: profiles without a controller, and their sizes in MB.
- **specialize**: every profile specialized and exported again; error against the elastic graph at its options.
- **x86_64**: all profiles lowered by TVM and run; greatest error against the specialized graphs in torch; latencies at
  batch 1 in ms.
- **arm64**: the same, of which the greatest profile is run, under QEMU.
- **dynamic shapes**: the x86_64 library on another batch (and sequence length); the least and the greatest profile.
- **ONNX**: the greatest profile in ONNX Runtime; error against the specialized graph in torch.
- **torch**, **linalg-on-tensors**, **tosa**, **stablehlo**: the greatest profile through torch-mlir; it verifies.

"""


def write_page(cells: list[dict[str, Any]], models: Sequence[str], columns: Sequence[str], path: Path) -> None:
    """Write the page: the table, the reasons, and what it ran on."""
    by_place = {(cell["model"], cell["column"]): cell for cell in cells}
    reasons: list[str] = []
    rows = []
    for model in models:
        row = [model]
        for column in columns:
            row.append(_text(by_place.get((model, column)), reasons))
        peaks = [cell["peak_mb"] for cell in cells if cell["model"] == model and cell.get("peak_mb")]
        rows.append([*row, f"{max(peaks) / 1024:.1f}" if peaks else ""])
    lines = [f"| model | {' | '.join(columns)} | peak GiB |", "|---" * (len(columns) + 2) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    text = _HEAD + "\n".join(lines) + "\n"
    if reasons:
        text += (
            "\nReasons, as the tool gives them:\n\n" + "\n".join(f"{i}. {r}" for i, r in enumerate(reasons, 1)) + "\n"
        )
    tools = ", ".join(
        f"{tool} {version(tool)}" for tool in ("torch", "apache-tvm", "torchvision", "timm", "transformers")
    )
    cores = len(os.sched_getaffinity(0))
    text += f"\nOn {cores} {platform.machine()} cores, Python {platform.python_version()}, {tools}.\n"
    path.write_text(text, encoding="utf-8")


def _text(cell: dict[str, Any] | None, reasons: list[str]) -> str:
    if cell is None:
        return ""
    if "result" in cell:
        return f"{cell['result']}; {cell['seconds']:.0f} s"
    if cell["reason"] not in reasons:
        reasons.append(cell["reason"])
    return f"no ({reasons.index(cell['reason']) + 1})"
