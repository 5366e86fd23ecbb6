"""What changing profile costs in a running program: time and memory.

    python benchmarks/switching.py build/demo/vit.t3c

``switch`` is ``set_budget`` alone; ``first`` is how much longer the first call after a switch takes than a call of the
same profile in a row (its weights are not in the cache yet). Medians over 300 switches between all profiles, in turn.
``grown`` is resident anonymous memory after all profiles have run, less that after 2000 calls of the first.
"""

import sys
import time
from pathlib import Path
from statistics import median

import numpy as np

import t3c_compile
from t3c_compile.show import show


def resident() -> int:
    """Anonymous resident bytes of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def main() -> None:
    session = t3c_compile.load(sys.argv[1])
    shapes = [[1 if isinstance(size, str) else size for size in entry["shape"]] for entry in session.inputs]
    inputs = [np.zeros(shape, entry["dtype"]) for shape, entry in zip(shapes, session.inputs, strict=True)]
    budgets = [t3c_compile.Budget(size_mb=profile.size_mb) for profile in session.profiles]

    def call() -> float:
        start = time.perf_counter()
        session.run(*inputs)
        return 1e6 * (time.perf_counter() - start)

    session.set_budget(budgets[0])
    for _ in range(2000):
        call()
    before = resident()
    for budget in budgets:
        session.set_budget(budget)
        call()
    grown = resident() - before
    switches, firsts = [], []
    for i in range(300):
        start = time.perf_counter()
        session.set_budget(budgets[i % len(budgets)])
        switches.append(1e6 * (time.perf_counter() - start))
        first = call()
        firsts.append(first - median(call() for _ in range(5)))
    row = {"artifact": sys.argv[1], "profiles": len(budgets), "switch_us": median(switches)}
    row |= {"first_us": median(firsts), "grown_bytes": grown}
    show("switching", [row], False)


if __name__ == "__main__":
    main()
