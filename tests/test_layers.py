"""Every kind of layer, from the model to compiled code; what is kept says why; groups are decided together."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from layer_nets import LAYER_NETS, layer_net
from nets import packed
from refusals import REFUSALS
from torch import Tensor, nn
from tvm.runtime import vm as runtime

from t3c_compile.backends.targets import get_target
from t3c_compile.backends.tvm.build import build_library
from t3c_compile.certificate import TrainingProxy, observed_drift
from t3c_compile.chain import Grid, chains
from t3c_compile.controller import Controller
from t3c_compile.groups import layer_groups, member_level
from t3c_compile.passes import find_elastic_layers
from t3c_compile.passes.capture import capture
from t3c_compile.passes.elastic import DenseLinear, SvdLinear, Table, elastic_layers
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.option import Option
from t3c_compile.passes.specialize import specialize
from t3c_compile.snapping import snap
from t3c_compile.transforming import Config, observe, transform

ARM = get_target("arm64")


@cache
def made(net: str) -> tuple[nn.Module, ElasticGraphModule, tuple[Tensor, ...]]:
    """A net and its elastic form, for tests that change neither."""
    model, inputs = layer_net(net)
    return model, transform(model, inputs), inputs


def _profile(elastic: ElasticGraphModule, rank: int, bits: int) -> dict[str, Option]:
    return {
        name: Option(layer.form, 0 if layer.form == "dense" else min(rank, layer.max_rank), bits)
        for name, layer in elastic_layers(elastic)
    }


def _close(found: Tensor, expected: Tensor, rtol: float = 1e-4) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= rtol * float(expected.abs().max())


@pytest.mark.parametrize("net", LAYER_NETS)
def test_full_rank_equals_the_model_with_its_gradients(net: str) -> None:
    """Outputs to 1e-4 in both modes; gradients of the inputs, and of every weight through its factors, to 1e-3."""
    model, inputs = layer_net(net)
    elastic = transform(model, inputs)
    for training in (True, False):
        model.train(training)
        elastic.set_full()
        elastic.train(training)
        mine, theirs = ([x.clone().requires_grad_(x.is_floating_point()) for x in inputs] for _ in range(2))
        expected, found = model(*theirs), elastic(*mine)
        _close(found, expected)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    for x, y in zip(mine, theirs, strict=True):
        if x.is_floating_point():
            _close(x.grad, y.grad, 1e-3)
    sources = elastic.meta["t3c_sources"]
    for name, layer in elastic_layers(elastic):
        view = sources[name]["weight"].view
        gradient = model.get_parameter(view.target).grad
        holder = nn.Module()
        holder.register_buffer("w", gradient)
        gradient = type(view)("w", view.steps).of(holder)
        if isinstance(layer, SvdLinear):
            _close(layer.U.grad, gradient @ layer.V.T, 1e-3)
            _close(layer.V.grad, layer.U.T @ gradient, 1e-3)
        elif isinstance(layer, DenseLinear):
            _close(layer.weight.grad, gradient, 1e-3)


@pytest.mark.parametrize("net", LAYER_NETS)
def test_specialized_reexported_and_compiled(net: str, tmp_path: Path) -> None:
    """The profile's graph is the elastic graph (2e-3), re-exports to the bit, and runs compiled (2e-3).

    A rounding tie in a float stage may move one int8 step of the next.
    """
    model, inputs = layer_net(net)
    elastic = transform(model, inputs)
    options = _profile(elastic, 8, 6)
    elastic.set_options(options)
    observe(elastic, [inputs])
    with torch.no_grad():
        expected = elastic(*inputs)
        graph = specialize(elastic, options)
        found = graph(*inputs)
        _close(found, expected, 2e-3)
        program = torch.export.export(graph, inputs, strict=False)
        assert torch.equal(program.module()(*inputs), found)
    assert not [node for node in graph.graph.nodes if node.op == "call_module" or "batch_norm" in str(node.target)]
    library = build_library({"profile_0": program}, get_target("x86_64"), tmp_path / "layers.so")
    assert all(how.startswith(("kernel template: ", "default: ")) for how in library.kernels.values())
    machine = runtime.VirtualMachine(tvm.runtime.load_module(str(library.path)), tvm.cpu())
    state = graph.state_dict()
    tensors = packed(machine, library, state)
    compiled = machine["profile_0"](*(tvm.runtime.tensor(x.numpy()) for x in inputs), tensors)
    _close(torch.from_numpy(np.array(compiled.numpy())), found, 2e-3)


@pytest.mark.parametrize("net", ["linears", "convs", "attention", "tied"])
def test_weights_go_back_where_they_came_from(net: str) -> None:
    """``to_dense`` of packed, transposed, reshaped, tied and shared weights."""
    model, elastic, _ = made(net)
    state = elastic.to_dense()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(state[name], tensor, atol=1e-4), name


def test_what_is_elastic() -> None:
    """By net: the layers and their forms; nothing but what stays whole is kept."""
    expected = {
        "linears": {**{f"w.{i}_elastic": "svd" for i in range(7)}, "left_elastic": "dense"},
        "convs": {"even": "tucker2", "grouped": "dense", "pointwise": "svd", "wide": "tucker2", "volume": "svd"},
        "whole": {"head": "svd"},
        "attention": {
            **{f"{name}.out_proj": "svd" for name in ("own", "cross", "apart", "other")},
            "own.in_proj": "svd",
            **{f"cross.in_proj_{i}": "svd" for i in range(2)},
            **{f"apart.in_proj_{i}": "svd" for i in range(3)},
            "other.q_proj": "svd",
            "other.k_proj": "svd",
            "other.v_proj": "svd",
        },
        "recurrent": {"stem": "svd", "head": "svd"},
    }
    kept = {"whole": {"up1", "up2", "volume", "up3"}, "recurrent": {"lstm", "gru"}}
    for net, forms in expected.items():
        report = made(net)[1].report
        assert {name: record.form for name, record in report.elastic.items()} == forms
        assert set(report.kept) == kept.get(net, set())


@pytest.mark.parametrize("name", REFUSALS)
def test_what_stays_whole_says_why_and_works(name: str) -> None:
    """The report names the layer and the reason; outputs are the model's."""
    model, layer, reason = REFUSALS[name]
    x = torch.randn(3, 6, 32)
    keep = ("lay*",) if name == "by request" else ()
    elastic = transform(model, (x,), Config(keep=keep))
    assert list(elastic.report.elastic) == ["first"]
    assert list(elastic.report.kept) == [layer]
    assert reason in elastic.report.kept[layer].reason
    for training in (True, False):
        _close(elastic.train(training)(x), model.train(training)(x))


