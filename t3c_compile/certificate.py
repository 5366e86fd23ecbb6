"""The spectral certificate: a bound on logit drift, cheap enough for training and exact enough to rank profiles.

``D = sum_l L_l (||W_l - W_l(option)|| a_l + rounding_l)`` (paper, section 3.4): ``L_l`` is the measured gain from the
layer's output to the logits, ``a_l`` the root-mean-square input norm over calibration samples, and ``rounding_l``
[ours] what int8 activations add. A layer called several times has one term a call. It is first order in the error, and
sums terms as if they all pushed one way; that is what it assumes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from t3c_compile.passes.elastic import ElasticLayer, Gates, elastic_layers, full_width_known
from t3c_compile.passes.elastic.layer import Activation, of_call
from t3c_compile.passes.errors import T3CError
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.option import Option
from t3c_compile.passes.path_gains import kernel_factor, path_gains, samples_of
from t3c_compile.passes.specialize import as_dense
from t3c_compile.passes.spectral_norm import EXACT_SIDE, matrix_norm, spectral_norms
from t3c_compile.processes import gathered

_NORM_SAMPLES = 256


@dataclass(frozen=True)
class CallStatistics:
    """What calibration says of one call of a layer: gain to the logits, RMS input norm, numbers in one sample's input
    and output. The input of a look-up in a table counts as one-hot rows."""

    gain: float
    input_norm: float
    input_size: int
    output_size: int
    look_up: bool
    number: int
    """Which of the layer's products it is."""


def call_statistics(
    model: ElasticGraphModule, calibration: Sequence[tuple[Any, ...]]
) -> dict[str, list[CallStatistics]]:
    """Measure every call of every elastic layer on ``calibration`` (input tuples) at full rank and 32 bits."""
    training = model.training
    model.eval()
    model.set_full()
    with full_width_known(model):
        gains = path_gains(model, calibration)
    seen: dict[str, list[tuple[Tensor, int, int, bool, int]]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            (x,) = inputs
            look_up = not x.is_floating_point()
            square = torch.tensor(float(x.numel())) if look_up else x.detach().square().sum()
            seen.setdefault(name, []).append((square, x.numel(), output.numel(), look_up, kwargs.get("call", 0)))

        return hook

    handles = [layer.register_forward_hook(watch(name), with_kwargs=True) for name, layer in elastic_layers(model)]
    try:
        with torch.no_grad():
            for inputs in samples_of(model, calibration, _NORM_SAMPLES):
                model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    found: dict[str, list[CallStatistics]] = {}
    for name, by_call in gains.items():
        for index, gain in enumerate(by_call):
            # Every sample runs the layer's calls in graph order.
            samples = seen[name][index :: len(by_call)]
            norm = math.sqrt(float(torch.stack([square for square, *_ in samples]).mean()))
            found.setdefault(name, []).append(CallStatistics(gain, norm, *samples[-1][1:]))
    return found


class _Factors(nn.Module):
    """A layer's factors as a forward, for ``functional_call`` to put whole parameters in place of sharded ones."""

    def __init__(self, layer: ElasticLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, bits: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], tuple[int, ...]]:
        exact = {name: factor for name, (factor, _) in self.layer.factors().items()}
        return exact, self.layer.rounded_factors(bits), self.layer.dense_shape()


def _factors(layer: ElasticLayer, bits: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], tuple[int, ...]]:
    """Factors in store layout, exact and rounded to ``bits``, and the dense shape; FSDP2 may have sharded the layer."""
    whole = {f"layer.{name}": gathered(parameter) for name, parameter in layer.named_parameters()}
    found: Any = torch.func.functional_call(_Factors(layer), whole, (bits,))
    return found  # type: ignore[no-any-return]


