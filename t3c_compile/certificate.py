"""The spectral certificate: a bound on logit drift, cheap enough for training and exact enough to rank profiles.

``D = s sum_l L_l (||W_l - W_l(option)|| a_l + rounding_l)`` (paper, section 3.4): ``L_l`` is the measured gain from the
layer's output to the logits, ``a_l`` the root-mean-square input norm over calibration samples, and ``rounding_l``
[ours] what int8 activations add. A layer called several times has one term a call.

The sum is first order and takes all errors as if they pushed one way, hundreds of times above what is seen. The scale
``s`` [ours] is measured: with it the bound holds for a stated share of inputs like the calibration samples
(:func:`certified_drift`). For a profile it is measured at that profile; for training once, at half rank and 6 bits.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import binom
from torch import Tensor, nn

from t3c_compile.passes.elastic import ElasticLayer, Gates, elastic_layers, full_width_known
from t3c_compile.passes.elastic.layer import Activation, of_call
from t3c_compile.passes.errors import T3CError
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.option import Option
from t3c_compile.passes.path_gains import first_tensor, kernel_factor, path_gains, samples_of
from t3c_compile.passes.specialize import as_dense
from t3c_compile.passes.spectral_norm import EXACT_SIDE, matrix_norm, spectral_norms
from t3c_compile.processes import gathered

_NORM_SAMPLES = 256
_SHARE, _CONFIDENCE = 0.95, 0.95
# Where training has each layer's error ready: widths, and ranks as shares of the greatest.
_WIDTHS = (4, 6, 8, 32)
_RANKS = (0.0, 0.125, 0.25, 0.5, 1.0)


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


_AGED, _TURN = "aged", "turn"
# One in how many calls of the proxy measures a layer.
_MEASURED_EVERY = 4


class SpectralProxy:
    """Terms of a profile's drift by layer, from fixed layer statistics and exact spectral norms."""

    def __init__(self, model: ElasticGraphModule, calibration: Sequence[tuple[Any, ...]]) -> None:
        self.layers = dict(elastic_layers(model))
        self.statistics = call_statistics(model, calibration)

    def _weights(self, name: str) -> tuple[float, float]:
        """What one unit of weight error of a layer moves the logits by: in its products, and in its look-ups."""
        parts = [(call.look_up, call.gain * call.input_norm) for call in self.statistics[name]]
        return sum(part for look_up, part in parts if not look_up), sum(part for look_up, part in parts if look_up)

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
        """Terms of a profile's sum by layer, before it is scaled. A layer at 32 bits adds nothing.

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


def _ranks(layer: ElasticLayer) -> list[int]:
    return [max(1, int(share * layer.max_rank)) for share in _RANKS]


def _hats(at: Tensor, places: Tensor) -> Tensor:
    """Weights of linear interpolation: ``at`` [n] among rising ``places`` [n, k] -> [n, k]; the ends go on for ever."""
    right = torch.searchsorted(places, at.detach()[:, None].contiguous()).clamp(1, places.shape[1] - 1)
    low, high = places.gather(1, right - 1), places.gather(1, right)
    share = ((at[:, None] - low) / (high - low).clamp_min(1e-9)).clamp(0, 1)
    return torch.zeros_like(places, dtype=at.dtype).scatter(1, right - 1, 1 - share).scatter_add(1, right, share)


class TrainingProxy(SpectralProxy):
    """The bound of drift for training: :meth:`drift` is differentiable and costs a few matrix-vector products."""

    def __init__(self, model: ElasticGraphModule, calibration: Sequence[tuple[Any, ...]]) -> None:
        super().__init__(model, calibration)
        generator = torch.Generator().manual_seed(0)
        # The leading right singular vector of each error, kept from one visit to the next, where one power iteration
        # follows it; how far the errors tabled are from those measured since; and whose turn it is.
        self._state = {
            name: torch.randn(math.prod(layer.dense_shape()[1:]), generator=generator)
            for name, layer in self.layers.items()
        } | {_AGED: torch.ones(len(self.layers)), _TURN: torch.zeros((), dtype=torch.int64)}
        self._ranks = torch.tensor([[float(rank) for rank in _ranks(layer)] for layer in self.layers.values()])
        self._table = torch.stack([self._tabled(name) for name in self.layers])
        self.scale = self._scale(model, calibration)
        """What :meth:`drift` multiplies the sum by."""

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`drift` keeps from step to step, for a training checkpoint."""
        return {name: tensor.clone() for name, tensor in self._state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises :class:`T3CError` where ``state`` is not of the same layers."""
        if {name: tensor.shape for name, tensor in state.items()} != {n: t.shape for n, t in self._state.items()}:
            raise T3CError("the proxy's state is of other layers")
        self._state = {name: tensor.clone() for name, tensor in state.items()}

    def drift(self, gates: Gates) -> Tensor:
        """Weight part of the bound (0-d, in logit 2-norm), differentiable in masks, widths and factors.

        Layers are read from a table of their errors by rank and width, corrected by what their last turn found. One
        call in four measures a layer, in turn, at its gate and with gradients to its factors, four times theirs.
        """
        aged, turn = self._state[_AGED], int(self._state[_TURN])
        self._state[_TURN] = torch.tensor((turn + 1) % (_MEASURED_EVERY * len(self.layers)))
        errors = self._read(gates) * aged
        index, calls = divmod(turn, _MEASURED_EVERY)
        if calls < _MEASURED_EVERY - 1:
            return self.scale * errors.sum()
        name = list(self.layers)[index]
        mask, bits = gates[name]
        # The gate's gradient is the table's for every layer alike; the factors' is that of the one measured.
        fresh = self._measured(name, mask.detach(), bits.detach())
        old, new = float(errors[index].detach()), float(fresh.detach())
        if old > 0 and new > 0:
            self._state[_AGED] = aged.index_put((torch.tensor(index),), aged[index] * (new / old))
        return self.scale * (errors.sum() + (new - old) + _MEASURED_EVERY * (fresh - new))

    def _tabled(self, name: str) -> Tensor:
        """One layer's term at every width and rank of the table."""
        layer = self.layers[name]
        if layer.form == "dense":
            found = self.layer_errors(name, [Option("dense", 0, bits) for bits in _WIDTHS])
            return torch.tensor(found)[:, None].expand(-1, len(_RANKS))
        options = [Option(layer.form, rank, bits) for bits in _WIDTHS for rank in _ranks(layer)]
        return torch.tensor(self.layer_errors(name, options)).reshape(len(_WIDTHS), len(_RANKS))

    def _read(self, gates: Gates) -> Tensor:
        """Terms [layers] at ``gates`` from the table, linear between its ranks and widths."""
        rank = torch.stack([gates[name][0].sum() for name in self.layers])
        width = torch.stack([gates[name][1] for name in self.layers])
        widths = torch.tensor(_WIDTHS, dtype=width.dtype).repeat(len(width), 1)
        along_ranks = (self._table * _hats(rank, self._ranks)[:, None]).sum(-1)
        return (along_ranks * _hats(width, widths)).sum(-1)

    def _measured(self, name: str, mask: Tensor, bits: Tensor) -> Tensor:
        """One layer's term at its gate, from its present factors."""
        products, look_ups = self._weights(name)
        total = torch.zeros(())
        if products:
            total = total + products * self._error_norm(name, mask, bits)
        if look_ups:
            exact, rounded, _ = _factors(self.layers[name], bits)
            total = total + look_ups * _greatest_row(exact["weight"] - rounded["weight"])
        return total

    @torch.no_grad()
    def _scale(self, model: ElasticGraphModule, calibration: Sequence[tuple[Any, ...]]) -> float:
        """The drift certified at half rank and 6 bits, activations in float32, over the sum there."""
        training = model.training
        model.eval()
        model.set_full()
        full = logits_of(model, calibration)
        floats = {name: layer.float_activations for name, layer in self.layers.items()}
        model.set_options({name: Option(layer.form, layer.max_rank // 2, 6) for name, layer in self.layers.items()})
        for layer in self.layers.values():
            layer.float_activations = True
        seen = observed_drifts(full, logits_of(model, calibration))
        gates = {name: (layer.gate.mask, layer.gate.bits) for name, layer in self.layers.items() if layer.gate}
        total = float(self._read(gates).sum())
        for name, layer in self.layers.items():
            layer.float_activations = floats[name]
        model.set_full()
        model.train(training)
        return certified_drift(seen)[0] / total if total else 1.0

    def _error_norm(self, name: str, mask: Tensor, bits: Tensor) -> Tensor:
        layer = self.layers[name]
        exact, rounded, shape = _factors(layer, bits)
        factor = math.sqrt(shape[2] * shape[3]) if len(shape) == 4 else 1.0
        mask = mask[:, None]
        ones = torch.ones_like(mask)

        def error(x: Tensor) -> Tensor:
            return layer.product(exact, x[:, None], ones) - layer.product(rounded, x[:, None], mask)

        with torch.enable_grad():
            x = self._state[name].requires_grad_(True)
            (step,) = torch.autograd.grad(error(x).square().sum() / 2, x)
        length = step.norm()
        if float(length) > 0:
            self._state[name] = (step / length).detach()
        norm: Tensor = error(self._state[name].detach()).norm() * factor
        return norm


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


def certified_drift(drifts: Tensor, statements: int = 1) -> tuple[float, float]:
    """A bound of drift, and the share of inputs that it holds for, from the drifts [samples] of independent inputs.

    With a confidence of 0.95 so many ``statements`` like it hold at once. The share is 0.95 where there are samples
    enough (59 for one statement), else what so few can say of their greatest.

    An order statistic, as in :mod:`t3c_compile.certifying`.
    """
    count, chance = len(drifts), (1 - _CONFIDENCE) / statements
    place = int(binom.isf(chance, count, _SHARE)) + 1
    if place > count:
        return float(drifts.max()), float(chance ** (1 / count))
    return float(drifts.sort().values[place - 1]), _SHARE


def observed_drift(full: Tensor, logits: Tensor) -> Tensor:
    """2-norm of the logit difference of each sample; both [batch, ...] -> [batch]."""
    drift: Tensor = (logits - full).flatten(1).norm(dim=1)
    return drift


def observed_drifts(full: Sequence[Tensor], logits: Sequence[Tensor]) -> Tensor:
    """:func:`observed_drift` of all samples, of logits by batch -> [samples]."""
    return torch.cat([observed_drift(batch, found) for batch, found in zip(full, logits, strict=True)])


@torch.no_grad()
def logits_of(model: ElasticGraphModule, calibration: Sequence[tuple[Any, ...]]) -> list[Tensor]:
    """[samples, ..., classes] of each batch; sizes may differ from batch to batch, as sequence lengths do."""
    return [first_tensor(model(*inputs)) for inputs in calibration]
