"""What a layer costs, as sympy expressions in (rank, bits): printed in reports, lambdified for the budget loss."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import sympy
import torch

from t3c_compile.backends.targets import Target
from t3c_compile.passes.elastic import CpConv2d, DenseConv2d, ElasticLayer, Table, Tucker2Conv2d, elastic_layers
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.option import Option

RANK, BITS = sympy.symbols("rank bits", positive=True)

# Energy of a 45 nm multiply-add (int8, float32), and of a byte from DRAM, in picojoules: M. Horowitz, "Computing's
# energy problem", ISSCC 2014, figure 1.1.9 (8-bit add 0.03 + multiply 0.2; float32 0.9 + 3.7; DRAM 1.3-2.6 nJ for 64
# bits, the lower taken).
_PJ_PER_MAC = 0.23
_PJ_PER_FLOAT_MAC = 4.6
_PJ_PER_BYTE = 162.5


@dataclass(frozen=True)
class LayerCost:
    """Cost of one elastic layer for one sample. ``macs`` multiply-adds and ``weights`` numbers are in ``rank``."""

    macs: sympy.Expr
    weights: sympy.Expr
    vectors: sympy.Expr
    """float32 numbers beside the factors: scales and bias."""
    read: float = 1.0
    """The share of the bytes that one sample reads: all, but of a table with look-ups alone only a few rows."""
    floats: bool = False
    """Whether activations are float32, and so the multiply-adds."""

    @property
    def bytes(self) -> sympy.Expr:
        """Bytes of the layer's store at (rank, bits)."""
        return self.weights * BITS / 8 + 4 * self.vectors

    @cached_property
    def _functions(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        # Plain Python operators only (Min aside), so the same function takes numbers and tensors.
        modules = [{"Min": _minimum}]
        return tuple(sympy.lambdify((RANK, BITS), e, modules) for e in (self.macs, self.bytes))

    def at(self, rank: Any, bits: Any) -> tuple[Any, Any]:
        """(multiply-adds, bytes) at a rank and width; numbers or tensors (differentiable)."""
        macs, size = self._functions
        return macs(rank, bits), size(rank, bits)


def layer_cost(layer: ElasticLayer, form: str | None = None) -> LayerCost:
    """The cost of a layer in its own form, or in ``form="dense"`` with its factors multiplied out."""
    out, inner, kernel, groups = _dense_shape(layer)
    bias = 0 if layer.bias is None else out
    if (form or layer.form) == "dense":
        numbers = out * inner // groups * kernel
        read = 0.0 if isinstance(layer, Table) and not layer.calls else 1.0
        macs, vectors = sympy.Integer(layer.rows_out * numbers), sympy.Integer(out + bias)
        return LayerCost(macs, sympy.Integer(numbers), vectors, read, layer.float_activations)
    if isinstance(layer, Tucker2Conv2d):
        ki, ko = sympy.Min(RANK, layer.V.shape[0]), sympy.Min(RANK, layer.U.shape[1])
        return LayerCost(
            layer.rows_in * ki * inner + layer.rows_out * (ki * ko * kernel + ko * out),
            ki * inner + ki * ko * kernel + ko * out,
            ki + ko + bias,
        )
    if isinstance(layer, CpConv2d):
        macs = RANK * (layer.rows_in * inner + layer.rows_out * (kernel + out))
        return LayerCost(macs, RANK * (inner + kernel + out), 2 * RANK + bias)
    numbers = RANK * (inner + out)
    return LayerCost(layer.rows_out * numbers, numbers, RANK + bias, floats=layer.float_activations)


def _dense_shape(layer: ElasticLayer) -> tuple[int, int, int, int]:
    """(out, in, kernel positions, groups)."""
    shape = layer.dense_shape()
    groups = layer.groups if isinstance(layer, DenseConv2d) else 1
    kernel = shape[2] * shape[3] if len(shape) == 4 else 1
    return shape[0], shape[1] * groups, kernel, groups


def _minimum(a: Any, b: Any) -> Any:
    """``Min`` for numbers and tensors alike."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))
    return min(a, b)


@dataclass(frozen=True)
class Cost:
    """Cost of a profile for one sample."""

    size_bytes: float
    latency_ms: float
    energy_mj: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.size_bytes + other.size_bytes, self.latency_ms + other.latency_ms, self.energy_mj + other.energy_mj
        )


def roofline(macs: Any, size: Any, target: Target, read: float = 1.0, floats: bool = False) -> Cost:
    """Roofline estimate of one layer: the slower of arithmetic at peak and weights from memory; no overheads.

    ``read`` is the share of its ``size`` bytes that one sample reads; ``floats``: the multiply-adds are of float32.
    """
    arithmetic = 2 * macs / ((target.peak_gflops if floats else target.peak_gops) * 1e9)
    memory = size * read / (target.bandwidth_gbps * 1e9)
    energy = (macs * (_PJ_PER_FLOAT_MAC if floats else _PJ_PER_MAC) + size * read * _PJ_PER_BYTE) * 1e-9
    return Cost(size, 1e3 * max(arithmetic, memory), energy)


@dataclass(frozen=True)
class LayerTimes:
    """Milliseconds of one layer for one sample: ``dense``, and those at ``ranks`` (rising; none: dense alone)."""

    dense: float
    ranks: tuple[int, ...] = ()
    factorized: tuple[float, ...] = ()

    def at(self, rank: int) -> float:
        """Milliseconds at ``rank``, 0 for dense; between measured ranks on a line, and never falling.

        Where a greater rank took less, other programs had a part in the lesser one's time: they only add to it.
        """
        if rank == 0:
            return self.dense
        rising = np.minimum.accumulate(self.factorized[::-1])[::-1]
        return float(np.interp(rank, self.ranks, rising))

    def pays(self, rank: int) -> bool:
        """Whether the factors are faster than the dense product."""
        return self.at(rank) < self.dense


Times = dict[str, LayerTimes]
"""By layer; tables and weight-only layers are not there."""


def option_costs(
    layer: ElasticLayer, options: Sequence[Option], target: Target, times: LayerTimes | None = None
) -> list[Cost]:
    """Cost of one layer at each of ``options``; at 32 bits it is deployed dense.

    By the roofline, but for integers the latency is that of ``times`` where they are known.
    """
    forms = ["dense" if option.bits == 32 else option.form for option in options]
    formulas = {form: layer_cost(layer, form) for form in set(forms)}
    costs = []
    for option, form in zip(options, forms, strict=True):
        formula = formulas[form]
        macs, size = formula.at(option.rank, option.bits)
        floats = formula.floats or option.bits == 32
        cost = roofline(float(macs), float(size), target, formula.read, floats)
        if times is not None and not floats:
            cost = replace(cost, latency_ms=times.at(option.rank))
        costs.append(cost)
    return costs


def kept_bytes(elastic: ElasticGraphModule) -> int:
    """Bytes of the parameters that are not elastic (kept layers, norms, embeddings): every profile carries them."""
    owned = {id(p) for _, layer in elastic_layers(elastic) for p in layer.parameters()}
    return sum(4 * p.numel() for p in elastic.parameters() if id(p) not in owned)


def profile_cost(
    elastic: ElasticGraphModule, options: Mapping[str, Option], target: Target, times: Times | None = None
) -> Cost:
    """Cost of a profile: its layers, as :func:`option_costs` has it, and the parameters every profile carries."""
    total = Cost(kept_bytes(elastic), 0.0, 0.0)
    for name, layer in elastic_layers(elastic):
        total = total + option_costs(layer, [options[name]], target, (times or {}).get(name))[0]
    return total


def dense_int8_bytes(elastic: ElasticGraphModule) -> float:
    """Bytes of the model with every elastic layer dense in int8: the size profiles are compared with."""
    layers = [layer for _, layer in elastic_layers(elastic)]
    return kept_bytes(elastic) + sum(float(layer_cost(layer, "dense").at(0, 8)[1]) for layer in layers)
