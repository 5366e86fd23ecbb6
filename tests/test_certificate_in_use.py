"""Certificates at run time: bounds beside outputs, a budget of drift, and the monitor that contradicts them."""

import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from certified import Small, samples

import t3c_compile
from t3c_compile import Budget, BudgetError, CertificateError, T3CError, certify
from t3c_compile.conformal import ConformalCertificate
from t3c_compile.manifest import read_manifest, write_manifest
from t3c_compile.monitor import DriftWarning, Monitor
from t3c_compile.runtime import ProfileInfo, choose


@pytest.fixture(scope="module")
def certified(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = small.copy(tmp_path_factory.mktemp("certified"))
    certify(path, [samples(600, seed=2)])
    return path


def test_a_call_gives_the_bounds_of_its_inputs(small: Small, certified: Path) -> None:
    """Each input's own bound holds for 95% of 4000 fresh inputs in every profile; where inputs have different bounds,
    they are the tighter."""
    session, x = t3c_compile.load(certified), samples(4000, seed=4)
    full, scaled = small.logits(x), 0
    certificate = ConformalCertificate.from_json(read_manifest(certified)["targets"]["x86_64"]["conformal"])
    for profile in session.profiles[:-1]:
        session.set_profile(profile.name)
        logits, bounds = session.run(x, certificate=True)
        np.testing.assert_array_equal(logits, session.run(x))
        difference = np.abs(logits.astype(float) - full)
        assert (difference.max(1) <= bounds.drift["linf"]).mean() >= 0.95
        assert (np.linalg.norm(difference, axis=1) <= bounds.drift["l2"]).mean() >= 0.95
        assert (logits.argmax(1) == full.argmax(1)).mean() >= bounds.agreement
        for metric, bound in certificate.profiles[profile.index].drift.items():
            if np.ptp(bounds.drift[metric]) > 0:
                scaled += 1
                assert bounds.drift[metric].mean() < bound
        one = session.run(x[7:8], certificate=True)[1]
        assert {metric: bound.tolist() for metric, bound in one.drift.items()} == {
            metric: [pytest.approx(bound[7], rel=1e-6)] for metric, bound in bounds.drift.items()
        }
        assert "600 calibration samples" in bounds.statement
    assert scaled


def test_compared_with_the_greatest_the_bounds_follow_each_input(small: Small, tmp_path: Path) -> None:
    """Of an artifact without the full model: they hold for 95% of 4000 fresh inputs in every profile, are tighter than
    without, and go with the drift of each input more than those do; here not much, for the greatest drifts nearly as
    far as the least."""
    path, x = small.copy(tmp_path, full=False), samples(4000, seed=4)
    certify(path, [fit := samples(600, seed=2)], small.logits(fit))
    session, full = t3c_compile.load(path), small.logits(x)
    for profile in session.profiles:
        session.set_profile(profile.name)
        (logits, alone), (again, compared) = (session.run(x, certificate=form) for form in (True, "compared"))
        np.testing.assert_array_equal(logits, again)
        drift = np.linalg.norm(logits.astype(float) - full, axis=1)
        assert (np.abs(logits.astype(float) - full).max(1) <= compared.drift["linf"]).mean() >= 0.95
        assert (drift <= compared.drift["l2"]).mean() >= 0.95
        if profile is session.profiles[-1]:
            assert all((alone.drift[metric] == bound).all() for metric, bound in compared.drift.items())
        else:
            assert all(compared.drift[metric].mean() < bound.mean() for metric, bound in alone.drift.items())
            follows = [np.corrcoef(drift, bounds.drift["l2"])[0, 1] for bounds in (alone, compared)]
            assert follows[1] > follows[0] + 0.3
    with pytest.raises(CertificateError, match="certificate='near' must be True, False or 'compared'"):
        session.run(x, certificate="near")  # type: ignore[arg-type]
    manifest = read_manifest(path)
    for entry in manifest["targets"]["x86_64"]["conformal"]["profiles"]:
        del entry["compared"]
    write_manifest(path, manifest)
    older = t3c_compile.load(path)
    older.set_profile("p0")
    older.run(x, certificate=True)
    with pytest.raises(CertificateError, match="an older version made it; run t3c-compile certify"):
        older.run(x, certificate="compared")


def test_compared_with_the_full_model_the_bounds_are_the_drift(small: Small, certified: Path) -> None:
    session, x = t3c_compile.load(certified), samples(200, seed=4)
    full = small.logits(x)
    for profile in session.profiles:
        session.set_profile(profile.name)
        logits, bounds = session.run(x, certificate="compared")
        drift = np.linalg.norm(logits.astype(float) - full, axis=1)
        np.testing.assert_allclose(bounds.drift["l2"], drift, rtol=1e-4, atol=1e-4)


def test_a_monitor_says_what_it_does_not_see(small: Small, certified: Path, tmp_path: Path) -> None:
    path, fit = small.copy(tmp_path, full=False), samples(600, seed=2)
    certify(path, [fit], small.logits(fit))
    session = t3c_compile.load(path)
    with pytest.warns(UserWarning, match=r"compares with p\d+, which is not the full model.*full_model=True"):
        session.monitor()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.monitor(fraction=0)
        t3c_compile.load(certified).monitor()


def test_a_budget_of_drift_takes_the_cheapest_that_meets_it(certified: Path) -> None:
    session, x = t3c_compile.load(certified), samples(2, seed=4)
    bounds = [profile.drift_bound for profile in session.profiles]
    assert bounds[-1] == 0
    for limit in (*bounds[:-1], 1e9):
        assert limit is not None
        expected = next(i for i, bound in enumerate(bounds) if bound is not None and bound <= limit)
        assert session.set_budget(Budget(max_drift=limit)).index == expected
        _, found = session.run(x, budget=Budget(max_drift=limit), certificate=True)
        assert session.active.index == expected
        assert set(found.drift) == {"linf", "l2", "kl"}
    # The float model alone meets it, and is too large for the other limit.
    least = session.profiles[-2]
    with pytest.raises(BudgetError, match="max_drift=1e-06 is below the least drift that can be had"):
        session.set_budget(Budget(max_drift=1e-6, size_mb=least.size_mb))
    with pytest.raises(BudgetError, match=r"size_mb=1e-09 \(needs"):
        session.set_budget(Budget(max_drift=1.0, size_mb=1e-9))
    with pytest.raises(BudgetError, match="max_drift=-1 must be a positive number"):
        Budget(max_drift=-1)


def test_looser_budgets_in_ten_thousand_pairs() -> None:
    """Random sets of profiles and pairs of budgets: a looser cost never gives a lesser profile, a looser drift never a
    costlier one; what is chosen fits; where nothing is, nothing fits."""
    generator = np.random.default_rng(0)

    def chosen(profiles: list[ProfileInfo], limits: dict[str, float]) -> int | None:
        budget = Budget(**limits)
        fits = [p.index for p in profiles if p.fits(budget) and (p.drift_bound or 0) <= limits.get("max_drift", 1e9)]
        try:
            index = choose(profiles, budget).index
        except BudgetError:
            assert not fits
            return None
        assert index in fits
        return index

    for _ in range(10_000):
        size, drift = np.sort(generator.random(5)), generator.random(5) * np.linspace(1, 0, 5)
        profiles = [
            ProfileInfo(i, f"p{i}", size[i], 2 * size[i], "measured", size[i] / 3, {}, {}, {}, drift[i])
            for i in range(5)
        ]
        names = [name for name in ("latency_ms", "energy_mj", "size_mb") if generator.random() < 0.7]
        tight = {name: float(generator.random() * 2 + 1e-3) for name in names}
        loose = {name: limit + float(generator.random()) * (generator.random() < 0.8) for name, limit in tight.items()}
        less, more = chosen(profiles, tight), chosen(profiles, loose)
        assert less is None or (more is not None and more >= less)
        strict = float(generator.random() + 1e-3)
        first, second = (chosen(profiles, tight | {"max_drift": strict + more}) for more in (0.0, generator.random()))
        assert first is None or (second is not None and second <= first)


def test_what_is_not_certified_says_so(small: Small, tmp_path: Path) -> None:
    session, x = t3c_compile.load(small.copy(tmp_path)), samples(2, seed=4)
    for use in (
        lambda: session.run(x, certificate=True),
        lambda: session.run(x, budget=Budget(max_drift=1.0)),
        lambda: session.monitor(),
    ):
        with pytest.raises(CertificateError, match="run t3c-compile certify on the artifact"):
            use()


_LEAN = """
import sys, numpy, t3c_compile
session = t3c_compile.load(sys.argv[1])
session.monitor(fraction=1.0)
session.run(numpy.zeros((1, 64), numpy.float32), budget=t3c_compile.Budget(max_drift=1e9), certificate=True)
print(*sorted({"torch", "scipy", "rich"} & sys.modules.keys()))
"""


def test_the_runtime_stays_numpy_and_tvm(certified: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _LEAN, str(certified)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def _watched(probability: float, inputs: int, runs: int, alpha: float = 0.05, level: float = 0.05) -> float:
    """The share of runs in which inputs that exceed with ``probability`` contradict the certificate, looked at after
    every one."""
    generator = np.random.default_rng(0)
    contradicted = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DriftWarning)
        for _ in range(runs):
            monitor = Monitor([1.0, 0.0], alpha, fraction=1.0, significance=level, seed=0)
            for drift in np.where(generator.random((inputs, 1)) < probability, 2.0, 0.5):
                monitor.observe(0, drift)
                if monitor.contradicted:
                    contradicted += 1
                    break
    return contradicted / runs


def test_false_alarms_are_as_rare_as_is_said() -> None:
    """A true certificate at its very limit, 300 times watched for 200 inputs: the level, and four deviations."""
    assert _watched(0.05, inputs=200, runs=300) <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 300)


