"""SparseGPT: Frantar and Alistarh, https://arxiv.org/abs/2301.00774, algorithm 1, for linear and convolution layers."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.paper.baselines.pruned import prunable, sparse_int8
from benchmarks.paper.deploy import Compressed
from benchmarks.paper.training import Start

SPARSITY = 0.5
_BLOCK = 128
_DAMPING = 0.01


def compress(start: Start) -> Compressed:
    """Layer by layer, each on what the pruned layers before it give; nothing is trained."""
    model = copy.deepcopy(start.model).eval()
    calibration = start.task.calibration_inputs()
    for layer in prunable(model):
        if getattr(layer, "groups", 1) == 1:
            hessian = _hessian(model, layer, calibration)
            layer.weight.data = prune_columns(layer.weight.data.flatten(1), hessian, SPARSITY).view_as(layer.weight)
    return sparse_int8(model, start.task)


@torch.no_grad()
def _hessian(model: nn.Module, layer: nn.Module, calibration: list[tuple[Tensor]]) -> Tensor:
    """Sum of ``x x^T`` over the columns that ``layer`` multiplies: [n, n]."""
    total: list[Tensor] = []

    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = columns(layer, inputs[0])
        total.append(x.T @ x)

    handle = layer.register_forward_pre_hook(watch)
    try:
        for inputs in calibration:
            model(*inputs)
    finally:
        handle.remove()
    return torch.stack(total).sum(0)


def columns(layer: nn.Module, x: Tensor) -> Tensor:
    """The rows [count, n] that the flattened weight [m, n] of ``layer`` is multiplied by."""
    if isinstance(layer, nn.Conv2d):
        unfolded = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return unfolded.transpose(1, 2).flatten(0, 1)
    return x.flatten(0, -2)


def prune_columns(weight: Tensor, hessian: Tensor, sparsity: float) -> Tensor:
    """``weight`` [m, n] with ``sparsity`` of each block of columns zero, the rest corrected for what that does to the
    outputs."""
    weight, size = weight.clone(), weight.shape[1]
    damping = _DAMPING * hessian.diagonal().mean() * torch.eye(size)
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian + damping)), upper=True)
    for begin in range(0, size, _BLOCK):
        end = min(begin + _BLOCK, size)
        importance = (weight[:, begin:end] / inverse.diagonal()[begin:end]).square()
        gone = torch.zeros_like(importance, dtype=torch.bool).flatten()
        gone[importance.flatten().argsort()[: round(sparsity * gone.numel())]] = True
        gone = gone.view_as(importance)
        errors = torch.zeros_like(importance)
        for j in range(begin, end):
            error = torch.where(gone[:, j - begin], weight[:, j], 0) / inverse[j, j]
            weight[:, j:end] -= error[:, None] * inverse[j, j:end]
            weight[:, j] = torch.where(gone[:, j - begin], 0, weight[:, j])
            errors[:, j - begin] = error
        weight[:, end:] -= errors @ inverse[begin:end, end:]
    return weight
