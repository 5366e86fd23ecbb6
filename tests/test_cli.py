"""The command line end to end, and what a script can rely on when something is wrong."""

import json
import os
import pty
import re
import shlex
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

from t3c_compile import commands
from t3c_compile.checkpoint import Checkpoint
from t3c_compile.cli import build_parser, main
from t3c_compile.manifest import read_manifest
from t3c_compile.passes.elastic import elastic_layers
from t3c_compile.passes.specialize import specialize
from t3c_compile.profile import Profile

REPO = Path(__file__).resolve().parent.parent
# What sets a colour in a terminal.
_COLOUR = re.compile(r"\x1b\[(\d+;)*([34][0-8]|9\d|10\d)[;m]")

_USER_MODULE = """
import torch
from nets import mlp

def model():
    return mlp()[0]

class Inner(torch.nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x) + torch.special.i0(x)

class Bessel(torch.nn.Module):
    def __init__(self, last):
        super().__init__()
        self.first, self.inner = torch.nn.Linear(64, 32), last

    def forward(self, x):
        return self.inner(self.first(x))

class Topk(torch.nn.Module):
    def forward(self, x):
        return torch.topk(x, 10).values

def bessel():
    return Bessel(Inner())

def topk():
    return Bessel(Topk())

def data():
    torch.manual_seed(1)
    xs = [torch.randn(32, 64) for _ in range(4)]
    return [(x, (x.sum(1) > 0).long()) for x in xs]

def nothing():
    return 3

def broken():
    raise OSError("no disk")
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


def _progress(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, str]:
    """What a command prints with --json, and its progress bars: stderr is a terminal here."""
    assert main([*arguments, "--json"]) == 0
    printed = capsys.readouterr()
    assert re.search(r"\d:\d\d:\d\d", printed.err), f"{arguments[0]} shows no time left"
    return json.loads(printed.out), printed.err


def test_from_a_model_to_a_running_artifact(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the way stdout holds one JSON document alone, while bars with the time left go to the terminal."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    spec = ["usermodule:model", "--input", "float32[4,64]"]
    rows, bars = _progress(capsys, "transform", *spec, "--data", "usermodule:data", "-o", "a.pt")
    assert _COLOUR.search(bars)
    assert [(row["layer"], row["form"]) for row in rows] == [("first", "svd"), ("second", "svd"), ("head", "svd")]

    monkeypatch.setenv("NO_COLOR", "1")
    rows, bars = _progress(capsys, "train", "a.pt", "--data", "usermodule:data", "--epochs", "2", "-o", "b.pt")
    assert not _COLOUR.search(bars)
    assert [row["epoch"] for row in rows] == [0, 1]
    assert Checkpoint.load("b.pt").controller is not None

    lower = ["lower", "b.pt", "--data", "usermodule:data", "--target", "x86_64", "--profiles", "4", "-o", "m.t3c"]
    key = Ed25519PrivateKey.generate()
    Path("key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    Path("public.pem").write_bytes(public)
    rows, bars = _progress(capsys, *lower, "--sign", "key.pem")
    for work in ("gains of the layers", "profiles", "specialize", "compile for x86_64", "measure"):
        assert work in bars
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

    np.savez("samples.npz", x=np.random.default_rng(0).standard_normal((256, 64)).astype(np.float32))
    certify = ["certify", "m.t3c", "--data", "samples.npz", "--reference", "b.pt", "--alpha", "0.1"]
    certified, bars = _progress(capsys, *certify, "--sign", "key.pem")
    assert [row["l2_bound"] > 0 for row in certified] == [True] * len(rows)
    assert "certify" in bars
    assert _run(capsys, "sign", "m.t3c", "--key", "key.pem") == [{"artifact": "m.t3c"}]

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
    lower = ["lower", *model, "--data", "usermodule:data", "--target", "x86_64"]
    for code, arguments, message in (
        (1, ["transform", "usermodule:model", "-o", "a.pt"], "name its inputs, such as --input"),
        (1, ["transform", "usermodule:model", "--input", "float[3]", "-o", "a.pt"], "neither dtype[size,size,...]"),
        (1, ["transform", "usermodule:gone", "-o", "a.pt"], "has no attribute 'gone'"),
        (1, ["transform", "nomodule:f", "-o", "a.pt"], "No module named 'nomodule'"),
        (1, ["transform", "usermodule:nothing", "--input", "float32[1]", "-o", "a.pt"], "returned a int, not a torch"),
        (1, ["transform", *model, "-o", "no/where.pt"], "no is not a folder"),
        (1, ["transform", *model, "-o", "."], ". is a folder: name a file to write"),
        (4, [*lower, "-o", "."], ". is there already and is no artifact: choose"),
        (1, ["transform", "gone.pt2", "-o", "a.pt"], "there is no such file"),
        (1, ["transform", "gone.pt", "-o", "a.pt"], "there is no such file"),
        (
            1,
            ["transform", *model, "--data", "usermodule:broken", "-o", "a.pt"],
            "broken() failed: OSError: no disk (at",
        ),
        (1, ["train", *model, "-o", "a.pt"], "train needs --data"),
        (1, ["train", *model, "--data", "usermodule:nothing", "-o", "a.pt"], "not batches of (*inputs, labels)"),
        (1, ["lower", *model, "--target", "x86_64", "-o", "m.t3c"], "lower needs --data"),
        (1, ["lower", *model, "--target", "z80", "-o", "m.t3c"], "unknown target 'z80'; known targets: x86_64"),
        (4, ["run", "gone.t3c"], "is not a t3c artifact"),
        (4, ["inspect", "gone.t3c"], "is not a t3c artifact"),
    ):
        assert message in _fails(capsys, code, *arguments), arguments
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == ["usermodule.py"]


def test_ops_without_a_lowering_are_known_before_long_work(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`transform` notes them, and keeps the note in the checkpoint; `lower` and `tune` refuse before they snap."""
    long_work: list[Any] = []
    monkeypatch.setattr("t3c_compile.snapping.snap", lambda *_, **__: long_work.append("snap"))
    monkeypatch.setattr("t3c_compile.kernel_times.kernel_times", lambda *_, **__: long_work.append("times"))
    lower = ["a.pt", "--data", "usermodule:data", "--target", "x86_64"]
    for model, words in (
        ("bessel", ["special_bessel_j0", "in layer 'inner'", "i0", "CONVERTERS", "Write the layer with supported ops"]),
        ("topk", ["R.topk", "CONVERTERS"]),
    ):
        assert main(["transform", f"usermodule:{model}", "--input", "float32[4,64]", "-o", "a.pt", "--json"]) == 0
        printed = capsys.readouterr()
        assert [row["layer"] for row in json.loads(printed.out)] == ["first"]
        (note,) = Checkpoint.load("a.pt").model.report.notes
        assert printed.err == f"t3c-compile: note: {note}\n"
        for command in (["lower", *lower, "-o", "m.t3c"], ["tune", *lower, "--records", "r.jsonl"]):
            message = _fails(capsys, 1, *command)
            assert note == f"`lower` and `tune` will refuse this model: {message}"
        assert all(word in note for word in words)
    assert not long_work
    assert not Path("m.t3c").exists()


