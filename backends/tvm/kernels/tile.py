"""The sizes of an int8 product that tuning may choose. Results are the same for any of them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """``rows`` times ``vectors`` accumulator registers; ``chunk``: how much of the image or matrix a task takes.

    Linear layers: rows of the input against vectors of output columns, ``chunk`` rows a task. Convolutions: output
    channels against vectors of pixels, ``chunk`` pixels a task (whole lines where columns are dropped).
    """

    rows: int
    vectors: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.vectors} in {self.chunk}"


# One for each product of a kernel, in order; none for the defaults.
Tiles = tuple[Tile, ...]


def tile_of(tiles: Tiles, product: int, default: Tile) -> Tile:
    """The tile of a kernel's product number ``product``."""
    return tiles[product] if tiles else default
