"""Learning rates of a task, compared on its calibration split: what ``tasks.py`` says was chosen by this.

    python -m benchmarks.paper.learning_rate text

Prints a score for each rate of the float32 model, and, from the best of them, for each rate of fine-tuning, which
QAT-8b stands for.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from benchmarks.paper.baselines import quantized
from benchmarks.paper.tasks import TASKS, Task
from benchmarks.paper.training import Start, trained_float

FLOAT_RATES = (2e-4, 4e-4, 1e-3, 2e-3)
RATES = (5e-5, 1e-4, 2e-4, 4e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task = TASKS[arguments.task]()
    sign = -1 if task.metric == "perplexity" else 1
    starts: dict[float, Start] = {}
    with TemporaryDirectory() as folder:
        for rate in FLOAT_RATES:
            path = Path(folder) / f"{rate}.safetensors"
            starts[rate] = trained_float(replace(task, float_lr=rate), arguments.seed, path)
            print(f"float32 at {rate:g}: {task.metric} {score(starts[rate].model, task):.2f}", flush=True)
    best = max(starts, key=lambda rate: sign * score(starts[rate].model, task))
    for rate in RATES:
        start = replace(starts[best], task=replace(task, lr=rate))
        print(f"QAT-8b at {rate:g}: {task.metric} {score(quantized.qat8(start).elastic, task):.2f}", flush=True)


@torch.no_grad()
def score(model: nn.Module, task: Task) -> float:
    """The task's metric on its calibration split."""
    logits = torch.cat([model.eval()(x) for (x,) in task.calibration_inputs()])
    return task.score(logits, task.labels(task.calibration))


if __name__ == "__main__":
    main()
