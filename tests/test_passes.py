"""Passes: graph to graph, conditions, the pipeline as text, and a user's own PassManager."""

import copy
import re

import pytest
import torch
from nets import NETS, attention_net, conv_net, mlp
from torch import nn
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_manager import PassManager, pass_result_wrapper

from t3c_compile.passes.base import elastic_calls
from t3c_compile.passes.capture import capture
from t3c_compile.passes.decompose_conv import DecomposeConv, cp_factors, tucker2_factors
from t3c_compile.passes.decompose_linear import DecomposeLinear
from t3c_compile.passes.elastic import CpConv2d, DenseConv2d, SvdConv2d, SvdLinear, Tucker2Conv2d, elastic_layers
from t3c_compile.passes.errors import PassConditionError
from t3c_compile.passes.find_elastic_layers import FindElasticLayers
from t3c_compile.passes.fold_batch_norm import FoldBatchNorm
from t3c_compile.passes.insert_hooks import InsertHooks
from t3c_compile.passes.insert_quantizers import InsertQuantizers
from t3c_compile.passes.low_rank import svd_factors
from t3c_compile.passes.path_gains import PathGains, measured_gains, norm_product_gains
from t3c_compile.passes.pipeline import PASSES, Pipeline, PipelineSyntaxError, default_pipeline
from t3c_compile.passes.specialize import Specialize

aten = torch.ops.aten


def _targets(gm: GraphModule) -> list[str]:
    return [str(n.target) for n in gm.graph.nodes if n.op in ("call_function", "call_module")]


def test_capture_keeps_names_and_two_graphs() -> None:
    model, inputs = conv_net()
    captured = capture(model, inputs)
    assert dict(captured.named_parameters()).keys() == dict(model.named_parameters()).keys()
    norms = [n for g in (captured.eval_graph, captured.train_graph) for n in g.nodes if "batch_norm" in str(n.target)]
    assert [n.args[5] for n in norms] == [False] * 3 + [True] * 3


def test_find_decompose_replaces_nodes_in_both_graphs() -> None:
    model, inputs = mlp()
    gm = capture(model, inputs)
    assert _targets(gm) == ["aten.linear.default", "aten.relu.default"] * 2 + ["aten.linear.default"]
    for p in (FindElasticLayers(), DecomposeLinear()):
        gm.run_pass(p)
    assert _targets(gm) == ["first", "aten.relu.default", "second", "aten.relu.default", "head"]
    assert _targets(gm.train()) == ["first", "aten.relu.default", "second", "aten.relu.default", "head"]
    assert set(gm.state_dict()) == {f"{n}.{p}" for n in ("first", "second", "head") for p in ("U", "V", "bias")}
    assert all(node.meta["t3c_pass"] == "decompose-linear" for node, _ in elastic_calls(gm))


@pytest.mark.parametrize(("conv", "kind"), [("tucker2", Tucker2Conv2d), ("cp", CpConv2d)])
def test_each_convolution_gets_its_form(conv: str, kind: type) -> None:
    model, inputs = conv_net()
    gm = capture(model, inputs)
    for p in (FindElasticLayers(conv=conv), DecomposeConv()):
        gm.run_pass(p)
    kinds = {name: type(layer) for name, layer in elastic_layers(gm)}
    assert kinds == {
        "stem": DenseConv2d,
        "wide": kind,
        "down": kind,
        "depthwise": DenseConv2d,
        "pointwise": SvdConv2d,
    }


def test_passes_run_in_a_users_pass_manager() -> None:
    """Beside a pass of the user's own, on a plain GraphModule."""

    def relu_to_gelu(gm: GraphModule) -> None:
        for node in gm.graph.nodes:
            if node.target == aten.relu.default:
                node.target = aten.gelu.default
        gm.recompile()

    model, inputs = conv_net()
    captured = capture(model, inputs)
    plain = GraphModule(captured, copy.deepcopy(captured.eval_graph))
    manager = PassManager(
        [
            FindElasticLayers(),
            DecomposeLinear(),
            DecomposeConv(),
            pass_result_wrapper(relu_to_gelu),
            InsertQuantizers(),
            InsertHooks(),
        ]
    )
    result = manager(plain).graph_module
    swapped = copy.deepcopy(model)
    nn.functional.relu, original = nn.functional.gelu, nn.functional.relu
    try:
        expected = swapped(*inputs)
    finally:
        nn.functional.relu = original
    assert torch.allclose(result(*inputs), expected, rtol=1e-4, atol=1e-5)


