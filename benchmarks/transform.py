"""What ``transform`` costs: seconds, peak memory, and the time torch.linalg.svd takes for the same matrices.

    python benchmarks/transform.py [--model NAME ...] [--repeats 3] [--threads 2]

Every run is a process of its own, which first transforms the model's small variant, so that libraries are loaded and
warm; what it then holds is the baseline. ``peak`` is the greatest resident memory during ``transform`` less the
baseline, over the bytes of the float32 weights; the user's own model, which stays, is 1 of it.

``svd ratio``: after ``transform``, for each matrix that it decomposed a normal one of that shape (as the models' are)
is decomposed as ``transform`` does, then by ``torch.linalg.svd`` (float32, reduced); the ratio is of the two sums. Of
models above a gigabyte one matrix of every shape is taken, and counted as often as the shape occurs. Times are medians
over the runs, peaks the greatest.
Results go to ``benchmarks/results/transform.json`` with the load average at the start and the end of every run.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

REPO = Path(__file__).resolve().parent.parent
MODELS = ("resnet50", "vit_b_16", "bert_base", "tinyllama")
# Seconds and peak that the project asks for on 2 cores.
LIMITS = {"vit_b_16": (30, 2.5), "tinyllama": (360, 2.5)}
_LARGE = 1e9


def status(field: str) -> int:
    """Bytes of a field of this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(name: str) -> dict[str, Any]:
    """One run, in this process."""
    import torch

    import t3c_compile
    from examples.models import language, vision
    from t3c_compile.passes import decompose_conv, low_rank, replace

    imported = status("VmRSS")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    builder = {**vision.MODELS, **language.MODELS}[name]
    t3c_compile.transform(builder.build(True), builder.inputs(True), dynamic_shapes=builder.dynamic_shapes(True))
    gc.collect()
    baseline = status("VmRSS")
    model, inputs = builder.build(False), builder.inputs(False)
    weights = sum(4 * parameter.numel() for parameter in model.parameters())
    shapes: list[tuple[int, int]] = []

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        def record(matrix: Any, *arguments: Any) -> Any:
            shapes.append(tuple(matrix.shape))
            return function(matrix, *arguments)

        return record

    replace.svd_factors = recorded(low_rank.svd_factors)
    decompose_conv.left_basis = recorded(low_rank.left_basis)
    load = [os.getloadavg()[0]]
    Path("/proc/self/clear_refs").write_text("5")
    start, worked = time.perf_counter(), time.process_time()
    elastic = t3c_compile.transform(model, inputs, dynamic_shapes=builder.dynamic_shapes(False))
    seconds, worked, peak = time.perf_counter() - start, time.process_time() - worked, status("VmHWM")
    load.append(os.getloadavg()[0])
    layers = len(elastic.report.elastic)
    del elastic
    taken = list(Counter(shapes).items()) if weights > _LARGE else [(shape, 1) for shape in shapes]
    ours = theirs = 0.0
    for shape, count in taken:
        matrix = torch.randn(shape)
        ours += count * timed(lambda matrix: low_rank.svd_factors(matrix, None, 0.0), matrix)
        theirs += count * timed(lambda matrix: torch.linalg.svd(matrix, full_matrices=False), matrix)
    load.append(os.getloadavg()[0])
    result = {
        "seconds": seconds,
        "cpu_seconds": worked,
        "peak_ratio": (peak - baseline) / weights,
        "layers": layers,
        "weight_bytes": weights,
    }
    result |= {"imported_bytes": imported, "baseline_bytes": baseline, "peak_bytes": peak}
    result |= {"matrices": len(shapes), "matrices_timed": len(taken), "our_seconds": ours, "svd_seconds": theirs}
    return result | {"load": load, "torch": torch.__version__}


def timed(function: Callable[[Any], Any], argument: Any) -> float:
    start = time.perf_counter()
    function(argument)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="what transform costs")
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(REPO))
    if arguments.child:
        print(json.dumps(measure(arguments.child)))
        return
    path = REPO / "benchmarks/results/transform.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    rows = []
    for name in arguments.model or MODELS:
        command = [sys.executable, __file__, "--child", name]
        environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
        runs = []
        for _ in range(arguments.repeats):
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
        ratio = median(run["our_seconds"] / run["svd_seconds"] for run in runs)
        summary = {"seconds": median(run["seconds"] for run in runs), "peak_ratio": max(r["peak_ratio"] for r in runs)}
        results[name] = summary | {"svd_ratio": ratio, "threads": arguments.threads, "runs": runs}
        path.write_text(json.dumps(results, indent=1) + "\n")
        limit = LIMITS.get(name)
        row = {"model": name, "weights_mb": runs[0]["weight_bytes"] / 1e6, "layers": runs[0]["layers"], **summary}
        row |= {"svd ratio": ratio, "torch svd, s": median(run["svd_seconds"] for run in runs)}
        row |= {"cpu, s": median(run["cpu_seconds"] for run in runs)}
        row |= {"baseline_mb": runs[0]["baseline_bytes"] / 1e6, "load": max(max(run["load"]) for run in runs)}
        met = limit is None or (summary["seconds"] <= limit[0] and summary["peak_ratio"] <= limit[1])
        rows.append(
            row | {"limits": "-" if limit is None else f"{limit[0]} s, {limit[1]}: {'met' if met else 'MISSED'}"}
        )
    from t3c_compile.show import show

    show(f"transform, {arguments.threads} threads", rows, False)


if __name__ == "__main__":
    main()
