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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest, spearmanr

from benchmarks.certified_models import BUILDERS, Certified
from t3c_compile.certifying import agreement_bound, certify, chance_of_each, order_statistic, profile_bounds
from t3c_compile.conformal import ConformalCertificate
from t3c_compile.drift import METRICS, Array, agrees, drifts, scales
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


@dataclass(frozen=True)
class Seen:
    """What a certificate can say of samples, and what is true of them, each [profiles, samples] by metric: the drift,
    its distance from the greatest profile, and the scales of the profile's and of the greatest profile's logits."""

    drift: dict[str, Array]
    apart: dict[str, Array]
    scale: dict[str, Array]
    near: dict[str, Array]
    agrees: Array

    def part(self, chosen: Array) -> "Seen":
        fields = (self.drift, self.apart, self.scale, self.near)
        return Seen(
            *({m: values[:, chosen] for m, values in field.items()} for field in fields), self.agrees[:, chosen]
        )

    def certificate(self) -> ConformalCertificate:
        """What ``certify`` makes of these samples, without running them again."""
        profiles, count = self.agrees.shape
        chance = chance_of_each(count, profiles, ALPHA, DELTA)
        scores = {"agrees": self.agrees, "to_greatest": self.apart["l2"]}
        for metric, drift in self.drift.items():
            beyond = (drift - self.apart[metric]) / self.near[metric]
            scores |= {metric: drift, f"{metric} scale": self.scale[metric], f"{metric} beyond": beyond}
        by_profile = ({key: values[index] for key, values in scores.items()} for index in range(profiles))
        found = tuple(profile_bounds(one, ALPHA, chance) for one in by_profile)
        return ConformalCertificate(ALPHA, DELTA, count, "the full model", "", found)

    def bounds(self, certificate: ConformalCertificate) -> dict[str, dict[str, Array]]:
        """By form and metric, [profiles, samples]."""
        found: dict[str, dict[str, list[Array]]] = {form: {metric: [] for metric in METRICS} for form in FORMS}
        for index, entry in enumerate(certificate.profiles):
            last = index == len(certificate.profiles) - 1
            for metric, plain in entry.drift.items():
                scale = self.scale[metric][index]
                call = entry.scaled[metric] * scale if metric in entry.scaled else np.full(len(scale), plain)
                compared = self.apart[metric][index] + entry.compared[metric] * self.near[metric][index]
                found["plain"][metric].append(np.full(len(scale), plain))
                found["call"][metric].append(call)
                found["compared"][metric].append(call if last else np.maximum(compared, 0))
        return {form: {metric: np.stack(rows) for metric, rows in metrics.items()} for form, metrics in found.items()}


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


def see(model: Certified, inputs: Array) -> Seen:
    """Every profile and the full model on ``inputs``, batch by batch."""
    rows: dict[str, list[Array]] = {}
    for start in range(0, len(inputs), _BATCH):
        chunk = inputs[start : start + _BATCH]
        full, logits = model.full(chunk), model.of_profiles(chunk)
        near = scales(logits[-1])
        for values in logits:
            drift, apart, scale = drifts(full, values), drifts(logits[-1], values), scales(values)
            for metric in METRICS:
                for what, found in (("drift", drift), ("apart", apart), ("scale", scale), ("near", near)):
                    rows.setdefault(f"{what} {metric}", []).append(found[metric])
            rows.setdefault("agrees", []).append(agrees(full, values))
    profiles = len(logits)
    joined = {
        key: np.stack([np.concatenate(parts[index::profiles]) for index in range(profiles)])
        for key, parts in rows.items()
    }
    by_metric = ({m: joined[f"{what} {m}"] for m in METRICS} for what in ("drift", "apart", "scale", "near"))
    return Seen(*by_metric, joined["agrees"])


def measure(model: Certified, splits: int) -> dict[str, Any]:
    """Everything of one model."""
    samples, size = model.samples, len(model.samples) // 2
    like, pool = see(model, samples), see(model, model.draw(model.fresh, 0))
    made, first = like.part(np.arange(size)).certificate(), samples[:size]
    again = certify(model.path, [first], model.full(first), alpha=ALPHA, delta=DELTA)
    if any(not np.isclose(a.drift["l2"], b.drift["l2"]) for a, b in zip(made.profiles, again.profiles, strict=True)):
        raise RuntimeError("certify gives other bounds than these scores do")
    shifted = {noise: see(model, noisy(samples, noise)) for noise in NOISES if samples.dtype == np.float32}
    joint: dict[str, list[float]] = {metric: [] for metric in METRICS}
    for first, _ in split(like, size, splits):
        plain = like.part(first).certificate().profiles
        for metric in METRICS:
            ratios = joint_bounds(like.drift[metric][:, first]) / [entry.drift[metric] for entry in plain]
            joint[metric].extend(ratios)
    return {
        "profiles": len(like.agrees),
        "samples": size,
        "fresh": model.fresh,
        "mean_drifts": [round(float(mean), 4) for mean in like.drift["l2"].mean(1)],
        **{f"halves_{key}": value for key, value in of_splits(like, size, splits).items()},
        **{f"pool{n}_{key}": value for n in SIZES for key, value in of_splits(pool, n, splits).items()},
        **{f"joint_{metric}_median": float(np.median(ratios)) for metric, ratios in joint.items()},
        **spectral(model, like),
        **watched(like, shifted, size, splits),
    }


