"""Exact factors of a matrix, sorted by energy: singular vectors from the eigenvectors of a Gram matrix.

A profile may use up to mn / (m + n) components, which is never under half of min(m, n), and three quarters of it at
common shapes. So many leave randomized SVD nothing to save (``benchmarks/low_rank.py`` compares): the symmetric
eigenproblem of the smaller side takes less time than that or a full SVD, and needs no memory of the larger side's size.
"""

import math

import torch
from torch import Tensor

# Up to this size float64 costs milliseconds; beyond it, float32 halves time and memory.
_FLOAT64 = 512
_CHUNK = 1024


def svd_factors(weight: Tensor, moment: Tensor | None, damping: float) -> tuple[Tensor, Tensor]:
    """``V`` [R, n] and ``U`` [m, R] with ``U V`` equal to ``weight`` [m, n], R = min(m, n), sorted by energy.

    ``moment`` [n, n] is the mean of ``x x^T`` over inputs: the energy is then that of ``W S``, ``S S^T`` the damped
    moment. ``U`` has orthonormal columns, so that int8 noise of the middle weighs the same on every component. The
    product is exact at full rank, whatever the basis, and every prefix captures the greatest energy there is to 1e-5.
    """
    w = weight.detach()
    m, n = w.shape
    # What stays is allocated ahead of what goes, or the heap would keep holes between the layers' factors.
    u, v = w.new_empty(m, min(m, n)), w.new_empty(min(m, n), n)
    damped = None if moment is None else _damped(moment, damping)
    if m <= n:
        basis = left_basis(w, damped)
        _multiply(w.T, basis, v.T)
        u.copy_(basis)
        return v, u
    root = None if damped is None else torch.linalg.cholesky(damped)
    gram = _gram(w.T, _dtype(n, moment))
    right = _eigenvectors(gram if root is None else root.T @ gram @ root)
    scale = _scale(w)
    _multiply(w, scale * (right if root is None else root @ right), u)
    # U = W S P / norms and V = norms P^T / S: their product is W however P's directions are rounded.
    norms = torch.linalg.vector_norm(u, dim=0).clamp_min(torch.finfo(u.dtype).tiny)
    u /= norms
    v.copy_(right.T if root is None else torch.linalg.solve_triangular(root, right.T, upper=False, left=False))
    v *= norms[:, None] / scale
    if norms[-1] < 1e5 * torch.finfo(right.dtype).eps * norms[0]:
        # The least components hold the rounding of the greatest.
        u, triangle = torch.linalg.qr(u)
        v = triangle @ v
    return v, u


def left_basis(w: Tensor, moment: Tensor | None = None) -> Tensor:
    """Left singular vectors [m, R] of ``w`` [m, n], R = min(m, n), by falling singular value; float32 or float64.

    With ``moment`` [n, n] (m at most n), those of ``w S``, ``S S^T = moment``.
    """
    m, n = w.shape
    if m > n:
        u: Tensor = torch.linalg.svd(w.to(torch.float64), full_matrices=False).U
        return u
    return _eigenvectors(_gram(w, _dtype(m, moment), moment))


def svd_flops(m: int, n: int) -> float:
    """Floating-point operations of :func:`svd_factors`, nearly: what a progress bar goes by."""
    small = min(m, n)
    return 4.0 * m * n * small + 20.0 * small**3


def _dtype(small: int, moment: Tensor | None) -> torch.dtype:
    """Whitened spectra are steep: the least singular values drown in a float32 Gram matrix."""
    return torch.float64 if moment is not None or small <= _FLOAT64 else torch.float32


def _damped(moment: Tensor, damping: float) -> Tensor:
    c = moment.to(torch.float64, copy=True)
    c.diagonal().add_(damping * float(c.diagonal().mean().clamp_min(1e-12)))
    return c


def _gram(w: Tensor, dtype: torch.dtype, moment: Tensor | None = None) -> Tensor:
    """``w moment w^T`` for ``w`` divided by its largest magnitude, a block of columns at a time."""
    scale = _scale(w)
    gram = torch.zeros(len(w), len(w), dtype=dtype)
    left = None if moment is None else scale * w.to(dtype) @ moment
    for start in range(0, w.shape[1], _CHUNK):
        columns = slice(start, start + _CHUNK)
        block = w[:, columns].to(dtype) * scale
        gram.addmm_(block if left is None else left[:, columns], block.T)
    return gram


def _scale(w: Tensor) -> float:
    """What brings squares of ``w`` into the range of float32."""
    return 1 / max(float(torch.linalg.vector_norm(w, math.inf)), 1e-30)


def _eigenvectors(gram: Tensor) -> Tensor:
    """By falling eigenvalue."""
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors.flip(1)


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a b`` in the precision of ``b``, a block of rows at a time."""
    for start in range(0, len(a), _CHUNK):
        rows = slice(start, start + _CHUNK)
        out[rows] = a[rows].to(b.dtype) @ b
