"""The conformal certificate of the digits models: does it hold, is it tight, does the monitor see a shift?

    python -m benchmarks.certificates        (about 15 minutes on 2 cores; artifacts in --folder are used again)

Two populations. Halves: 20 times the 540 test images are split at random, one half certifies and on the other the share
of images within the bounds is counted, the least of all profiles and metrics; 270 images leave that share uncertain by
1%. Draws: images drawn from the 540 and moved a little, 270 to certify, 20,000 to count. On the halves bounds are held
against the 99th percentile of the drifts and against those of one joint score, and a monitor watches every profile, on
the images as they are and with noise on the pixels. Writes ``benchmarks/results/certificates.json``.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest

from t3c_compile.artifact import lower
from t3c_compile.backends.targets import get_target
from t3c_compile.certifying import certify, order_statistic
from t3c_compile.conformal import ConformalCertificate
from t3c_compile.drift import METRICS, Array, agrees, drifts
from t3c_compile.monitor import DriftWarning, Monitor
from t3c_compile.runtime import load
from t3c_compile.show import show
from t3c_compile.snapping import snap

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "certificates.json"
ALPHA, DELTA, LEVEL = 0.05, 0.05, 0.01
# Deviations of the noise that shifts the inputs; pixels have one of about 1.
NOISES = (0.1, 0.2, 0.4)
FRESH = 20_000
"""Draws on which coverage is counted: its own error is then at most 0.2%."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=("cnn", "vit"), help="only this model (default both)")
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "certificates", help="where artifacts are kept")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    found = [measure(name, arguments.folder, arguments.splits) for name in arguments.model or ("cnn", "vit")]
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    title = f"{arguments.splits} splits, alpha {ALPHA}, delta {DELTA}, level of the monitor {LEVEL}"
    rows = [{"measure": key, **{result["model"]: str(result[key]) for result in found}} for key in list(found[0])[1:]]
    show(title, rows, False)


def artifact(name: str, folder: Path) -> tuple[Path, Array]:
    """A digits model with the full model as its greatest profile, and the test images."""
    sys.path.insert(0, str(ROOT / "examples" / "digits"))
    import data
    import run

    path = folder / f"{name}.t3c"
    if not path.exists():
        done, targets = run.prepare(name, seed=0), [get_target("x86_64")]
        labels = done.data.calibration[1]
        profiles = snap(done.elastic, done.calibration, targets, labels, done.controller, full_model=True)
        lower(done.elastic, profiles, targets, path, done.calibration[0])
    return path, data.load().test[0].numpy()


def logits_of_profiles(path: Path, x: Array) -> list[Array]:
    session = load(path)
    found = []
    for profile in session.profiles:
        session.set_profile(profile.name)
        found.append(session.run(x))
    return found


