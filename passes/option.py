"""What one elastic layer may be: a form, a rank and a width."""

from dataclasses import dataclass

FORMS = ("dense", "svd", "tucker2", "cp")


@dataclass(frozen=True, order=True)
class Option:
    """One way to run a layer.

    ``form`` is one of :data:`FORMS`; ``rank`` is the number of components kept (0 for ``dense``); ``bits`` is the
    weight width, 4 to 8, or 32 for floating point.
    """

    form: str
    rank: int
    bits: int

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"option form {self.form!r} is not one of {', '.join(FORMS)}")
        if self.rank < 0 or (self.form != "dense" and self.rank == 0):
            raise ValueError(f"option {self.form}: rank {self.rank} must be positive")
        if self.bits not in (4, 5, 6, 7, 8, 32):
            raise ValueError(f"option {self.form}: bits {self.bits} must be 4 to 8, or 32")

    def no_lower_than(self, other: "Option") -> bool:
        """Element-wise order of a chain: same form, rank and bits at least the other's."""
        return self.form == other.form and self.rank >= other.rank and self.bits >= other.bits

    def __str__(self) -> str:
        return f"w{self.bits}" if self.form == "dense" else f"{self.form} r{self.rank} w{self.bits}"
