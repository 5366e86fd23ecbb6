"""The controller: a budget goes in, one option for every elastic layer comes out, monotone by construction.

T3C (arXiv 2601.01299), "device-aware controller". A budget is three fractions (latency, energy, size) of what the
greatest options cost: 1 is free. Training samples options from the controller's scores by Gumbel-softmax
(https://arxiv.org/abs/1611.01144) over the prefixes of each layer's components; deployment snaps them.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t3c_compile.groups import Groups, group_top, member_level
from t3c_compile.passes.elastic import Gates
from t3c_compile.passes.errors import T3CError
from t3c_compile.passes.option import Option

RESOURCES = ("latency", "energy", "size")
"""The coordinates of a budget vector, in order."""

_UNITS = 8
# Above zero, so that a budget's two ends never meet.
_LEAST_WEIGHT = 1e-3


class Controller(nn.Module):
    """Maps a budget to one score per elastic layer; the rounded score is an index into the layer's chain.

    Each resource has a network of its own, one hidden layer with non-negative weights and increasing activations, for
    the level it allows; a layer gets the least of the three, since an option must fit every resource. Zero budget is
    the least option and a free budget the greatest, whatever the weights. All operations are element-wise in a fixed
    order and piecewise linear, so that levels never fall, not even by a rounding error.

    Args:
        chains: every elastic layer's options from least to greatest (see ``t3c_compile.chain``).
        groups: layers that share one score, as a fraction of their chain (see ``t3c_compile.groups``); the others have
            one each.
    """

    tops: Tensor
    group_of: Tensor
    group_tops: Tensor
    places: Tensor

    def __init__(self, chains: Mapping[str, tuple[Option, ...]], groups: Groups = ()) -> None:
        super().__init__()
        empty = [name for name, chain in chains.items() if not chain]
        if empty or not chains:
            raise T3CError(f"controller: no options for {', '.join(empty) or 'any layer'}; build chains from a grid")
        self.chains = dict(chains)
        grouped = {name for group in groups for name in group}
        self.groups = (*groups, *((name,) for name in chains if name not in grouped))
        place = {name: index for index, group in enumerate(self.groups) for name in group}
        self.register_buffer("group_of", torch.tensor([place[name] for name in chains]), persistent=False)
        # A group is sampled as its longest chain; at each of its levels, where every layer is.
        tops = [group_top(group, self.chains) for group in self.groups]
        self.register_buffer("group_tops", torch.tensor(tops), persistent=False)
        places = [
            [member_level(min(level, top), top, len(chain) - 1) for level in range(max(tops) + 1)]
            for chain, top in ((chain, tops[place[name]]) for name, chain in chains.items())
        ]
        self.register_buffer("places", torch.tensor(places), persistent=False)
        # Unit i starts as a hinge at i / units, alternately convex and concave: with positive weights and one kind
        # alone the network could not bend both ways (https://arxiv.org/abs/2205.11775).
        self.hidden = nn.Parameter(torch.zeros(len(RESOURCES), _UNITS))
        self.shift = nn.Parameter(-torch.arange(_UNITS) / _UNITS * torch.ones(len(RESOURCES), 1))
        self.out = nn.Parameter(torch.zeros(len(RESOURCES), _UNITS, len(self.groups)))
        self.register_buffer("tops", torch.tensor([len(chain) - 1.0 for chain in self.chains.values()]))

    def scores(self, budget: Tensor) -> dict[str, Tensor]:
        """Score of every layer, [...] in [0, chain length - 1], for budgets [..., 3] in [0, 1] (float32)."""
        return dict(zip(self.chains, self(budget).unbind(-1), strict=True))

    def forward(self, budget: Tensor) -> Tensor:
        """The scores as one tensor [..., layers], in the order of ``chains``.

        Raises:
            T3CError: ``budget`` is not three numbers in [0, 1].
        """
        if budget.shape[-1:] != (len(RESOURCES),) or not bool(((budget >= 0) & (budget <= 1)).all()):
            raise T3CError(f"budget must be {', '.join(RESOURCES)} as fractions in [0, 1], got {budget.tolist()}")
        return self._shares(budget)[..., self.group_of] * self.tops

    def _shares(self, budget: Tensor) -> Tensor:
        """How far up its chain each group may go, [..., groups] in [0, 1]."""
        budgets = budget.reshape(-1, len(RESOURCES))
        allowed = self._allowed(torch.cat([torch.zeros_like(budgets[:1]), torch.ones_like(budgets[:1]), budgets]))
        shares = ((allowed[2:] - allowed[0]) / (allowed[1] - allowed[0])).amin(-2)
        return shares.reshape(*budget.shape[:-1], -1)

    def _allowed(self, budget: Tensor) -> Tensor:
        """Increasing functions of each resource, [..., 3, groups]."""
        weight, out = F.softplus(self.hidden) + _LEAST_WEIGHT, F.softplus(self.out) + _LEAST_WEIGHT
        total = torch.zeros_like(out[:, 0])
        # Added up one by one: the order of a matmul's sum may differ from row to row.
        for unit in range(_UNITS):
            x = budget * weight[:, unit] + self.shift[:, unit]
            bent = F.leaky_relu(x, 0.1) if unit % 2 else -F.leaky_relu(-x, 0.1)
            total = total + bent[..., None] * out[:, unit]
        return total

    def sample(self, budget: Tensor) -> Tensor:
        """A level for every layer, sampled for a budget [3] once a group: exactly one-hot [layers, longest chain], in
        the order of ``chains``, differentiable."""
        levels = gumbel_levels(self._shares(budget) * self.group_tops, self.group_tops + 1)[self.group_of]
        return torch.zeros_like(levels).scatter_add(1, self.places, levels)

    @torch.no_grad()
    def levels(self, budget: Tensor) -> Tensor:
        """Rounded scores, int64 [..., layers]: element-wise no lower for a budget no lower."""
        return torch.floor(self(budget) + 0.5).long()

    def options(self, budget: Tensor) -> dict[str, Option]:
        """The option of every layer for one budget [3]."""
        levels = self.levels(budget).tolist()
        return {name: chain[level] for (name, chain), level in zip(self.chains.items(), levels, strict=True)}


def gumbel_levels(
    scores: Tensor, lengths: int | Tensor, temperature: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Sample a level near each score: exactly one-hot [..., longest chain], differentiable in ``scores`` [...].

    The logit of level k is ``-(score - k)^2``; the gradient is that of the Gumbel-softmax at ``temperature`` (straight
    through).

    Args:
        lengths: of the chain, or int64 [...] of each score's.
    """
    longest = lengths if isinstance(lengths, int) else int(lengths.max())
    levels = torch.arange(longest, dtype=scores.dtype, device=scores.device)
    uniform = torch.rand(*scores.shape, longest, generator=generator, dtype=scores.dtype, device=scores.device)
    noise = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
    logits = (noise - (scores[..., None] - levels) ** 2) / temperature
    if isinstance(lengths, Tensor):
        logits = logits.masked_fill(levels >= lengths[..., None], -torch.inf)
    soft = F.softmax(logits, dim=-1)
    hard = F.one_hot(soft.argmax(-1), longest).to(soft.dtype)
    # Parenthesized so that the value is exactly ``hard``: bits of 5.9999995 would round weights otherwise.
    return hard + (soft - soft.detach())


