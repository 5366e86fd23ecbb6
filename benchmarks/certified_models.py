"""The models of the benchmarks of certificates: trained, snapped, and lowered without the full model, which stays in
torch beside."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from t3c_compile.artifact import lower
from t3c_compile.backends.targets import get_target
from t3c_compile.drift import Array
from t3c_compile.passes.elastic import full_width_known
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.profile import ProfileSet
from t3c_compile.runtime import Session, load
from t3c_compile.snapping import snap

ROOT = Path(__file__).resolve().parents[1]
TOKENS = 32
"""Bytes of one text: few, for its logits are 256 times as many."""


@dataclass(frozen=True)
class Certified:
    """One model.

    Attributes:
        path: its artifact, of integer profiles alone.
        elastic: the model in torch, whose full rank in float32 drift is measured from.
        profiles: what the artifact was lowered from.
        calibration: the batches that snap had.
        samples: test inputs; nothing was fitted to them.
        labels: their classes, or the next bytes.
        draw: a number of inputs drawn from what the test inputs come from, by a seed.
        fresh: how many make a pool.
    """

    path: Path
    elastic: ElasticGraphModule
    profiles: ProfileSet
    calibration: list[tuple[Tensor]]
    samples: Array
    labels: Array
    draw: Callable[[int, int], Array]
    fresh: int

    @property
    def spectral(self) -> list[float]:
        """The spectral bound of every profile."""
        return [profile.certificate["bound"] for profile in self.profiles.profiles]

    def full(self, inputs: Array) -> Array:
        """The full model's logits."""
        self.elastic.set_full()
        with torch.no_grad(), full_width_known(self.elastic):
            found: Array = self.elastic(torch.from_numpy(inputs)).numpy()
        return found

    def of_profiles(self, inputs: Array) -> list[Array]:
        """Every profile's logits, from the compiled library."""
        session, found = _session(self.path), []
        for profile in session.profiles:
            session.set_profile(profile.name)
            found.append(session.run(inputs))
        return found


_SESSIONS: dict[Path, Session] = {}


def _session(path: Path) -> Session:
    if path not in _SESSIONS:
        _SESSIONS[path] = load(path)
    return _SESSIONS[path]


def _kept(folder: Path, make: Callable[[], tuple[Any, list[tuple[Tensor]], ProfileSet]]) -> tuple[Any, ...]:
    """What ``make`` returns, and the artifact of it; from ``folder`` where it has been made before."""
    file, path = folder / "model.pt", folder / "model.t3c"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(make(), file)
    # It was written here.
    elastic, calibration, profiles = torch.load(file, weights_only=False)
    if not path.exists():
        lower(elastic, profiles, ["x86_64"], path, calibration[0], measured=False)
    return path, elastic.eval(), profiles, calibration


def digits(name: str, folder: Path) -> Certified:
    """A digits model; draws are test images moved a little, as in training."""
    sys.path.insert(0, str(ROOT / "examples" / "digits"))
    import data
    import run

    def make() -> Any:
        done = run.prepare(name, seed=0)
        labels = done.data.calibration[1]
        profiles = snap(done.elastic, done.calibration, [get_target("x86_64")], labels, done.controller)
        return done.elastic, done.calibration, profiles

    images, labels = (part.numpy() for part in data.load().test)

    def draw(count: int, seed: int) -> Array:
        chosen = np.random.default_rng(seed).integers(len(images), size=count)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            drawn: Array = data.augment(torch.from_numpy(images[chosen])).numpy()
        return drawn

    return Certified(*_kept(folder, make), images, labels, draw, 20_000)


def llama(folder: Path) -> Certified:
    """The paper's small Llama over the bytes of Python's library, in texts of :data:`TOKENS` bytes; draws are texts
    from any place of the test files."""
    from benchmarks.paper import files, t3c, tasks
    from benchmarks.paper.training import trained_float
    from t3c_compile.training import train

    whole = tasks.TASKS["lm"]()

    def cut(part: Any) -> TensorDataset:
        return TensorDataset(*(tensor.reshape(-1, TOKENS) for tensor in part.tensors))

    parts = {name: cut(getattr(whole, name)) for name in ("train", "calibration", "test")}
    task = replace(whole, **parts, batch=64)
    # Every other one: their logits take long.
    samples, labels = (part.numpy()[::2] for part in task.test.tensors)

    def make() -> Any:
        start = trained_float(task, 0, folder / "float.safetensors")
        elastic, target, controller, proxy, weights = t3c.prepared(start, t3c.VARIANTS["t3c"])
        options = {"controller": controller, "weights": weights, "proxy": proxy, "target": target, "lr": task.lr}
        train(elastic, task.batches(), epochs=task.epochs, progress=False, **options)
        calibration, labels = task.calibration_inputs(), task.labels(task.calibration)
        return elastic, calibration, snap(elastic.eval(), calibration, [target], labels, controller)

    text = np.frombuffer(files.split_files(tasks.library_files())[2], np.uint8)

    def draw(count: int, seed: int) -> Array:
        starts = np.random.default_rng(seed).integers(len(text) - TOKENS, size=count)
        return text[starts[:, None] + np.arange(TOKENS)].astype(samples.dtype)

    return Certified(*_kept(folder, make), samples, labels, draw, 16_000)


BUILDERS: dict[str, Callable[[Path], Certified]] = {
    "cnn": partial(digits, "cnn"),
    "vit": partial(digits, "vit"),
    "llama": llama,
}
