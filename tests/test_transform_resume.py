"""Transform of large models: going on after being killed, memory, and the progress bar."""

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import attention_net, conv_net, mlp
from rich.progress import Progress, TimeRemainingColumn
from torch import Tensor, nn

from t3c_compile import progress as progress_module
from t3c_compile.cli import main
from t3c_compile.passes import decompose_conv, replace
from t3c_compile.passes.capture import capture
from t3c_compile.passes.errors import T3CError
from t3c_compile.transforming import Config, transform

TESTS = Path(__file__).parent


def _child(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=300)


# Dies as by `kill -9` when it has come to some call of a function: in the midst of a layer, or of writing its file.
KILLED = """
    import os, signal, sys
    from importlib import import_module
    from nets import conv_net
    from t3c_compile.transforming import transform
    folder, module, name, last = sys.argv[1:]
    owner = import_module(module)
    real, calls = getattr(owner, name), []
    def dying(*arguments):
        calls.append(1)
        if len(calls) == int(last):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)
    setattr(owner, name, dying)
    transform(*conv_net(), resume=folder)
"""


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The decompositions that were really made."""
    calls: list[str] = []

    def count(module: Any, name: str) -> None:
        real = getattr(module, name)

        def counted(*arguments: Any) -> Any:
            calls.append(name)
            return real(*arguments)

        monkeypatch.setattr(module, name, counted)

    count(replace, "svd_factors")
    count(decompose_conv, "tucker2_factors")
    count(decompose_conv, "cp_factors")
    return calls


def _equal(first: nn.Module, second: nn.Module) -> None:
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


@pytest.mark.parametrize(
    ("module", "name", "call", "done"),
    [
        ("t3c_compile.passes.decompose_conv", "tucker2_factors", 2, 3),
        ("os", "replace", 4, 3),
    ],
    ids=["in a layer", "with its file half made"],
)
def test_a_killed_transform_goes_on_to_the_same_model(
    module: str, name: str, call: int, done: int, tmp_path: Path, made: list[str]
) -> None:
    """The second run makes only what the first had not, and every bit is that of a run in one piece."""
    whole = transform(*conv_net())
    layers = len(made)
    made.clear()
    killed = _child(KILLED, tmp_path, module, name, call)
    assert killed.returncode == -9, killed.stderr
    assert len(list(tmp_path.glob("*.safetensors"))) == done
    resumed = transform(*conv_net(), resume=tmp_path)
    assert len(made) == layers - done
    _equal(resumed, whole)


def test_only_what_belongs_to_the_same_weights_and_options_is_read(tmp_path: Path, made: list[str]) -> None:
    model, inputs = conv_net()
    transform(model, inputs, resume=tmp_path)
    layers = len(made)
    made.clear()
    # The k x k convolutions are other ones.
    transform(model, inputs, Config(conv="cp"), resume=tmp_path)
    assert made == ["cp_factors"] * 2
    made.clear()
    with torch.no_grad():
        model.hidden.weight[3, 5] += 1e-6
    changed = transform(model, inputs, resume=tmp_path)
    assert made == ["svd_factors"]
    assert torch.allclose(changed(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
    made.clear()
    # With calibration the linears and the 1x1 convolution are whitened.
    for _ in range(2):
        transform(model, inputs, calibration=[inputs], resume=tmp_path)
    assert made == ["svd_factors"] * 3
    assert layers == 5


def test_a_damaged_file_is_made_again(tmp_path: Path, made: list[str]) -> None:
    whole = transform(*mlp(), resume=tmp_path)
    layers = len(made)
    files = sorted(tmp_path.iterdir())
    files[0].write_bytes(b"")
    files[1].write_bytes(files[1].read_bytes()[:-8])
    made.clear()
    _equal(transform(*mlp(), resume=tmp_path), whole)
    assert made == ["svd_factors"] * 2
    assert layers == len(files)


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(T3CError, match=r"the folder to resume from, .*file.*, cannot be made"):
        transform(*mlp(), resume=tmp_path / "file")


def test_the_command_removes_its_folder_when_the_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: list[str]
) -> None:
    (tmp_path / "its_model.py").write_text("from nets import mlp\ndef build():\n    return mlp()[0]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    transform(*mlp(), resume="model.pt.resume")
    made.clear()
    command = ["transform", "its_model:build", "--input", "float32[5,64]", "--resume", "--json", "-o", "model.pt"]
    assert main(command) == 0
    assert made == []
    assert sorted(path.name for path in tmp_path.glob("model*")) == ["model.pt"]


class Tied(nn.Module):
    """An embedding and an output layer of one parameter, and a layer that stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 32)
        self.hidden = nn.Linear(32, 32)
        self.norm = nn.LayerNorm(32)
        self.out = nn.Linear(32, 40, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.hidden(self.words(x))))


