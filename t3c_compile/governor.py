"""A governor: the profile follows the latencies measured, so that a target is kept while the machine's load changes.

The load is what a call took over what its profile took when it was measured; it tells what a call of another profile
would take now. With ``n`` calls a window, one in ``n`` may be late:

- **Down on two.** Two late calls in a window lower the profile at once, by one step at least: to the greatest that
  would have been in time at the median load of the last three calls, with room for what else the late ones took. What
  interrupts a call takes its time in every profile. Of a profile just raised, one late call is enough.
- **Up on n.** Where none of the last ``n`` calls would have been late in the next profile either, with a margin, that
  one is tried. Of n + 1 exchangeable values the last is the greatest with probability 1 / (n + 1), so a trial that the
  prediction was right about is late no more often than is allowed.
- **Backoff.** A profile whose trial fails (it is late within ``n`` calls) waits twice as long for the next one, unless
  the load has fallen by the margin since: where the prediction is wrong, or load comes and goes, switching dies out.

What interrupts calls on a machine shows only after many of them, so it begins low: with :data:`HEADROOM`.

Fast down, slow up is how TCP keeps a link busy and not congested (D. Chiu and R. Jain, "Analysis of the increase and
decrease algorithms for congestion avoidance", 1989, https://doi.org/10.1016/0169-7552(89)90019-6); doubling the wait
is Ethernet's (R. Metcalfe and D. Boggs, 1976, https://doi.org/10.1145/360248.360253).
"""

import threading
from collections import deque
from collections.abc import Sequence
from statistics import median

from t3c_compile.passes.errors import T3CError

MARGIN = 1.1
"""A profile is tried where it is predicted to be in time with this factor to spare."""
HEADROOM = 1.5
"""A call of the profile to begin with may take longer than its budgeted latency by this factor."""
MOST_BACKOFF = 64
"""In windows: how long a profile waits at the most for its next trial."""


class Governor:
    """What :meth:`t3c_compile.Session.governor` gives; thread-safe.

    Attributes:
        slo_ms: milliseconds a call may take.
        level: index of the profile that the next call runs.
        calls, late, switches: how many calls were governed, took longer, and how often the profile was changed.
    """

    def __init__(self, costs: Sequence[float], slo_ms: float, violations: float, start: int) -> None:
        """``costs`` are milliseconds a call by profile, as measured once; ``start`` is the level to begin with."""
        if not slo_ms > 0:
            raise T3CError(f"slo_ms={slo_ms!r} must be a positive number of milliseconds")
        if not 0 < violations <= 0.5:
            raise T3CError(f"violations={violations!r} must be a share of calls, above 0 and at most 0.5")
        self.slo_ms = slo_ms
        self.level = start
        self.calls = self.late = self.switches = 0
        self._costs = [max(cost, 1e-9) for cost in costs]
        self._window = round(1 / violations)
        self._lock = threading.Lock()
        self._loads: deque[float] = deque(maxlen=self._window)
        self._calls_here = 0
        # The last late call: the how many-eth here it was, and its milliseconds.
        self._late: tuple[int, float] | None = None
        # By level, what is known of its trials: how many windows the next one waits, and the least load one failed at.
        self._backoff = [1] * len(costs)
        self._failed_at = [0.0] * len(costs)
        self._trial: float | None = None

    def observe(self, level: int, latency_ms: float) -> None:
        """Take in what a call of profile ``level`` took, from when it was asked for."""
        with self._lock:
            self.calls += 1
            late = latency_ms > self.slo_ms
            self.late += late
            # Calls that began before the last switch say nothing of it.
            if level != self.level:
                return
            self._calls_here += 1
            # Nor does the first call of a profile of the next ones: it is given fresh memory.
            if self._calls_here == 1:
                return
            self._loads.append(latency_ms / self._costs[level])
            if late:
                self._take_in_late(latency_ms)
            elif level + 1 < len(self._costs):
                self._consider_next()
            if self._trial is not None and self._calls_here > self._window:
                self._backoff[level], self._trial = 1, None

    def _take_in_late(self, latency_ms: float) -> None:
        before, self._late = self._late, (self._calls_here, latency_ms)
        if self._trial is not None:
            first = self._backoff[self.level] == 1
            self._failed_at[self.level] = self._trial if first else min(self._trial, self._failed_at[self.level])
            self._backoff[self.level] = min(2 * self._backoff[self.level], MOST_BACKOFF)
            self._lower([])
        elif before is not None and self._calls_here - before[0] < self._window:
            self._lower([before[1], latency_ms])

    def _lower(self, late: list[float]) -> None:
        """To the greatest profile that is in time at the load of now, with room for what else made calls take ``late``
        milliseconds here where a profile has it; by one at least."""
        load = median(list(self._loads)[-3:])
        interruptions = [max(latency - load * self._costs[self.level], 0.0) for latency in late]
        for room in (*sorted(interruptions, reverse=True), 0.0):
            fitting = [i for i in range(self.level) if load * self._costs[i] + room <= self.slo_ms]
            if fitting:
                break
        if self.level:
            self._switch(fitting[-1] if fitting else 0, trial=None)

    def _consider_next(self) -> None:
        if self._calls_here <= self._window:
            return
        above = self.level + 1
        worst = max(self._loads)
        wait = 1 if worst * MARGIN < self._failed_at[above] else self._backoff[above]
        if self._calls_here > wait * self._window and worst * self._costs[above] * MARGIN <= self.slo_ms:
            self._switch(above, trial=worst)

    def _switch(self, level: int, trial: float | None) -> None:
        self.level, self._trial = level, trial
        self.switches += 1
        self._calls_here, self._late = 0, None