def test_every_reason_is_tried() -> None:
    """Two more need a pipeline without the normalizing passes."""
    tried = [reason for _, _, reason in REFUSALS.values()]
    reasons = {*find_elastic_layers._KEPT_WHOLE.values(), find_elastic_layers._COMPUTED}
    missing = [reason for reason in reasons if not any(words in reason for words in tried)]
    assert missing == [find_elastic_layers._CONV1D]
    model, inputs = layer_net("convs")
    captured = capture(model, inputs)
    captured.run_pass(find_elastic_layers.FindElasticLayers())
    kept = {layer: record.reason for layer, record in captured.report.kept.items()}
    assert kept["even"] == find_elastic_layers._CONV1D
    assert kept["wide"] == "padding='same' differs before and after: run normalize-conv first"


def test_tied_weights_are_one_stored_tensor() -> None:
    """Table and output layer read the same integers; a change of one is a change of both."""
    _, elastic, _ = made("tied")
    (name,) = [name for name, layer in elastic_layers(elastic) if isinstance(layer, Table) and layer.calls]
    assert "tied to a linear" in elastic.report.elastic[name].reason
    graph = specialize(elastic, _profile(elastic, 8, 8))
    readers = {
        str(node.target)
        for node in graph.graph.nodes
        if any(source.target == f"{name}.weight" for source in node.all_input_nodes)
    }
    assert readers == {"t3c.int8_embedding.default", "t3c.int8_linear.default"}
    assert [tuple(t.shape) for t in graph.state_dict().values() if t.dtype == torch.int8].count((50, 32)) == 1
    rows = elastic.get_submodule(name)(torch.arange(50))
    eye = elastic.get_submodule(name)(torch.eye(32), product=True) - elastic.get_submodule(name).bias
    _close(eye, rows.T)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_rows_are_quantized_one_by_one(bits: int) -> None:
    """Each row to its own scale: within half a step of the width; a small row beside a large one keeps its detail."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 8)).eval()
    with torch.no_grad():
        model[0].weight[3] *= 1e-3
    ids = torch.arange(20)[None]
    elastic = transform(model, (ids,))
    elastic.set_options(_profile(elastic, 8, bits))
    table = elastic.get_submodule("0")
    error = (table(ids)[0] - model[0].weight).abs().amax(1)
    step = model[0].weight.abs().amax(1) / 119 * 2 ** (8 - bits)
    assert bool((error <= 0.51 * (step + model[0].weight.abs().amax(1) / 119)).all())
    assert bool((error > 0).all())


def test_every_call_of_a_shared_layer_has_its_own_ranges() -> None:
    model, inputs = layer_net("tied")
    elastic = transform(model, inputs)
    layer = elastic.get_submodule("again")
    assert layer.calls == 3
    scales = layer.activations()
    assert set(scales) == {"x", "x.1", "x.2", "h", "h.1", "h.2"}
    assert scales["x"] == scales["x.1"]
    assert scales["x.2"][1] == -128  # after a ReLU
    assert scales["x.2"] != scales["x"]
    layer.set_activations({"x.1": (0.5, 3)})
    assert layer.activations()["x.1"] == (0.5, 3)
    assert layer.activations()["x"] == scales["x"]


class _Pyramid(nn.Module):
    """One convolution over two levels, each with a batch norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        large, small = (norm(self.conv(y)) for norm, y in zip(self.norms, (x, x[..., ::2, ::2]), strict=True))
        return torch.cat([large.mean((2, 3)), small.mean((2, 3))], 1)


