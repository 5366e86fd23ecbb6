"""Chains: each layer's options in order, on a grid of ranks and widths."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from t3c_compile.cost import layer_cost
from t3c_compile.passes.elastic import ElasticLayer, elastic_layers
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.option import Option

# A layer of thousands of components gains nothing from a step of one in a hundred, and each step is measured.
_MOST_RANKS = 48


@dataclass(frozen=True)
class Grid:
    """What a target can run: ranks that are multiples of ``rank_multiple``, and the weight widths it has."""

    rank_multiple: int = 8
    bits: tuple[int, ...] = (4, 6, 8)

    def join(self, other: "Grid") -> "Grid":
        """The grid of options both can run."""
        multiple = max(self.rank_multiple, other.rank_multiple)
        while multiple % self.rank_multiple or multiple % other.rank_multiple:
            multiple += 1
        return Grid(multiple, tuple(b for b in self.bits if b in other.bits))


def layer_chain(layer: ElasticLayer, grid: Grid, pays: Callable[[int], bool] | None = None) -> tuple[Option, ...]:
    """A layer's options from least to greatest, widths tied to rank (paper, section 3.2).

    Ranks are those whose factors cost fewer multiply-adds than the dense product and for which ``pays`` is true; when
    none is, the layer is dense at every width. Each rank has the width of its place in the ladder, and the last rank
    goes on to the greatest width, so each option is no lower than the one before.
    """
    ranks = [rank for rank in paying_ranks(layer, grid) if pays is None or pays(rank)]
    if not ranks:
        return tuple(Option("dense", 0, bits) for bits in grid.bits)
    places = [min(len(grid.bits) - 1, i * len(grid.bits) // len(ranks)) for i in range(len(ranks))]
    tied = [Option(layer.form, rank, grid.bits[place]) for rank, place in zip(ranks, places, strict=True)]
    rest = [Option(layer.form, ranks[-1], bits) for bits in grid.bits if bits > tied[-1].bits]
    return (*tied, *rest)


def paying_ranks(layer: ElasticLayer, grid: Grid) -> list[int]:
    """Ranks on the grid at which the factors need fewer multiply-adds than the dense product, evenly thinned to at
    most ``_MOST_RANKS``, of which the greatest stays.

    None where the grid has one alone: every profile would lose what is beyond it. The last layer of ten classes at rank
    8 is such a one, and no layer before it makes up for two logits that depend on the others.
    """
    if layer.form == "dense" or layer.max_rank < 2 * grid.rank_multiple:
        return []
    cost, dense = layer_cost(layer), float(layer_cost(layer, "dense").at(0, 8)[0])
    ranks = range(grid.rank_multiple, layer.max_rank + 1, grid.rank_multiple)
    paying = [rank for rank in ranks if float(cost.at(rank, 8)[0]) < dense]
    step = max(1, -(-len(paying) // _MOST_RANKS))
    return paying[::-step][::-1]


def chains(
    elastic: ElasticGraphModule, grid: Grid, pays: Callable[[str, int], bool] | None = None
) -> dict[str, tuple[Option, ...]]:
    """The chain of every elastic layer; ``pays(layer, rank)`` as for :func:`layer_chain`."""
    return {
        name: layer_chain(layer, grid, None if pays is None else partial(pays, name))
        for name, layer in elastic_layers(elastic)
    }


def dense_layers(elastic: ElasticGraphModule, ladder: Mapping[str, tuple[Option, ...]]) -> list[str]:
    """The layers with factors that the chains of ``ladder`` run dense."""
    return [name for name, layer in elastic_layers(elastic) if layer.form != "dense" == ladder[name][0].form]
