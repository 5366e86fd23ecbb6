"""Calls over a latency target with and without the governor, idle and beside a process that keeps the other core busy.

    python -m benchmarks.governor [ARTIFACT] --rounds 5 --calls 400

The program has one core and the other process another, where it copies memory; the four phases take turns. The target
is the 90th percentile of the greatest profile, measured idle, with the margin that budgets have and ``--slack``.
Without ARTIFACT a stack of linear layers with random weights is lowered.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["TVM_NUM_THREADS"] = "1"

import numpy as np

import t3c_compile
from t3c_compile.runtime import LATENCY_MARGIN, Session
from t3c_compile.show import show

BUSY = "import numpy as np\na, b = np.ones(1 << 25), np.ones(1 << 25)\nwhile True: a[:] = b; b += a * 0.5"


def build(folder: Path) -> Path:
    """Eight linear layers of 768 x 768 over 64 rows, at the most eight profiles."""
    import torch
    from torch import nn

    from t3c_compile.artifact import lower
    from t3c_compile.backends.targets import get_target
    from t3c_compile.snapping import snap
    from t3c_compile.transforming import transform

    torch.manual_seed(0)
    layers = [part for _ in range(8) for part in (nn.Linear(768, 768), nn.GELU())]
    model = nn.Sequential(*layers, nn.Linear(768, 10)).eval()
    inputs = (torch.randn(2, 64, 768),)
    elastic = transform(model, inputs)
    profiles = snap(elastic, [inputs], [get_target("x86_64")])
    return lower(elastic, profiles, ["x86_64"], folder / "net.t3c", inputs)


def measure(call: Callable[[], object], calls: int) -> list[float]:
    """Milliseconds of each call."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def one_phase(session: Session, inputs: list[np.ndarray], slo: float, governed: bool, calls: int) -> dict[str, float]:
    """Calls over ``slo``, the mean profile and the changes of profile."""
    levels: list[int] = []
    if governed:
        governor = session.governor(slo_ms=slo)
    else:
        session.set_budget(t3c_compile.Budget())

    def call() -> None:
        levels.append(session.active.index)
        session.run(*inputs)

    late = sum(milliseconds > slo for milliseconds in measure(call, calls))
    switches = governor.switches if governed else 0
    return {"calls": calls, "late": late, "profile": float(np.mean(levels)) * calls, "switches": switches}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=400, help="of each phase and round")
    parser.add_argument("--slack", type=float, default=1.0, help="factor on the target (default 1)")
    parser.add_argument("--realtime", action="store_true", help="keep other programs off both cores (as root)")
    arguments = parser.parse_args()
    first, other = sorted(os.sched_getaffinity(0))[:2]
    with tempfile.TemporaryDirectory() as folder:
        session = t3c_compile.load(arguments.artifact or build(Path(folder)))
        if arguments.realtime:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
        os.sched_setaffinity(0, {first})
        shapes = [[1 if isinstance(size, str) else size for size in entry["shape"]] for entry in session.inputs]
        inputs = [np.zeros(shape, entry["dtype"]) for shape, entry in zip(shapes, session.inputs, strict=True)]
        medians = []
        for profile in session.profiles:
            session.set_profile(profile.name)
            times = measure(lambda: session.run(*inputs), 60)[10:]
            medians.append(float(np.median(times)))
        slo = LATENCY_MARGIN * float(np.percentile(times, 90)) * arguments.slack
        busy = subprocess.Popen([sys.executable, "-c", BUSY])
        os.sched_setaffinity(busy.pid, {other})
        time.sleep(1)
        phases = [(loaded, governed) for loaded in (False, True) for governed in (False, True)]
        sums: dict[tuple[bool, bool], dict[str, float]] = {phase: {} for phase in phases}
        try:
            for _ in range(arguments.rounds):
                for loaded, governed in phases:
                    busy.send_signal(signal.SIGCONT if loaded else signal.SIGSTOP)
                    time.sleep(0.2)
                    found = one_phase(session, inputs, slo, governed, arguments.calls)
                    totals = sums[loaded, governed]
                    totals |= {key: totals.get(key, 0) + value for key, value in found.items()}
        finally:
            busy.kill()
    print(f"target {slo:.3g} ms; medians of the profiles, idle: {', '.join(f'{m:.3g}' for m in medians)} ms")
    print(f"load average {os.getloadavg()[0]:.1f}, of which this benchmark's are at most 2")
    rows = [
        {"other core": "busy" if loaded else "idle", "governor": "on" if governed else "off"}
        | {"calls": int(s["calls"]), "late_percent": 100 * s["late"] / s["calls"]}
        | {"mean_profile": s["profile"] / s["calls"], "switches": int(s["switches"])}
        for (loaded, governed), s in sums.items()
    ]
    show("calls over the target", rows, False)


if __name__ == "__main__":
    main()
