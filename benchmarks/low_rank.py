"""Ways to the factors of one matrix: seconds, and how much of the greatest energy prefixes capture.

    OMP_NUM_THREADS=2 python benchmarks/low_rank.py [--shape 2048 2048] [--repeats 3]

``lost``: the greatest share, over ranks that pay (up to mn / (m + n)), of the energy a prefix could capture and does
not; for a flat spectrum (normal entries, the worst case) and for one that falls as 1/sqrt(i). Times are medians over
runs that take the ways in turn. ``randomized`` is Halko, Martinsson and Tropp's subspace iteration (arXiv 0909.4061) as
``torch.svd_lowrank`` has it, with the paying rank and two iterations; it lacks the tail that an exact product needs.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import scipy.linalg
import torch
from torch import Tensor

from t3c_compile.passes.low_rank import svd_factors
from t3c_compile.show import show

SHAPES = [(768, 768), (768, 3072), (2048, 2048), (2048, 5632), (5632, 2048)]


def _paying(w: Tensor) -> int:
    return w.numel() // sum(w.shape)


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "t3c": lambda w: svd_factors(w, None, 0.0)[1],
    "torch.linalg.svd": lambda w: torch.linalg.svd(w, full_matrices=False).U,
    "scipy gesdd": lambda w: torch.from_numpy(scipy.linalg.svd(w.numpy(), full_matrices=False)[0]),
    "randomized": lambda w: torch.svd_lowrank(w, q=_paying(w), niter=2)[0],
}


def falling(shape: tuple[int, int]) -> Tensor:
    """Normal singular vectors and singular values 1 / sqrt(i)."""
    small = min(shape)
    u, v = (torch.linalg.qr(torch.randn(size, small)).Q for size in shape)
    return (u * torch.arange(1, small + 1) ** -0.5) @ v.T


def lost(w: Tensor, u: Tensor, singular: Tensor) -> float:
    best = singular.double().square().cumsum(0)[: _paying(w)]
    captured = (u.T @ w).double().square().sum(1).cumsum(0)[: _paying(w)]
    return float((1 - captured / best).max())


def main() -> None:
    parser = argparse.ArgumentParser(description="ways to the factors of one matrix")
    parser.add_argument("--shape", type=int, nargs=2, action="append")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    rows = []
    for shape in map(tuple, arguments.shape or SHAPES):
        torch.manual_seed(0)
        matrices = {"flat": torch.randn(shape), "falling": falling(shape)}
        singular = {name: torch.linalg.svdvals(w) for name, w in matrices.items()}
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(arguments.repeats):
            for way, function in WAYS.items():
                start = time.perf_counter()
                function(matrices["flat"])
                seconds[way].append(time.perf_counter() - start)
        for way, function in WAYS.items():
            row = {"shape": "x".join(map(str, shape)), "paying": _paying(matrices["flat"]), "way": way}
            row |= {"seconds": median(seconds[way])}
            rows.append(row | {f"lost, {n}": lost(w, function(w), singular[n]) for n, w in matrices.items()})
    results = {"threads": torch.get_num_threads(), "rows": rows}
    path = Path(__file__).parent / "results/low_rank.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    show(f"factors of one matrix, {torch.get_num_threads()} threads", rows, False)


if __name__ == "__main__":
    main()
