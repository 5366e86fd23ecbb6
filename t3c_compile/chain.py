"""Chains: each layer's options in order, on a grid of ranks and widths."""

from dataclasses import dataclass

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


def layer_chain(layer: ElasticLayer, grid: Grid) -> tuple[Option, ...]:
    """A layer's options from least to greatest, widths tied to rank (paper, section 3.2).

    Ranks are those whose factors cost fewer multiply-adds than the dense product; when none is, the layer is dense at
    every width. Each rank has the width of its place in the ladder, and the last rank goes on to the greatest width, so
    each option is no lower than the one before.
    """
    ranks = paying_ranks(layer, grid)
    if not ranks:
        return tuple(Option("dense", 0, bits) for bits in grid.bits)
    places = [min(len(grid.bits) - 1, i * len(grid.bits) // len(ranks)) for i in range(len(ranks))]
    tied = [Option(layer.form, rank, grid.bits[place]) for rank, place in zip(ranks, places, strict=True)]
    rest = [Option(layer.form, ranks[-1], bits) for bits in grid.bits if bits > tied[-1].bits]
    return (*tied, *rest)


def paying_ranks(layer: ElasticLayer, grid: Grid) -> list[int]:
    """Ranks on the grid at which the factors need fewer multiply-adds than the dense product, evenly thinned to at
    most ``_MOST_RANKS``, of which the greatest stays."""
    if layer.form == "dense":
        return []
    cost, dense = layer_cost(layer), float(layer_cost(layer, "dense").at(0, 8)[0])
    ranks = range(grid.rank_multiple, layer.max_rank + 1, grid.rank_multiple)
    paying = [rank for rank in ranks if float(cost.at(rank, 8)[0]) < dense]
    step = max(1, -(-len(paying) // _MOST_RANKS))
    return paying[::-step][::-1]


def chains(elastic: ElasticGraphModule, grid: Grid) -> dict[str, tuple[Option, ...]]:
    """The chain of every elastic layer."""
    return {name: layer_chain(layer, grid) for name, layer in elastic_layers(elastic)}
