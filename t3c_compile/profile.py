"""Profiles: one option for every elastic layer, and the totally ordered set of them."""

from dataclasses import asdict, dataclass, field
from typing import Any

from t3c_compile.passes.errors import T3CError
from t3c_compile.passes.option import Option

Activation = tuple[float, int]


@dataclass
class Profile:
    """One option for every elastic layer, with what is known of it.

    Attributes:
        name: ``p0`` is the least; numbers rise with size.
        options: by layer.
        activations: scale and zero point of every int8 tensor, by layer and tensor (``x``, ``h``, ``g``). A layer that
            has none takes its activations in float32 (weight-only), or is a table of look-ups alone.
        size_bytes: weights of this profile alone at its own widths.
        quality: on calibration data: ``kl`` (nats, full against this profile), ``agreement`` (top-1 share),
            ``drift`` (mean logit 2-norm; ``drift_p95`` and ``drift_max`` of the same), and ``accuracy`` where labels
            were given.
        certificate: ``bound`` (logit 2-norm) that a ``share`` of inputs keeps, divided by ``layers``, with the
            ``statement`` in words.
        costs: by target: ``latency_ms``, ``energy_mj``, and the ``source`` of each (``energy_source``).
    """

    name: str
    options: dict[str, Option]
    activations: dict[str, dict[str, Activation]]
    size_bytes: int
    quality: dict[str, float] = field(default_factory=dict)
    certificate: dict[str, Any] = field(default_factory=dict)
    costs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Profile":
        options = {name: Option(**option) for name, option in data["options"].items()}
        activations = {
            layer: {tensor: (float(scale), int(zero)) for tensor, (scale, zero) in tensors.items()}
            for layer, tensors in data["activations"].items()
        }
        return Profile(**{**data, "options": options, "activations": activations})


@dataclass
class ProfileSet:
    """Profiles from least to greatest, each element-wise no lower than the one before.

    ``order`` says how upgrades were ordered; ``notes`` what was dropped and why.
    """

    profiles: list[Profile]
    order: str
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.profiles:
            raise T3CError("a profile set needs at least one profile")
        for low, high in zip(self.profiles, self.profiles[1:], strict=False):
            for layer, option in high.options.items():
                if not option.no_lower_than(low.options[layer]):
                    raise T3CError(
                        f"profiles are not nested: layer {layer} is {low.options[layer]} in {low.name} and "
                        f"{option} in {high.name}"
                    )

    def store_ranks(self) -> dict[str, int]:
        """The rank each layer's factors are stored to: its greatest; a layer at 32 bits is stored dense."""
        stored = [item for profile in self.profiles for item in profile.options.items() if item[1].bits != 32]
        return {layer: option.rank for layer, option in stored}

    def to_json(self) -> dict[str, Any]:
        return {"profiles": [p.to_json() for p in self.profiles], "order": self.order, "notes": self.notes}

    @staticmethod
    def from_json(data: dict[str, Any]) -> "ProfileSet":
        return ProfileSet([Profile.from_json(p) for p in data["profiles"]], data["order"], list(data["notes"]))
