"""Unstructured pruning while the model is fine-tuned, then rounding to int8.

Dense kernels multiply zeros like other numbers, so nothing is faster; what is gone is stored as one bit a weight.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from benchmarks.paper.deploy import Compressed, dense_options, elastic_of
from benchmarks.paper.tasks import Task
from benchmarks.paper.training import Start, fit
from t3c_compile.passes.elastic import elastic_layers

SPARSITY = 0.8
_RAMP = 0.7
"""The share of training after which the sparsity is reached."""
_SCORE_LR = 1e-2


def prunable(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def scheduled(done: float, sparsity: float) -> float:
    """Cubic from nothing to ``sparsity``: Zhu and Gupta, https://arxiv.org/abs/1710.01878, equation 1."""
    return sparsity * (1 - (1 - min(1.0, done / _RAMP)) ** 3)


def magnitude(start: Start) -> Compressed:
    """The smallest weights of all layers together (torch.nn.utils.prune), more and more of them."""
    model, task = copy.deepcopy(start.model).train(), start.task
    layers = [(layer, "weight") for layer in prunable(model)]

    def step(done: float) -> None:
        gone = sum(float((layer.weight == 0).sum()) for layer, _ in layers)
        total = sum(layer.weight.numel() for layer, _ in layers)
        more = int(scheduled(done, SPARSITY) * total - gone)
        if more > 0.01 * total or (more > 0 and done >= _RAMP):
            prune.global_unstructured(layers, prune.L1Unstructured, amount=more)

    fit(task, model, model.parameters(), epochs=task.epochs, lr=task.lr, seed=start.seed, before_step=step)
    step(1.0)
    for layer, name in layers:
        prune.remove(layer, name)
    return sparse_int8(model.eval(), task)


class _Top(torch.autograd.Function):
    """A mask of the ``kept`` greatest scores; the gradient goes straight through to the scores."""

    @staticmethod
    def forward(ctx: object, scores: Tensor, kept: int) -> Tensor:
        mask = torch.zeros_like(scores).flatten()
        mask[scores.flatten().topk(kept).indices] = 1
        return mask.view_as(scores)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class Movement(nn.Module):
    """``W * mask(S)`` by layer: ``S`` falls where a weight moves to zero, its gradient being ``dL/dW' * W`` (Sanh et
    al., https://arxiv.org/abs/2005.07683, equations 2 and 3)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros_like(weight))
        self.sparsity = 0.0

    def forward(self, weight: Tensor) -> Tensor:
        mask: Tensor = _Top.apply(self.scores, round((1 - self.sparsity) * weight.numel()))
        return weight * mask


def movement(start: Start) -> Compressed:
    """The weights that training moves to zero, more and more of them."""
    model, task = copy.deepcopy(start.model).train(), start.task
    layers = prunable(model)
    masks = [Movement(layer.weight) for layer in layers]
    for layer, mask in zip(layers, masks, strict=True):
        parametrize.register_parametrization(layer, "weight", mask)

    def step(done: float) -> None:
        for mask in masks:
            mask.sparsity = scheduled(done, SPARSITY)

    scores = {id(mask.scores) for mask in masks}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in scores], "lr": task.lr},
        {"params": [mask.scores for mask in masks], "lr": _SCORE_LR, "weight_decay": 0.0},
    ]
    fit(task, model, groups, epochs=task.epochs, lr=task.lr, seed=start.seed, before_step=step)
    step(1.0)
    for layer in layers:
        parametrize.remove_parametrizations(layer, "weight")
    return sparse_int8(model.eval(), task)


def sparse_int8(model: nn.Module, task: Task) -> Compressed:
    """``model`` in dense int8, and what its zeros save in storage."""
    elastic = elastic_of(model, task)
    saved, zeros, numbers = 0, 0, 0
    for _, layer in elastic_layers(elastic):
        weight = layer.store(0)["weight"]
        saved += weight.numel() - sparse_bytes(weight)
        zeros, numbers = zeros + int((weight == 0).sum()), numbers + weight.numel()
    return Compressed(elastic, dense_options(elastic, 8), saved, {"sparsity": zeros / numbers})


def sparse_bytes(weight: Tensor) -> int:
    """Bytes of an int8 tensor: all of it, or a bit a number and those that are not zero, whichever is less."""
    return min(weight.numel(), -(-weight.numel() // 8) + int(weight.count_nonzero()))