class SpectralProxy:
    """Drift bounds of a model from fixed layer statistics.

    :meth:`drift` is differentiable and costs a few matrix-vector products a layer, for training; :meth:`certify` takes
    exact spectral norms, for a profile.
    """

    def __init__(self, model: ElasticGraphModule, calibration: Sequence[tuple[Any, ...]]) -> None:
        self.layers = dict(elastic_layers(model))
        self.statistics = call_statistics(model, calibration)
        generator = torch.Generator().manual_seed(0)
        # The leading right singular vector of each error, kept between steps: one power iteration a step follows it.
        self._vectors = {
            name: torch.randn(math.prod(layer.dense_shape()[1:]), generator=generator)
            for name, layer in self.layers.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`drift` keeps from step to step, for a training checkpoint."""
        return {name: vector.clone() for name, vector in self._vectors.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises :class:`T3CError` where ``state`` is not of the same layers."""
        if {name: vector.shape for name, vector in state.items()} != {n: v.shape for n, v in self._vectors.items()}:
            raise T3CError("the proxy's state is of other layers")
        self._vectors = {name: vector.clone() for name, vector in state.items()}

    def drift(self, gates: Gates) -> Tensor:
        """Weight part of the bound (0-d, in logit 2-norm), differentiable in masks and factors."""
        total = torch.zeros(())
        for name, (mask, bits) in gates.items():
            products, look_ups = self._weights(name)
            if products:
                total = total + products * self._error_norm(name, mask, bits)
            if look_ups:
                exact, rounded, _ = _factors(self.layers[name], bits)
                total = total + look_ups * _greatest_row(exact["weight"] - rounded["weight"])
        return total

    def _weights(self, name: str) -> tuple[float, float]:
        """What one unit of weight error of a layer moves the logits by: in its products, and in its look-ups."""
        parts = [(call.look_up, call.gain * call.input_norm) for call in self.statistics[name]]
        return sum(part for look_up, part in parts if not look_up), sum(part for look_up, part in parts if look_up)

    def _error_norm(self, name: str, mask: Tensor, bits: Tensor) -> Tensor:
        layer = self.layers[name]
        exact, rounded, shape = _factors(layer, bits)
        factor = math.sqrt(shape[2] * shape[3]) if len(shape) == 4 else 1.0
        mask = mask[:, None]
        ones = torch.ones_like(mask)

        def error(x: Tensor) -> Tensor:
            return layer.product(exact, x[:, None], ones) - layer.product(rounded, x[:, None], mask)

        with torch.enable_grad():
            x = self._vectors[name].requires_grad_(True)
            (step,) = torch.autograd.grad(error(x).square().sum() / 2, x)
        length = step.norm()
        if float(length) > 0:
            self._vectors[name] = (step / length).detach()
        norm: Tensor = error(self._vectors[name].detach()).norm() * factor
        return norm

    @torch.no_grad()
    def layer_errors(self, name: str, options: Sequence[Option]) -> list[float]:
        """Weight part of one layer's term of the bound at each of ``options``."""
        layer = self.layers[name]
        products, look_ups = self._weights(name)
        errors = [products * norm for norm in error_norms(layer, options)] if products else [0.0] * len(options)
        if look_ups:
            rows = (float(_greatest_row(layer.dense_weight() - layer.dense_weight(option))) for option in options)
            errors = [error + look_ups * row for error, row in zip(errors, rows, strict=True)]
        return errors

    @torch.no_grad()
    def certify(
        self,
        options: Mapping[str, Option],
        activations: Mapping[str, Mapping[str, Activation]],
        known: Mapping[str, Mapping[Option, float]] | None = None,
    ) -> dict[str, float]:
        """Bound of a profile by layer (logit 2-norm); their sum is the certificate. A layer at 32 bits adds nothing.

        ``known``: what :meth:`layer_errors` has said already.
        """
        bounds = dict.fromkeys(options, 0.0)
        for name, option in options.items():
            if option.bits != 32:
                found = (known or {}).get(name, {}).get(option)
                error = self.layer_errors(name, [option])[0] if found is None else found
                bounds[name] = error + self._rounding(name, option, activations[name])
        return bounds

    def _rounding(self, name: str, option: Option, activations: Mapping[str, Activation]) -> float:
        """What rounding the inputs and middles of a layer's products adds to its bound: nothing where they are float32.

        RMS norm at the output of a uniform error (variance s^2/12), times the gain.
        """
        layer, calls = self.layers[name], [call for call in self.statistics[name] if not call.look_up]
        if not calls or not activations:
            return 0.0
        weight = layer.dense_weight(option) if option.form == layer.form else layer.dense_weight()
        norm = matrix_norm(weight.flatten(1)) * kernel_factor(weight)
        middles = {m: layer.middle_norm(m, option.rank) for m in layer.middles} if option.form != "dense" else {}
        bound = 0.0
        for call in calls:
            total = norm * activations[of_call("x", call.number)][0] * math.sqrt(call.input_size / 12)
            for middle, middle_norm in middles.items():
                first = len(middles) == 2 and middle == "h"
                rows = call.input_size // weight.shape[1] if first else call.output_size // weight.shape[0]
                noise = activations[of_call(middle, call.number)][0]
                total += noise * math.sqrt(rows * min(option.rank, layer.max_rank) / 12) * middle_norm
            bound += call.gain * total
        return bound


def _greatest_row(error: Tensor) -> Tensor:
    """What one look-up may be wrong by, in 2-norm (0-d)."""
    greatest: Tensor = error.norm(dim=1).amax()
    return greatest


@torch.no_grad()
def error_norms(layer: ElasticLayer, options: Sequence[Option]) -> list[float]:
    """``||W - W(option)||`` for each option: the spectral norm of the flattened error (at most 7% above it for large
    layers, see :mod:`t3c_compile.passes.spectral_norm`), times ``sqrt(kh kw)`` for kernels.

    Options of one width are taken together.
    """
    norms: dict[Option, float] = {}
    for form, bits in {(option.form, option.bits) for option in options}:
        source = as_dense(layer) if form == "dense" else layer
        same = [option for option in options if (option.form, option.bits) == (form, bits)]
        norms |= zip(same, _norms_at(source, same), strict=True)
    return [norms[option] for option in options]


def _norms_at(layer: ElasticLayer, options: list[Option]) -> list[float]:
    """Error norms of options that differ in rank alone."""
    shape = layer.dense_shape()
    inputs = math.prod(shape[1:])
    factor = math.sqrt(shape[2] * shape[3]) if len(shape) == 4 else 1.0
    exact = {key: value.detach() for key, (value, _) in layer.factors().items()}
    rounded = layer.rounded_factors(torch.tensor(float(options[0].bits)))
    if min(shape[0], inputs) <= EXACT_SIDE:
        full = layer.compose(exact, layer.max_rank)
        errors = ((full - layer.compose(rounded, option.rank)).flatten(1) for option in options)
        return [matrix_norm(error) * factor for error in errors]
    masks = torch.arange(layer.max_rank)[:, None] < torch.tensor([option.rank for option in options])

    ones = torch.ones_like(masks)

    def error(x: Tensor) -> Tensor:
        return layer.product(exact, x, ones) - layer.product(rounded, x, masks)

    return [factor * norm for norm in spectral_norms(error, inputs, len(options)).tolist()]


def observed_drift(full: Tensor, logits: Tensor) -> Tensor:
    """2-norm of the logit difference of each sample; both [batch, ...] -> [batch]."""
    drift: Tensor = (logits - full).flatten(1).norm(dim=1)
    return drift
