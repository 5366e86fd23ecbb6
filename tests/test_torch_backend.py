"""``torch.compile(backend="t3c")``: equal to eager, or eager with the reason; one graph at a time."""

import logging
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import conv_net, mlp
from torch import Tensor, nn

from t3c_compile.artifact import lower
from t3c_compile.backends.targets import host_target
from t3c_compile.cost import dense_int8_bytes
from t3c_compile.passes.specialize import specialize
from t3c_compile.profile import ProfileSet
from t3c_compile.snapping import snap
from t3c_compile.transforming import transform

_LOGGER = "t3c_compile.torch_backend"


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    torch._dynamo.reset()
    caplog.set_level(logging.INFO, _LOGGER)
    return caplog


def _said(log: pytest.LogCaptureFixture, text: str) -> int:
    return sum(text in record.getMessage() for record in log.records if record.name == _LOGGER)


def _compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="t3c", options=options or None)


def _close(found: Tensor, expected: Tensor, rtol: float = 1e-4) -> None:
    assert float((found - expected).abs().max()) <= rtol * float(expected.abs().max())


def test_without_options_it_is_eager_in_float32(log: pytest.LogCaptureFixture) -> None:
    """Within 1e-4 of the largest output; a second batch size compiles once more, a third no more."""
    model, (x,) = conv_net()
    compiled = _compiled(model)
    with torch.no_grad():
        for rows in (5, 3, 9):
            batch = torch.randn(rows, *x.shape[1:]) * 3
            _close(compiled(batch), model(batch))
    assert _said(log, "nodes took") == 2
    assert _said(log, "runs in eager") == 0


def test_dynamic_compiles_once(log: pytest.LogCaptureFixture) -> None:
    """Under ``inference_mode``; the norm's epsilon is then an input of dynamo's graph."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.LayerNorm(48, eps=1e-2), nn.Linear(48, 10)).eval()
    compiled = torch.compile(model, backend="t3c", dynamic=True)
    with torch.inference_mode():
        for rows in (5, 3, 9):
            batch = torch.randn(rows, 32)
            _close(compiled(batch), model(batch))
    assert _said(log, "nodes took") == 1
    assert _said(log, "runs in eager") == 0


def test_size_gives_the_greatest_profile_that_fits(log: pytest.LogCaptureFixture) -> None:
    """What runs is the profile that transform and snap find for the model, equal to its torch reference."""
    model, inputs = mlp()
    # As a graph of dynamo's: its batch is one input of one size, of which gains are measured together.
    elastic = transform(model, inputs, dynamic_shapes=({},))
    profiles = snap(elastic, [inputs], [host_target()]).profiles
    profile = profiles[-2]
    size = (profiles[-1].size_bytes - 1) / dense_int8_bytes(elastic)
    reference = specialize(elastic, profile.options, profile.activations)
    with torch.no_grad():
        _close(_compiled(model, size=size)(*inputs), reference(*inputs), 1e-3)
        torch._dynamo.reset()
        assert torch.equal(_compiled(model, size=1e-3)(*inputs), model(*inputs))
    assert _said(log, "no profile is within") == 1


class TwoInputs(nn.Module):
    """Reads its second input first: dynamo orders inputs by use."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(24, 32), nn.Linear(16, 32)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        y = self.right(b)
        return y + self.left(a), y.sum(1)


def test_an_artifact_runs_instead(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, inputs = TwoInputs().eval(), (torch.randn(4, 24), torch.randn(4, 16))
    elastic = transform(model, inputs)
    found = snap(elastic, [inputs], [host_target()], count=2)
    path = lower(elastic, ProfileSet(found.profiles, "all"), [host_target()], tmp_path / "m.t3c", inputs)
    with torch.no_grad():
        for index, options in ((0, {"profile": "p0"}), (-1, {})):
            torch._dynamo.reset()
            profile = found.profiles[index]
            reference = specialize(elastic, profile.options, profile.activations)(*inputs)
            for ours, theirs in zip(_compiled(model, artifact=path, **options)(*inputs), reference, strict=True):
                _close(ours, theirs, 1e-3)
        assert _said(log, "runs in eager") == 0
        other, x = mlp()
        assert torch.equal(_compiled(other, artifact=path)(*x), other(*x))
    assert _said(log, "it takes x, the artifact a, b") == 1


def test_training_stays_eager_with_the_reason(log: pytest.LogCaptureFixture) -> None:
    """Autograd, dropout and batch norm in training mode: results and side effects are eager's."""
    model, (x,) = conv_net()
    compiled = _compiled(model)
    compiled(x).sum().backward()
    assert model.stem.weight.grad is not None
    assert _said(log, "autograd is on") == 1

    torch._dynamo.reset()
    expected, _ = conv_net()
    for m in (model, expected):
        m.train()
    with torch.no_grad():
        for m in (compiled, expected):
            torch.manual_seed(3)
            m(x)
    assert _said(log, "random numbers") == 1
    assert torch.equal(model.norm1.running_mean, expected.norm1.running_mean)

    norm = nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16)).train()
    with torch.no_grad():
        _compiled(norm)(x)
    assert int(norm[1].num_batches_tracked) == 1
    assert _said(log, "writes to its inputs or buffers") == 1


def test_a_graph_break_gives_graphs_that_stand_alone(log: pytest.LogCaptureFixture) -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.first(x))
            torch._dynamo.graph_break()
            # TVM has no lowering for it.
            return self.second(x) + torch.special.bessel_j0(x[:, :16])

    torch.manual_seed(0)
    model, x = Breaks().eval(), torch.randn(4, 16)
    with torch.no_grad():
        _close(_compiled(model)(x), model(x))
    assert _said(log, "nodes took") == 1
    assert _said(log, "runs in eager: UnsupportedOpError") == 1


def test_weights_written_to_are_read_again(log: pytest.LogCaptureFixture) -> None:
    """Also when another module of the same code runs the same graph."""
    model, (x,) = mlp()
    compiled = _compiled(model)
    with torch.no_grad():
        compiled(x)
        model.head.weight.mul_(2)
        _close(compiled(x), model(x))
        assert _said(log, "nodes took") == 2
        for _ in range(3):
            model.head.weight.mul_(0.5)
            _close(compiled(x), model(x))
    assert _said(log, "its weights or numbers have changed") == 1

    torch._dynamo.reset()
    blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
    for block in blocks:
        block.compile(backend="t3c")
    x = torch.randn(3, 8)
    with torch.no_grad():
        for block in blocks:
            _close(block(x), F.linear(x, block.weight, block.bias))


def test_bad_options_are_errors() -> None:
    model, inputs = mlp()
    for options, message in (
        ({"sise": 1}, "unknown options sise: there are size, artifact and profile"),
        ({"size": 0}, "must be a fraction"),
        ({"size": 0.5, "artifact": "a.t3c"}, "give one of them"),
        ({"profile": "p0"}, "give artifact too"),
    ):
        torch._dynamo.reset()
        with torch.no_grad(), pytest.raises(Exception, match=message):
            _compiled(model, **options)(*inputs)


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    example = Path(__file__).resolve().parent.parent / "examples" / "torch_compile_backend.py"
    runpy.run_path(str(example), run_name="__main__")
    printed = capsys.readouterr().out
    assert "float32: within" in printed
    assert "half the int8 size: the same class on" in printed
