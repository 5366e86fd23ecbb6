"""The conformal certificate: its statistics against exact sums, its bounds on a real artifact, how it is written."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from certified import Small, samples
from torch import nn

import t3c_compile
from t3c_compile import ArtifactError, CertificateError, InputError, certify
from t3c_compile import certifying as module
from t3c_compile.certifying import agreement_bound, least_samples, order_statistic
from t3c_compile.cli import main
from t3c_compile.conformal import ConformalCertificate
from t3c_compile.manifest import MANIFEST, read_manifest, write_manifest
from t3c_compile.passes.errors import DataError
from t3c_compile.transforming import transform


def _at_least(k: int, n: int, p: float) -> float:
    """P(Bin(n, p) >= k), summed term by term."""
    return math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


@pytest.mark.parametrize(("alpha", "chance"), [(0.05, 0.05), (0.1, 1e-3), (0.01, 1e-4)])
def test_order_statistics_are_the_least_that_hold(alpha: float, chance: float) -> None:
    needed = least_samples(alpha, chance)
    assert (1 - alpha) ** needed <= chance < (1 - alpha) ** (needed - 1)
    assert order_statistic(needed - 1, alpha, chance) == needed
    for n in (needed, needed + 1, 2 * needed, 1000):
        k = order_statistic(n, alpha, chance)
        # The k-th smallest of n is below the quantile when k or more samples are.
        assert _at_least(k, n, 1 - alpha) <= chance < _at_least(k - 1, n, 1 - alpha)


def test_the_agreement_bound_is_exact() -> None:
    for agreeing, n, chance in ((50, 50, 0.01), (47, 50, 0.01), (1, 50, 1e-3)):
        assert _at_least(agreeing, n, agreement_bound(agreeing, n, chance)) == pytest.approx(chance, rel=1e-9)
    assert agreement_bound(0, 50, 0.01) == 0.0


def test_bounds_fail_as_often_as_is_said() -> None:
    """Of uniform scores the share below a bound is the bound itself: 20,000 draws of 200, against the exact chance."""
    n, alpha, chance = 200, 0.05, 0.02
    k = order_statistic(n, alpha, chance)
    bounds = np.sort(np.random.default_rng(0).random((20_000, n)), axis=1)[:, k - 1]
    expected = _at_least(k, n, 1 - alpha)
    # Four deviations.
    assert abs((bounds < 1 - alpha).mean() - expected) < 4 * math.sqrt(expected / 20_000)


def _drift(reference: Any, logits: Any) -> dict[str, Any]:
    """The metrics, written again."""
    full = np.exp(reference.astype(float)) / np.exp(reference.astype(float)).sum(1, keepdims=True)
    found = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum(1, keepdims=True)
    difference = (logits - reference).astype(float)
    return {
        "linf": np.abs(difference).max(1),
        "l2": np.sqrt((difference**2).sum(1)),
        "kl": (full * np.log(full / found)).sum(1),
        "scale": (found * (1 - found)).sum(1),
    }


def test_bounds_are_order_statistics_of_what_the_library_gives(small: Small, tmp_path: Path) -> None:
    path, x = small.copy(tmp_path), samples(400, seed=2)
    certificate = certify(path, [x])
    session = t3c_compile.load(path)
    logits = [_run(session, profile.name, x) for profile in session.profiles]
    assert certificate.profiles[-1].drift == {"linf": 0, "l2": 0, "kl": 0}
    assert certificate.profiles[-1].agreement == 1
    chance = 0.05 / (11 * (len(logits) - 1))
    k = order_statistic(400, 0.05, chance)
    for index, found in enumerate(logits[:-1]):
        expected, bounds = _drift(logits[-1], found), certificate.profiles[index]
        for metric, bound in bounds.drift.items():
            assert bound == pytest.approx(np.sort(expected[metric])[k - 1], rel=1e-5)
            scale = expected["scale"] if metric == "kl" else np.sqrt(expected["scale"])
            factor = np.sort(expected[metric] / scale)[k - 1]
            assert (metric in bounds.scaled) == (factor * scale.mean() < bound)
            if metric in bounds.scaled:
                assert bounds.scaled[metric] == pytest.approx(factor, rel=1e-5)
        assert bounds.to_greatest == bounds.drift["l2"]
        # The greatest profile is the full model.
        assert bounds.compared == {"linf": 0, "l2": 0, "kl": 0}
        agreeing = int((logits[-1].argmax(1) == found.argmax(1)).sum())
        assert _at_least(agreeing, 400, bounds.agreement) == pytest.approx(chance, rel=1e-6)
    assert ConformalCertificate.from_json(read_manifest(path)["targets"]["x86_64"]["conformal"]) == certificate


def _run(session: Any, profile: str, x: Any) -> Any:
    session.set_profile(profile)
    return session.run(x)


def test_twenty_certificates_cover_what_comes_next(small: Small, tmp_path: Path) -> None:
    """Coverage on 4000 fresh inputs, of every profile and metric, in 20 draws of the samples. A true certificate fails
    with at most 5%: more than 3 of 20 are 1.6% likely. The bounds are no more than 1.5 times the 99th percentile."""
    path, fresh = small.copy(tmp_path), samples(4000, seed=3)
    session = t3c_compile.load(path)
    logits = [_run(session, profile.name, fresh) for profile in session.profiles]
    drifts = [_drift(logits[-1], found) for found in logits[:-1]]
    failed = 0
    for seed in range(20):
        certificate = certify(path, [samples(300, seed=100 + seed)])
        inside = [
            (drift[metric] <= certificate.bounds(index, logits[index]).drift[metric]).mean()
            for index, drift in enumerate(drifts)
            for metric in ("linf", "l2", "kl")
        ]
        failed += min(inside) < 0.95
        for index, drift in enumerate(drifts):
            assert certificate.profiles[index].drift["l2"] < 1.5 * np.quantile(drift["l2"], 0.99)
    assert failed <= 3


def test_the_full_model_is_taken_where_the_artifact_has_none(small: Small, tmp_path: Path) -> None:
    path, x = small.copy(tmp_path, full=False), samples(300, seed=2)
    with pytest.raises(CertificateError, match=r"does not hold the full model.*give the model or its logits"):
        certify(path, [x])
    by_model = certify(path, [x], small.elastic)
    by_logits = certify(path, [x], small.logits(x))
    assert by_model == by_logits
    top = by_model.profiles[-1]
    assert top.drift["l2"] > 0
    assert top.to_greatest == 0
    session = t3c_compile.load(path)
    near, full = _run(session, session.profiles[-1].name, x), small.logits(x)
    k = order_statistic(300, 0.05, 0.05 / (11 * len(by_model.profiles)))
    for profile, bounds in zip(session.profiles, by_model.profiles, strict=True):
        found = _run(session, profile.name, x)
        drift, apart, scale = _drift(full, found), _drift(near, found), _drift(full, near)["scale"]
        for metric, factor in bounds.compared.items():
            beyond = (drift[metric] - apart[metric]) / (scale if metric == "kl" else np.sqrt(scale))
            assert factor == pytest.approx(np.sort(beyond)[k - 1], rel=1e-4, abs=1e-6)


def test_bad_samples_are_named_before_any_work(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, x = small.copy(tmp_path), samples(300, seed=2)
    before = (path / MANIFEST).read_bytes()
    needed = least_samples(0.05, 0.05 / (11 * (len(read_manifest(path)["profiles"]) - 1)))
    certify(small.copy(tmp_path / "enough"), [x[:needed]])
    monkeypatch.setattr(module, "scores_of", lambda *_: pytest.fail("work was done"))
    for inputs, options, message in (
        ([x[: needed - 1]], {}, f"{needed - 1} samples are too few: {needed} are needed for 2 profiles"),
        ([x], {"alpha": 1.0}, "alpha=1.0 must lie between 0 and 1"),
        ([x], {"delta": 0.0}, "delta=0.0 must lie between 0 and 1"),
        ([x], {"reference": small.logits(x)[:-1]}, "the logits of 299 samples, the inputs have 300"),
    ):
        with pytest.raises(CertificateError, match=message):
            certify(path, inputs, **options)
    for wrong, message in (
        ([x, x], "2 inputs given, the model takes 1"),
        ([x.astype(float)], "input 'x' is float64"),
        ([x[:, :9]], r"input 'x' has shape \[1, 9\]"),
    ):
        with pytest.raises(InputError, match=message):
            certify(path, wrong, small.elastic)
    with pytest.raises(ArtifactError, match="has no target 'z80'"):
        certify(path, [x], target="z80")
    assert (path / MANIFEST).read_bytes() == before


def test_bad_logits_are_named(small: Small, tmp_path: Path) -> None:
    path, x = small.copy(tmp_path), samples(300, seed=2)
    x[70, 3] = np.nan
    with pytest.raises(CertificateError, match=r"logits that are not finite on sample 70"):
        certify(path, [x], small.logits(x))
    with pytest.raises(CertificateError, match=r"the reference has logits of shape \(64, 9\), the artifact \(64, 10\)"):
        certify(path, [samples(300, seed=2)], small.logits(x)[:, :9])
    other = transform(nn.Linear(63, 10).eval(), (torch.ones(2, 63),))
    with pytest.raises(
        DataError, match=r"the reference: input 'input_1' has shape \[64, 64\], the model takes \[any, 63\]"
    ):
        certify(path, [samples(300, seed=2)], other)


def test_arm64_libraries_are_certified_too(small: Small, arm64: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_BATCH", 200)  # one start of the emulator
    path, x = small.copy(tmp_path, full=False), samples(200, seed=2)
    here = certify(path, [x], small.logits(x))
    there = certify(path, [x], small.logits(x), target="arm64")
    # Both libraries give the same bits.
    assert there == here
    targets = read_manifest(path)["targets"]
    assert ConformalCertificate.from_json(targets["x86_64"]["conformal"]) == here
    assert ConformalCertificate.from_json(targets["arm64"]["conformal"]) == there


def test_a_manifest_that_cannot_be_written_stays(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, x = small.copy(tmp_path), samples(200, seed=2)
    before, names = (path / MANIFEST).read_bytes(), sorted(path.iterdir())

    def fails(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(ArtifactError, match="the disk is full; it is as it was"):
        certify(path, [x])
    assert (path / MANIFEST).read_bytes() == before
    assert sorted(path.iterdir()) == names


_CERTIFY = """
import sys, numpy
from t3c_compile import certify
print("ready", flush=True)
certify(sys.argv[1], [numpy.load(sys.argv[3])], resume=sys.argv[2])
assert "torch" not in sys.modules
"""


def test_killed_at_any_moment_it_goes_on_and_the_artifact_loads(small: Small, tmp_path: Path) -> None:
    path, kept, x = small.copy(tmp_path), tmp_path / "kept", samples(4000, seed=2)
    expected = certify(small.copy(tmp_path / "whole"), [x])
    np.save(tmp_path / "x.npy", x)
    generator = np.random.default_rng(0)
    for _ in range(4):
        done = len(list(kept.glob("*.npz")))
        command = [sys.executable, "-c", _CERTIFY, str(path), str(kept), str(tmp_path / "x.npy")]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            # At a moment drawn at random after it has gone on by a batch.
            while process.poll() is None and len(list(kept.glob("*.npz"))) == done:
                time.sleep(0.001)
            time.sleep(generator.random() * 0.1)
            process.send_signal(signal.SIGKILL)
        t3c_compile.load(path)
    assert certify(path, [x], resume=kept) == expected
    assert read_manifest(path) == read_manifest(tmp_path / "whole" / "copy.t3c")


def test_a_damaged_certificate_is_found(small: Small, tmp_path: Path) -> None:
    path = small.copy(tmp_path)
    certify(path, [samples(200, seed=2)])
    whole = (path / MANIFEST).read_text()
    for change, message in (
        (lambda c: c["profiles"].pop(), "has 2 certified profiles"),
        (lambda c: c.pop("statement"), "x86_64/conformal/statement is missing"),
        (lambda c: c["profiles"][0]["drift"].pop("l2"), "drift/l2 is missing"),
        (lambda c: c["profiles"][0]["compared"].pop("l2"), "compared/l2 is missing"),
        (lambda c: c.update(alpha="much"), "alpha is missing or of the wrong type"),
    ):
        manifest = json.loads(whole)
        change(manifest["targets"]["x86_64"]["conformal"])  # type: ignore[no-untyped-call]
        write_manifest(path, manifest)
        with pytest.raises(ArtifactError, match=message):
            t3c_compile.load(path)


def test_the_command_writes_what_inspect_shows(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path, x = small.copy(tmp_path, full=False), samples(200, seed=2)
    np.savez("x.npz", x=x, unused=x[:3])
    (tmp_path / "folder").mkdir()
    np.save("folder/x.npy", x)
    np.save("logits.npy", small.logits(x))
    rows = []
    for data in ("x.npz", "folder"):
        command = ["certify", str(path), "--data", data, "--reference", "logits.npy", "--resume", "--json"]
        assert main(command) == 0
        rows.append(json.loads(capsys.readouterr().out))
    assert rows[0] == rows[1]
    certificate = read_manifest(path)["targets"]["x86_64"]["conformal"]
    bounds = [entry["drift"]["l2"] for entry in certificate["profiles"]]
    # The other target is not certified.
    assert [row["l2_bound"] for row in rows[0]] == [*bounds, *[None] * len(bounds)]
    assert main(["inspect", str(path)]) == 0
    assert "With probability 0.95 over the draw of 200 calibration samples" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.resume"))
    shutil.rmtree("folder")
    for data in ("folder", "logits.npy"):
        assert main(["certify", str(path), "--data", data, "--json"]) == 1
        assert "with arrays named x" in capsys.readouterr().err
    assert main(["certify", str(path), "--data", "x.npz", "--json"]) == 1
    assert "does not hold the full model" in capsys.readouterr().err
