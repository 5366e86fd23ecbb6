"""Times of all artifacts of one task and seed, in turn in one process that does nothing else.

    python -m benchmarks.paper.latency FOLDER ROUNDS    (prints JSON)

One thread on one core; batch 1, and beside it a batch of 32, in which the fixed cost of a call does not count. Half of
the rounds set the budgets: for each T3C profile, the least latency for which a user would be given it, its 90th
percentile with the runtime's margin. The other half are the times reported, and those held against the budgets.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from t3c_compile.runtime import LATENCY_MARGIN, Session, load

INPUT = "input.npy"
BATCH = 32
_CALLS = 8


def measure(folder: Path, rounds: int) -> dict[str, dict[str, float | None]]:
    """By method and profile: ``p50`` and ``p90`` in milliseconds, and ``violations``: the share of calls above the
    profile's own budget; for what is no T3C profile, above each of the budgets, in the mean; ``batch_p50``: a call with
    the whole batch."""
    x = np.load(folder / INPUT)
    sessions = {path.stem: load(path) for path in sorted(folder.glob("*.t3c"))}
    entries = [(f"{name}/{p.name}", session, p.name) for name, session in sessions.items() for p in session.profiles]
    times: dict[str, list[float]] = {key: [] for key, _, _ in entries}
    batch: dict[str, list[float]] = {key: [] for key, _, _ in entries}
    for _ in range(rounds):
        for key, session, profile in entries:
            session.set_profile(profile)
            times[key] += _times(session, x[:1], _CALLS)
            batch[key] += _times(session, x, 1)
    halves = {key: np.split(np.array(values), 2) for key, values in times.items()}
    budgets = {
        key: LATENCY_MARGIN * float(np.percentile(first, 90))
        for key, (first, _) in halves.items()
        if key.startswith("t3c/")
    }
    found: dict[str, dict[str, float | None]] = {}
    for key, (_, second) in halves.items():
        held = [budgets[key]] if key in budgets else list(budgets.values())
        over = [float((second > budget).mean()) for budget in held]
        found[key] = {
            "p50": float(np.percentile(second, 50)),
            "p90": float(np.percentile(second, 90)),
            "batch_p50": float(np.median(batch[key])),
            "violations": float(np.mean(over)) if over else None,
        }
    return found


def _times(session: Session, x: np.ndarray[Any, Any], calls: int) -> list[float]:
    found = []
    # The first calls after another profile or shape fetch its weights and take memory.
    for _ in range(2 + calls):
        began = time.perf_counter()
        session.run(x)
        found.append(1e3 * (time.perf_counter() - began))
    return found[2:]


if __name__ == "__main__":
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:1]))
    print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]))))
