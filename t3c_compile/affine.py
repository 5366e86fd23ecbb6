"""Affine forms (zonotopes): sets of values that linear maps keep exact and that remember where an error came from.

L. de Figueiredo and J. Stolfi, "Affine arithmetic: concepts and applications", 2004; for ReLU the relaxation of least
area of G. Singh et al., "Fast and effective robustness certification", 2018. All is float64; who makes a form leaves
room for what float64 rounds off.
"""

from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor

from t3c_compile.passes.errors import T3CError

# float64 numbers of one form: 2 GiB.
_MOST = 1 << 28

_GROUPS = count()


class BoundError(T3CError):
    """A worst-case bound cannot be had, or would say nothing; the message says why."""


class Affine:
    """All values ``center + sum_i s_i part_i + e`` with every symbol ``s_i`` in [-1, 1] and ``|e| <= box``.

    ``center`` and ``box`` are [1, ...]; ``parts`` holds [k, ...] for a group of k symbols, by its number. Forms that
    hold the same group share its symbols, so what is equal in both cancels in their difference; the box is of this form
    alone.
    """

    def __init__(self, center: Tensor, parts: dict[int, Tensor] | None = None, box: Tensor | None = None) -> None:
        self.center = center
        self.parts = parts or {}
        self.box = torch.zeros_like(center) if box is None else box

    def radius(self) -> Tensor:
        radius = self.box.clone()
        for part in self.parts.values():
            radius += part.abs().sum(0, keepdim=True)
        return radius

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Least and greatest values, [1, ...]."""
        radius = self.radius()
        return self.center - radius, self.center + radius

    def magnitude(self) -> Tensor:
        """Greatest absolute values, [1, ...]."""
        return self.center.abs() + self.radius()

    def __add__(self, other: "Affine") -> "Affine":
        parts = dict(self.parts)
        for group, part in other.parts.items():
            parts[group] = parts[group] + part if group in parts else part
        return Affine(self.center + other.center, parts, self.box + other.box)

    def __sub__(self, other: "Affine") -> "Affine":
        return self + other.scaled(torch.tensor(-1.0))

    def scaled(self, factor: Tensor) -> "Affine":
        """Each element times its own number, [1, ...] or what broadcasts to it."""
        parts = {group: part * factor for group, part in self.parts.items()}
        return Affine(self.center * factor, parts, self.box * factor.abs())

    def shifted(self, by: Tensor) -> "Affine":
        return Affine(self.center + by, self.parts, self.box)

    def widened(self, by: Tensor) -> "Affine":
        """With an error of every element by itself, of at most ``by``."""
        return Affine(self.center, self.parts, self.box + by)

    def spread(self) -> "Affine":
        """Itself, its box now a group of symbols, which whatever is made of it shares."""
        size = self.box[0].numel()
        (places,) = self.box.flatten().nonzero(as_tuple=True)
        if len(places):
            if (sum(map(len, self.parts.values())) + len(places)) * size > _MOST:
                raise BoundError("the network is too large for a worst-case bound, which is for small ones")
            part = self.center.new_zeros(len(places), size)
            part[torch.arange(len(places)), places] = self.box.flatten()[places]
            self.parts = {**self.parts, next(_GROUPS): part.reshape(-1, *self.box.shape[1:])}
            self.box = torch.zeros_like(self.box)
        return self

    def mapped(self, linear: Callable[[Tensor], Tensor]) -> "Affine":
        """Under a linear function of [n, ...]."""
        self.spread()
        return Affine(linear(self.center), {group: linear(part) for group, part in self.parts.items()})

    def relu(self) -> "Affine":
        slope, radius = _relaxed(*self.bounds())
        return self.scaled(slope).shifted(radius).widened(radius)

    def rounded(self, step: float, least: float, greatest: float, first: Tensor, last: Tensor) -> "Affine":
        """Clamped to ``least`` and ``greatest``, then moved by at most half a ``step``. ``first`` and ``last`` are what
        the ends of the range come to; they stand for themselves where they are equal, or the form has grown wider than
        what there is between ``least`` and ``greatest``."""
        minus, span = torch.tensor(-1.0), torch.tensor(greatest - least)
        short = self.scaled(minus).shifted(torch.tensor(greatest)).relu()  # greatest - min(x, greatest)
        clamped = short.scaled(minus).shifted(span).relu().shifted(torch.tensor(least))
        known = (first == last) | (clamped.radius() > span)
        y = clamped.widened(torch.tensor(step / 2)).scaled((~known).to(self.center.dtype))
        middle, half = (torch.where(known, end, 0.0) for end in ((first + last) / 2, (last - first) / 2))
        return y.shifted(middle).widened(half)


def relu_beside(x: Affine, other: Affine, other_relu: Affine) -> Affine:
    """``relu(x)`` from ``other`` and ``relu(other)``, so that the difference of the two is small where it was.

    ``relu(x) - relu(other)`` lies between 0 and ``x - other``: half of that, with an error of half its magnitude. Taken
    where it adds less to the difference than the relaxations of each by itself.
    """
    slope, radius = _relaxed(*x.bounds())
    _, other_radius = _relaxed(*other.bounds())
    apart = x - other
    half = apart.magnitude() / 2
    beside = half < radius + other_radius
    alone = x.scaled(slope.masked_fill(beside, 0)).shifted(radius.masked_fill(beside, 0))
    chosen = beside.to(half.dtype)
    y = alone + other_relu.scaled(chosen) + apart.scaled(chosen / 2)
    return y.widened(torch.where(beside, half, radius))


def _relaxed(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """``slope`` and ``radius`` with ``relu(x)`` in ``slope x + radius ± radius`` for x in [low, high]."""
    crossing = (low < 0) & (high > 0)
    slope = torch.where(crossing, high / (high - low), (low >= 0).to(low.dtype))
    return slope, torch.where(crossing, -slope * low / 2, 0.0)