def test_a_norm_after_one_call_of_a_shared_layer_is_not_folded_into_all() -> None:
    torch.manual_seed(0)
    model, x = _Pyramid(), torch.randn(4, 16, 8, 8)
    for _ in range(3):
        model(x * 2 + 1)
    elastic = transform(model.eval(), (x,))
    assert elastic.get_submodule("conv").calls == 2
    options = _profile(elastic, 8, 8)
    elastic.set_options(options)
    observe(elastic, [(x,)])
    _close(specialize(elastic, options)(x), elastic(x), 2e-3)


def test_the_certificate_sums_the_calls_of_a_shared_layer() -> None:
    """One term a call, for a model with tied, shared and looked-up weights; of so few samples the greatest drift."""
    model, inputs = layer_net("tied")
    elastic = transform(model, inputs)
    proxy = TrainingProxy(elastic, [inputs])
    assert {name: len(calls) for name, calls in proxy.statistics.items()} == {
        name: {"again": 3, "places": 1}.get(name, 2) for name in proxy.statistics
    }
    option = Option("svd", 8, 6)
    again = proxy.layers["again"]
    error = float(torch.linalg.matrix_norm(again.dense_weight() - again.dense_weight(option), ord=2))
    total = sum(call.gain * call.input_norm * error for call in proxy.statistics["again"])
    assert proxy.layer_errors("again", [option])[0] == pytest.approx(total, rel=1e-3)
    profiles = snap(elastic, [inputs], [ARM], count=3)
    for profile in profiles.profiles:
        graph = specialize(elastic, profile.options, profile.activations)
        greatest = float(observed_drift(model(*inputs), graph(*inputs)).max())
        assert profile.certificate["bound"] == pytest.approx(greatest, rel=0.02)


def test_layers_that_read_one_tensor_are_one_group() -> None:
    groups = layer_groups(made("grouped")[1])
    assert groups == (("q", "k", "v"), ("out",), ("gate", "up"), ("down",))


@pytest.mark.parametrize("path", ["greedy", "controller"])
def test_query_key_and_value_have_one_rank_and_width_in_every_profile(path: str) -> None:
    """Where shapes agree; the others are as far along their own chains. Profiles stay nested (their set checks it)."""
    model, inputs = layer_net("grouped")
    elastic = transform(model, inputs)
    groups, ladder = layer_groups(elastic), chains(elastic, Grid(8, (4, 6, 8)))
    controller = None
    if path == "controller":
        controller = Controller(ladder, groups)
        torch.manual_seed(1)
        with torch.no_grad():
            controller.out.normal_(0, 3)
    profiles = snap(elastic, [inputs], [ARM], controller=controller, count=8).profiles
    assert len(profiles) > 2
    for profile in profiles:
        assert profile.options["k"] == profile.options["v"]
        assert profile.options["gate"] == profile.options["up"]
        places = {name: chain.index(profile.options[name]) / (len(chain) - 1) for name, chain in ladder.items()}
        assert places["q"] == pytest.approx(places["k"], abs=0.5 / (len(ladder["k"]) - 1))
    # Not everything rises at once: groups are decided one by one.
    assert len({profile.options["q"] for profile in profiles}) > 1


def test_a_policy_that_splits_a_group_is_held_together() -> None:
    """No layer goes above what the policy asked for it."""
    model, inputs = layer_net("grouped")
    elastic = transform(model, inputs)
    ladder = chains(elastic, Grid(8, (4, 6, 8)))

    class OnlyKeys:
        def options(self, budget: Tensor) -> dict[str, Option]:
            return {name: chain[-1 if name == "k" and float(budget[0]) > 0.5 else 0] for name, chain in ladder.items()}

    profiles = snap(elastic, [inputs], [ARM], controller=OnlyKeys(), count=8).profiles
    assert [profile.options["k"] for profile in profiles] == [ladder["k"][0], ladder["k"][-1]]


def test_a_group_is_sampled_once() -> None:
    """Training sees what deployment will have: equal chains at one level, others in proportion; gradients flow."""
    torch.manual_seed(0)
    long = tuple(Option("svd", 8 * (i + 1), 8) for i in range(9))
    controller = Controller({"q": long, "k": long[:3], "v": long[:3], "other": long}, (("q", "k", "v"),))
    assert controller.groups == (("q", "k", "v"), ("other",))
    seen = set()
    for _ in range(40):
        sampled = controller.sample(torch.full((3,), 0.5)).detach()
        assert bool(((sampled == 0) | (sampled == 1)).all())
        assert bool((sampled.sum(1) == 1).all())
        levels = dict(zip(controller.chains, sampled.argmax(1).tolist(), strict=True))
        assert levels["k"] == levels["v"] == member_level(levels["q"], 8, 2)
        seen.add((levels["q"], levels["other"]))
    assert len(seen) > 5
    (controller.sample(torch.full((3,), 0.5)) * torch.arange(9)).sum().backward()
    assert float(controller.out.grad.abs().sum()) > 0
