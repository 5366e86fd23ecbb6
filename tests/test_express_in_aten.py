"""Deployment ops as ATen: the table and the pass give the ``t3c::`` ops' results to the bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_ops import _samples
from torch import Tensor, nn
from torch.fx import GraphModule

from t3c_compile.passes import ops
from t3c_compile.passes.errors import T3CError
from t3c_compile.passes.express_in_aten import ExpressInAten, decompositions
from t3c_compile.passes.pipeline import Pipeline

t3c = torch.ops.t3c

CONV = ([1, 1], [1, 1], [1, 1])


def _op(name: str) -> Any:
    return getattr(t3c, name).default


class _Call(nn.Module):
    """An op whose first argument is the input and whose other tensors are stored."""

    def __init__(self, name: str, *args: object) -> None:
        super().__init__()
        self.op, self.args = _op(name), args
        for index, argument in enumerate(args):
            if isinstance(argument, Tensor):
                self.register_buffer(f"stored_{index}", argument)

    def forward(self, x: Tensor) -> Tensor:
        args = [getattr(self, f"stored_{i}", argument) for i, argument in enumerate(self.args)]
        return self.op(x, *args)


def _plain_graph(model: nn.Module, x: Tensor) -> GraphModule:
    module = torch.export.export(model, (x,)).module(check_guards=False)
    return GraphModule(module, module.graph)


def _targets(graph: torch.fx.Graph) -> set[str]:
    return {str(node.target).partition(".")[0] for node in graph.nodes if node.op == "call_function"}


def test_every_deployment_op_has_an_aten_form() -> None:
    assert set(decompositions()) == {_op(name) for name in (*ops.DEPLOYMENT_OPS, *ops.FLOAT_OPS)}


@pytest.mark.parametrize("name", ops.DEPLOYMENT_OPS)
def test_table_and_pass_with_a_free_batch(name: str) -> None:
    """As ``run_decompositions`` with a symbolic batch and as a pass: no ``t3c::`` op is left, the bits are equal.

    Those of weight-only layers, whose sums ATen forms in float32, are to 1e-6 of the largest.
    """
    x, *rest = _samples()[name]
    assert isinstance(x, Tensor)
    model = _Call(name, *rest)
    expected = model(x)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    decomposed = program.run_decompositions(decompositions())
    graph = _plain_graph(model, x)
    assert ExpressInAten()(graph).modified
    for found in (decomposed.graph, graph.graph):
        assert _targets(found) == {"aten"}
    tolerance = 1e-6 * float(expected.abs().max()) if "weight_only" in name else 0.0
    more = torch.cat([x, x])
    for found, wanted in (
        (decomposed.module()(x), expected),
        (graph(x), expected),
        (decomposed.module()(more), model(more)),
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ops.FLOAT_OPS)
def test_float_stages_mean_what_aten_means(name: str) -> None:
    """To 4e-6 of the largest: their references round in an order of their own."""
    torch.manual_seed(0)
    x, heads = torch.randn(4, 6, 20) * 3, torch.randn(4, 2, 6, 20)
    args: dict[str, tuple[object, ...]] = {
        "layer_norm_f32": (x, torch.rand(20), torch.randn(20), 1e-5),
        "rms_norm_f32": (x, torch.rand(20), 1e-6),
        "mean_f32": (x, [1], False),
        "matmul_f32": (x, torch.randn(4, 20, 5)),
        "attention_f32": (heads, torch.randn(4, 2, 7, 20), torch.randn(4, 2, 7, 20), None, False, 0.2),
        "attention_int8": (
            heads,
            torch.randn(4, 1, 7, 20),
            torch.randn(4, 1, 7, 20),
            torch.rand(6, 7) > 0.3,
            True,
            0.2,
        ),
    }
    first, *rest = args.get(name, (x,))
    assert isinstance(first, Tensor)
    model = _Call(name, *rest)
    expected = model(first)
    decomposed = torch.export.export(model, (first,)).run_decompositions(decompositions())
    graph = _plain_graph(model, first)
    assert ExpressInAten()(graph).modified
    assert _targets(decomposed.graph) == {"aten"}
    for found in (decomposed.module()(first), graph(first)):
        assert float((found - expected).abs().max()) <= 4e-6 * float(expected.abs().max())


def _int8(*shape: int, most: int = 119) -> Tensor:
    return torch.randint(-most, most + 1, shape).to(torch.int8)


def _linear(channels: int, bits: int) -> tuple[object, ...]:
    return (_int8(40, channels), torch.rand(40) * 1e-2, torch.randn(40), 0.02, -128, bits)


def _svd(channels: int, bits: int) -> tuple[object, ...]:
    tensors = (_int8(24, channels), _int8(24, 40), torch.rand(24) * 1e-4, torch.rand(40), torch.randn(40))
    return (*tensors, 0.02, 127, 0.05, 19, bits)


def _conv(channels: int, bits: int) -> tuple[object, ...]:
    return (_int8(24, channels // 2, 3, 3), torch.rand(24), torch.randn(24), 0.02, -128, *CONV, 2, bits)


def _svd_conv(channels: int, bits: int) -> tuple[object, ...]:
    *tensors_and_scales, rank, bits = _svd(channels, bits)
    return (*tensors_and_scales, [2, 2], rank, bits)


def _three(core: tuple[int, ...], rank: int, channels: int, bits: int) -> tuple[object, ...]:
    factors = (_int8(core[-3], channels), _int8(*core), _int8(core[0], 40))
    scales = (torch.rand(core[-3]) * 1e-4, torch.rand(core[0]) * 1e-4, torch.rand(40), torch.randn(40))
    return (*factors, *scales, 0.02, 5, 0.05, 0.1, [2, 1], [1, 2], [1, 2], rank, bits)


HARD: dict[str, Callable[[int, int], tuple[object, ...]]] = {
    "int8_linear": _linear,
    "svd_linear": _svd,
    "int8_conv2d": _conv,
    "svd_conv2d": _svd_conv,
    "tucker2_conv2d": lambda channels, bits: _three((140, 130, 3, 3), 125, channels, bits),
    "cp_conv2d": lambda channels, bits: _three((24, 3, 3), 19, channels, bits),
}


def _extremes(x: Tensor) -> Tensor:
    """Some rows at each end of int8, the rest random."""
    x[0], x[1] = -128, 127
    return x


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
@pytest.mark.parametrize("channels", [64, 548, 1400])
@pytest.mark.parametrize("name", HARD)
def test_equal_at_the_extremes(name: str, channels: int, bits: int) -> None:
    """The largest zero points, weights all at their largest in one channel, sums on both sides of 2**24."""
    torch.manual_seed(channels + bits)
    shape = (channels,) if "linear" in name else (channels, 5, 6)
    x = _extremes(_int8(16, *shape, most=127))
    args = HARD[name](channels, bits)
    first = args[0]
    assert isinstance(first, Tensor)
    first[0], first[1] = 119, -119
    expected = _op(name)(x, *args)
    assert torch.equal(decompositions()[_op(name)](x, *args), expected)


@pytest.mark.parametrize("channels", [64, 1400])
@pytest.mark.parametrize("name", HARD)
def test_without_float64_sums_are_still_exact(name: str, channels: int) -> None:
    """Where there is no bias the epilogue has one rounding either way, so all bits are equal; with one, to an ulp.

    Torch itself has no dilated convolution of integers, so there is none here.
    """
    torch.manual_seed(channels)
    shape = (channels,) if "linear" in name else (channels, 5, 6)
    x = _extremes(_int8(4, *shape, most=127))
    schema = [argument.name for argument in _op(name)._schema.arguments][1:]
    args = [[1, 1] if isinstance(value, list) else value for value in HARD[name](channels, 6)]
    graph = _plain_graph(_Call(name, *args), x)
    ExpressInAten(float64=False)(graph)
    assert not any(torch.float64 in node.args for node in graph.graph.nodes)
    expected = _op(name)(x, *args)
    largest = float(expected.abs().max())
    assert float((graph(x) - expected).abs().max()) <= 2**-23 * largest
    without = [None if argument == "bias" else value for argument, value in zip(schema, args, strict=True)]
    exact = _op(name)(x, *without)
    assert torch.equal(decompositions(float64=False)[_op(name)](x, *without), exact)


def test_quantize_on_ties_and_beyond() -> None:
    x = torch.cat([torch.arange(-600, 600) * 0.25, torch.tensor([float("inf"), -float("inf"), 1e30, -1e30, -0.0])])
    for scale, zero in ((0.5, 0), (0.1, -128), (1 / 3, 127), (1e-3, 7)):
        expected = t3c.quantize_int8(x, scale, zero)
        found = decompositions()[t3c.quantize_int8.default](x, scale, zero)
        assert found.dtype == torch.int8
        assert torch.equal(found, expected)


def test_as_pipeline_text() -> None:
    pipeline = Pipeline.parse("fold-batch-norm; express-in-aten{float64=False}")
    assert pipeline.passes[1] == ExpressInAten(float64=False)
    assert Pipeline.parse(str(pipeline)) == pipeline
    with pytest.raises(T3CError, match="float64='no' is not a boolean"):
        Pipeline.parse("express-in-aten{float64=no}")


def test_new_nodes_say_where_they_come_from() -> None:
    model = nn.Module()
    model.layer = _Call("int8_linear", *_linear(16, 8))  # type: ignore[assignment]
    model.forward = lambda x: model.layer(x)  # type: ignore[method-assign, assignment]
    graph = _plain_graph(model, _int8(3, 16))
    ExpressInAten()(graph)
    stacks = [node.meta["nn_module_stack"] for node in graph.graph.nodes if node.op == "call_function"]
    assert stacks
    assert all(list(stack.values())[-1][0] == "layer" for stack in stacks)
