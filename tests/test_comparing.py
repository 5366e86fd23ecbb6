"""The first node where compiled code and torch part: planted errors are found where they were planted."""

import copy
import json
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Interpreter

from t3c_compile.artifact import lower
from t3c_compile.backends.targets import get_target
from t3c_compile.backends.tvm import convert
from t3c_compile.checkpoint import Checkpoint
from t3c_compile.cli import main
from t3c_compile.comparing import Comparison, ComparisonError, compare
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.specialize import specialize
from t3c_compile.profile import ProfileSet
from t3c_compile.snapping import snap
from t3c_compile.transforming import transform

OP = "svd_linear.default"


def _samples() -> list[tuple[Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(16, 64),), (torch.randn(7, 64),)]


def _net(hidden: int = 48, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layers = OrderedDict(first=nn.Linear(64, hidden), relu=nn.ReLU(), second=nn.Linear(hidden, 32, bias=bias))
    return nn.Sequential(layers)


class Made:
    """An elastic network of two layers and its one profile."""

    def __init__(self, folder: Path) -> None:
        self.inputs = (torch.randn(5, 64),)
        self.elastic: ElasticGraphModule = transform(_net(), self.inputs).eval()
        self.profiles: ProfileSet = snap(self.elastic, _samples(), [get_target("x86_64")], count=1)
        self._folder = folder

    def lower(self, name: str) -> Path:
        return lower(self.elastic, self.profiles, ["x86_64"], self._folder / name, self.inputs, measured=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("comparing"))


@pytest.fixture(scope="module")
def artifact(made: Made) -> Path:
    return made.lower("right.t3c")


def _wrong(patch: pytest.MonkeyPatch, when: Callable[[Any, Any], bool]) -> None:
    """From now on the kernel of a chain takes its input's step as 1% greater, ``when(lowering, arguments)`` holds."""
    right = convert.CONVERTERS[OP]

    def converter(lowering: Any, a: Any) -> Any:
        return right(lowering, {**a, "x_scale": a["x_scale"] * 1.01} if when(lowering, a) else a)

    patch.setitem(convert.CONVERTERS, OP, converter)


def _expected(made: Made, x: Tensor, layer: str) -> tuple[Tensor, Tensor]:
    """What a layer's node gives in torch: right, and with the wrong step."""
    profile = made.profiles.profiles[0]
    found = []
    for factor in (1.0, 1.01):
        graph = specialize(made.elastic, profile.options, profile.activations, made.profiles.store_ranks())
        (node,) = (node for node in graph.graph.nodes if node.meta.get("t3c_layer") == layer)
        place = [argument.name for argument in node.target._schema.arguments].index("x_scale")
        node.update_arg(place, node.args[place] * factor)
        values = Interpreter(graph, garbage_collect_values=False)
        values.run(x)
        found.append(values.env[node])
    return found[0], found[1]


def test_equal_outputs_have_no_divergence(made: Made, artifact: Path) -> None:
    assert compare(artifact, made.elastic, _samples()) == [Comparison("p0", 0.0, None)]


@torch.no_grad()
def test_a_wrong_kernel_is_named_with_its_layer_and_size(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    _wrong(monkeypatch, lambda lowering, a: lowering.names[a["v"].name].startswith("second."))
    path = made.lower("wrong.t3c")
    ((name, difference, where),) = (vars(found).values() for found in compare(path, made.elastic, _samples()))
    assert (name, where.layer, where.op) == ("p0", "second", "t3c.svd_linear.default")
    assert difference > 0
    # The batch is the one whose outputs differ most.
    sizes = []
    for (x,) in _samples():
        right, wrong = _expected(made, x, "second")
        apart = (wrong - right).abs()
        sizes.append((float(apart.max()), float(right.abs().max()), float((apart > 0).float().mean())))
    assert any((where.difference, where.greatest, where.share) == pytest.approx(size, rel=1e-5) for size in sizes)


def test_an_error_of_a_fused_kernel_alone_is_found_by_bisection(made: Made) -> None:
    """With all values as outputs no kernel is fused, and nothing is wrong; and with the compiler mended, the library
    that was made before still is."""
    with pytest.MonkeyPatch.context() as patch:
        _wrong(
            patch, lambda lowering, a: lowering.names[a["v"].name].startswith("first.") and bool(lowering.finish.steps)
        )
        path = made.lower("fused.t3c")
        (found,) = compare(path, made.elastic, _samples())
        assert (found.divergence.op, found.divergence.layer) == ("aten.relu.default", "first")
    (mended,) = compare(path, made.elastic, _samples())
    assert mended == Comparison("p0", found.difference, None)
    assert found.difference > 0


@torch.no_grad()
def test_other_weights_are_found_where_they_are_read(made: Made, artifact: Path) -> None:
    other = copy.deepcopy(made.elastic)
    other.get_submodule("second").bias[3] += 0.125
    (found,) = compare(artifact, other, _samples())
    where = found.divergence
    assert (where.layer, where.op) == ("second", "t3c.svd_linear.default")
    assert where.difference == pytest.approx(0.125, rel=1e-5)
    assert where.share == pytest.approx(1 / 32)


def test_the_command(
    made: Made, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "compared.py").write_text(
        "import torch\n\ndef data():\n    torch.manual_seed(1)\n    return [(torch.randn(16, 64), torch.zeros(16))]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("compared", None)
    checkpoint = str(tmp_path / "model.safetensors")
    Checkpoint(made.elastic, made.inputs).save(checkpoint)
    command = ["compare", str(artifact), "--reference", checkpoint, "--data", "compared:data", "--json"]
    assert main(command) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["profile"], row["difference"], row["node"]) == ("p0", 0.0, None)
    assert main([*command, "--target", "z80"]) == 4
    assert "no target 'z80'" in capsys.readouterr().err


def test_what_cannot_be_compared_is_refused(made: Made, artifact: Path) -> None:
    with pytest.raises(ComparisonError, match="compare needs samples"):
        compare(artifact, made.elastic, [])
    other = transform(_net(bias=False), made.inputs)
    with pytest.raises(
        ComparisonError, match=r"another model: tensor second.bias is missing, the artifact has it as \["
    ):
        compare(artifact, other, _samples())
    with pytest.raises(ComparisonError, match=r"another model: tensor .* is \[.*56.*\], the artifact has it as"):
        compare(artifact, transform(_net(56), made.inputs), _samples())
    with pytest.raises(ComparisonError, match="another model: they differ in the layers 0, first, second"):
        compare(artifact, transform(nn.Sequential(nn.Linear(64, 32)), made.inputs), _samples())
