"""A budget: what a call, or a download, may cost."""

from dataclasses import dataclass, fields

from t3c_compile.passes.errors import T3CError


class BudgetError(T3CError):
    """The budget is not a budget, or no profile fits it (the message says the least that can be met)."""


@dataclass(frozen=True)
class Budget:
    """Upper limits; what is None is free.

    With ``max_drift`` the cheapest profile that meets it is chosen, otherwise the greatest that fits.

    Attributes:
        latency_ms: milliseconds a call (at the 90th percentile, with a margin) may take.
        energy_mj: millijoules a call may take.
        size_mb: megabytes (1e6 bytes) the profile's weights may take.
        max_drift: 2-norm by which logits may differ from the full model's, as the conformal certificate bounds it.
    """

    latency_ms: float | None = None
    energy_mj: float | None = None
    size_mb: float | None = None
    max_drift: float | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None and not value > 0:
                raise BudgetError(f"budget {f.name}={value!r} must be a positive number")
