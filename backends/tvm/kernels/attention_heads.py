"""What an attention kernel is made for, and where its heads lie."""

from dataclasses import dataclass

from t3c_compile.backends.tvm.kernels.emit import Buffer, Index
from t3c_compile.backends.tvm.kernels.finish import PLAIN, Finish

Size = tuple[int | str, ...]
"""A product of numbers and sizes that are known at run time alone."""


@dataclass(frozen=True)
class Layout:
    """Where the heads of a tensor of ``shape`` lie: rows one after the other in memory, the first of them at ``start``,
    and the steps to the next sample, head and token, in elements."""

    shape: Size
    batch: Size
    head: Size
    token: Size
    start: int = 0


def plain(batch: int | str, heads: int, tokens: int | str, width: int, tokens_first: bool = False) -> Layout:
    """Of a tensor [batch, heads, tokens, width], or [batch, tokens, heads, width]."""
    if tokens_first:
        return Layout((batch, tokens, heads, width), (tokens, heads, width), (width,), (heads, width))
    return Layout((batch, heads, tokens, width), (heads, tokens, width), (tokens, width), (width,))


@dataclass(frozen=True)
class AttentionSpec:
    """Sizes of ``query`` [batch, groups * share, rows, width], ``key`` and ``value`` [batch, groups, keys, ...].

    ``layouts``: of query, key, value and output. ``mask``: its dtype, or none; ``mask_shape``: its four dimensions, 1
    where it broadcasts. ``integers``: both products are of int8, with widths that are multiples of 16. ``finish``: of
    the output, rounding alone.
    """

    batch: int | str
    groups: int
    share: int
    rows: int | str
    keys: int | str
    width: int
    value_width: int
    layouts: tuple[Layout, Layout, Layout, Layout]
    scale: float
    causal: bool = False
    mask: str | None = None
    mask_shape: Size = ()
    integers: bool = False
    finish: Finish = PLAIN


@dataclass(frozen=True)
class Places:
    """Where the rows of heads lie, ``tokens`` each; ``layout`` with its steps as indices: sample, head, token."""

    tokens: Index
    start: int
    steps: tuple[Index, Index, Index]

    def row(self, batch: Index, head: Index, token: Index) -> Index:
        """Where row ``token`` of a head starts."""
        return self.start + batch * self.steps[0] + head * self.steps[1] + token * self.steps[2]

    @property
    def step(self) -> Index:
        """From a row to the next."""
        return self.steps[2]


@dataclass(frozen=True)
class Heads(Places):
    """A tensor of heads."""

    buffer: Buffer


@dataclass(frozen=True)
class RowTile:
    """The rows a tile takes: ``height`` from ``row`` on, of which those before ``last`` are there; where each row of
    the query and of the output starts."""

    row: Index
    last: Index
    height: int
    sources: Buffer
    targets: Buffer
