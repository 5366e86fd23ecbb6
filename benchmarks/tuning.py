"""Tune full-size models on this machine, show how their kernels stand, and write the records that are shipped.

    python -m benchmarks.tuning resnet50 vit_b_16 --threads 1 --threads 2 --minutes 15 [--ship]

Each model as in ``benchmarks/latency.py``: dense int8, a half and a quarter of the multiply-adds. Found records are
kept in ``--records``, and the next run goes on from there. ``--ship`` writes the best of all of them to
``backends/tvm/tuning/records``.
"""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.engines import FRACTIONS, builder, inputs_of, one_profile
from t3c_compile.backends.targets import get_target
from t3c_compile.backends.tvm.tuning import records
from t3c_compile.show import show
from t3c_compile.tuning import open_records, tune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="of examples/models")
    parser.add_argument("--target", default="x86_64")
    parser.add_argument("--threads", type=int, action="append", help="may be repeated (default 1)")
    parser.add_argument("--minutes", type=float, default=15.0, help="for each model, fraction and number of threads")
    parser.add_argument("--records", type=Path, default=Path("build/tuning.jsonl"))
    parser.add_argument("--ship", action="store_true", help="write the best of --records to where lowering finds it")
    arguments = parser.parse_args()
    target = get_target(arguments.target)
    arguments.records.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.models:
        for engine, fraction in FRACTIONS.items():
            torch.manual_seed(0)
            batches = inputs_of(name, 1, 2)
            elastic, profiles = one_profile(builder(name).build(False).eval(), batches, fraction)
            for threads in arguments.threads or [1]:
                rows = tune(
                    elastic,
                    profiles,
                    target,
                    arguments.records,
                    batches[0],
                    minutes=arguments.minutes,
                    threads=threads,
                    progress=sys.stderr.isatty(),
                )
                show(f"{name}, {engine}, {threads} threads", rows, False)
    if arguments.ship:
        found = open_records(arguments.records, target)
        records.write_best(found, records.SHIPPED / f"{found.cpu}.jsonl")


if __name__ == "__main__":
    main()
