"""Factors against a float64 SVD: exact at full rank, and every prefix captures what the best of its rank does."""

import math

import pytest
import torch
from nets import attention_net, conv_net
from torch import Tensor, nn

from t3c_compile.passes.capture import capture
from t3c_compile.passes.decompose_conv import tucker2_factors
from t3c_compile.passes.find_elastic_layers import Candidate, FindElasticLayers
from t3c_compile.passes.low_rank import left_basis, svd_factors
from t3c_compile.passes.record_moments import InputMoments

SPECTRA = {"flat": None, "1/i": -1.0, "1/i^3": -3.0, "outliers": 0.0}


def _matrix(m: int, n: int, spectrum: str) -> Tensor:
    torch.manual_seed(0)
    power = SPECTRA[spectrum]
    if power is None:
        return torch.randn(m, n)
    rank = min(m, n)
    u, v = (torch.linalg.qr(torch.randn(size, rank, dtype=torch.float64)).Q for size in (m, n))
    singular = torch.arange(1, rank + 1, dtype=torch.float64) ** power
    if spectrum == "outliers":
        singular[:3] = torch.tensor([1000.0, 300.0, 100.0])
    return ((u * singular) @ v.T).float()


def _moment(n: int) -> Tensor:
    """Of inputs with a steep spectrum and a few features a hundred times the others, as transformers have."""
    x = torch.randn(2 * n, n, dtype=torch.float64) * torch.logspace(0, -2, n, dtype=torch.float64)
    x[:, ::97] *= 100
    return x.T @ x / len(x)


def _check(weight: Tensor, v: Tensor, u: Tensor, root: Tensor) -> None:
    m, n = weight.shape
    w, u, v = weight.double(), u.double(), v.double()
    rank = min(m, n)
    assert u.shape == (m, rank)
    assert v.shape == (rank, n)
    assert float((u @ v - w).norm()) <= 3e-6 * float(w.norm())
    assert float((u.T @ u - torch.eye(rank)).abs().max()) < 2e-2
    energies = torch.linalg.svdvals(w @ root).square()
    best, total = energies.cumsum(0), energies.sum()
    paying = m * n // (m + n)
    for k in sorted({1, 8, paying // 4, paying // 2, paying} - {0}):
        lost = (w @ root - u[:, :k] @ (v[:k] @ root)).square().sum()
        assert float(total - lost) >= (1 - 2e-5) * float(best[k - 1]), k


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(530, 530), (520, 700), (700, 520), (96, 300), (300, 96)])
def test_prefixes_capture_the_greatest_energy_there_is(shape: tuple[int, int], spectrum: str) -> None:
    """Relative to the captured energy, 2e-5; the product at full rank within 3e-6; columns of U orthonormal."""
    weight = _matrix(*shape, spectrum)
    v, u = svd_factors(weight, None, 0.0)
    _check(weight, v, u, torch.eye(shape[1], dtype=torch.float64))


@pytest.mark.parametrize("shape", [(1200, 520), (520, 1200)])
def test_long_matrices_are_taken_in_blocks(shape: tuple[int, int]) -> None:
    weight = _matrix(*shape, "flat")
    v, u = svd_factors(weight, None, 0.0)
    _check(weight, v, u, torch.eye(shape[1], dtype=torch.float64))


