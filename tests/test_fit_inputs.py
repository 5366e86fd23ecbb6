"""Data that does not fit the model is refused, by name, before long work: in transform, train, snap and lower."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import mlp
from torch import Tensor, nn

from t3c_compile import snapping
from t3c_compile.backends.targets import get_target
from t3c_compile.checkpoint import Checkpoint
from t3c_compile.cli import main
from t3c_compile.passes.errors import DataError
from t3c_compile.passes.fit_inputs import require_fitting
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.snapping import snap
from t3c_compile.training import train
from t3c_compile.transforming import transform

_Y = torch.arange(32) % 10
# By what is wrong: a batch for the network 64 -> 10, and words of the error.
WRONG: dict[str, tuple[tuple[Any, ...], str]] = {
    "shape": ((torch.ones(32, 63), _Y), r"input 'x' has shape \[32, 63\], the model takes \[any, 64\]: .*transform"),
    "dimensions": ((torch.ones(32, 8, 8), _Y), r"input 'x' has shape \[32, 8, 8\], the model takes \[any, 64\]"),
    "nothing": ((torch.ones(0, 64), _Y[:0]), r"input 'x' has shape \[0, 64\]"),
    "dtype": (
        (torch.ones(32, 64).double(), _Y),
        r"input 'x' is float64, the model takes float32: .*\.to\(torch.float32",
    ),
    "integers": ((torch.ones(32, 64).long(), _Y), "input 'x' is int64, the model takes float32"),
    "array": ((np.ones((32, 64), np.float32), _Y), "input 'x' is a ndarray, the model takes a tensor"),
    "number": ((torch.ones(32, 64), torch.ones(32, 64), _Y), r"has 2 inputs \(labels apart\), the model takes 1: x"),
}
GOOD = (torch.ones(32, 64), _Y)


@pytest.fixture(scope="module")
def elastic() -> ElasticGraphModule:
    return transform(*mlp())


@pytest.fixture
def no_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes long fails here."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("long work has begun")

    for place in ("training.ElasticLoss.__call__", "snapping.SpectralProxy", "transforming.record_moments"):
        monkeypatch.setattr(f"t3c_compile.{place}", refuse)


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.usefixtures("no_long_work")
def test_inputs_of_the_wrong_kind(wrong: str, elastic: ElasticGraphModule) -> None:
    batch, words = WRONG[wrong]
    # The last one of a list is looked at, too, before the first is trained on; of a loader the first one is.
    loader = torch.utils.data.DataLoader([GOOD, batch], batch_size=None, shuffle=False)
    first = torch.utils.data.DataLoader([batch], batch_size=None)
    with pytest.raises(DataError, match=f"batch 1:? {words}" if wrong == "number" else f"batch 1: {words}"):
        train(elastic, [GOOD, batch], epochs=1, progress=False)
    if wrong != "array":  # a loader makes tensors of arrays
        with pytest.raises(DataError, match=words):
            train(elastic, first, epochs=1, progress=False)
        with pytest.raises(AssertionError, match="long work"):
            train(elastic, loader, epochs=1, progress=False)
    inputs = [GOOD[:1], batch[:-1]]
    with pytest.raises(DataError, match=f"calibration batch 1.*{words}"):
        snap(elastic, inputs, [get_target("arm64")])
    with pytest.raises(DataError, match=f"calibration batch 1.*{words}"):
        transform(*mlp(), calibration=inputs)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (_Y.float(), r"labels are float32, not int64 numbers of classes: .*\.to\(torch.int64\)"),
        ([1] * 32, "labels are list, not int64"),
        (_Y[:31], r"labels of shape \[31\] do not fit logits of shape \[32, 10\]"),
        (_Y + 1, "label 10 is no class: the model's logits have 10, numbered from 0"),
        (_Y - 1, "label -1 is no class"),
    ],
)
def test_labels_of_the_wrong_kind(labels: Any, words: str, elastic: ElasticGraphModule) -> None:
    with pytest.raises(DataError, match=words):
        train(elastic, [(GOOD[0], labels)], epochs=1, progress=False)


def test_labels_of_another_number(elastic: ElasticGraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(snapping, "SpectralProxy")
    with pytest.raises(DataError, match="there are 31 labels for 64 predictions on the calibration batches"):
        snap(elastic, [GOOD[:1]] * 2, [get_target("arm64")], _Y[:31])


def test_inputs_that_fit() -> None:
    """Sizes that are free may be any, but one where inputs share it; nested inputs are looked at one by one."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 8)

        def forward(self, pair: tuple[Tensor, Tensor], scale: float) -> Tensor:
            return self.layer(pair[0] + pair[1]) * scale

    def pair(*sizes: int) -> tuple[Any, ...]:
        return (tuple(torch.ones(size, 3, 16) for size in sizes), 2.0)

    model = transform(Pair().eval(), pair(5, 5), dynamic_shapes=(({0: torch.export.Dim.AUTO},) * 2, None))
    for size in (1, 2, 7):
        require_fitting(model, pair(size, size), "this")
        assert model(*pair(size, size)).shape == (size, 3, 8)
    with pytest.raises(DataError, match=r"this: input 'pair_1' has shape \[4, 3, 16\], the model takes \[any, 3, 16\]"):
        require_fitting(model, pair(5, 4), "this")


_MODULE = """
import torch
def data():
    return [(torch.ones(32, 63), torch.arange(32) % 10)]
def lists():
    return [(torch.ones(32, 64), [1] * 32)]
"""


def test_commands_say_so_in_one_line(
    elastic: ElasticGraphModule, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "misfit.py").write_text(_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("misfit", None)
    model, out, records = (str(tmp_path / name) for name in ("m.safetensors", "out", "records"))
    Checkpoint(elastic, mlp()[1]).save(model)
    shape = "batch 0: input 'x' has shape [32, 63], the model takes [any, 64]"
    for command, data, more, words in (
        ("train", "data", ["-o", out], shape),
        ("lower", "data", ["--target", "x86_64", "-o", out], f"misfit:data(): {shape}"),
        ("tune", "data", ["--target", "x86_64", "--records", records], f"misfit:data(): {shape}"),
        (
            "lower",
            "lists",
            ["--target", "x86_64", "-o", out],
            "misfit:lists() gave batches whose last entry is no tensor",
        ),
    ):
        assert main([command, model, "--data", f"misfit:{data}", *more, "--json"]) == 1
        error = json.loads(capsys.readouterr().err.splitlines()[-1])
        assert words in error["message"], command
    assert not Path(out).exists()
