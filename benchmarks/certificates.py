"""The certificates of three small models: do they hold, are they tight, do they follow the drift of each input?

    python -m benchmarks.certificates        (about 15 minutes on 2 cores; artifacts in --folder are used again)

The digits models, and a small Llama over the bytes of Python's library. Twenty times samples are split at random: some
certify and the others are counted, the share of them within the bounds, the least of all profiles, metrics and forms.
Halves: of the test samples, which are few. Pool: of thousands drawn anew, of which 250, 500, 1000 or 2000 certify, so
that it shows how many samples a certificate wants. The forms of a bound: ``plain``, one number a profile; ``call``,
what ``run(certificate=True)`` gives; ``compared``, what ``run(certificate="compared")`` does.
A monitor watches every profile, on the halves as they are and with noise on the pixels: in an artifact of integers
alone, and in one that holds the full model. Writes ``benchmarks/results/certificates.json``.
"""

import argparse
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest, spearmanr

from benchmarks.certified_models import BUILDERS, Certified
from t3c_compile.certifying import (
    Scores,
    agreement_bound,
    certify,
    chance_of_each,
    order_statistic,
    profile_bounds,
    scores_of,
)
from t3c_compile.conformal import ConformalCertificate
from t3c_compile.drift import METRICS, Array
from t3c_compile.monitor import DriftWarning, Monitor
from t3c_compile.show import show

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "certificates.json"
ALPHA, DELTA, LEVEL = 0.05, 0.05, 0.01
# Deviations of the noise that shifts the inputs; pixels have one of about 1.
NOISES = (0.1, 0.2, 0.4, 0.8)
SIZES = (250, 500, 1000, 2000)
"""How many of the pool certify."""
FORMS = ("plain", "call", "compared")
_BATCH = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=tuple(BUILDERS), help="only this model (default all)")
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "certificates", help="where artifacts are kept")
    arguments = parser.parse_args()
    chosen = arguments.model or list(BUILDERS)
    kept = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else []
    found = {result["model"]: result for result in kept if result["model"] not in chosen}
    for name in chosen:
        found[name] = measure(BUILDERS[name](arguments.folder / name), arguments.splits)
        ordered = [{"model": name, **found[name]} for name in BUILDERS if name in found]
        RESULTS.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    title = f"{arguments.splits} splits, alpha {ALPHA}, delta {DELTA}, level of the monitor {LEVEL}"
    keys = dict.fromkeys(key for name in chosen for key in found[name] if key != "model")
    show(title, [{"measure": key, **{name: str(found[name].get(key)) for name in chosen}} for key in keys], False)


def see(model: Certified, inputs: Array) -> Scores:
    """What ``certify`` scores, [profiles, samples], of every profile on ``inputs``, batch by batch."""
    chunks = [inputs[start : start + _BATCH] for start in range(0, len(inputs), _BATCH)]
    parts = [scores_of(model.of_profiles(chunk), model.full(chunk)) for chunk in chunks]
    return {key: np.concatenate([part[key] for part in parts], axis=1) for key in parts[0]}


def part_of(seen: Scores, chosen: Array) -> Scores:
    return {key: values[:, chosen] for key, values in seen.items()}


def certificate_of(seen: Scores) -> ConformalCertificate:
    """What ``certify`` makes of these samples, without running them again."""
    profiles, count = seen["agrees"].shape
    chance = chance_of_each(count, profiles, ALPHA, DELTA)
    by_profile = ({key: values[index] for key, values in seen.items()} for index in range(profiles))
    found = tuple(profile_bounds(one, ALPHA, chance) for one in by_profile)
    return ConformalCertificate(ALPHA, DELTA, count, "the full model", "", found)


def bounds_of(certificate: ConformalCertificate, seen: Scores) -> dict[str, dict[str, Array]]:
    """What a certificate says of samples: by form and metric, [profiles, samples]."""
    found: dict[str, dict[str, Array]] = {form: {} for form in FORMS}
    for metric in METRICS:
        scale = seen[f"{metric} scale"]
        apart = seen[metric] - seen[f"{metric} beyond"] * scale[-1]
        plain, call, compared = np.empty_like(scale), np.empty_like(scale), np.empty_like(scale)
        for index, entry in enumerate(certificate.profiles):
            plain[index] = entry.drift[metric]
            call[index] = entry.scaled[metric] * scale[index] if metric in entry.scaled else plain[index]
            compared[index] = np.maximum(apart[index] + entry.compared[metric] * scale[-1], 0)
        # The greatest profile is compared with nothing.
        compared[-1] = call[-1]
        for form, bounds in zip(FORMS, (plain, call, compared), strict=True):
            found[form][metric] = bounds
    return found