@pytest.mark.parametrize("spectrum", ["flat", "1/i"])
@pytest.mark.parametrize("shape", [(300, 400), (400, 300)])
def test_whitened_prefixes_capture_the_greatest_energy_of_outputs(shape: tuple[int, int], spectrum: str) -> None:
    weight = _matrix(*shape, spectrum)
    moment = _moment(shape[1])
    v, u = svd_factors(weight, moment, 1e-2)
    damped = moment + 1e-2 * moment.diagonal().mean() * torch.eye(shape[1])
    _check(weight, v, u, torch.linalg.cholesky(damped))


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(560, 530),
        torch.zeros(530, 560),
        torch.ones(560, 530),
        torch.ones(6, 5),
        1e-25 * _matrix(560, 530, "flat"),
        1e25 * _matrix(560, 530, "flat"),
        _matrix(560, 3, "flat") @ _matrix(3, 530, "flat"),
        _matrix(560, 530, "flat") * (torch.arange(530) % 7 > 0),
        _matrix(1, 530, "flat"),
        _matrix(530, 1, "flat"),
        _matrix(530, 560, "flat").T,
    ],
    ids=["zero", "zero wide", "ones", "small", "tiny", "huge", "rank 3", "dead inputs", "row", "column", "transposed"],
)
def test_hard_matrices_are_exact_and_orthonormal(weight: Tensor) -> None:
    v, u = svd_factors(weight, None, 0.0)
    scale = float(weight.abs().max()) or 1.0
    w = weight.double() / scale
    assert bool(torch.isfinite(u).all())
    assert float((u.double() @ (v.double() / scale) - w).norm()) <= 3e-6 * float(w.norm())
    if bool(weight.any()):
        assert float((u.double().T @ u.double() - torch.eye(u.shape[1])).abs().max()) < 2e-2


@pytest.mark.parametrize("shape", [(520, 24, 3, 3), (24, 520, 3, 3), (64, 3, 7, 7), (600, 4, 3, 3)])
def test_tucker2_is_the_higher_order_svd(shape: tuple[int, ...]) -> None:
    """Its bases capture, side by side, what the singular vectors of the two unfoldings do."""
    torch.manual_seed(0)
    kernel = torch.randn(shape) * torch.linspace(1, 0.01, shape[0])[:, None, None, None]
    v, core, u = tucker2_factors(kernel)
    whole = torch.einsum("or,rshw,si->oihw", u.double(), core.double(), v.double())
    assert float((whole - kernel).norm()) <= 3e-6 * float(kernel.norm())
    for basis, unfolded in ((u, kernel.flatten(1)), (v.T, kernel.transpose(0, 1).flatten(1))):
        best = torch.linalg.svdvals(unfolded.double()).square().cumsum(0)
        captured = (basis.double().T @ unfolded.double()).square().sum(1).cumsum(0)
        assert torch.allclose(captured, best[: len(captured)], rtol=2e-5)


def test_left_basis_of_a_tall_matrix_is_orthonormal() -> None:
    basis = left_basis(_matrix(900, 530, "1/i^3"))
    assert torch.allclose(basis.T @ basis, torch.eye(530, dtype=basis.dtype), atol=1e-9)


def _candidates(gm: nn.Module) -> dict[str, Candidate]:
    found = [node.meta.get("t3c_candidate") for node in gm.graph.nodes]  # type: ignore[union-attr]
    return {c.layer: c for c in found if isinstance(c, Candidate) and c.form == "svd"}


@pytest.mark.parametrize("net", [attention_net, conv_net])
def test_moments_are_of_the_layers_own_inputs(net: object) -> None:
    """In any order of asking, against inputs that hooks saw in the user's own model."""
    model, inputs = net()  # type: ignore[operator]
    batches = [tuple(torch.randn_like(x) for x in inputs) for _ in range(3)]
    gm = capture(model, inputs).eval()
    FindElasticLayers()(gm)
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str, kind: str) -> object:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].movedim(1, -1) if kind == "conv2d" else args[0]
            seen.setdefault(name, []).append(x.detach().reshape(-1, x.shape[-1]).double())

        return hook

    found = _candidates(gm)
    modules = dict(model.named_modules())
    named = [name for name in found if name in modules and not isinstance(modules[name], nn.MultiheadAttention)]
    handles = [modules[name].register_forward_pre_hook(keep(name, found[name].kind)) for name in named]  # type: ignore[arg-type]
    for batch in batches:
        model(*batch)
    for handle in handles:
        handle.remove()
    moments = InputMoments(gm, iter(batches))
    assert moments.get("no.such.layer") is None
    checked = [name for name in [*seen, *reversed(list(seen))] if seen[name]]
    assert len(checked) >= 4
    for name in checked:
        rows = torch.cat(seen[name])
        moment = moments.get(name)
        assert moment is not None
        assert math.isclose(
            float((moment - rows.T @ rows / len(rows)).norm()), 0.0, abs_tol=1e-5 * float(moment.norm())
        )
