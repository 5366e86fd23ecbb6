"""The conformal certificate as an artifact holds it: bounds of drift by profile, and what they promise.

numpy alone: the runtime reads it. :mod:`t3c_compile.certifying` makes it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from t3c_compile.drift import Array, drifts, logits_of, scales
from t3c_compile.passes.errors import T3CError


class CertificateError(T3CError):
    """A certificate cannot be made of what was given, or the artifact has none."""


@dataclass(frozen=True)
class ProfileBounds:
    """What is certified of one profile.

    Attributes:
        drift: bound by metric (see ``drift.METRICS``), the same for every input.
        scaled: for metrics where it is the tighter, the factor on ``drift.scales`` of an input's own logits.
        agreement: lower bound of the share of inputs with the reference's top-1 class.
        to_greatest: bound of the 2-norm of the drift from the artifact's greatest profile, which a monitor can observe.
        compared: by metric, the factor on ``drift.scales`` of the greatest profile's logits that drift from the
            reference exceeds drift from the greatest profile by; below 0 where it is always the lesser one. Empty in
            certificates of before there was this.
    """

    drift: Mapping[str, float]
    scaled: Mapping[str, float]
    agreement: float
    to_greatest: float
    compared: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ConformalCertificate:
    """The certificate of one target's library, with bounds for its profiles in their order.

    ``alpha`` is the share of inputs that may exceed a bound, ``delta`` the chance that the calibration samples (so many
    as ``samples``) mislead, ``reference`` what drift is measured from, and ``statement`` the promise in words.
    """

    alpha: float
    delta: float
    samples: int
    reference: str
    statement: str
    profiles: tuple[ProfileBounds, ...]

    def bounds(self, profile: int, outputs: Any) -> "InputBounds":
        """The bounds for the inputs of a call of the profile that gave ``outputs``."""
        bounds, logits = self.profiles[profile], logits_of(outputs)
        scale = scales(logits)
        drift = {
            metric: bounds.scaled[metric] * scale[metric] if metric in bounds.scaled else np.full(len(logits), bound)
            for metric, bound in bounds.drift.items()
        }
        return InputBounds(drift, bounds.agreement, self.statement)

    def compared_bounds(self, profile: int, outputs: Any, greatest: Any) -> "InputBounds":
        """The same where the greatest profile gave ``greatest`` for these inputs: its distance is known, and what is
        uncertain is how far it drifts itself.

        Raises:
            CertificateError: the certificate is of before there were such bounds.
        """
        bounds, logits, near = self.profiles[profile], logits_of(outputs), logits_of(greatest)
        if not bounds.compared:
            raise CertificateError(
                "the certificate has no bounds for profiles that are compared: an older version made it; run "
                "t3c-compile certify on the artifact again"
            )
        apart, scale = drifts(near, logits), scales(near)
        drift = {m: np.maximum(apart[m] + factor * scale[m], 0.0) for m, factor in bounds.compared.items()}
        return InputBounds(drift, bounds.agreement, self.statement)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "ConformalCertificate":
        profiles = tuple(ProfileBounds(**_known(ProfileBounds, entry)) for entry in data["profiles"])
        return ConformalCertificate(**{**_known(ConformalCertificate, data), "profiles": profiles})


@dataclass(frozen=True)
class InputBounds:
    """The bounds that apply to the inputs of one call: ``drift`` by metric, float64 [samples]; ``agreement`` and
    ``statement`` as in the certificate."""

    drift: Mapping[str, Array]
    agreement: float
    statement: str


def _known(kind: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a data class among ``data``: later versions may write more, earlier ones wrote fewer."""
    return {field.name: data[field.name] for field in fields(kind) if field.name in data}
