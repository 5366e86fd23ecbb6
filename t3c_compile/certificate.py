"""The spectral certificate: a bound on logit drift, cheap enough for training and exact enough to rank profiles.

``D = sum_l L_l (||W_l - W_l(option)|| a_l + rounding_l)`` (paper, section 3.4): ``L_l`` is the measured gain from the
layer's output to the logits, ``a_l`` the root-mean-square input norm over calibration samples, and ``rounding_l``
[ours] what int8 activations add. It is first order in the error, and sums layers as if they all pushed one way; that
is what it assumes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from t3c_compile.passes.elastic import ElasticLayer, Gates, elastic_layers
from t3c_compile.passes.elastic.layer import Activation
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.option import Option
from t3c_compile.passes.path_gains import kernel_factor, path_gains, samples_of
from t3c_compile.passes.specialize import as_dense

_NORM_SAMPLES = 256


@dataclass(frozen=True)
class LayerStatistics:
    """What calibration says of one layer: gain to the logits, RMS input norm and numbers in one sample's input."""

    gain: float
    input_norm: float
    input_size: int


def layer_statistics(model: ElasticGraphModule, calibration: Sequence[tuple[Any, ...]]) -> dict[str, LayerStatistics]:
    """Measure every elastic layer on ``calibration`` (input tuples) at full rank and 32 bits."""
    training = model.training
    model.eval()
    model.set_full()
    gains = path_gains(model, calibration)
    squares: dict[str, list[Tensor]] = {}
    sizes: dict[str, int] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares.setdefault(name, []).append(inputs[0].detach().square().sum())
            sizes[name] = inputs[0].numel()

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in elastic_layers(model)]
    try:
        with torch.no_grad():
            for inputs in samples_of(model, calibration, _NORM_SAMPLES):
                model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    norms = {name: math.sqrt(float(torch.stack(parts).mean())) for name, parts in squares.items()}
    return {name: LayerStatistics(gains[name], norms[name], sizes[name]) for name in norms}


class SpectralProxy:
    """Drift bounds of a model from fixed layer statistics.

    :meth:`drift` is differentiable and costs a few matrix-vector products a layer, for training; :meth:`certify` takes
    exact spectral norms, for a profile.
    """

    def __init__(self, model: ElasticGraphModule, calibration: Sequence[tuple[Any, ...]]) -> None:
        self.layers = dict(elastic_layers(model))
        self.statistics = layer_statistics(model, calibration)
        generator = torch.Generator().manual_seed(0)
        # The leading right singular vector of each error, kept between steps: one power iteration a step follows it.
        self._vectors = {
            name: torch.randn(math.prod(layer.dense_shape()[1:]), generator=generator)
            for name, layer in self.layers.items()
        }

    def drift(self, gates: Gates) -> Tensor:
        """Weight part of the bound (0-d, in logit 2-norm), differentiable in masks and factors."""
        total = torch.zeros(())
        for name, (mask, bits) in gates.items():
            statistics = self.statistics[name]
            norm = self._error_norm(name, mask, bits)
            total = total + statistics.gain * statistics.input_norm * norm
        return total

    def _error_norm(self, name: str, mask: Tensor, bits: Tensor) -> Tensor:
        layer = self.layers[name]
        shape = layer.dense_shape()
        factor = math.sqrt(shape[2] * shape[3]) if len(shape) == 4 else 1.0
        exact = {key: value for key, (value, _) in layer.factors().items()}
        rounded = layer.rounded_factors(bits)
        ones = torch.ones_like(mask)

        def error(x: Tensor) -> Tensor:
            return layer.product(exact, x, ones) - layer.product(rounded, x, mask)

        with torch.enable_grad():
            x = self._vectors[name].requires_grad_(True)
            (step,) = torch.autograd.grad(error(x).square().sum() / 2, x)
        length = step.norm()
        if float(length) > 0:
            self._vectors[name] = (step / length).detach()
        norm: Tensor = error(self._vectors[name].detach()).norm() * factor
        return norm

    @torch.no_grad()
    def layer_error(self, name: str, option: Option) -> float:
        """Weight part of one layer's term of the bound at one option (exact spectral norm)."""
        layer = self.layers[name]
        statistics = self.statistics[name]
        return statistics.gain * statistics.input_norm * error_norm(layer, option)

    @torch.no_grad()
    def certify(
        self, options: Mapping[str, Option], activations: Mapping[str, Mapping[str, Activation]]
    ) -> dict[str, float]:
        """Bound of a profile by layer (logit 2-norm); their sum is the certificate."""
        bounds: dict[str, float] = {}
        for name, option in options.items():
            rounding = self.statistics[name].gain * self._rounding(name, option, activations[name])
            bounds[name] = self.layer_error(name, option) + rounding
        return bounds

    def _rounding(self, name: str, option: Option, activations: Mapping[str, Activation]) -> float:
        """RMS norm that rounding input and middles adds at the layer's output (uniform error, variance s^2/12)."""
        layer, statistics = self.layers[name], self.statistics[name]
        weight = layer.dense_weight(option) if option.form == layer.form else layer.dense_weight()
        norm = float(torch.linalg.matrix_norm(weight.flatten(1), ord=2)) * kernel_factor(weight)
        total = norm * activations["x"][0] * math.sqrt(statistics.input_size / 12)
        if option.form != "dense":
            for middle in layer.middles:
                rows = layer.rows_in if len(layer.middles) == 2 and middle == "h" else layer.rows_out
                noise = activations[middle][0] * math.sqrt(rows * min(option.rank, layer.max_rank) / 12)
                total += noise * layer.middle_norm(middle, option.rank)
        return total


@torch.no_grad()
def error_norm(layer: ElasticLayer, option: Option) -> float:
    """``||W - W(option)||``: the spectral norm of the flattened error, times ``sqrt(kh kw)`` for kernels."""
    layer = as_dense(layer) if option.form == "dense" else layer
    error = layer.dense_weight() - layer.dense_weight(option)
    return float(torch.linalg.matrix_norm(error.flatten(1), ord=2)) * kernel_factor(error)


def observed_drift(full: Tensor, logits: Tensor) -> Tensor:
    """2-norm of the logit difference of each sample; both [batch, ...] -> [batch]."""
    drift: Tensor = (logits - full).flatten(1).norm(dim=1)
    return drift
