"""Models of the paper and common families, built from their configurations with random weights.

Each file beside this one (``vision.py``, ``language.py``) has ``MODELS: dict[str, Builder]``. ``benchmarks/models.py``
takes every one of them through the whole pipeline. Run from the repository's root, so that ``examples`` is a package.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def classes_loss(output: Any) -> Tensor:
    """Cross-entropy of logits [N, ..., classes] against fixed random classes."""
    logits = (
        output if isinstance(output, Tensor) else next(iter(output.values() if isinstance(output, dict) else output))
    )
    flat = logits.flatten(0, -2)
    classes = torch.randint(flat.shape[-1], (len(flat),), generator=torch.Generator().manual_seed(0))
    return F.cross_entropy(flat, classes)


@dataclass(frozen=True)
class Builder:
    """One model. ``small`` is a variant for tests: the same kinds of layer, few and narrow.

    Attributes:
        build: the model in eval mode, seeded.
        inputs: seeded example inputs of batch 1.
        other_inputs: seeded inputs of another batch size, and another sequence length where that is dynamic.
        dynamic_shapes: as ``t3c_compile.transform`` takes it; None keeps the batch free.
        loss: of the model's output, for a training step.
    """

    name: str
    build: Callable[[bool], nn.Module]
    inputs: Callable[[bool], tuple[Tensor, ...]]
    other_inputs: Callable[[bool], tuple[Tensor, ...]]
    dynamic_shapes: Callable[[bool], Any] = lambda small: None
    loss: Callable[[Any], Tensor] = classes_loss