def test_a_threefold_share_is_found_within_400_inputs() -> None:
    assert _watched(0.15, inputs=400, runs=50) >= 0.95


def test_the_monitor_is_silent_on_like_inputs_and_warns_of_shifted_ones(certified: Path) -> None:
    session, x = t3c_compile.load(certified), samples(1000, seed=5)
    session.set_profile("p0")

    def watch(inputs: Any, seed: int) -> tuple[Monitor, list[warnings.WarningMessage]]:
        monitor = session.monitor(fraction=0.5, seed=seed)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for start in range(0, len(inputs), 5):
                session.run(inputs[start : start + 5])
        return monitor, caught

    like, caught = watch(x, seed=0)
    assert not caught
    assert not like.contradicted
    # Half of 200 calls, to four deviations.
    assert abs(like.compared - 500) < 5 * 4 * math.sqrt(200 / 4)
    again, other = watch(x, seed=0)[0], watch(x, seed=1)[0]
    assert (again.compared, again.exceeded) == (like.compared, like.exceeded)
    assert (other.compared, other.exceeded) != (like.compared, like.exceeded)

    shifted, caught = watch(4 * x, seed=0)
    assert shifted.contradicted
    assert len(caught) == 1
    assert issubclass(caught[0].category, DriftWarning)
    assert "certify on inputs like these" in str(caught[0].message)
    assert Path(caught[0].filename) == Path(__file__)

    # The greatest profile is not compared with itself; a fraction of 0 ends the watch.
    session.set_profile(session.profiles[-1].name)
    assert watch(4 * x, seed=0)[0].compared == 0
    session.set_profile("p0")
    ended = session.monitor(fraction=0)
    session.run(x)
    assert ended.compared == 0
    for options, message in (({"fraction": 1.5}, "fraction=1.5"), ({"significance": 0.0}, "significance=0.0")):
        with pytest.raises(T3CError, match=message):
            session.monitor(**options)
