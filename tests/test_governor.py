"""The governor on simulated loads: late calls and switches are bounded, the best profile is reached, nothing swings."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from certified import Small, samples

import t3c_compile
from t3c_compile import Budget, T3CError
from t3c_compile.governor import HEADROOM, MARGIN, MOST_BACKOFF, Governor

COSTS = (1.0, 1.3, 1.7, 2.2, 3.0)
WINDOW = 100
Load = Callable[[int], float]


@dataclass
class Trace:
    """Levels and whether calls were late, by call."""

    levels: Any
    late: Any

    @property
    def switches(self) -> int:
        return int((np.diff(self.levels) != 0).sum())


def run(
    load: Load,
    calls: int,
    slo: float = 3.5,
    noise: float = 0.05,
    seed: int = 0,
    start: int = 4,
    true_costs: Sequence[float] = COSTS,
    interruption: Load = lambda _: 0.0,
) -> Trace:
    """A program under ``load`` (a factor on all costs), with log-normal noise; ``true_costs`` are this machine's, and
    ``interruption`` is what a call of any profile takes longer by."""
    generator = np.random.default_rng(seed)
    governor = Governor(COSTS, slo, 1 / WINDOW, start)
    levels, late = [], []
    for call in range(calls):
        level = governor.level
        latency = true_costs[level] * load(call) * np.exp(noise * generator.standard_normal()) + interruption(call)
        governor.observe(level, latency)
        levels.append(level)
        late.append(latency > slo)
    trace = Trace(np.array(levels), np.array(late))
    assert (governor.calls, governor.late) == (calls, sum(late))
    assert governor.switches == trace.switches + (governor.level != levels[-1])
    return trace


def best(load: float, margin: float = MARGIN) -> int:
    """The greatest profile that is in time with the margin, else the least."""
    return max((i for i, cost in enumerate(COSTS) if cost * load * margin <= 3.5), default=0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("factor", [1.2, 1.5, 2.0, 3.0])
def test_a_step_of_load_is_met_at_once_and_left_again(factor: float, seed: int) -> None:
    """Some calls are late after the step, no more; afterwards the best profile is had again within a window a level."""
    trace = run(lambda call: factor if 1000 <= call < 3000 else 1.0, 6000, noise=0.01, seed=seed)
    assert not trace.late[:1000].any()
    assert trace.late[1000:1010].sum() <= 3
    assert trace.late[1010:3000].mean() <= 0.5 / WINDOW
    # It goes down without the margin and up with it.
    assert set(trace.levels[1010:3000]) <= set(range(best(factor), best(factor, 1.0) + 1))
    recovered = 3000 + (WINDOW + 2) * len(COSTS) + 2
    assert (trace.levels[recovered:] == 4).all()
    assert not trace.late[3000:].any()
    assert trace.switches <= 2 * len(COSTS) + 2


@pytest.mark.parametrize("seed", range(3))
def test_the_best_profile_is_reached_from_the_least(seed: int) -> None:
    for load in (1.0, 1.2, 1.7):
        trace = run(lambda _, load=load: load, 2000, noise=0.005, seed=seed, start=0)
        assert (trace.levels[(WINDOW + 2) * best(load) :] == best(load)).all()
        assert trace.switches == best(load)
        assert not trace.late.any()


@pytest.mark.parametrize("seed", range(3))
def test_single_spikes_change_nothing(seed: int) -> None:
    """Fewer than one call in two windows, ten times as long: no profile helps against these."""
    trace = run(lambda call: 10.0 if call % (2 * WINDOW + 7) == 50 else 1.0, 10_000, seed=seed, noise=0.01)
    assert trace.switches == 0
    assert trace.late.mean() < 1 / WINDOW


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("milliseconds", "level"), [(0.4, 4), (1.0, 3), (1.5, 2), (2.0, 1), (2.4, 0)])
def test_room_is_kept_for_interruptions(milliseconds: float, level: int, seed: int) -> None:
    """Two calls late, then at once the greatest profile with room for such interruptions; no other is late, ever."""
    trace = run(lambda _: 1.0, 5000, seed=seed, noise=0.01, interruption=lambda call: milliseconds * (call % 40 == 30))
    assert trace.late.sum() == 2 * (level < 4)
    assert trace.switches == (level < 4)
    assert (trace.levels[100:] == level).all()


def test_interruptions_that_no_profile_has_room_for_lower_it_by_one() -> None:
    trace = run(lambda _: 1.0, 100, noise=0.01, interruption=lambda call: 10.0 * (call in (20, 40)))
    assert (trace.levels[:41] == 4).all()
    assert (trace.levels[41:] == 3).all()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("load", [0.9, 1.0, 1.1, 1.6, 2.5])
def test_noise_is_late_no_more_than_allowed_and_switching_dies_out(load: float, seed: int) -> None:
    trace = run(lambda _: load, 20_000, noise=0.15, seed=seed)
    assert trace.late.mean() <= 1.5 / WINDOW
    first, last = trace.levels[:10_000], trace.levels[10_000:]
    assert (np.diff(first) != 0).sum() <= 60
    assert (np.diff(last) != 0).sum() <= 60


@pytest.mark.parametrize("seed", range(2))
def test_a_slow_drift_is_followed(seed: int) -> None:
    """Load rises threefold and falls again over 20,000 calls: a few late calls a level, and few switches."""
    trace = run(lambda call: 2.0 - np.cos(2 * np.pi * call / 20_000), 20_000, noise=0.02, seed=seed)
    assert trace.late.mean() <= 0.5 / WINDOW
    assert trace.switches <= 6 * len(COSTS)
    assert trace.levels[9_000:11_000].max() == best(3.0) == 0
    assert trace.levels[-1] == 4


@pytest.mark.parametrize("seed", range(2))
def test_a_wrong_prediction_does_not_swing(seed: int) -> None:
    """On this machine the greatest profile takes twice what was measured: it is tried ever more rarely."""
    true_costs = (*COSTS[:4], 2 * COSTS[4])
    trace = run(lambda _: 1.0, 60_000, noise=0.01, seed=seed, start=0, true_costs=true_costs)
    tried = np.flatnonzero((trace.levels[1:] == 4) & (trace.levels[:-1] == 3))
    assert len(tried) <= np.log2(MOST_BACKOFF) + 2 + 60_000 / (MOST_BACKOFF * WINDOW)
    waits = np.diff(tried)
    assert all(later >= 1.9 * earlier for earlier, later in pairwise(waits[:6]))
    assert trace.late.sum() <= 2 * len(tried)
    assert (trace.levels == 3).mean() > 0.99


def test_load_that_comes_and_goes_does_not_swing() -> None:
    """A load that is there for a third of every 150 calls would make each of them a cycle of two levels."""
    trace = run(lambda call: 1.8 if call % 150 >= 100 else 1.0, 60_000, noise=0.01)
    assert trace.switches < 60_000 / 150 / 4
    assert trace.late.mean() <= 1 / WINDOW


def test_what_nothing_can_meet_stays_at_the_least() -> None:
    trace = run(lambda _: 10.0, 1000)
    assert (trace.levels[5:] == 0).all()


@pytest.mark.parametrize(
    ("slo", "violations"), [(0, 0.01), (-1, 0.01), (float("nan"), 0.01), (1, 0), (1, 0.6), (1, -1)]
)
def test_targets_that_are_none(small: Small, tmp_path: Path, slo: float, violations: float) -> None:
    with pytest.raises(T3CError, match="must be"):
        Governor(COSTS, slo, violations, 0)


def test_a_session_is_governed(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls run the governor's profile and it sees their time; eight threads at once; an explicit choice ends it."""
    session = t3c_compile.load(small.copy(tmp_path))
    x = samples(4, seed=1)
    expected = []
    for profile in session.profiles:
        session.set_profile(profile.name)
        expected.append(session.run(x))
    with pytest.raises(T3CError, match="slo_ms"):
        session.governor(slo_ms=0)
    governor = session.governor(slo_ms=1e6, violations=0.1)
    assert session.active is session.profiles[-1]
    for level in (0, len(expected) - 1):
        governor.level = level
        assert session.active.index == level
        assert np.array_equal(session.run(x), expected[level])
    for profile in session.profiles:
        # It begins with room, and no lower than that asks for.
        roomy = profile.needs["latency_ms"] * HEADROOM
        session.governor(slo_ms=roomy * 1.001)
        assert session.active.index >= profile.index
        session.governor(slo_ms=roomy * 0.999)
        assert session.active.needs["latency_ms"] < profile.needs["latency_ms"] or session.active.index == 0
    governor = session.governor(slo_ms=1e-6)
    assert session.active.index == 0  # nothing is that fast, but calls are answered
    assert np.array_equal(session.run(x), expected[0])
    assert (governor.calls, governor.late) == (1, 1)
    governor = session.governor(slo_ms=1e6, violations=0.25)
    governor.level = 0

    def work() -> None:
        for _ in range(20):
            session.run(x)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (governor.calls, governor.late, governor.level) == (160, 0, len(expected) - 1)
    assert governor.switches == len(expected) - 1
    session.set_budget(Budget())
    session.run(x)
    assert governor.calls == 160
    governor = session.governor(slo_ms=1e6)
    # A call that is refused does not end it.
    for refused, certificate in ((x, True), (x, "near"), (x[:, :-1], False)):
        with pytest.raises(T3CError):
            session.run(refused, budget=Budget(), certificate=certificate)  # type: ignore[arg-type]
    session.run(x)
    assert governor.calls == 1
    governor = session.governor(slo_ms=1e6)
    session.run(x, budget=Budget())
    session.run(x)
    assert governor.calls == 0
