"""Spectral norms by Lanczos, held against singular value decompositions."""

import pytest
import torch
from torch import Tensor

from t3c_compile.certificate import error_norms
from t3c_compile.passes.decompose_conv import tucker2_factors
from t3c_compile.passes.elastic import SvdLinear, Tucker2Conv2d
from t3c_compile.passes.elastic.conv import ConvGeometry
from t3c_compile.passes.option import Option
from t3c_compile.passes.spectral_norm import matrix_norm, spectral_norms

BOUND = 1.05


def _with_values(values: Tensor, rows: int, columns: int) -> Tensor:
    left, right = (torch.linalg.qr(torch.randn(size, len(values)))[0] for size in (rows, columns))
    return left * values @ right.T


SPECTRA = {
    "gaussian": lambda: torch.randn(300, 500),
    "flat": lambda: _with_values(torch.ones(200), 400, 300),
    "a cluster at the top": lambda: _with_values(torch.cat([1 - torch.rand(50) / 1e3, torch.rand(150)]), 300, 400),
    "one direction": lambda: _with_values(torch.ones(1), 300, 200),
    "slow decay": lambda: _with_values(1 / torch.arange(1.0, 301), 300, 300),
    "tiny": lambda: 1e-12 * torch.randn(300, 300),
    "zero": lambda: torch.zeros(300, 200),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_norm_is_bounded_from_above_and_tight(name: str) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        matrix = SPECTRA[name]()
        exact = float(torch.linalg.matrix_norm(matrix, ord=2))
        assert (1 - 1e-5) * exact <= matrix_norm(matrix) <= BOUND * exact


def test_maps_side_by_side_do_not_mix() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(6, 150, 130) * torch.tensor([1e-3, 1, 5, 0, 1e3, 2])[:, None, None]
    norms = spectral_norms(lambda x: torch.einsum("kmn,nk->mk", matrices, x), 130, 6)
    exact = torch.linalg.matrix_norm(matrices, ord=2)
    assert bool((norms >= (1 - 1e-5) * exact).all())
    assert bool((norms <= BOUND * exact).all())


def test_few_inputs_are_exact() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(40, 7)
    (norm,) = spectral_norms(lambda x: matrix @ x, 7, 1)
    assert float(norm) == pytest.approx(float(torch.linalg.matrix_norm(matrix, ord=2)), rel=1e-4)


@pytest.mark.parametrize("form", ["svd", "tucker2"])
def test_error_norms_of_large_layers(form: str) -> None:
    """All options of a chain at once, dense included, against each error composed and decomposed."""
    torch.manual_seed(0)
    if form == "svd":
        layer = SvdLinear(
            torch.linalg.qr(torch.randn(128, 160))[0][:, :128].T.contiguous(), torch.randn(200, 128), None
        )
        kernel = 1.0
    else:
        layer = Tucker2Conv2d(*tucker2_factors(torch.randn(112, 104, 3, 3)), None, ConvGeometry(padding=(1, 1)))
        kernel = 3.0
    options = [
        Option(form, 16, 4),
        Option(form, 48, 4),
        Option(form, 48, 6),
        Option(form, 96, 8),
        Option("dense", 0, 6),
    ]
    for option, norm in zip(options, error_norms(layer, options), strict=True):
        if option.form == "dense":
            continue
        error = (layer.dense_weight() - layer.dense_weight(option)).detach().flatten(1)
        exact = float(torch.linalg.matrix_norm(error, ord=2)) * kernel
        assert (1 - 1e-4) * exact <= norm <= BOUND * exact, option
