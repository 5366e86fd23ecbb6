"""How a bound could follow from the distance to the greatest profile: forms tried for ``certificate="compared"``.

    python -m benchmarks.compared_forms --model vit        (a minute; artifacts are those of benchmarks.certificates)

Drift is in 2-norm, ``apart`` the distance from the greatest profile, ``scale`` the root of its class variance. Each
form has one factor for each profile, an order statistic of the samples that certify, as in ``certifying.py``; the
others are counted. ``pearson`` and ``but the least`` are medians of twenty splits, over all profiles and without the
least, and ``quotient`` the mean bound over the 99th percentile of drift, its mean over profiles and splits.

- ``sum``: ``apart + factor * scale``, what ``compared`` is.
- ``root of squares``: ``sqrt(apart^2 + factor * scale^2)``, as if drifts stood at right angles.
- ``no scale``: ``apart + factor``.
- ``scale + 1/4``: ``apart + factor * (scale + 1/4)``.
- ``class means``: the sum, apart from the greatest profile's logits plus their mean difference from the full model's by
  class, which the first fifth of the samples gives; the others certify.
- ``linear map``: the same with a linear map of the logits, by ridge regression.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.certificates import ALPHA, DELTA, split
from benchmarks.certified_models import BUILDERS
from t3c_compile.certifying import chance_of_each, order_statistic
from t3c_compile.drift import Array, scales
from t3c_compile.show import show

SPLITS, RIDGE = 20, 0.03
_BATCH = 500


def class_means(greatest: Array, lacking: Array) -> Callable[[Array], Array]:
    mean = lacking.mean(0)
    return lambda logits: logits + mean


def linear_map(greatest: Array, lacking: Array) -> Callable[[Array], Array]:
    """Logits to logits plus what they lack, from samples of both."""
    centre, unit, mean = greatest.mean(0), greatest.std(0), lacking.mean(0)
    x = (greatest - centre) / unit
    weights = np.linalg.solve(x.T @ x + RIDGE * len(x) * np.eye(x.shape[1]), x.T @ (lacking - mean))
    return lambda logits: logits + (logits - centre) / unit @ weights + mean


FORMS: dict[str, tuple[int, float, Callable[[Array, Array], Callable[[Array], Array]] | None]] = {
    "sum": (1, 0.0, None),
    "root of squares": (2, 0.0, None),
    "no scale": (1, np.inf, None),
    "scale + 1/4": (1, 0.25, None),
    "class means": (1, 0.0, class_means),
    "linear map": (1, 0.0, linear_map),
}
"""Of each: the power in which distance and scale add, what is added to the scale (without end: the scale says nothing),
and what learns to correct the logits."""


def measure(full: Array, logits: Array, size: int) -> list[dict[str, object]]:
    """One row a form, from logits [samples, classes] and [profiles, samples, classes]."""
    drift, greatest = np.linalg.norm(logits - full, axis=2), logits[-1]
    chance = chance_of_each(size, len(logits), ALPHA, DELTA)
    rows: list[dict[str, object]] = []
    for form, (power, added, learn) in FORMS.items():
        unit = np.ones(len(full)) if np.isinf(added) else (scales(greatest)["l2"] + added) ** power
        found = []
        for first, second in split({"agrees": drift}, size, SPLITS):
            near, certify = greatest, first
            if learn is not None:
                fifth, certify = first[: size // 5], first[size // 5 :]
                near = learn(greatest[fifth], (full - greatest)[fifth])(greatest)
            apart = np.linalg.norm(logits - near, axis=2)
            beyond = np.sort((drift**power - apart**power)[:, certify] / unit[certify])
            factor = beyond[:, order_statistic(len(certify), ALPHA, chance) - 1, None]
            bound = np.maximum(apart[:, second] ** power + factor * unit[second], 0) ** (1 / power)
            seen = drift[:, second]
            pearson = [float(np.corrcoef(bound[low:].ravel(), seen[low:].ravel())[0, 1]) for low in (0, 1)]
            found.append([*pearson, float((bound.mean(1) / np.quantile(seen, 0.99, axis=1)).mean())])
        pearson, rest, quotient = zip(*found, strict=True)
        medians = {"pearson": float(np.median(pearson)), "but the least": float(np.median(rest))}
        rows.append({"form": form, "certify": size, **medians, "quotient": float(np.mean(quotient))})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("cnn", "vit"), default="vit")
    parser.add_argument("--sizes", type=int, nargs="+", default=[250, 1000], help="how many certify")
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parents[1] / "build" / "certificates")
    arguments = parser.parse_args()
    model = BUILDERS[arguments.model](arguments.folder / arguments.model)
    pool = model.draw(model.fresh, 0)
    chunks = [pool[start : start + _BATCH] for start in range(0, len(pool), _BATCH)]
    full = np.concatenate([model.full(chunk) for chunk in chunks]).astype(np.float64)
    logits = np.concatenate([np.stack(model.of_profiles(chunk)) for chunk in chunks], axis=1).astype(np.float64)
    rows = [row for size in arguments.sizes for row in measure(full, logits, size)]
    show(f"{arguments.model}: forms of a compared bound", rows, False)


if __name__ == "__main__":
    main()
