"""Residuals in int8: what training sees, and what is deployed."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import t3c_compile as t3c
from t3c_compile.artifact import export_profiles
from t3c_compile.backends.targets import get_target
from t3c_compile.backends.tvm.fuse import fuse
from t3c_compile.backends.tvm.kernels.finish import ADD, ADD_INT8
from t3c_compile.backends.tvm.prepare import prepare
from t3c_compile.checkpoint import Checkpoint
from t3c_compile.passes.elastic import elastic_layers
from t3c_compile.passes.errors import T3CError
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.option import Option
from t3c_compile.passes.specialize import specialize


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(inputs, 24, 1), nn.Conv2d(24, outputs, 3, stride, 1, bias=False)
        self.norm, self.relu = nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        self.short = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.second(self.relu(self.first(x))))
        y += self.short(x)
        out: Tensor = self.relu(y)
        return out


class Net(nn.Module):
    """Two plain blocks, one with a convolution on its short way, and one more plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.blocks = nn.Sequential(Block(32, 32), Block(32, 32), Block(32, 48, 2), Block(48, 48))
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))
        return y


@pytest.fixture
def built() -> tuple[ElasticGraphModule, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 12, 12)
    model = Net()
    model(x)  # batch norm has seen something
    return t3c.transform(model.eval(), (x,)), x


def _int8(elastic: ElasticGraphModule) -> dict[str, Option]:
    return {name: Option(layer.form, layer.max_rank, 8) for name, layer in elastic_layers(elastic)}


def _rounding(elastic: ElasticGraphModule) -> list[int]:
    graphs = (elastic.eval_graph, elastic.train_graph)
    return [sum("fake_quantize" in str(node.target) for node in graph.nodes) for graph in graphs]


def test_the_full_model_is_untouched_and_training_sees_the_rounding(built: tuple[ElasticGraphModule, Tensor]) -> None:
    elastic, x = built
    with torch.no_grad():
        full = elastic.eval()(x)
    elastic.set_residual_dtype("int8")
    assert _rounding(elastic) == [3, 3]
    assert torch.equal(elastic(x), full)
    elastic.set_options(_int8(elastic))
    losses = []
    for dtype in ("int8", "float32"):
        trained = copy.deepcopy(elastic)
        trained.set_residual_dtype(dtype)
        trained.train()
        # Several runs before one backward, each of which moves the ranges.
        loss = torch.stack([(trained(x * scale) - full).square().mean() for scale in (1.0, 0.9)]).sum()
        loss.backward()
        losses.append(float(loss))
    assert _rounding(trained) == [0, 0]
    assert losses[0] != losses[1]
    assert abs(losses[0] - losses[1]) < 0.2 * losses[1]
    with pytest.raises(T3CError, match="residuals can be int8 or float32, not 'int4'"):
        elastic.set_residual_dtype("int4")


def test_images_between_blocks_are_written_once_as_int8(
    built: tuple[ElasticGraphModule, Tensor], tmp_path: Path
) -> None:
    elastic, x = built
    elastic.set_residual_dtype("int8")
    Checkpoint(elastic, (x,)).save(tmp_path / "net.pt")
    elastic = Checkpoint.load(tmp_path / "net.pt").model
    profiles = t3c.snap(elastic, [(x,)], [get_target("x86_64")], count=1, full_model=True)
    programs, _ = export_profiles(elastic, profiles, (x,))
    fused = [found for found in fuse(next(iter(prepare(programs).values())).graph) if found.finish.added]
    assert [found.finish.added for found in fused] == [[ADD_INT8], [ADD_INT8], [ADD], [ADD_INT8]]
    # All but the last, which the mean reads.
    assert [found.finish.floats for found in fused] == [False, False, False, True]

    t3c.lower(elastic, profiles, ["x86_64"], tmp_path / "net.t3c", (x,))
    session = t3c.load(tmp_path / "net.t3c")
    more = torch.randn(3, 3, 12, 12) * 2
    for profile in profiles.profiles:
        graph = specialize(elastic, profile.options, profile.activations, profiles.store_ranks())
        kinds = {str(node.target).split(".")[1] for node in graph.graph.nodes if "t3c" in str(node.target)}
        is_full = all(option.bits == 32 for option in profile.options.values())
        assert ("dequantize_int8" in kinds) is not is_full
        session.set_profile(profile.name)
        expected = graph(more)
        tolerance = 1e-4 * float(expected.abs().max()) if is_full else 0.0
        torch.testing.assert_close(torch.from_numpy(session.run(more.numpy())), expected, rtol=0, atol=tolerance)
