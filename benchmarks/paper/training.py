"""Float32 training, and the one loop that fine-tunes every baseline."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from benchmarks.paper.tasks import Task
from t3c_compile.passes.elastic import ActivationQuantizer

Parameters = Iterable[nn.Parameter] | Iterable[dict[str, Any]]


@dataclass(frozen=True)
class Start:
    """Where every method starts: a trained float32 model, in eval mode, and the data. Copy the model to change it."""

    task: Task
    model: nn.Module
    seed: int


def fit(
    task: Task,
    forward: Callable[[Tensor], Tensor],
    parameters: Parameters,
    *,
    epochs: int,
    lr: float,
    seed: int,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    before_step: Callable[[float], None] | None = None,
) -> None:
    """AdamW under a one-cycle schedule.

    Args:
        forward: inputs to logits.
        loss: of logits, inputs and labels; the task's by default.
        before_step: told the share of training that is done.
    """
    torch.manual_seed(seed)
    batches = task.batches()
    steps = epochs * len(batches)
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.05)
    peaks = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=steps, pct_start=0.15)
    for step, (x, y) in enumerate(batch for _ in range(epochs) for batch in batches):
        if before_step is not None:
            before_step(step / steps)
        optimizer.zero_grad()
        logits = forward(x)
        value = task.loss(logits, y) if loss is None else loss(logits, x, y)
        value.backward()
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        schedule.step()


def trained_float(task: Task, seed: int, cache: Path) -> Start:
    """The float32 model, trained or read from ``cache``."""
    torch.manual_seed(seed)
    model = task.build()
    if cache.exists():
        load_model(model, cache)
    elif task.float_epochs:
        model.train()
        fit(task, model, model.parameters(), epochs=task.float_epochs, lr=task.float_lr, seed=seed)
        save_model(model, cache)
    return Start(task, model.eval(), seed)


@contextmanager
def ranges_follow(elastic: nn.Module) -> Iterator[None]:
    """Inside, activation ranges follow the data, as in T3C's training; everything else is in eval mode."""
    elastic.eval()
    for module in elastic.modules():
        if isinstance(module, ActivationQuantizer):
            module.training = True
    try:
        yield
    finally:
        elastic.eval()
