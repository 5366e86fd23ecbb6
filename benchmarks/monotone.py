"""More budget never gives less: 10,000 pairs of budgets of three real artifacts, and accuracy along their profiles.

    python -m benchmarks.monotone        (minutes; artifacts are those of benchmarks.certificates, certified there)

A pair is a budget, of limits drawn at random around what the profiles need, and a looser one. ``violations`` counts
the pairs in which the looser one is refused where the other is met, or gives a lesser profile; of budgets of drift, a
costlier one. ``greatest_fall`` is the most that accuracy on test samples falls from a profile to any greater one, in
percent. Whether that is more than chance is said by intervals of the mean difference over samples (Student's t), which
hold for all pairs of profiles at once with 95%: ``falls`` counts those above zero.
"""

import argparse
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import ttest_rel

from benchmarks.certified_models import BUILDERS, Certified
from t3c_compile.budget import Budget
from t3c_compile.drift import Array
from t3c_compile.passes.errors import T3CError
from t3c_compile.runtime import Session, load
from t3c_compile.show import show

COSTS = ("latency_ms", "energy_mj", "size_mb")


def chosen(session: Session, limits: dict[str, float]) -> int | None:
    """The index of the profile that a budget gives, None where it is refused."""
    try:
        return session.set_budget(Budget(**limits)).index
    except T3CError:
        return None


def violations(session: Session, pairs: int) -> dict[str, int]:
    """By what is loosened, the pairs of which the looser budget gives less."""
    generator = np.random.default_rng(0)
    needs = {name: [profile.needs[name] for profile in session.profiles] for name in COSTS}
    bounds = [profile.drift_bound for profile in session.profiles if profile.drift_bound is not None]

    def drawn(values: list[float]) -> float:
        low, high = np.log(0.8 * min(values)), np.log(1.2 * max(values))
        return float(np.exp(generator.uniform(low, high)))

    found = {"cost": 0, "drift": 0}
    for _ in range(pairs):
        tight = {name: drawn(values) for name, values in needs.items() if generator.random() < 0.7}
        loose = {name: limit * (1 + generator.exponential(0.3)) for name, limit in tight.items()}
        less, more = chosen(session, tight), chosen(session, loose)
        found["cost"] += less is not None and (more is None or more < less)
        drift = drawn(bounds)
        strict, wide = (
            chosen(session, tight | {"max_drift": limit}) for limit in (drift, drift * (1 + generator.exponential(0.3)))
        )
        found["drift"] += strict is not None and (wide is None or wide > strict)
    return found


def falls(right: Array) -> dict[str, float]:
    """``right`` [profiles, samples], the share of a sample's predictions that are right."""
    pairs = list(combinations(range(len(right)), 2))
    level = 1 - 0.05 / len(pairs)
    lost = {(low, high): float(right[low].mean() - right[high].mean()) for low, high in pairs}
    # Of profiles that are right on the same samples there is nothing to test.
    differ = [(low, high) for low, high in pairs if (right[low] != right[high]).any()]
    least = {
        (low, high): ttest_rel(right[low], right[high], alternative="greater").confidence_interval(level).low
        for low, high in differ
    }
    return {
        "greatest_fall": 100 * max(0.0, *lost.values()),
        "falls": sum(value > 0 for value in least.values()),
        "compared": len(pairs),
    }


def measure(model: Certified, pairs: int) -> dict[str, Any]:
    """One row of one model."""
    found = violations(load(model.path), pairs)
    right = np.stack([logits.argmax(-1) == model.labels for logits in model.of_profiles(model.samples)])
    right = right.reshape(*right.shape[:2], -1).mean(2)
    return {
        "pairs": pairs,
        "violations": found["cost"],
        "violations_of_drift": found["drift"],
        "samples": len(model.samples),
        "accuracy": " ".join(f"{100 * share:.2f}" for share in right.mean(1)),
        **falls(right),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=tuple(BUILDERS), help="only this model (default all)")
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parents[1] / "build" / "certificates")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.model or BUILDERS:
        rows.append({"model": name} | measure(BUILDERS[name](arguments.folder / name), arguments.pairs))
    show("monotone", rows, False)


if __name__ == "__main__":
    main()
