"""Accuracy and agreement of every profile of the digits models, over several seeds.

    python benchmarks/digits.py --seeds 3        (about 15 minutes on 2 cores)

Writes ``benchmarks/results/digits.json`` and prints a table: the top and the middle profile against the float32 model,
all profiles by size, and the differences between torch, x86-64 and, under QEMU, arm64.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console

from t3c_compile.demo import run_demo
from t3c_compile.show import show

RESULTS = Path(__file__).parent / "results" / "digits.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", action="append", choices=("cnn", "vit"))
    arguments = parser.parse_args()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.model or ("cnn", "vit"):
            for seed in range(arguments.seeds):
                result = run_demo(name, seed, Path(folder), Console(stderr=True))
                runs.append({"model": name, "seed": seed, "float": result.float_accuracy, "rows": result.rows})
                runs[-1]["seconds"] = round(result.seconds, 1)
                show(f"{name}, seed {seed}: float32 {result.float_accuracy:.2%}", result.rows, False)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    show("means over the seeds", [summary(runs, name) for name in {run["model"]: 0 for run in runs}], False)


def summary(runs: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Means over the seeds of one model: accuracy in percent along the profile set."""
    mine = [run for run in runs if run["model"] == name]

    def percent(place: float) -> float:
        """Accuracy at ``place`` of the way up the profile set."""
        return 100 * mean(run["rows"][round(place * (len(run["rows"]) - 1))]["accuracy"] for run in mine)

    errors = [row[f"{target}_error"] for run in mine for row in run["rows"] for target in ("x86_64", "arm64")]
    return {
        "model": name,
        "seeds": len(mine),
        "float": 100 * mean(run["float"] for run in mine),
        "least": percent(0),
        "quarter": percent(0.25),
        "middle": percent(0.5),
        "three_quarters": percent(0.75),
        "top": percent(1),
        "least_size": mean(run["rows"][0]["of_int8_dense"] for run in mine),
        "worst_error": max(error for error in errors if error is not None),
    }


if __name__ == "__main__":
    main()