@pytest.mark.parametrize("keep", [(), ("*",), ("words", "out")])
def test_nothing_of_the_elastic_model_lies_in_the_users_memory(keep: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model, x = Tied().eval(), torch.randint(0, 40, (3, 7))
    mine = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    shared = capture(model, (x,), share=True)
    assert {p.untyped_storage().data_ptr() for p in shared.parameters()} <= mine
    if keep == ("*",):
        with pytest.raises(T3CError, match="nothing to compress"):
            transform(model, (x,), Config(keep=keep))
        return
    before, expected = {name: t.clone() for name, t in model.state_dict().items()}, model(x)
    elastic = transform(model, (x,), Config(keep=keep))
    assert not mine & {tensor.untyped_storage().data_ptr() for tensor in elastic.state_dict().values()}
    assert torch.allclose(elastic(x), expected, rtol=1e-4, atol=1e-5)
    # Tied stays tied: one parameter for both uses.
    assert sum(p.shape == (40, 32) for p in elastic.parameters()) == 1
    with torch.no_grad():
        for parameter in elastic.parameters():
            parameter.fill_(7.0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


MEMORY = """
    import sys
    import torch
    from torch import nn
    from t3c_compile.transforming import transform

    def read(field):
        lines = open("/proc/self/status").read().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    def net(layers, width):
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(8, width), *(nn.Linear(width, width) for _ in range(layers)))

    x = torch.zeros(1, 2, dtype=torch.int64)
    transform(net(2, 64), (x,))
    model = net(24, 1024)
    before = read("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    elastic = transform(model, (x,))
    weights, factors = (sum(4 * p.numel() for p in m.parameters()) for m in (model, elastic))
    print(weights, factors, read("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's peak of resident memory")
def test_memory_is_the_factors_and_the_work_on_one_layer() -> None:
    """Square layers, the worst case: factors are twice the weights; all else at most half the weights.

    A copy of the weights, or the work on a few layers that is not given back, would be more.
    """
    child = _child(MEMORY)
    assert child.returncode == 0, child.stderr
    weights, factors, grown = map(int, child.stdout.split())
    assert factors > 1.9 * weights
    assert grown < factors + weights / 2


def test_progress_goes_by_work_and_ends_at_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer moves the bar by its share of the operations, and the time left is shown."""
    bars: list[Progress] = []
    steps: list[tuple[str, float]] = []

    class Recorded(Progress):
        def __init__(self, *columns: Any, **options: Any) -> None:
            super().__init__(*columns, **options)
            assert any(isinstance(column, TimeRemainingColumn) for column in columns)
            bars.append(self)

        def update(self, task_id: Any, **fields: Any) -> None:
            if "advance" in fields:
                steps.append((fields["description"], fields["advance"]))
            super().update(task_id, **fields)

    monkeypatch.setattr(progress_module, "Progress", Recorded)
    elastic = transform(*attention_net(), progress=True)
    (task,) = bars[0].tasks
    assert task.completed == task.total == sum(work for _, work in steps)
    assert {name for name, _ in steps} == set(elastic.report.elastic)
    assert dict(steps)["up"] > 2 * dict(steps)["head"]
