"""Train one of the float32 models on digits: ``python train_float.py cnn --seed 0``."""

import argparse

import torch
import torch.nn.functional as F
from data import Batches, Digits, accuracy, load
from models import MODELS
from torch import nn

from t3c_compile.progress import progress_bar

_EPOCHS = {"cnn": 40, "vit": 45}
_PEAK_LR = {"cnn": 3e-3, "vit": 1e-3}
_BATCH = 32


def train_float(name: str, data: Digits, seed: int = 0, progress: bool = True) -> nn.Module:
    """``MODELS[name]`` trained on augmented images, in eval mode; torch's global generator is seeded."""
    torch.manual_seed(seed)
    model = MODELS[name]()
    batches = Batches(data.train, _BATCH, augmented=True)
    steps = _EPOCHS[name] * len(batches)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAK_LR[name], total_steps=steps, pct_start=0.15)
    with progress_bar(progress) as bar:
        task = bar.add_task(f"{name}: float training", total=steps)
        for _ in range(_EPOCHS[name]):
            for x, y in batches:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y, label_smoothing=0.1).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                bar.advance(task)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(MODELS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    data = load()
    model = train_float(arguments.name, data, arguments.seed)
    print(
        f"{arguments.name}, seed {arguments.seed}: {accuracy(model, data.test):.4f} on {len(data.test[1])} test images"
    )


if __name__ == "__main__":
    main()