class GateTable:
    """The gates of one layer's options: prefix masks [options, max_rank] and widths [options]."""

    def __init__(self, chain: tuple[Option, ...], max_rank: int) -> None:
        # A dense option of a factored layer multiplies all its components.
        ranks = torch.tensor([option.rank or max_rank for option in chain])
        self.masks = (torch.arange(max_rank) < ranks[:, None]).float()
        self.widths = torch.tensor([float(option.bits) for option in chain])
        found = sorted(set(ranks.tolist()))
        self.above = [next((rank for rank in found if rank > own), own) for own in ranks.tolist()]
        """By level: the next rank that there is, or the last."""

    def gate(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Mask [max_rank] and width (0-d) of probabilities ``levels`` [options]; both differentiable.

        The mask is the probability-weighted sum of the levels' prefix masks: Gumbel-Top-k restricted to prefixes, which
        is all that components sorted by energy leave to choose. A one-hot ``levels`` gives the level's mask and width
        exactly.
        """
        return gates_of(levels, self.masks, self.widths)


def gates_of(levels: Tensor, masks: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
    """What :meth:`GateTable.gate` gives, of one layer or of many at once: masks [..., ranks] and widths [...] of
    ``levels`` [..., options], from ``masks`` [..., options, ranks] and ``widths`` [..., options]."""
    return (levels[..., None, :] @ masks)[..., 0, :], (levels * widths).sum(-1)


def apply_gates(model: nn.Module, gates: Gates, inputs: tuple[Any, ...]) -> Any:
    """Run an elastic model (plain, or in DistributedDataParallel) at ``gates``; gradients reach the gates.

    Layers not named run as their own gate says.
    """
    prefix = "module." if isinstance(model, nn.parallel.DistributedDataParallel) else ""
    tensors: dict[str, Tensor] = {}
    for name, (mask, bits) in gates.items():
        tensors |= {f"{prefix}{name}.gate.mask": mask, f"{prefix}{name}.gate.bits": bits}
    # No two gates are one tensor, and looking for such takes a walk over the model.
    return torch.func.functional_call(model, tensors, inputs, tie_weights=False)