def measure(model: Certified, splits: int) -> dict[str, Any]:
    """Everything of one model."""
    samples, size = model.samples, len(model.samples) // 2
    like, pool = see(model, samples), see(model, model.draw(model.fresh, 0))
    made, first = certificate_of(part_of(like, np.arange(size))), samples[:size]
    again = certify(model.path, [first], model.full(first), alpha=ALPHA, delta=DELTA)
    if any(not np.isclose(a.drift["l2"], b.drift["l2"]) for a, b in zip(made.profiles, again.profiles, strict=True)):
        raise RuntimeError("certify gives other bounds than these scores do")
    shifted = {noise: see(model, noisy(samples, noise)) for noise in NOISES if samples.dtype == np.float32}
    joint: dict[str, list[float]] = {metric: [] for metric in METRICS}
    for first, _ in split(like, size, splits):
        plain = certificate_of(part_of(like, first)).profiles
        for metric in METRICS:
            ratios = joint_bounds(like[metric][:, first]) / [entry.drift[metric] for entry in plain]
            joint[metric].extend(ratios)
    return {
        "profiles": len(like["agrees"]),
        "samples": size,
        "fresh": model.fresh,
        "mean_drifts": [round(float(mean), 4) for mean in like["l2"].mean(1)],
        **{f"halves_{key}": value for key, value in of_splits(like, size, splits).items()},
        **{f"pool{n}_{key}": value for n in SIZES for key, value in of_splits(pool, n, splits).items()},
        **{f"joint_{metric}_median": float(np.median(ratios)) for metric, ratios in joint.items()},
        **spectral(model, like),
        **watched(like, shifted, size, splits),
    }


def split(seen: Scores, size: int, splits: int) -> Iterator[tuple[Array, Array]]:
    """Random ``size`` of the samples, and the others."""
    for number in range(splits):
        order = np.random.default_rng(number).permutation(seen["agrees"].shape[1])
        yield order[:size], order[size:]


def of_splits(seen: Scores, size: int, splits: int) -> dict[str, Any]:
    """Whether bounds hold, what they are over the 99th percentile of drift, and how they go with it."""
    coverage: list[float] = []
    ratios: dict[str, list[float]] = {}
    pearson: dict[str, list[float]] = {}
    ordered: list[float] = []
    for first, second in split(seen, size, splits):
        certificate, rest = certificate_of(part_of(seen, first)), part_of(seen, second)
        bounds = bounds_of(certificate, rest)
        coverage.append(least_coverage(certificate, rest))
        for form in FORMS:
            for metric in METRICS:
                p99 = np.quantile(rest[metric], 0.99, axis=1)
                ratios.setdefault(f"{form}_{metric}", []).extend(bounds[form][metric].mean(1) / p99)
            for name, start in {form: 0, f"{form}_but_the_least": 1}.items():
                both = bounds[form]["l2"][start:].ravel(), rest["l2"][start:].ravel()
                pearson.setdefault(name, []).append(float(np.corrcoef(*both)[0, 1]))
        ordered.append(spearmanr(bounds["compared"]["l2"].mean(1), rest["l2"].mean(1))[0])
    return {
        "held": share(coverage),
        "least_coverage": min(coverage),
        **{f"{ratio}_median": float(np.median(values)) for ratio, values in ratios.items()},
        **{f"{ratio}_greatest": float(max(values)) for ratio, values in ratios.items()},
        **{f"pearson_{name}_median": float(np.median(values)) for name, values in pearson.items()},
        **{f"pearson_{name}_least": min(values) for name, values in pearson.items()},
        "spearman_compared_least": min(ordered),
    }


