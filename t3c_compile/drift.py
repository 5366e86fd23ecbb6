"""Drift: how far the logits of a profile are from the reference's, one number a sample.

numpy alone: the runtime measures it too.
"""

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

METRICS = {
    "linf": "the greatest absolute difference of a logit",
    "l2": "the 2-norm of the difference of all logits",
    "kl": "KL(reference || profile) in nats, the greatest of the sample's predictions",
}

_LEAST_VARIANCE = 1e-6
"""Nobody is that certain: without it the quotient of a tiny drift and a tinier variance would set the bound."""


def logits_of(outputs: Any) -> Array:
    """The logits among a model's outputs: the first of them."""
    first: Array = outputs[0] if isinstance(outputs, tuple) else outputs
    return first


def drifts(reference: Array, logits: Array) -> dict[str, Array]:
    """Every metric of :data:`METRICS`; both [samples, ..., classes] -> float64 [samples]."""
    difference = _rows(logits.astype(np.float64) - reference)
    full, found = _log_softmax(reference), _log_softmax(logits)
    divergence = (np.exp(full) * (full - found)).sum(-1)
    return {
        "linf": np.abs(difference).max(1),
        "l2": np.linalg.norm(difference, axis=1),
        # A sum of terms of both signs: rounding may leave it just below zero.
        "kl": np.maximum(_rows(divergence).max(1), 0.0),
    }


def scales(logits: Array) -> dict[str, Array]:
    """What drift is expected to be in proportion to, by metric, from a profile's own logits: float64 [samples].

    An uncertain input drifts more. With p the softmax, sum p (1 - p) is the variance of the class. To second order KL
    is half the variance of the drift under p, so it goes with that sum, and the norms with its root.
    """
    chances = np.exp(_log_softmax(logits))
    variance = _rows((chances * (1 - chances)).sum(-1)).max(1)
    variance = np.maximum(variance, _LEAST_VARIANCE)
    root = np.sqrt(variance)
    return {"linf": root, "l2": root, "kl": variance}


def agrees(reference: Array, logits: Array) -> Array:
    """Whether all predictions of a sample have the same top-1 class: [samples, ..., classes] -> bool [samples]."""
    same: Array = _rows(reference.argmax(-1) == logits.argmax(-1)).all(1)
    return same


def _rows(values: Array) -> Array:
    return values.reshape(len(values), -1)


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
