"""Scikit-learn's bundled digits: 1797 real 8x8 scans of handwritten digits, split once and for all.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998,
https://doi.org/10.24432/C50P49.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

_SPLIT_SEED = 2601
_TEST, _CALIBRATION = 540, 240
# Pixels run from 0 to 16; these are the mean and deviation of the training split.
_MEAN, _DEVIATION = 4.9, 6.0

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Digits:
    """Three disjoint, stratified parts; each is (float32 images [N, 1, 8, 8], int64 labels [N]).

    Nothing is ever fitted to ``calibration`` but activation ranges and certificates, and nothing at all to ``test``.
    """

    train: Batch
    calibration: Batch
    test: Batch


def load() -> Digits:
    """1017 training, 240 calibration and 540 test images; the same for every model and seed."""
    images, labels = load_digits(return_X_y=True)
    x = ((torch.from_numpy(images).float() - _MEAN) / _DEVIATION).reshape(-1, 1, 8, 8)
    y = torch.from_numpy(labels).long()
    rest, test = train_test_split(range(len(y)), test_size=_TEST, random_state=_SPLIT_SEED, stratify=y)
    train, calibration = train_test_split(rest, test_size=_CALIBRATION, random_state=_SPLIT_SEED, stratify=y[rest])
    return Digits(*((x[part], y[part]) for part in (train, calibration, test)))


def augment(x: Tensor) -> Tensor:
    """Small random rotations, scalings and shifts of images [N, 1, H, W], from torch's global generator."""
    n = len(x)
    angle = (torch.rand(n) * 2 - 1) * math.radians(12)
    scale = 1 + (torch.rand(n, 2) * 2 - 1) * 0.1
    shift = (torch.rand(n, 2) * 2 - 1) * 0.2
    cos, sin = angle.cos(), angle.sin()
    rows = [
        torch.stack([cos * scale[:, 0], -sin, shift[:, 0]], 1),
        torch.stack([sin, cos * scale[:, 1], shift[:, 1]], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    # The border is paper: what comes in from outside has the value of the border.
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


class Batches:
    """Shuffled batches of one part, anew at every pass, from torch's global generator; augmented where asked."""

    def __init__(self, part: Batch, size: int, augmented: bool = False) -> None:
        self.images, self.labels = part
        self.size, self.augmented = size, augmented

    def __len__(self) -> int:
        return len(self.labels) // self.size

    def __iter__(self):  # type: ignore[no-untyped-def]
        order = torch.randperm(len(self.labels))
        for start in range(0, len(self) * self.size, self.size):
            chosen = order[start : start + self.size]
            x = self.images[chosen]
            yield (augment(x) if self.augmented else x), self.labels[chosen]


@torch.no_grad()
def accuracy(model: torch.nn.Module, part: Batch) -> float:
    """Fraction of ``part`` that ``model`` gets right, in eval mode."""
    training = model.training
    model.eval()
    right = (model(part[0]).argmax(1) == part[1]).float().mean()
    model.train(training)
    return float(right)
