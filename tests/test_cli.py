"""The command line end to end, and what a script can rely on when something is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from nets import mlp

from t3c_compile.checkpoint import Checkpoint
from t3c_compile.cli import main
from t3c_compile.manifest import read_manifest
from t3c_compile.passes.elastic import elastic_layers
from t3c_compile.passes.specialize import specialize
from t3c_compile.profile import Profile

_USER_MODULE = """
import torch
from nets import mlp

def model():
    return mlp()[0]

def data():
    torch.manual_seed(1)
    xs = [torch.randn(32, 64) for _ in range(4)]
    return [(x, (x.sum(1) > 0).long()) for x in xs]

def nothing():
    return 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a user's module in it."""
    (tmp_path / "usermodule.py").write_text(_USER_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("usermodule", None)
    return tmp_path


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def _fails(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    assert main([*arguments, "--json"]) == code
    error = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert set(error) == {"error", "message"}
    return str(error["message"])


def test_from_a_model_to_a_running_artifact(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = ["usermodule:model", "--input", "float32[4,64]"]
    rows = _run(capsys, "transform", *spec, "--data", "usermodule:data", "-o", "a.pt")
    assert [(row["layer"], row["form"]) for row in rows] == [("first", "svd"), ("second", "svd"), ("head", "svd")]

    rows = _run(capsys, "train", "a.pt", "--data", "usermodule:data", "--epochs", "2", "-o", "b.pt")
    assert [row["epoch"] for row in rows] == [0, 1]
    assert Checkpoint.load("b.pt").controller is not None

    lower = ["lower", "b.pt", "--data", "usermodule:data", "--target", "x86_64", "--profiles", "4", "-o", "m.t3c"]
    key = Ed25519PrivateKey.generate()
    Path("key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    Path("public.pem").write_bytes(public)
    rows = _run(capsys, *lower, "--sign", "key.pem")
    assert rows == _run(capsys, "inspect", "m.t3c")
    assert _run(capsys, "verify", "m.t3c", "--key", "public.pem") == [{"artifact": "m.t3c", "key": "public.pem"}]
    assert rows[0]["target"] == "x86_64"
    assert [row["profile"] for row in rows] == [f"p{i}" for i in range(len(rows))]
    assert all(row["accuracy"] is not None and row["certificate"] > 0 for row in rows)

    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    np.save("x.npy", x.numpy())
    (row,) = _run(capsys, "run", "m.t3c", "x.npy", "-o", "y.npy")
    assert row["profile"] == rows[-1]["profile"]
    top = Profile.from_json(read_manifest(Path("m.t3c"))["profiles"][-1])
    expected = specialize(Checkpoint.load("b.pt").model, top.options, top.activations)(x).detach().numpy()
    assert np.abs(np.load("y.npy") - expected).max() <= 1e-3 * np.abs(expected).max()
    (row,) = _run(capsys, "run", "m.t3c", "--size-mb", str(rows[0]["size_kb"] / 1e3))
    assert row["profile"] == "p0"
    (row,) = _run(capsys, "run", "m.t3c", "--profile", "p0")
    assert row["profile"] == "p0"

    message = _fails(capsys, 3, "run", "m.t3c", "--size-mb", "1e-6")
    assert "no profile fits the budget: size_mb=1e-06 (needs" in message
    message = _fails(capsys, 1, "run", "m.t3c", "missing.npy")
    assert "cannot read inputs" in message
    message = _fails(capsys, 1, "run", "m.t3c", "usermodule.py")
    assert "cannot read inputs" in message


def test_a_pt2_file_is_a_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own example inputs are used; the training graph is the evaluation graph."""
    model, inputs = mlp()
    torch.export.save(torch.export.export(model, inputs, dynamic_shapes=({0: torch.export.Dim("n", min=2)},)), "m.pt2")
    rows = _run(capsys, "transform", "m.pt2", "-o", "m.pt")
    assert [row["layer"] for row in rows] == ["first", "second", "head"]
    loaded = Checkpoint.load("m.pt").model
    x = torch.randn(9, 64)
    assert torch.allclose(loaded(x), model(x), rtol=1e-4, atol=1e-5)
    _run(capsys, "transform", "m.pt2", "--activations", "float32", "-o", "f.pt")
    for path, floats in (("m.pt", False), ("f.pt", True)):
        assert {layer.float_activations for _, layer in elastic_layers(Checkpoint.load(path).model)} == {floats}
    loaded.train()
    loaded(x).sum().backward()
    assert any("training graph" in note for note in loaded.report.notes)


def test_errors_say_what_and_how(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["usermodule:model", "--input", "float32[4,64]"]
    for code, arguments, message in (
        (1, ["transform", "usermodule:model", "-o", "a.pt"], "name its inputs, such as --input"),
        (1, ["transform", "usermodule:model", "--input", "float[3]", "-o", "a.pt"], "neither dtype[size,size,...]"),
        (1, ["transform", "usermodule:gone", "-o", "a.pt"], "has no attribute 'gone'"),
        (1, ["transform", "nomodule:f", "-o", "a.pt"], "No module named 'nomodule'"),
        (1, ["transform", "usermodule:nothing", "--input", "float32[1]", "-o", "a.pt"], "returned a int, not a torch"),
        (1, ["transform", *model, "-o", "no/where.pt"], "no is not a folder"),
        (1, ["transform", "gone.pt2", "-o", "a.pt"], "there is no such file"),
        (1, ["transform", "gone.pt", "-o", "a.pt"], "there is no such file"),
        (1, ["train", *model, "-o", "a.pt"], "train needs --data"),
        (1, ["train", *model, "--data", "usermodule:nothing", "-o", "a.pt"], "not batches of (*inputs, labels)"),
        (1, ["lower", *model, "--target", "x86_64", "-o", "m.t3c"], "lower needs --data"),
        (1, ["lower", *model, "--target", "z80", "-o", "m.t3c"], "unknown target 'z80'; known targets: x86_64"),
        (4, ["run", "gone.t3c"], "is not a t3c artifact"),
        (4, ["inspect", "gone.t3c"], "is not a t3c artifact"),
    ):
        assert message in _fails(capsys, code, *arguments), arguments
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == ["usermodule.py"]


def test_usage_errors_exit_with_two(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["lower", "m"], ["transform", "m", "-o", "a", "--conv", "svd"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        capsys.readouterr()


def test_tables_are_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets"]) == 0
    shown = capsys.readouterr().out
    assert "rank multiple" in shown
    assert "cortex-a76" in shown
    assert {row["target"] for row in _run(capsys, "targets")} >= {"x86_64", "arm64"}


def test_the_installed_command_runs() -> None:
    command = Path(sys.executable).with_name("t3c-compile")
    done = subprocess.run([str(command), "targets", "--json"], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
