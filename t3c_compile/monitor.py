"""A drift monitor: now and then the greatest profile runs beside the active one, and tests the certificate.

The certificate says that an input exceeds its bound with a probability of at most alpha. Each input compared is a bet
against that, at odds that are fair if it is true: staked on a probability q above alpha, a unit becomes q / alpha
where the bound is exceeded and (1 - q) / (1 - alpha) where it is not. The stake is spread over many q. While the
certificate holds the wealth is a supermartingale, and the chance that it ever reaches 1 / s is at most s (J. Ville,
1939): one may look after every call, for ever. See I. Waudby-Smith and A. Ramdas, "Estimating means of bounded random
variables by betting", 2024, https://arxiv.org/abs/2010.09686, and G. Shafer, "Testing by betting", 2021,
https://arxiv.org/abs/1903.06991.
"""

import warnings
from collections.abc import Sequence

import numpy as np

from t3c_compile.drift import Array
from t3c_compile.passes.errors import T3CError

_BETS = 63
"""How many probabilities between alpha and 1 are bet on."""


class DriftWarning(UserWarning):
    """Inputs drift more than the certificate allows: they are not distributed as the calibration samples were."""


class Monitor:
    """What :meth:`t3c_compile.Session.monitor` gives.

    Attributes:
        compared: how many inputs ran in the greatest profile too.
        exceeded: how many of them drifted by more than the bound.
        contradicted: whether the certificate has been contradicted, once and for all, at ``significance``: a
            certificate that holds is contradicted with no more than that probability, however long it is watched.
    """

    def __init__(self, bounds: Sequence[float], alpha: float, fraction: float, significance: float, seed: int) -> None:
        """``bounds`` are by profile, of the drift from the greatest in 2-norm; ``alpha`` is the certificate's."""
        if not 0 <= fraction <= 1:
            raise T3CError(f"fraction={fraction} must lie between 0 and 1")
        if not 0 < significance < 1:
            raise T3CError(f"significance={significance} must lie between 0 and 1")
        self.compared = 0
        self.exceeded = 0
        self.contradicted = False
        self._bounds = bounds
        self._alpha = alpha
        self._fraction = fraction
        self._significance = significance
        self._random = np.random.default_rng(seed)
        self._bets = np.linspace(alpha, 1, _BETS + 2)[1:-1]

    def chooses(self, profile: int) -> bool:
        """Whether a call of the profile is to be compared; the greatest never is."""
        return profile < len(self._bounds) - 1 and self._random.random() < self._fraction

    def observe(self, profile: int, drift: Array) -> None:
        """Take in the ``drift`` [samples] of a call from the greatest profile; warns the first time that the
        certificate is contradicted."""
        self.compared += len(drift)
        self.exceeded += int((drift > self._bounds[profile]).sum())
        if not self.contradicted and self.wealth >= 1 / self._significance:
            self.contradicted = True
            warnings.warn(
                f"the certificate does not hold for these inputs: {self.exceeded} of {self.compared} drifted by more "
                f"than their bound, a share of {self._alpha:g} may (level {self._significance:g}); certify on inputs "
                "like these, or run a greater profile",
                DriftWarning,
                stacklevel=3,
            )

    @property
    def wealth(self) -> float:
        """Evidence against the certificate: what a unit staked on its being wrong has become."""
        within = self.compared - self.exceeded
        gains = self.exceeded * np.log(self._bets / self._alpha)
        gains += within * np.log((1 - self._bets) / (1 - self._alpha))
        with np.errstate(over="ignore"):
            return float(np.exp(np.logaddexp.reduce(gains) - np.log(_BETS)))
