"""Models with a layer that cannot be elastic, one for every reason the passes give."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Kept(nn.Module):
    """One layer that stays whole, named ``layer`` (or a parameter ``w``), after an elastic linear."""

    def __init__(self, layer: nn.Module | None, forward: Callable[["_Kept", Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.layer = layer if layer is not None else nn.Identity()
        self.w = nn.Parameter(torch.randn(shape)) if shape else None
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, self.first(x))


_NOT_A_MATRIX = "not a matrix that multiplies rows of activations"
_RECURRENT = "a recurrent layer stays whole, in float"
_TRANSPOSED = "a transposed convolution stays whole, in float"
_weight_norm = nn.utils.parametrizations.weight_norm


def _ids(x: Tensor) -> Tensor:
    return (x[..., 0] > 0).long()


def _strides(m: _Kept, x: Tensor) -> Tensor:
    """One convolution weight at two strides."""
    x = x.unflatten(2, (8, 4)).transpose(1, 2)
    return F.conv2d(x, m.w, padding=1).sum((2, 3)) + F.conv2d(x, m.w, stride=2, padding=1).sum((2, 3))


REFUSALS: dict[str, tuple[_Kept, str, str]] = {}
"""By name: a model of float32 [3, 6, 32], the layer that is kept, and words of the reason."""


def _refuse(
    name: str, kept: str, reason: str, layer: nn.Module | None, forward: Callable[[_Kept, Tensor], Tensor], *w: int
) -> None:
    torch.manual_seed(0)
    REFUSALS[name] = (_Kept(layer, forward, *w).eval(), kept, reason)


def _plain(m: _Kept, x: Tensor) -> Tensor:
    result = m.layer(x)
    return result[0] if isinstance(result, tuple) else result


_refuse("parametrized linear", "layer", "the weight is computed in the graph", _weight_norm(nn.Linear(32, 8)), _plain)
_refuse("parametrized conv1d", "layer", "the weight is computed in the graph", _weight_norm(nn.Conv1d(6, 8, 3)), _plain)
_refuse(
    "float64",
    "layer",
    "the weight is torch.float64, not float32",
    nn.Linear(32, 8).double(),
    lambda m, x: m.layer(x.double()).float(),
)
_refuse("by request", "layer", "kept by request (pattern 'lay*')", nn.Linear(32, 8), _plain)
_refuse("batch of matrices", "w", _NOT_A_MATRIX, None, lambda m, x: x @ m.w, 3, 32, 8)
_refuse("vector", "w", _NOT_A_MATRIX, None, lambda m, x: x @ m.w, 32)
_refuse("scaled", "w", _NOT_A_MATRIX, None, lambda m, x: torch.addmm(x[0, 0, :8], x[0], m.w, alpha=2.0), 32, 8)
_refuse("einsum", "w", _NOT_A_MATRIX, None, lambda m, x: torch.einsum("nti,tio->nto", x, m.w), 6, 32, 8)
_refuse(
    "conv3d", "layer", "a 3-d convolution stays whole", nn.Conv3d(3, 4, 3), lambda m, x: m.layer(x.unflatten(2, (4, 8)))
)
_refuse("transposed 1-d", "layer", _TRANSPOSED, nn.ConvTranspose1d(6, 8, 3), _plain)
_refuse(
    "transposed 2-d", "layer", _TRANSPOSED, nn.ConvTranspose2d(6, 8, 3), lambda m, x: m.layer(x.unflatten(2, (4, 8)))
)
_refuse(
    "transposed 3-d",
    "layer",
    _TRANSPOSED,
    nn.ConvTranspose3d(6, 8, 3),
    lambda m, x: m.layer(x.unflatten(2, (4, 4, 2))),
)
_refuse(
    "bag of embeddings",
    "layer",
    "a bag of embeddings (sums of rows) stays whole",
    nn.EmbeddingBag(5, 8),
    lambda m, x: m.layer(_ids(x)),
)
_refuse(
    "scaled embedding",
    "layer",
    "scale_grad_by_freq or sparse gradients",
    nn.Embedding(5, 8, scale_grad_by_freq=True),
    lambda m, x: m.layer(_ids(x)),
)
_refuse("bilinear", "layer", "a bilinear product has two inputs", nn.Bilinear(32, 32, 8), lambda m, x: m.layer(x, x))
_refuse("lstm", "layer", _RECURRENT, nn.LSTM(32, 8, batch_first=True), _plain)
_refuse("gru", "layer", _RECURRENT, nn.GRU(32, 8, batch_first=True), _plain)
_refuse("rnn", "layer", _RECURRENT, nn.RNN(32, 8, batch_first=True), _plain)
_refuse(
    "read elsewhere",
    "layer",
    "the weight layer.weight is also read by aten.square (",
    nn.Linear(32, 8),
    lambda m, x: m.layer(x) + m.layer.weight.square().mean(),
)
_refuse(
    "overlapping parts",
    "w",
    "the weight w is also read by aten.linear (",
    None,
    lambda m, x: F.linear(x, m.w[:20]).sum(2) + F.linear(x, m.w[10:]).sum(2),
    30,
    32,
)
_refuse(
    "two strides", "w", "shared by convolutions that differ in stride, padding or dilation", None, _strides, 16, 8, 3, 3
)
_refuse(
    "training reads it otherwise",
    "layer",
    "is read differently in training and in evaluation",
    nn.Linear(32, 8),
    lambda m, x: m.layer(x) + (m.layer.weight.square().mean() if m.training else 0.0),
)
