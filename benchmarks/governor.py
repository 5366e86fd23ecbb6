"""Calls over a latency target with and without the governor, idle and beside a process that keeps the other core busy.

    python -m benchmarks.governor [ARTIFACT] --rounds 5 --calls 400

The program has one core and the other process another, where it copies memory. Four phases take turns: idle and busy,
each in a session without and in one with the governor, which goes through both. The target is the least budget that the
greatest profile fits, its 90th percentile measured idle with the margin that budgets have, times ``--slack``; lesser
profiles leave room. Without ARTIFACT a stack of linear layers is lowered whose singular values fall as those of trained
layers do.

After every call a loop that takes as long as the least profile's does, and reads no memory, is timed against the same
target: what of it is late the machine makes late, and no choice of profiles could help.
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
RANKS = (16, 64, 128, 208, 256, 320, 384, 448)
"""Of the profiles, such that each takes longer than the one before: at 192 a call took longer than at 256."""


def build(folder: Path) -> Path:
    """Eight linear layers of 1024 x 1024 over 256 rows, in eight profiles: one rank of :data:`RANKS` in all layers."""
    import torch
    from torch import nn

    from t3c_compile.artifact import lower
    from t3c_compile.backends.targets import get_target
    from t3c_compile.cost import profile_cost
    from t3c_compile.passes.elastic import elastic_layers
    from t3c_compile.passes.option import Option
    from t3c_compile.profile import Profile, ProfileSet
    from t3c_compile.transforming import observe, transform

    torch.manual_seed(0)
    layers = [part for _ in range(8) for part in (nn.Linear(1024, 1024), nn.GELU())]
    with torch.no_grad():
        for layer in layers[::2]:
            u, s, v = torch.linalg.svd(layer.weight)
            layer.weight.copy_(u * (4 * s.mean() / (1 + torch.arange(1024) / 16)) @ v)
    model = nn.Sequential(*layers, nn.Linear(1024, 10)).eval()
    inputs = (torch.randn(2, 256, 1024),)
    elastic, target, profiles = transform(model, inputs).eval(), get_target("x86_64"), []
    for index, rank in enumerate(RANKS):
        options = {
            name: Option("svd", rank, 8) if layer.max_rank >= RANKS[-1] else Option("dense", 0, 8)
            for name, layer in elastic_layers(elastic)
        }
        elastic.set_options(options)
        observe(elastic, [inputs])
        activations = {name: layer.activations() for name, layer in elastic_layers(elastic)}
        size = round(profile_cost(elastic, options, target).size_bytes)
        cost = {"latency_ms": 0.0, "energy_mj": 0.0, "source": "none"}
        # Lowering measures them. Nothing is said of quality: only the time counts here.
        profiles.append(
            Profile(f"p{index}", options, activations, size, {"kl": 0.0}, {"bound": 0.0}, {target.name: cost})
        )
    return lower(elastic, ProfileSet(profiles, "by hand"), [target], folder / "net.t3c", inputs)


def measure(call: Callable[[], object], calls: int) -> list[float]:
    """Milliseconds of each call."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def spinning(milliseconds: float) -> Callable[[], None]:
    """A loop that takes so long where nothing interrupts it."""

    def spin(turns: int = 100_000) -> None:
        for _ in range(turns):
            pass

    turns = round(100_000 * milliseconds / float(np.median(measure(spin, 60)[10:])))
    return lambda: spin(turns)


def one_phase(
    session: Session,
    inputs: list[np.ndarray],
    slo: float,
    calls: int,
    medians: list[float],
    spin: Callable[[], None],
) -> dict[str, float]:
    """Calls over ``slo``, those that what interrupted them had made late in the least profile too, loops over it, the
    sum of the profiles that ran, and the seconds in which something else had the core."""
    levels: list[int] = []
    times: list[float] = []
    spins: list[float] = []
    used, began = time.process_time(), time.perf_counter()
    for _ in range(calls):
        levels.append(session.active.index)
        times += measure(lambda: session.run(*inputs), 1)
        spins += measure(spin, 1)
    away = time.perf_counter() - began - (time.process_time() - used)
    least = [time - medians[level] + medians[0] for time, level in zip(times, levels, strict=True)]
    late, in_any, spun = (sum(milliseconds > slo for milliseconds in one) for one in (times, least, spins))
    switches = int(np.count_nonzero(np.diff(levels)))
    profile = float(np.sum(levels))
    counts = {"calls": calls, "late": late, "in_any": in_any, "spun": spun}
    return counts | {"profile": profile, "switches": switches, "away": away}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=400, help="of each phase and round")
    parser.add_argument("--slack", type=float, default=1.0, help="factor on the target (default 1)")
    parser.add_argument("--violations", type=float, default=0.001, help="share that may be late (default 0.001)")
    arguments = parser.parse_args()
    first, other = sorted(os.sched_getaffinity(0))[:2]
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.artifact or build(Path(folder))
        session, governed = t3c_compile.load(path), t3c_compile.load(path)
        os.sched_setaffinity(0, {first})
        shapes = [[1 if isinstance(size, str) else size for size in entry["shape"]] for entry in session.inputs]
        inputs = [np.zeros(shape, entry["dtype"]) for shape, entry in zip(shapes, session.inputs, strict=True)]
        medians = []
        for profile in session.profiles:
            session.set_profile(profile.name)
            times = measure(lambda: session.run(*inputs), 60)[10:]
            medians.append(float(np.median(times)))
        session.set_budget(t3c_compile.Budget())
        slo = LATENCY_MARGIN * float(np.percentile(times, 90)) * arguments.slack
        governed.governor(slo, arguments.violations)
        spin = spinning(medians[0])
        busy = subprocess.Popen([sys.executable, "-c", BUSY])
        os.sched_setaffinity(busy.pid, {other})
        time.sleep(1)
        sums: dict[tuple[bool, bool], dict[str, float]] = {}
        try:
            for _ in range(arguments.rounds):
                for loaded in (False, True):
                    busy.send_signal(signal.SIGCONT if loaded else signal.SIGSTOP)
                    time.sleep(0.2)
                    for one in (session, governed):
                        found = one_phase(one, inputs, slo, arguments.calls, medians, spin)
                        totals = sums.setdefault((loaded, one is governed), {})
                        totals |= {key: totals.get(key, 0) + value for key, value in found.items()}
        finally:
            busy.kill()
    print(f"target {slo:.3g} ms; medians of the profiles, idle: {', '.join(f'{m:.3g}' for m in medians)} ms")
    print(f"load average {os.getloadavg()[0]:.1f}, of which this benchmark's are at most 2")
    rows = [
        {"other core": "busy" if loaded else "idle", "governor": "on" if on else "off"}
        | {"calls": int(s["calls"]), "late_percent": 100 * s["late"] / s["calls"]}
        | {"late_in_any_percent": 100 * s["in_any"] / s["calls"], "late_loops_percent": 100 * s["spun"] / s["calls"]}
        | {"mean_profile": s["profile"] / s["calls"], "switches": int(s["switches"])}
        | {"core_taken_ms": round(1e3 * s["away"])}
        for (loaded, on), s in sums.items()
    ]
    show("calls over the target", rows, False)


if __name__ == "__main__":
    main()
