"""Attention in integers: what training sees, what is deployed, and what stays in floats."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import t3c_compile as t3c
from t3c_compile.backends.targets import get_target
from t3c_compile.checkpoint import Checkpoint
from t3c_compile.passes.elastic import elastic_layers
from t3c_compile.passes.errors import T3CError
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.ops.int8_attention import integer_rows
from t3c_compile.passes.option import Option
from t3c_compile.passes.specialize import specialize


class Net(nn.Module):
    """Packed self-attention, attention from separate projections with a mask, and attention over heads of ``width``."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.packed = nn.MultiheadAttention(64, 2, batch_first=True)
        self.q, self.k, self.v = (nn.Linear(64, 4 * width) for _ in range(3))
        self.out = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.packed(x, x, x, need_weights=False)[0]
        q, k, v = (layer(x).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y: Tensor = self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return y


def elastic_net(width: int = 16) -> tuple[nn.Module, ElasticGraphModule, Tensor]:
    torch.manual_seed(0)
    model, x = Net(width).eval(), torch.randn(3, 21, 64)
    return model, t3c.transform(model, (x,)), x


def rounding_nodes(elastic: ElasticGraphModule) -> int:
    graphs = (elastic.eval_graph, elastic.train_graph)
    return sum("fake_quantize_rows" in str(node.target) for graph in graphs for node in graph.nodes)


def test_rows_are_rounded_by_their_greatest_number() -> None:
    x = torch.tensor([[127.0, -63.4, 0.5, 1.5], [0.0, 0.0, 0.0, 0.0], [-3e30, 1e30, 0.0, 3e30], [1e-40, 0.0, 0.0, 0.0]])
    whole, step = integer_rows(x)
    assert whole.tolist() == [[127, -63, 0, 2], [0, 0, 0, 0], [-127, 42, 0, 127], [0, 0, 0, 0]]
    assert torch.equal(step[0], torch.ones(1))
    torch.manual_seed(1)
    rows = torch.randn(50, 64) * torch.logspace(-20, 20, 50)[:, None]
    whole, step = integer_rows(rows)
    assert float(((whole * step - rows).abs() / rows.abs().amax(1, keepdim=True)).max()) <= 0.5 / 127 * (1 + 1e-5)


def test_the_full_model_is_untouched_and_int8_profiles_round() -> None:
    _, elastic, x = elastic_net()
    elastic.eval()
    full = elastic(x)
    options = {name: Option(layer.form, layer.max_rank, 8) for name, layer in elastic_layers(elastic)}
    elastic.set_options(options)
    floats = elastic(x)
    elastic.set_attention_dtype("int8")
    rounded = elastic(x)
    assert rounding_nodes(elastic) == 2 * 2 * 3
    assert 1e-4 < float((rounded - floats).norm() / floats.norm()) < 0.05
    elastic.set_full()
    assert torch.equal(elastic(x), full)
    elastic.set_options(options)
    elastic.set_attention_dtype("float32")
    assert torch.equal(elastic(x), floats)
    assert rounding_nodes(elastic) == 0


def test_gradients_pass_through_the_rounding() -> None:
    _, elastic, x = elastic_net()
    elastic.train()
    elastic.set_options({name: Option(layer.form, layer.max_rank, 8) for name, layer in elastic_layers(elastic)})
    grads = []
    for dtype in ("float32", "int8"):
        elastic.set_attention_dtype(dtype)
        elastic.zero_grad()
        elastic(x).square().sum().backward()
        found = [parameter.grad for name, parameter in elastic.named_parameters() if name.startswith("q.")]
        grads.append(torch.cat([grad.flatten() for grad in found if grad is not None]))
    assert float(grads[0].norm()) > 0
    assert float((grads[0] - grads[1]).norm() / grads[0].norm()) < 0.1


def test_the_lowered_profile_multiplies_integers_as_the_reference_does(tmp_path: Path) -> None:
    _, elastic, x = elastic_net()
    elastic.set_attention_dtype("int8")
    Checkpoint(elastic, (x,)).save(tmp_path / "net.pt")
    elastic = Checkpoint.load(tmp_path / "net.pt").model
    assert rounding_nodes(elastic) == 2 * 2 * 3
    profiles = t3c.snap(elastic, [(x,)], [get_target("x86_64")], count=2, full_model=True)
    t3c.lower(elastic, profiles, ["x86_64"], tmp_path / "net.t3c", (x,))
    session = t3c.load(tmp_path / "net.t3c")
    more = torch.randn(2, 21, 64)
    for profile in profiles.profiles:
        graph = specialize(elastic, profile.options, profile.activations, profiles.store_ranks())
        kinds = [str(node.target).split(".")[1] for node in graph.graph.nodes if "attention" in str(node.target)]
        is_full = all(option.bits == 32 for option in profile.options.values())
        assert kinds == ["attention_f32" if is_full else "attention_int8"] * 2
        session.set_profile(profile.name)
        expected = graph(more)
        tolerance = 1e-5 * float(expected.abs().max()) if is_full else 0.0
        torch.testing.assert_close(torch.from_numpy(session.run(more.numpy())), expected, rtol=0, atol=tolerance)


def test_what_cannot_be_rounded_stays_in_floats_with_the_reason() -> None:
    _, elastic, _ = elastic_net(width=12)
    elastic.set_attention_dtype("int8")
    assert rounding_nodes(elastic) == 2 * 3
    assert any("queries are 12 wide, which is no multiple of 16" in note for note in elastic.report.notes)
    with pytest.raises(T3CError, match="attention can be int8 or float32, not 'int4'"):
        elastic.set_attention_dtype("int4")
