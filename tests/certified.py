"""A small artifact and samples for it, which the tests of certificates share."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import mlp

from t3c_compile import snapping
from t3c_compile.artifact import lower
from t3c_compile.backends.targets import get_target
from t3c_compile.drift import Array
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.transforming import transform


def samples(count: int, seed: int) -> Array:
    """Inputs [count, 64]."""
    return np.random.default_rng(seed).standard_normal((count, 64)).astype(np.float32)


class Small:
    """An untrained network lowered twice: with the full model as its greatest profile, and, for arm64 too, without."""

    def __init__(self, folder: Path) -> None:
        model, inputs = mlp()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)  # logits as decided as a trained network's
        self.elastic: ElasticGraphModule = transform(model, inputs)
        targets = [get_target(name) for name in ("x86_64", "arm64")]
        calibration = [(torch.from_numpy(samples(256, seed=1)),)]
        # Of an untrained network on noise hardly a profile is better than another: keep them all.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(snapping, "drop_dominated", lambda profiles: (profiles, []))
            with_full = snapping.snap(self.elastic, calibration, targets[:1], count=2, full_model=True)
            without = snapping.snap(self.elastic, calibration, targets, count=2)
        self._with_full = lower(self.elastic, with_full, targets[:1], folder / "full.t3c", inputs, measured=False)
        self._without = lower(self.elastic, without, targets, folder / "integers.t3c", inputs, measured=False)

    def copy(self, folder: Path, full: bool = True) -> Path:
        """An uncertified copy of the artifact, with or without the full model."""
        return Path(shutil.copytree(self._with_full if full else self._without, folder / "copy.t3c"))

    def logits(self, x: Array) -> Array:
        """The full model's."""
        self.elastic.eval().set_full()
        with torch.no_grad():
            found: Array = self.elastic(torch.from_numpy(x)).numpy()
        return found