def test_default_pipeline_prints_and_parses_back() -> None:
    pipeline = default_pipeline(FindElasticLayers("cp", 16, "a* b.*"))
    text = str(pipeline)
    assert text == (
        "normalize-linear; normalize-conv; find-elastic-layers{conv=cp,rank_multiple=16,keep=a* b.*}; "
        "decompose-linear; decompose-conv; replace-table; insert-quantizers; insert-hooks"
    )
    assert Pipeline.parse(text) == pipeline
    everything = Pipeline(tuple(cls() for cls in PASSES.values()))
    assert Pipeline.parse(str(everything)) == everything
    damped = Pipeline((DecomposeLinear(damping=0.25),))
    assert Pipeline.parse(str(damped)) == damped


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("decompose-everything", "there is no pass 'decompose-everything'; known: normalize-linear, normalize-conv"),
        ("insert-hooks{x=1}", "insert-hooks has no option 'x'; known: none"),
        ("decompose-linear{damping=much}", "damping='much' is not a float"),
        ("find elastic", "'find elastic' is not a pass"),
    ],
)
def test_a_wrong_pipeline_text_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(PipelineSyntaxError, match=re.escape(message)):
        Pipeline.parse(text)


def test_conditions_name_the_pass_and_the_way_out() -> None:
    model, inputs = mlp()
    gm = capture(model, inputs)
    with pytest.raises(PassConditionError, match="insert-quantizers: the graph has no elastic layer: run decompose"):
        InsertQuantizers()(gm)
    with pytest.raises(PassConditionError, match="conv form 'svd' is not tucker2 or cp"):
        FindElasticLayers(conv="svd")(gm)
    for p in (FindElasticLayers(), DecomposeLinear()):
        gm.run_pass(p)
    with pytest.raises(PassConditionError, match=r"run insert-quantizers first\): first, second, head"):
        InsertHooks()(gm)
    with pytest.raises(PassConditionError, match="layer first: the profile has no option for it"):
        Specialize()(gm)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (7, 7)])
@pytest.mark.parametrize("whitened", [False, True])
def test_svd_is_exact_and_truncates_best(shape: tuple[int, int], whitened: bool) -> None:
    """Exact at full rank; the truncation error on the moment's own inputs is the least there is (Eckart-Young)."""
    torch.manual_seed(0)
    weight = torch.randn(shape)
    x = torch.randn(500, shape[1]) @ torch.randn(shape[1], shape[1])
    moment = x.T @ x / len(x) if whitened else None
    v, u = svd_factors(weight, moment, damping=1e-9)
    assert torch.allclose(u @ v, weight, atol=1e-4)
    root = torch.linalg.cholesky(x.T.double() @ x.double() / len(x)) if whitened else torch.eye(shape[1]).double()
    singular = torch.linalg.svdvals(weight.double() @ root)
    for rank in (1, 3, min(shape) - 1):
        error = torch.linalg.matrix_norm((weight - u[:, :rank] @ v[:rank]).double() @ root)
        assert float(error) == pytest.approx(float(singular[rank:].norm()), rel=1e-3)


def test_whitening_loses_less_on_real_inputs() -> None:
    """Inputs that live on few directions: whitened truncation beats plain SVD by far on the outputs."""
    torch.manual_seed(0)
    weight = torch.randn(32, 48)
    x = torch.randn(1000, 6) @ torch.randn(6, 48) + 0.01 * torch.randn(1000, 48)
    errors = []
    for moment in (None, x.T @ x / len(x)):
        v, u = svd_factors(weight, moment, damping=1e-2)
        errors.append(float((x @ weight.T - x @ (u[:, :8] @ v[:8]).T).norm()))
    assert errors[1] < 0.2 * errors[0]


