"""What an attention kernel is made for, and where its heads lie."""

from dataclasses import dataclass

from t3c_compile.backends.tvm.kernels.emit import Buffer, Index


@dataclass(frozen=True)
class AttentionSpec:
    """Shapes of ``query`` [batch, groups * share, rows, width], ``key`` and ``value`` [batch, groups, keys, ...].

    ``mask``: its dtype, or none; ``mask_shape``: its four dimensions, 1 where it broadcasts. ``tokens_first``: which of
    query, key, value and output lie as [batch, rows, heads, width]. ``integers``: both products are of int8, with
    widths that are multiples of 16.
    """

    batch: int | str
    groups: int
    share: int
    rows: int | str
    keys: int | str
    width: int
    value_width: int
    scale: float
    causal: bool = False
    mask: str | None = None
    mask_shape: tuple[int | str, ...] = ()
    tokens_first: tuple[bool, bool, bool, bool] = (False, False, False, False)
    integers: bool = False


@dataclass(frozen=True)
class Heads:
    """A tensor of heads: where row ``token`` of a head starts, and the step to the next row."""

    buffer: Buffer
    heads: int
    tokens: Index
    width: int
    tokens_first: bool

    def row(self, batch: Index, head: Index, token: Index) -> Index:
        if self.tokens_first:
            return ((batch * self.tokens + token) * self.heads + head) * self.width
        return ((batch * self.heads + head) * self.tokens + token) * self.width

    @property
    def step(self) -> int:
        return self.heads * self.width if self.tokens_first else self.width


@dataclass(frozen=True)
class RowTile:
    """The rows a tile takes: ``height`` from ``row`` on, of which those before ``last`` are there; where each row of
    the query and of the output starts."""

    row: Index
    last: Index
    height: int
    sources: Buffer
    targets: Buffer
