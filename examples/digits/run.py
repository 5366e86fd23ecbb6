"""Digits from float32 training to a trained elastic model: ``python run.py cnn --seed 0``."""

import argparse
import time
from dataclasses import dataclass

import torch
from data import Batches, Digits, accuracy, load
from torch import Tensor, nn
from train_float import train_float

from t3c_compile.backends.targets import get_target
from t3c_compile.chain import Grid, chains
from t3c_compile.controller import Controller
from t3c_compile.cost import dense_int8_bytes, profile_cost
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.training import LossWeights, train
from t3c_compile.transforming import Config, observe, transform

GRID = Grid(16, (4, 6, 8))
_EPOCHS = {"cnn": 20, "vit": 5}
_LR = {"cnn": 5e-4, "vit": 1e-4}


@dataclass(frozen=True)
class Prepared:
    """One trained digits model, in eval mode, and what it took.

    ``calibration`` holds input tuples; no weight was fitted to them.
    """

    name: str
    float_model: nn.Module
    elastic: ElasticGraphModule
    controller: Controller
    data: Digits
    calibration: list[tuple[Tensor]]
    seconds: float


def prepare(name: str, seed: int = 0, progress: bool = True) -> Prepared:
    """Train ``cnn`` or ``vit`` in float32, transform it with calibration, train the elastic model."""
    threads = torch.get_num_threads()
    # The models are too small for threads to pay, and on one the result is the same whatever the machine's cores.
    torch.set_num_threads(1)
    try:
        return _prepare(name, seed, progress)
    finally:
        torch.set_num_threads(threads)


def _prepare(name: str, seed: int, progress: bool) -> Prepared:
    began = time.monotonic()
    data = load()
    float_model = train_float(name, data, seed, progress)
    calibration = [(images,) for images in data.calibration[0].split(60)]
    # No layer keeps factors that do not pay on the grid.
    config = Config(rank_multiple=GRID.rank_multiple)
    elastic = transform(float_model, calibration[0], config, calibration=calibration, progress=progress)
    controller = Controller(chains(elastic, GRID))
    train(
        elastic,
        Batches(data.train, 32, augmented=True),
        epochs=_EPOCHS[name],
        controller=controller,
        # The float model was trained with as much smoothing: other targets would move it.
        weights=LossWeights(label_smoothing=0.1, distillation=2.0),
        lr=_LR[name],
        progress=progress,
        seed=seed,
    )
    return Prepared(name, float_model, elastic.eval(), controller, data, calibration, time.monotonic() - began)


LEVELS = {"greatest": 1.0, "middle": 0.5, "least": 0.0}
"""Three profiles, as places in every layer's chain."""


def report(prepared: Prepared) -> dict[str, tuple[float, float]]:
    """Accuracy on the test split, and weight bytes as a fraction of dense int8's, of every profile of ``LEVELS``."""
    elastic, found = prepared.elastic, {}
    for label, level in LEVELS.items():
        profile = {name: chain[int(level * (len(chain) - 1))] for name, chain in prepared.controller.chains.items()}
        elastic.set_options(profile)
        observe(elastic, prepared.calibration)
        size = profile_cost(elastic, profile, get_target("cortex-a76")).size_bytes / dense_int8_bytes(elastic)
        found[label] = (accuracy(elastic, prepared.data.test), size)
    elastic.set_full()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=("cnn", "vit"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    prepared = prepare(arguments.name, arguments.seed)
    print(f"{arguments.name}, seed {arguments.seed}: {prepared.seconds:.0f} s")
    print(f"  float32        {100 * accuracy(prepared.float_model, prepared.data.test):6.2f} %")
    print(f"  elastic, full  {100 * accuracy(prepared.elastic, prepared.data.test):6.2f} %")
    for label, (right, size) in report(prepared).items():
        print(f"  {label:14} {100 * right:6.2f} %  {size:.3f} of dense int8's bytes")


if __name__ == "__main__":
    main()