def watched(like: Scores, shifted: dict[float, Scores], size: int, splits: int) -> dict[str, Any]:
    """What a monitor says of samples as they are and of shifted ones."""
    alarms: dict[tuple[str, float], list[int | None]] = {}
    within: dict[float, list[float]] = {noise: [] for noise in shifted}
    for first, second in split(like, size, splits):
        certificate = certificate_of(part_of(like, first))
        for noise, seen in {0.0: like, **shifted}.items():
            part = part_of(seen, second)
            for index, entry in enumerate(certificate.profiles[:-1]):
                by_greatest = {
                    "integers": (entry.to_greatest, part["to_greatest"][index]),
                    "full_model": (entry.drift["l2"], part["l2"][index]),
                }
                for greatest, (bound, drift) in by_greatest.items():
                    alarms.setdefault((greatest, noise), []).append(inputs_to_alarm(bound, drift))
            if noise:
                within[noise].append(least_coverage(certificate, part))
    return {
        "coverage_at_noise": {str(noise): float(np.median(shares)) for noise, shares in within.items()},
        **{f"alarms_{greatest}_noise_{noise:g}": told(found) for (greatest, noise), found in alarms.items()},
    }


def spectral(model: Certified, seen: Scores) -> dict[str, float]:
    """The spectral certificate on the test samples: the order of its bounds, and the share that keeps them, of all
    profiles and the least of one."""
    bounds = np.array(model.spectral)
    drift = seen["l2"]
    return {
        "spearman_spectral": float(spearmanr(bounds, drift.mean(1))[0]),
        "spectral_coverage": float((drift <= bounds[:, None]).mean()),
        "spectral_least_coverage": float((drift <= bounds[:, None]).mean(1).min()),
    }


def share(shares: list[float]) -> str:
    """In how many splits coverage was what is promised, and the 95% interval of the share."""
    kept = sum(value >= 1 - ALPHA for value in shares)
    interval = binomtest(kept, len(shares)).proportion_ci(0.95)
    return f"{kept}/{len(shares)} ({interval.low:.2f} to {interval.high:.2f})"


def told(alarms: list[int | None]) -> str:
    """How many alarms there were, and after how many inputs."""
    found = [inputs for inputs in alarms if inputs is not None]
    return f"{len(found)}/{len(alarms)}" + (f" after {np.median(found):.0f}" if found else "")


def noisy(images: Array, noise: float) -> Array:
    drawn = np.random.default_rng(0).standard_normal(images.shape)
    return (images + noise * drawn).astype(np.float32)


def least_coverage(certificate: ConformalCertificate, seen: Scores) -> float:
    """The least share of samples within their bounds, of all profiles, metrics and forms; 0 where top-1 agreement is
    below its bound and the samples are enough to say so, at 1%."""
    bounds = bounds_of(certificate, seen)
    shares = [(seen[metric] <= values).mean(1).min() for form in bounds.values() for metric, values in form.items()]
    count = seen["agrees"].shape[1]
    # Texts of which every prediction agrees are rare: of 200 there may be none.
    most = [1 - agreement_bound(count - int(agrees.sum()), count, 0.01) for agrees in seen["agrees"]]
    agreed = [entry.agreement <= share for entry, share in zip(certificate.profiles, most, strict=True)]
    return float(min(shares)) if all(agreed) else 0.0


def joint_bounds(drift: Array) -> Array:
    """[profiles, samples] -> [profiles]: bounds from one score for all profiles, the greatest drift in units of each
    profile's mean, which a fifth of the samples gives. That is one statement of eleven in place of eleven a profile."""
    fifth = drift.shape[1] // 5
    units = drift[:, :fifth].mean(1)
    scores = np.sort((drift[:, fifth:] / units[:, None]).max(0))
    bounds: Array = units * scores[order_statistic(len(scores), ALPHA, DELTA / 11) - 1]
    return bounds


def inputs_to_alarm(bound: float, observed: Array) -> int | None:
    """After how many samples a monitor that compares every one contradicts the certificate of a profile."""
    monitor = Monitor([bound, 0.0], ALPHA, 1.0, LEVEL, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DriftWarning)
        for drift in observed:
            monitor.observe(0, np.array([drift]))
            if monitor.contradicted:
                return monitor.compared
    return None


if __name__ == "__main__":
    main()
