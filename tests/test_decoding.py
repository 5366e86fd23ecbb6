"""Weight-only decoding end to end: integer weights, float32 activations, a key-value cache passed in and out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import t3c_compile
from examples import decode_llama
from t3c_compile.artifact import lower
from t3c_compile.backends.onnx import export_onnx
from t3c_compile.backends.targets import get_target
from t3c_compile.backends.tvm.fuse import fuse
from t3c_compile.checkpoint import Checkpoint
from t3c_compile.cost import layer_cost, profile_cost
from t3c_compile.passes.elastic import elastic_layers
from t3c_compile.passes.errors import PassConditionError, T3CError
from t3c_compile.passes.option import Option
from t3c_compile.passes.specialize import specialize
from t3c_compile.profile import ProfileSet
from t3c_compile.snapping import snap
from t3c_compile.transforming import transform

LENGTH = 24
TOKENS = 12


class Built:
    """A small Llama with tied tables, weight-only: a profile at 4 bits, one between, one at 8."""

    def __init__(self, folder: Path) -> None:
        self.decoder = decode_llama.build(True, tie_word_embeddings=True, num_hidden_layers=1)
        generator = torch.Generator().manual_seed(3)
        self.prompts = torch.randint(2, 160, (2, 5), generator=generator)
        self.inputs = decode_llama.inputs(self.decoder, self.prompts, LENGTH)
        shapes = decode_llama.dynamic_shapes(self.decoder, LENGTH)
        self.elastic = transform(self.decoder, self.inputs, dynamic_shapes=shapes).eval()
        self.elastic.set_activation_dtype("float32")
        found = snap(self.elastic, [self.inputs], [get_target("x86_64")], count=2)
        self.profiles = ProfileSet([found.profiles[0], found.profiles[-1]], found.order)
        self.path = lower(self.elastic, self.profiles, ["x86_64"], folder / "llama.t3c", self.inputs, measured=False)
        self.graphs = {
            profile.name: specialize(self.elastic, profile.options, profile.activations, self.profiles.store_ranks())
            for profile in self.profiles.profiles
        }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("decoding"))


def test_every_linear_is_weight_only(built: Built) -> None:
    """Nothing is quantized at run time, and the integers are those of int8 activations."""
    low, high = built.profiles.profiles
    assert {option.bits for option in low.options.values()} == {4}
    assert {option.bits for option in high.options.values()} == {8}
    for graph in built.graphs.values():
        ops = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        assert not [op for op in ops if "quantize_int8" in op or op.startswith(("t3c.int8_linear", "t3c.svd_linear"))]
        assert sum("weight_only_linear" in op for op in ops) == 7 + 1
    weight_only = built.graphs[high.name].state_dict()
    built.elastic.set_activation_dtype("int8")
    int8 = specialize(built.elastic, high.options, store_ranks=built.profiles.store_ranks())
    built.elastic.set_activation_dtype("float32")
    assert any(str(node.target) == "t3c.svd_linear.default" for node in int8.graph.nodes)
    assert weight_only.keys() == int8.state_dict().keys()
    assert all(torch.equal(weight_only[name], tensor) for name, tensor in int8.state_dict().items())


def test_the_specialized_graph_is_the_elastic_one(built: Built) -> None:
    """Training and calibration see what is deployed."""
    for profile in built.profiles.profiles:
        built.elastic.set_options(profile.options)
        with torch.no_grad():
            expected, found = built.elastic(*built.inputs)[0], built.graphs[profile.name](*built.inputs)[0]
        assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_kernels_end_with_what_follows_them(built: Built) -> None:
    """The residuals are added and the gate's activation applied where the products are formed."""
    for graph in built.graphs.values():
        found = [fused for fused in fuse(graph.graph) if "weight_only" in str(fused.head.target)]
        assert sorted(fused.steps for fused in found) == [[]] * 5 + [["add"], ["add"], ["silu_f32"]]


def test_greedy_tokens_and_logits_are_torchs(built: Built) -> None:
    """Prefill of five tokens, then one at a time; logits to 1e-5 of the largest."""
    session = t3c_compile.load(built.path)
    for profile in built.profiles.profiles:
        session.set_profile(profile.name)
        graph = built.graphs[profile.name]
        for rows in (1, 2):
            first = decode_llama.inputs(built.decoder, built.prompts[:rows], LENGTH)
            arrays = [x.numpy() for x in first]
            with torch.no_grad():
                expected, found = graph(*first)[0].numpy(), session.run(*arrays)[0]
                tokens = decode_llama.generate(graph, first, TOKENS)
            assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
            assert np.array_equal(decode_llama.generate(session.run, arrays, TOKENS), tokens)


def test_onnx_runtime_decodes_too(built: Built, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    folder = export_onnx(built.elastic, built.profiles.profiles, tmp_path / "llama-onnx", built.inputs)
    for profile in built.profiles.profiles:
        options = onnxruntime.SessionOptions()
        # Else it rounds what its weight-only products read to int8.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        session = onnxruntime.InferenceSession(folder / f"{profile.name}.onnx", options)
        feeds = dict(zip((x.name for x in session.get_inputs()), (x.numpy() for x in built.inputs), strict=True))
        with torch.no_grad():
            expected = built.graphs[profile.name](*built.inputs)[0].numpy()
        assert np.abs(session.run(None, feeds)[0] - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_checkpoint_keeps_the_choice(built: Built, tmp_path: Path) -> None:
    Checkpoint(built.elastic, built.inputs).save(tmp_path / "llama.safetensors")
    loaded = Checkpoint.load(tmp_path / "llama.safetensors").model
    assert all(layer.float_activations for _, layer in elastic_layers(loaded))


def _small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 32)).eval()


def test_convolutions_keep_int8_activations() -> None:
    x = torch.randn(8, 1, 8, 8)
    elastic = transform(_small_net(), (x,)).eval()
    elastic.set_activation_dtype("float32")
    (profile,) = snap(elastic, [(x,)], [get_target("x86_64")], count=1).profiles
    by_layer = {name: sorted(found) for name, found in profile.activations.items()}
    assert by_layer["3"] == []
    assert "x" in by_layer["0"]
    ops = {str(node.target) for node in specialize(elastic, profile.options, profile.activations).graph.nodes}
    assert "t3c.quantize_int8.default" in ops
    assert "t3c.svd_weight_only_linear.default" in ops
    with pytest.raises(PassConditionError, match=r"layer 0.*convolution"):
        specialize(elastic, profile.options, {"0": {}, "3": {}})
    with pytest.raises(T3CError, match="int8 or float32"):
        elastic.set_activation_dtype("bfloat16")


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_cost_and_certificate_know_the_activations(dtype: str) -> None:
    """Float multiply-adds are slower and take more energy; weights take the same bytes, and rounding adds nothing."""
    x, target = torch.randn(64, 64), get_target("arm64")
    elastic = transform(nn.Sequential(nn.Linear(64, 64)).eval(), (x,)).eval()
    elastic.set_activation_dtype(dtype)
    (layer,) = (layer for _, layer in elastic_layers(elastic))
    assert layer_cost(layer).floats is (dtype == "float32")
    options = {"0": Option("dense", 0, 8)}
    cost = profile_cost(elastic, options, target)
    elastic.set_activation_dtype("int8")
    int8 = profile_cost(elastic, options, target)
    assert cost.size_bytes == int8.size_bytes
    assert (cost.energy_mj > int8.energy_mj) is (dtype == "float32")
