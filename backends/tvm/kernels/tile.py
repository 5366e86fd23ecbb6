"""The sizes of an int8 product that tuning may choose. Results are the same for any of them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """``rows`` times ``vectors`` of columns in accumulator registers; a task takes ``chunk`` rows."""

    rows: int
    vectors: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.vectors} in {self.chunk}"


# One for each product of a kernel that has a choice, in order; none for the defaults.
Tiles = tuple[Tile, ...]
