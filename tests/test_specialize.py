"""Specialize: the deployed graph is the elastic graph at that profile, and all profiles share one store."""

import pytest
import torch
from nets import NETS, conv_net

from t3c_compile.passes.elastic import elastic_layers
from t3c_compile.passes.errors import PassConditionError
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.ops import keep_top_bits
from t3c_compile.passes.option import Option
from t3c_compile.passes.specialize import specialize
from t3c_compile.transforming import Config, observe, transform


def _profile(elastic: ElasticGraphModule, rank: int, bits: int) -> dict[str, Option]:
    return {
        name: Option(layer.form, 0 if layer.form == "dense" else min(rank, layer.max_rank), bits)
        for name, layer in elastic_layers(elastic)
    }


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("conv", ["tucker2", "cp"])
@pytest.mark.parametrize(("rank", "bits"), [(8, 4), (16, 6), (10, 8)])
def test_equals_the_elastic_graph(net: str, conv: str, rank: int, bits: int) -> None:
    """Logits to 2e-3 of the largest: a rounding tie in a float sum may move one int8 step of a middle."""
    model, inputs = NETS[net]()
    elastic = transform(model, inputs, Config(conv=conv))
    options = _profile(elastic, rank, bits)
    elastic.set_options(options)
    observe(elastic, [(torch.randn(64, *inputs[0].shape[1:]),)])
    x = torch.randn(6, *inputs[0].shape[1:]) * 2
    graph = specialize(elastic, options)
    expected = elastic(x).detach()
    assert float((graph(x) - expected).abs().max()) <= 2e-3 * float(expected.abs().max())
    assert not [n for n in graph.graph.nodes if n.op == "call_module" or "batch_norm" in str(n.target)]


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_stored_integers_are_what_training_saw(bits: int) -> None:
    """Bit for bit: stored integer times scale is the training graph's rounded factor, at every width."""
    model, inputs = conv_net()
    elastic = transform(model, inputs)
    for name, layer in elastic_layers(elastic):
        store = layer.store(12)
        seen = layer.rounded_factors(torch.tensor(float(bits)))
        for key, (_, scale) in layer.factors().items():
            cut = layer._cut(key, seen[key], 12)
            rebuilt = keep_top_bits(store[key], bits).to(torch.float32) * scale[: len(cut)]
            assert torch.equal(rebuilt, cut.detach()), (name, key)


def test_all_profiles_name_the_same_tensors_and_small_ranks_are_prefixes() -> None:
    model, inputs = conv_net()
    elastic = transform(model, inputs)
    ranks = {name: min(24, layer.max_rank) for name, layer in elastic_layers(elastic)}
    stores = []
    for rank, bits in ((8, 4), (16, 6), (24, 8)):
        options = _profile(elastic, rank, bits)
        stores.append(specialize(elastic, options, store_ranks=ranks).state_dict())
    for store in stores[:-1]:
        assert store.keys() == stores[-1].keys()
        assert all(torch.equal(store[name], stores[-1][name]) for name in store)
    wide = elastic.get_submodule("wide")
    assert torch.equal(wide.store(8)["core"], wide.store(24)["core"][:8, :8])
    assert torch.equal(wide.store(8)["v"], wide.store(24)["v"][:8])


def test_a_factorized_layer_can_be_deployed_dense() -> None:
    model, inputs = conv_net()
    elastic = transform(model, inputs)
    observe(elastic, [(torch.randn(64, 1, 8, 8),)])
    options = {name: Option("dense", 0, 8) for name, _ in elastic_layers(elastic)}
    graph = specialize(elastic, options)
    ops = {str(n.target) for n in graph.graph.nodes if "t3c" in str(n.target) and "f32" not in str(n.target)}
    assert ops == {"t3c.quantize_int8.default", "t3c.int8_conv2d.default", "t3c.int8_linear.default"}
    x = torch.randn(6, 1, 8, 8)
    expected = model(x).detach()
    assert float((graph(x) - expected).abs().max()) <= 0.05 * float(expected.abs().max())


def test_query_key_and_value_share_one_quantize_node() -> None:
    class Heads(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (torch.nn.Linear(32, 32) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))

    torch.manual_seed(0)
    elastic = transform(Heads().eval(), (torch.randn(3, 5, 32),))
    graph = specialize(elastic, _profile(elastic, 8, 8))
    assert [str(n.target) for n in graph.graph.nodes].count("t3c.quantize_int8.default") == 1


def test_a_profile_that_does_not_fit_is_refused() -> None:
    model, inputs = conv_net()
    elastic = transform(model, inputs)
    good = _profile(elastic, 8, 8)
    for bad, message in (
        (Option("cp", 8, 8), "layer wide: option cp r8 w8 does not fit an elastic layer of form tucker2"),
        (Option("tucker2", 40, 8), "layer wide: rank 40 is beyond the stored rank"),
        (Option("tucker2", 8, 32), "layer wide: 32 bits is for full rank, 32"),
    ):
        with pytest.raises(PassConditionError, match=message):
            specialize(elastic, {**good, "wide": bad})
    with pytest.raises(ValueError, match="bits 3 must be 4 to 8"):
        Option("svd", 8, 3)


@pytest.mark.parametrize("name", NETS)
def test_at_32_bits_it_is_the_float_model(name: str) -> None:
    """Whole, and with one layer in int8 beside; the elastic model keeps tensors of its own."""
    model, inputs = NETS[name]()
    elastic = transform(model, inputs)
    full = {n: Option(layer.form, layer.max_rank, 32) for n, layer in elastic_layers(elastic)}
    graph = specialize(elastic, full)
    assert all(tensor.dtype == torch.float32 for tensor in graph.state_dict().values())
    torch.testing.assert_close(graph(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)
    last = list(full)[-1]
    mixed = specialize(elastic, {**full, last: Option(full[last].form, full[last].rank, 8)})
    assert sum(node.target == torch.ops.t3c.quantize_int8.default for node in mixed.graph.nodes) == 1
    torch.testing.assert_close(mixed(*inputs), model(*inputs), rtol=0.05, atol=0.05)
    with torch.no_grad():
        for tensor in (*graph.parameters(), *graph.buffers(), *mixed.parameters(), *mixed.buffers()):
            tensor.zero_()
    torch.testing.assert_close(elastic(*inputs), model(*inputs), rtol=1e-4, atol=1e-4)


def test_every_profile_reexports() -> None:
    model, inputs = conv_net()
    elastic = transform(model, inputs)
    graph = specialize(elastic, _profile(elastic, 8, 6))
    program = torch.export.export(graph, inputs, dynamic_shapes=({0: torch.export.Dim.AUTO},))
    x = torch.randn(9, 1, 8, 8)
    assert torch.equal(program.module()(x), graph(x))


def test_a_norm_behind_shared_weights_stays() -> None:
    """Folding it would change the layer's other call too."""

    class Shared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.norm = torch.nn.Linear(16, 16), torch.nn.BatchNorm1d(16)
            self.norm.running_mean, self.norm.running_var = torch.randn(16), torch.rand(16) + 0.5

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.inner(torch.relu(self.inner(x))))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    inputs = (torch.randn(32, 16),)
    elastic = transform(Shared().eval(), inputs)
    options = _profile(elastic, 16, 8)
    elastic.set_options(options)
    observe(elastic, [inputs])
    torch.testing.assert_close(specialize(elastic, options)(*inputs), elastic(*inputs), rtol=1e-4, atol=1e-4)