def split(seen: Seen, size: int, splits: int) -> Iterator[tuple[Array, Array]]:
    """Random ``size`` of the samples, and the others."""
    for number in range(splits):
        order = np.random.default_rng(number).permutation(seen.agrees.shape[1])
        yield order[:size], order[size:]


def of_splits(seen: Seen, size: int, splits: int) -> dict[str, Any]:
    """Whether bounds hold, what they are over the 99th percentile of drift, and how they go with it."""
    coverage: list[float] = []
    ratios: dict[str, list[float]] = {}
    pearson: dict[str, list[float]] = {}
    ordered: list[float] = []
    for first, second in split(seen, size, splits):
        certificate, rest = seen.part(first).certificate(), seen.part(second)
        bounds = rest.bounds(certificate)
        coverage.append(least_coverage(certificate, rest))
        for form in FORMS:
            for metric in METRICS:
                p99 = np.quantile(rest.drift[metric], 0.99, axis=1)
                ratios.setdefault(f"{form}_{metric}", []).extend(bounds[form][metric].mean(1) / p99)
            for name, start in {form: 0, f"{form}_but_the_least": 1}.items():
                both = bounds[form]["l2"][start:].ravel(), rest.drift["l2"][start:].ravel()
                pearson.setdefault(name, []).append(float(np.corrcoef(*both)[0, 1]))
        ordered.append(spearmanr(bounds["compared"]["l2"].mean(1), rest.drift["l2"].mean(1))[0])
    return {
        "held": share(coverage),
        "least_coverage": min(coverage),
        **{f"{ratio}_median": float(np.median(values)) for ratio, values in ratios.items()},
        **{f"{ratio}_greatest": float(max(values)) for ratio, values in ratios.items()},
        **{f"pearson_{name}_median": float(np.median(values)) for name, values in pearson.items()},
        **{f"pearson_{name}_least": min(values) for name, values in pearson.items()},
        "spearman_compared_least": min(ordered),
    }


def watched(like: Seen, shifted: dict[float, Seen], size: int, splits: int) -> dict[str, Any]:
    """What a monitor says of samples as they are and of shifted ones."""
    alarms: dict[tuple[str, float], list[int | None]] = {}
    within: dict[float, list[float]] = {noise: [] for noise in shifted}
    for first, second in split(like, size, splits):
        certificate = like.part(first).certificate()
        for noise, seen in {0.0: like, **shifted}.items():
            part = seen.part(second)
            for index, entry in enumerate(certificate.profiles[:-1]):
                by_greatest = {
                    "integers": (entry.to_greatest, part.apart["l2"][index]),
                    "full_model": (entry.drift["l2"], part.drift["l2"][index]),
                }
                for greatest, (bound, drift) in by_greatest.items():
                    alarms.setdefault((greatest, noise), []).append(inputs_to_alarm(bound, drift))
            if noise:
                within[noise].append(least_coverage(certificate, part))
    return {
        "coverage_at_noise": {str(noise): float(np.median(shares)) for noise, shares in within.items()},
        **{f"alarms_{greatest}_noise_{noise:g}": told(found) for (greatest, noise), found in alarms.items()},
    }


def spectral(model: Certified, seen: Seen) -> dict[str, float]:
    """The spectral certificate on the test samples: the order of its bounds, and the share that keeps them, of all
    profiles and the least of one."""
    bounds = np.array(model.spectral)
    drift = seen.drift["l2"]
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


def least_coverage(certificate: ConformalCertificate, seen: Seen) -> float:
    """The least share of samples within their bounds, of all profiles, metrics and forms; 0 where top-1 agreement is
    below its bound and the samples are enough to say so, at 1%."""
    bounds = seen.bounds(certificate)
    shares = [
        (seen.drift[metric] <= values).mean(1).min() for form in bounds.values() for metric, values in form.items()
    ]
    count = seen.agrees.shape[1]
    # Texts of which every prediction agrees are rare: of 200 there may be none.
    most = [1 - agreement_bound(count - int(agrees.sum()), count, 0.01) for agrees in seen.agrees]
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
