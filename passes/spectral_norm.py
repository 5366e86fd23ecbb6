"""Spectral norms of many linear maps at once, from above.

Lanczos on ``A^T A`` from a random start, all maps side by side, so that a step is two matrix products. What it finds
lies below the norm; after j steps in n dimensions it is more than a factor ``1 / sqrt(1 - e)`` below with probability
at most ``1.648 sqrt(n) exp(-sqrt(e) (2 j - 1))`` (Kuczynski and Wozniakowski, https://doi.org/10.1137/0613066, theorem
4.2), and that factor, for a probability of 1e-4, is put on top.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

_STEPS = 24
_MISS = 1e-4
# A singular value decomposition of a matrix with a side this short is cheaper.
EXACT_SIDE = 96


@torch.no_grad()
def spectral_norms(apply: Callable[[Tensor], Tensor], inputs: int, count: int) -> Tensor:
    """Upper bounds [count] on the norms of ``count`` linear maps, at most 7% above them for up to a million inputs.

    ``apply`` takes float32 [inputs, count], one vector for each map, and gives [outputs, count].
    """
    steps = min(_STEPS, inputs)
    start = torch.randn(inputs, 1, generator=torch.Generator().manual_seed(0)).expand(-1, count)
    now, before, off = start / start.norm(dim=0), torch.zeros_like(start), torch.zeros(count)
    diagonal, off_diagonal = [], []
    for _ in range(steps):
        with torch.enable_grad():
            image = apply(now.requires_grad_(True))
            (after,) = torch.autograd.grad(image, now, image.detach())
        now = now.detach()
        diagonal.append((now * after).sum(0))
        after = after - diagonal[-1] * now - off * before
        # The squares of what is left of a tiny matrix would vanish in float32.
        off = torch.linalg.vector_norm(after, dim=0, dtype=torch.float64).float()
        off_diagonal.append(off)
        before, now = now, after / off.clamp_min(torch.finfo(torch.float32).tiny)
    small = torch.diag_embed(torch.stack(diagonal, 1).double())
    sides = torch.stack(off_diagonal[:-1], 1).double() if steps > 1 else torch.zeros(count, 0).double()
    small = small + torch.diag_embed(sides, 1) + torch.diag_embed(sides, -1)
    found: Tensor = torch.linalg.eigvalsh(small)[:, -1].clamp_min(0).sqrt().float()
    if steps == inputs:
        return found  # the whole space has been seen
    share = (math.log(1.648 * math.sqrt(inputs) / _MISS) / (2 * steps - 1)) ** 2
    found = found / math.sqrt(1 - share)
    return found


def matrix_norm(matrix: Tensor) -> float:
    """Spectral norm of a float32 [m, n] matrix: exact where a side is short, else as :func:`spectral_norms` has it."""
    if min(matrix.shape) <= EXACT_SIDE:
        return float(torch.linalg.matrix_norm(matrix, ord=2))
    return float(spectral_norms(lambda x: matrix @ x, matrix.shape[1], 1)[0])