def test_usage_errors_exit_with_two(capsys: pytest.CaptureFixture[str]) -> None:
    lower = ["lower", "m", "--data", "a:b", "--target", "arm64", "-o", "m.t3c"]
    build_parser().parse_args([*lower, "--profiles", "1"])
    for arguments in ([], lower[:2], ["transform", "m", "-o", "a", "--conv", "svd"], [*lower, "--profiles", "0"]):
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
    """Also where who reads has seen enough."""
    command = Path(sys.executable).with_name("t3c-compile")
    done = subprocess.run([str(command), "targets", "--json"], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    assert "\x1b" not in done.stdout
    script = f"set -o pipefail; {command} targets | true"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=os.environ)
    assert done.stderr == ""


def test_what_is_no_error_of_ours_is_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Any) -> None:
        raise OSError(28, "No space left on device", "m.pt")

    def stopped(_: Any) -> None:
        raise KeyboardInterrupt

    for what, code, line in ((full, 1, "error: [Errno 28] No space left on device: 'm.pt'"), (stopped, 130, "stopped")):
        monkeypatch.setattr(commands, "targets", what)
        assert main(["targets"]) == code
        assert capsys.readouterr().err == f"t3c-compile: {line}\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    (line,) = re.findall(r'^version = "(.*)"$', (REPO / "pyproject.toml").read_text(), re.M)
    assert capsys.readouterr().out == f"t3c-compile {line}\n"


def _lines(text: str) -> list[list[str]]:
    """The t3c-compile commands in a text, as words; what a shell does with their output is cut off."""
    lines = [line.strip() for line in re.sub(r"\\\n\s*", "", text).splitlines()]
    found = []
    for line in lines:
        if line.removeprefix("$ ").startswith("t3c-compile "):
            words = shlex.split(line.removeprefix("$ "), comments=True)[1:]
            found.append(words[: next((i for i, word in enumerate(words) if word in (">", "|", "&&")), None)])
    return found


def test_examples_parse(capsys: pytest.CaptureFixture[str]) -> None:
    """Every command line in a command's help and in a code block of the documentation is one that the parser takes."""
    (subparsers,) = (action.choices for action in build_parser()._actions if isinstance(action.choices, dict))
    for name, command in subparsers.items():
        examples = _lines(command.epilog)
        assert examples, f"{name} has no example"
        for words in examples:
            assert build_parser().parse_args(words).command == name
    pages = [REPO / "README.md", REPO / "CONTRIBUTING.md", *(REPO / "docs").rglob("*.md")]
    count = 0
    for page in pages:
        for block in re.findall(r"^ *```(?:sh|bash|console)\n(.*?)^ *```", page.read_text(), re.M | re.S):
            for words in _lines(block):
                try:
                    build_parser().parse_args(words)
                except SystemExit:
                    pytest.fail(f"{page.name}: t3c-compile {shlex.join(words)}: {capsys.readouterr().err}")
                count += 1
    assert count >= 10


def test_completion_in_bash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An interactive bash completes a command, an option, a choice and a file with the tab key."""
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "model.safetensors").touch()
    ours, terminal = pty.openpty()
    shell = ["bash", "--norc", "--noprofile", "-i"]
    process = subprocess.Popen(shell, stdin=terminal, stdout=terminal, stderr=terminal, cwd=tmp_path)
    os.close(terminal)
    typed = "source ./script; t3c-compile() { printf '%s,' \"$@\" > seen; }\n"
    typed += "t3c-compile trans\tmod\t --resi\tin\t -o x\nexit\n"
    os.write(ours, typed.encode())
    while True:
        try:
            if not os.read(ours, 4096):
                break
        except OSError:  # Linux says so when the other end is closed
            break
    assert process.wait(timeout=30) == 0
    os.close(ours)
    assert (tmp_path / "seen").read_text() == "transform,model.safetensors,--residuals,int8,-o,x,"


def test_completion_of_other_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef t3c-compile")
    document = _run(capsys, "completion", "bash")
    assert set(document) == {"shell", "script"}
