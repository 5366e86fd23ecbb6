"""The ``t3c::`` ops: schema, fake kernel, reference and gradient."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from t3c_compile.passes import ops
from t3c_compile.passes.elastic import ActivationQuantizer
from t3c_compile.passes.ops.nested import keep_top_bits, quantize_weight, weight_scale


def _int8(*shape: int, most: int = 119) -> Tensor:
    return torch.randint(-most, most + 1, shape).to(torch.int8)


def _samples() -> dict[str, tuple[object, ...]]:
    torch.manual_seed(0)
    image, row = _int8(2, 6, 7, 5, most=127), _int8(3, 4, 11, most=127)
    chain = (None, torch.randn(9), 0.02, -7, 0.3)
    conv = ([2, 1], [1, 2], [1, 1])
    three = (torch.rand(4), torch.rand(5), torch.rand(9), torch.randn(9), 0.02, 3, 0.2, 0.4)
    return {
        "quantize_int8": (torch.randn(3, 4), 0.05, -3),
        "dequantize_int8": (row, 0.05, 9),
        "int8_linear": (row, _int8(9, 11), torch.rand(9), torch.randn(9), 0.02, 5, 6),
        "int8_embedding": (torch.tensor([[3, 0], [8, 8]]), _int8(9, 11), torch.rand(9), 6),
        "svd_linear": (row, _int8(8, 11), _int8(8, 9), torch.rand(8), *chain, 3, 4),
        "svd_weight_only_linear": (torch.randn(3, 11), _int8(8, 11), _int8(8, 9), torch.rand(8), torch.randn(9), 3, 4),
        "weight_only_linear": (torch.randn(3, 11), _int8(9, 11), torch.rand(9), None, 4),
        "int8_conv2d": (image, _int8(9, 3, 3, 3)[:8], torch.rand(8), None, 0.02, 5, *conv, 2, 8),
        "svd_conv2d": (image, _int8(8, 6), _int8(8, 9), torch.rand(8), *chain, [2, 1], 5, 8),
        "tucker2_conv2d": (image, _int8(4, 6), _int8(5, 4, 3, 3), _int8(5, 9), *three, *conv, 3, 8),
        "cp_conv2d": (
            image,
            _int8(4, 6),
            _int8(4, 3, 3),
            _int8(4, 9),
            three[0],
            torch.rand(4),
            *three[2:],
            *conv,
            3,
            6,
        ),
    }


@pytest.mark.parametrize("name", ops.DEPLOYMENT_OPS)
def test_deployment_op_is_well_formed(name: str) -> None:
    """Schema, fake kernel and export agree with the reference (torch's own checker)."""
    op = getattr(torch.ops.t3c, name).default
    torch.library.opcheck(op, _samples()[name], test_utils=("test_schema", "test_faketensor"))


def test_every_deployment_op_has_a_sample() -> None:
    assert set(_samples()) == set(ops.DEPLOYMENT_OPS)


def test_training_ops_are_well_formed() -> None:
    scale, zero, bits = torch.tensor(0.1), torch.tensor(3.0), torch.tensor(8.0)
    x = torch.randn(4, 4, requires_grad=True)
    torch.library.opcheck(torch.ops.t3c.fake_quantize.default, (x, scale, zero, bits, -128))
    torch.library.opcheck(torch.ops.t3c.fake_quantize_weight.default, (x, weight_scale(x.detach(), 1), bits))


@given(st.integers(4, 8))
@settings(max_examples=5)
def test_lower_widths_are_rounded_top_bits(bits: int) -> None:
    """Every width is the nearest multiple of its step, of two the even one, and fits its signed bits; so the mean of
    all weights stays where it is."""
    q = torch.arange(-119, 120)
    step = 2 ** (8 - bits)
    expected = torch.tensor([step * round(Fraction(int(value), step)) for value in q])
    found = keep_top_bits(q, bits)
    assert float(found.double().mean()) == 0
    assert torch.equal(found, expected)
    assert int((found // step).max()) <= 2 ** (bits - 1) - 1
    assert int((found // step).min()) >= -(2 ** (bits - 1))
    assert int((found - q).abs().max()) <= step / 2


def test_straight_through_gradients() -> None:
    """Gradient one where the value is representable, zero where it is clamped, whatever the rounding did."""
    x = torch.tensor([-20.0, -1.03, 0.0, 0.57, 20.0], requires_grad=True)
    y = ops.fake_quantize(x, torch.tensor(0.1), torch.tensor(0.0), torch.tensor(8.0), -128)
    assert torch.allclose(y, torch.tensor([-12.8, -1.0, 0.0, 0.6, 12.7]))
    (y * torch.arange(1.0, 6.0)).sum().backward()
    assert torch.equal(x.grad, torch.tensor([0.0, 2.0, 3.0, 4.0, 0.0]))


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_on_a_cpu_is_that_of_other_devices(symmetric: bool) -> None:
    """To the bit, with its gradient, and ranges as the tensor formulas have them."""
    torch.manual_seed(0)
    numbers, tensors = ActivationQuantizer(symmetric), ActivationQuantizer(symmetric)
    numbers.train()
    for _ in range(3):
        x = (3 * torch.randn(50, 7) + 1).requires_grad_()
        y = numbers(x, torch.tensor(8.0))
        tensors._observe(x.detach(), 0)
        for name, buffer in numbers.named_buffers():
            torch.testing.assert_close(buffer, tensors.get_buffer(name), rtol=1e-6, atol=0)
    # Wider than the range, so that some are clamped.
    x = (2 * x.detach()).requires_grad_()
    numbers.eval()
    y = numbers(x, torch.tensor(8.0))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    expected, inside = torch.ops.aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams(
        x, numbers.scale[0], numbers.zero_point[0].int(), torch.tensor(1), -127 if symmetric else -128, 127
    )
    assert torch.equal(y, expected)
    assert torch.equal(gradient, inside.float())
    assert not inside.all()


def test_thirty_two_bits_is_no_rounding() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    bits = torch.tensor(32.0)
    assert torch.equal(ops.fake_quantize(x, torch.tensor(0.5), torch.tensor(0.0), bits, -128), x)
    assert torch.equal(ops.fake_quantize_weight(x, weight_scale(x.detach(), 1), bits), x)


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
def test_fake_quantized_weight_is_the_stored_integer(bits: int) -> None:
    """What training sees is scale times what the store holds, to the bit."""
    torch.manual_seed(bits)
    weight = torch.randn(17, 33) * torch.logspace(-3, 3, 17)[:, None]
    scale = weight_scale(weight, 1)
    stored = quantize_weight(weight, scale).to(torch.int8)
    seen = ops.fake_quantize_weight(weight, scale, torch.tensor(float(bits)))
    assert torch.equal(seen, keep_top_bits(stored, bits).to(torch.float32) * scale)


@pytest.mark.parametrize("bits", [4, 8])
def test_svd_chain_is_two_dense_linears(bits: int) -> None:
    """The chain's middle and output against a separate computation in exact integers, at the extremes of int8."""
    torch.manual_seed(0)
    x, v, u = _int8(6, 40, most=127), _int8(16, 40), _int8(16, 24)
    x[0], x[1] = 127, -128
    mid, bias = torch.rand(16) * 1e-3, torch.randn(24)
    step = 2 ** (8 - bits)
    vq, uq = (step * (t.double() / step).round().long() for t in (v, u))
    acc = (x.long() + 5) @ vq[:8].T
    h = torch.clamp(torch.round(acc.float() * (mid[:8] * torch.tensor(0.02 / 0.1))), -127, 127)
    sums = (h.long() @ uq[:8]).double()
    y = (sums * torch.tensor(0.1).double() + bias.double()).float()
    assert torch.equal(ops.svd_linear(x, v, u, mid, None, bias, 0.02, -5, 0.1, 8, bits), y)


def test_a_one_by_one_chain_is_the_linear_chain() -> None:
    torch.manual_seed(0)
    x, v, u = _int8(2, 40, 3, 5, most=127), _int8(16, 40), _int8(16, 24)
    arguments = (torch.rand(16) * 1e-3, torch.rand(24), torch.randn(24), 0.02, -5, 0.1)
    y = ops.svd_conv2d(x, v, u, *arguments, [1, 1], 8, 6)
    rows = ops.svd_linear(x.permute(0, 2, 3, 1), v, u, *arguments, 8, 6)
    assert torch.allclose(y, rows.permute(0, 3, 1, 2), rtol=1e-6, atol=1e-6)