@pytest.mark.parametrize("shape", [(16, 8, 3, 3), (8, 24, 3, 1), (5, 7, 1, 3)])
def test_conv_factors_are_exact_at_full_rank_and_fit_better_with_rank(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    for layer in (Tucker2Conv2d(*tucker2_factors(weight), None, None), CpConv2d(*cp_factors(weight), None, None)):  # type: ignore[arg-type]
        assert torch.allclose(layer.dense_weight(), weight, atol=1e-4)
        factors = {name: factor for name, (factor, _) in layer.factors().items()}
        errors = [float((layer.compose(factors, rank) - weight).norm()) for rank in (8, 16, layer.max_rank)]
        assert errors == sorted(errors, reverse=True)


def test_batch_norm_folds_into_a_float_convolution() -> None:
    model, inputs = conv_net()
    captured = capture(model, inputs)
    plain = GraphModule(captured, copy.deepcopy(captured.eval_graph))
    FoldBatchNorm()(plain)
    assert not [t for t in _targets(plain) if "batch_norm" in t]
    assert torch.allclose(plain(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
    training = GraphModule(captured, copy.deepcopy(captured.train_graph))
    FoldBatchNorm()(training)
    assert len([t for t in _targets(training) if "batch_norm" in t]) == 3


@pytest.mark.parametrize("net", NETS)
def test_gains_bound_the_effect_of_a_small_error(net: str) -> None:
    """An error added to a layer's output moves the logits by at most gain times its norm (first order, 1% slack)."""
    model, inputs = NETS[net]()
    gm = capture(model, inputs)
    for p in (FindElasticLayers(), DecomposeLinear(), DecomposeConv()):
        gm.run_pass(p)
    PathGains((inputs,))(gm)
    expected = gm(*inputs)
    torch.manual_seed(1)
    for name, layer in elastic_layers(gm):
        errors: list[float] = []

        def add(module: nn.Module, args: object, out: torch.Tensor, errors: list[float] = errors) -> torch.Tensor:
            error = 1e-3 * torch.randn_like(out)
            errors.append(float(error.norm()))
            return out + error

        handle = layer.register_forward_hook(add)
        moved = torch.stack([(gm(x[None]) - y).norm() for x, y in zip(inputs[0], expected, strict=True)])
        handle.remove()
        (gain,) = gm.meta["t3c_gains"][name]
        assert gain > 0
        assert bool((moved <= 1.01 * gain * torch.tensor(errors) + 1e-6).all()), name


def test_a_layers_gain_is_its_jacobians_norm() -> None:
    """Against the Jacobian's largest singular value, sample by sample."""
    model, inputs = attention_net()
    gm = capture(model, inputs)
    for p in (FindElasticLayers(), DecomposeLinear()):
        gm.run_pass(p)
    node = next(n for n, _ in elastic_calls(gm) if n.target == "down")
    found = measured_gains(gm, [node], [inputs])[node]

    def rest(z: torch.Tensor) -> torch.Tensor:
        handle = gm.get_submodule("down").register_forward_hook(lambda m, i, out: z)
        try:
            return gm(*inputs)
        finally:
            handle.remove()

    z = torch.randn(5, 7, 32)
    jacobian = torch.autograd.functional.jacobian(rest, z)
    norms = [float(torch.linalg.matrix_norm(jacobian[i, :, i].flatten(1), ord=2)) for i in range(5)]
    assert found == pytest.approx(max(norms), rel=1e-3)


def test_where_the_gradient_stops_gains_are_products_of_norms() -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            return self.last((x > 0).float()) + self.last.bias

    torch.manual_seed(0)
    model, x = Rounded().eval(), torch.randn(3, 32)
    gm = capture(model, (x,))
    for p in (FindElasticLayers(), DecomposeLinear()):
        gm.run_pass(p)
    PathGains(((x,),))(gm)
    norm = float(torch.linalg.matrix_norm(model.last.weight, ord=2))
    assert gm.meta["t3c_gains"]["first"] == pytest.approx([norm], rel=1e-4)
    assert gm.meta["t3c_gains"]["last.elastic"] == pytest.approx([1.0], rel=1e-4)
    assert isinstance(gm.get_submodule("first"), SvdLinear)
    assert len(norm_product_gains(gm)) == len(list(gm.graph.nodes))