def measure(name: str, folder: Path, splits: int) -> dict[str, Any]:
    """Everything of one model."""
    path, images = artifact(name, folder)
    like = logits_of_profiles(path, images)
    shifted = {noise: logits_of_profiles(path, noisy(images, noise)) for noise in NOISES}
    drawn = logits_of_profiles(path, draws(images, FRESH, seed=0))
    coverage: dict[str, list[float]] = {"halves": [], "draws": []}
    ratios: dict[str, list[float]] = {f"{metric}_{what}": [] for metric in METRICS for what in ("p99", "joint")}
    alarms: dict[float, list[int | None]] = {noise: [] for noise in (0.0, *NOISES)}
    within: dict[float, list[float]] = {noise: [] for noise in NOISES}
    for split in range(splits):
        order = np.random.default_rng(split).permutation(len(images))
        first, second = order[: len(order) // 2], order[len(order) // 2 :]
        certificate = certify(path, [draws(images, len(first), seed=1 + split)], alpha=ALPHA, delta=DELTA)
        coverage["draws"].append(least_coverage(certificate, drawn))
        certificate = certify(path, [images[first]], alpha=ALPHA, delta=DELTA)
        coverage["halves"].append(least_coverage(certificate, [values[second] for values in like]))
        seen = [drifts(like[-1], values) for values in like[:-1]]
        for metric in METRICS:
            of_metric = np.stack([drift[metric] for drift in seen])
            bounds = np.array([entry.drift[metric] for entry in certificate.profiles[:-1]])
            ratios[f"{metric}_p99"] += list(bounds / np.quantile(of_metric[:, second], 0.99, axis=1))
            ratios[f"{metric}_joint"] += list(joint_bounds(of_metric[:, first]) / bounds)
        for noise, logits in {0.0: like, **shifted}.items():
            alarms[noise] += [inputs_to_alarm(certificate, i, logits, second) for i in range(len(logits) - 1)]
            if noise:
                within[noise].append(least_coverage(certificate, [values[second] for values in logits]))
    return {
        "model": name,
        **{f"held_on_{kind}": share(shares) for kind, shares in coverage.items()},
        **{f"least_coverage_on_{kind}": min(shares) for kind, shares in coverage.items()},
        **{f"{ratio}_median": float(np.median(values)) for ratio, values in ratios.items()},
        **{f"{metric}_p99_greatest": max(ratios[f"{metric}_p99"]) for metric in METRICS},
        "false_alarms": f"{len(at(alarms[0.0]))}/{len(alarms[0.0])}",
        "shifts": {
            str(noise): {
                "coverage": float(np.median(within[noise])),
                "alarms": f"{len(at(alarms[noise]))}/{len(alarms[noise])}",
                "inputs_to_alarm": float(np.median(at(alarms[noise]))) if at(alarms[noise]) else None,
            }
            for noise in NOISES
        },
    }


def share(shares: list[float]) -> str:
    """In how many splits coverage was what is promised, and the 95% interval of the share."""
    kept = sum(value >= 1 - ALPHA for value in shares)
    interval = binomtest(kept, len(shares)).proportion_ci(0.95)
    return f"{kept}/{len(shares)} ({interval.low:.2f} to {interval.high:.2f})"


def at(alarms: list[int | None]) -> list[int]:
    """The alarms there were."""
    return [inputs for inputs in alarms if inputs is not None]


def noisy(images: Array, noise: float) -> Array:
    drawn = np.random.default_rng(0).standard_normal(images.shape)
    return (images + noise * drawn).astype(np.float32)


def draws(images: Array, count: int, seed: int) -> Array:
    """Independent draws of an image, rotated, scaled and shifted at random as in training."""
    from data import augment

    chosen = np.random.default_rng(seed).integers(len(images), size=count)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        drawn: Array = augment(torch.from_numpy(images[chosen])).numpy()
    return drawn


def least_coverage(certificate: ConformalCertificate, logits: list[Array]) -> float:
    """The least share of inputs within their bounds, of all profiles and metrics, plain and as a call gives them; 0
    where top-1 agreement is below its bound."""
    shares = []
    for index, values in enumerate(logits[:-1]):
        seen, of_call = drifts(logits[-1], values), certificate.bounds(index, values)
        for metric, plain in certificate.profiles[index].drift.items():
            shares += [(seen[metric] <= plain).mean(), (seen[metric] <= of_call.drift[metric]).mean()]
        shares.append(float(agrees(logits[-1], values).mean() >= of_call.agreement))
    return float(min(shares))


def joint_bounds(drift: Array) -> Array:
    """[profiles, samples] -> [profiles]: bounds from one score for all profiles, the greatest drift in units of each
    profile's mean, which a fifth of the samples gives. It is one statement of the eight instead of eight a profile."""
    fifth = drift.shape[1] // 5
    units = drift[:, :fifth].mean(1)
    scores = np.sort((drift[:, fifth:] / units[:, None]).max(0))
    bounds: Array = units * scores[order_statistic(len(scores), ALPHA, DELTA / 8) - 1]
    return bounds


def inputs_to_alarm(certificate: ConformalCertificate, index: int, logits: list[Array], part: Array) -> int | None:
    """After how many inputs of ``part`` a monitor that compares every one contradicts the certificate of a profile."""
    monitor = Monitor([entry.to_greatest for entry in certificate.profiles], certificate.alpha, 1.0, LEVEL, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DriftWarning)
        for drift in drifts(logits[-1][part], logits[index][part])["l2"]:
            monitor.observe(index, np.array([drift]))
            if monitor.contradicted:
                return monitor.compared
    return None


if __name__ == "__main__":
    main()
