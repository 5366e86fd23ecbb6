"""The runner without Python gives what the Python session gives, and refuses what it refuses."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import t3c_compile
from t3c_compile import ArtifactError, Budget, BudgetError, snapping
from t3c_compile.artifact import lower
from t3c_compile.backends.targets import get_target
from t3c_compile.manifest import MANIFEST, STORE, described, sealed
from t3c_compile.transforming import transform

REPO = Path(__file__).resolve().parent.parent
ZIG = f"{sys.executable} -m ziglang"
ARM64 = "-target aarch64-linux-gnu.2.28"

# All that lies on a device beside the weights.
MOST_BYTES = 12_000_000


class TwoEnds(nn.Module):
    """Two inputs of one free batch, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Linear(32, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        side = torch.tanh(self.side(y))
        return self.head(x + side), side


class Built:
    """A small network lowered for both machines, and inputs for it."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        example = torch.randn(5, 64), torch.randn(5, 32)
        elastic = transform(TwoEnds().eval(), example)
        targets = [get_target(name) for name in ("x86_64", "arm64")]
        with pytest.MonkeyPatch.context() as patch:
            # Of an untrained network on noise hardly a profile is better than another: keep them all.
            patch.setattr(snapping, "drop_dominated", lambda profiles: (profiles, []))
            profiles = snapping.snap(elastic, [example], targets, count=3)
        self.path = lower(elastic, profiles, targets, folder / "net.t3c", example, measured=False)
        self.names = [profile.name for profile in profiles.profiles]
        self.inputs = [torch.randn(3, 64).numpy(), torch.randn(3, 32).numpy()]
        self.files = [folder / "x0.npy", folder / "x1.npy"]
        for file, array in zip(self.files, self.inputs, strict=True):
            np.save(file, array)
            array.tofile(file.with_suffix(".raw"))

    def copy(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.path, folder / "copy.t3c"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("runner"))


def _make(out: Path, site: str, compiler: str) -> Path:
    command = ["make", "--silent", "-C", str(REPO / "runner"), f"OUT={out}", f"SITE={site}", f"CXX={compiler}"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return out


@pytest.fixture(scope="module")
def host() -> Path:
    return _make(REPO / "build/runner/host", sysconfig.get_path("platlib"), "c++")


@pytest.fixture(scope="module")
def device(arm64: Any) -> Path:
    return _make(REPO / "build/runner/arm64", f"{arm64.find_root()}/site", f"{ZIG} c++ {ARM64}")


def _run(program: Path, *args: object, emulator: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [*(emulator or []), str(program), *map(str, args)]
    # Nothing of Python is left in the environment.
    return subprocess.run(command, capture_output=True, text=True, env={"TVM_NUM_THREADS": "1"}, timeout=300)


def _emulator(arm64: Any) -> list[str]:
    return [str(arm64.emulator()), "-L", str(arm64.find_root())]


def _given(built: Built, suffix: str = ".npy") -> list[object]:
    return [word for file in built.files for word in ("--input", file.with_suffix(suffix))]


def _expected(built: Built) -> dict[str, list[Any]]:
    session = t3c_compile.load(built.path)
    found = {}
    for name in built.names:
        session.set_profile(name)
        found[name] = list(session.run(*built.inputs))
    return found


def _check_program(built: Built, program: Path, folder: Path, expected: Any, emulator: list[str] | None) -> None:
    """The last profile from .npy to .npy and the first from raw to raw values."""
    for name, suffix in ((built.names[-1], ".npy"), (built.names[0], ".raw")):
        outputs = [folder / f"y{i}{suffix}" for i in range(2)]
        named = [word for file in outputs for word in ("--output", file)]
        done = _run(program, built.path, *_given(built, suffix), *named, "--profile", name, emulator=emulator)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"{name}\n"
        for file, array in zip(outputs, expected[name], strict=True):
            if suffix == ".npy":
                found = np.load(file)
                assert found.dtype == array.dtype
                np.testing.assert_array_equal(found, array)
            else:
                assert file.read_bytes() == array.tobytes()


def _check_switching(
    built: Built,
    runner: Path,
    compiler: list[str],
    target: str,
    folder: Path,
    expected: Any,
    emulator: list[str] | None,
) -> None:
    """Every profile up and down the set in one session, by a program in C."""
    program = folder / "runner_switch"
    source = [str(REPO / "tests/runner_switch.c"), "-std=c11", "-O1", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    link = [f"-I{runner}", str(runner / "libt3c.so"), f"-Wl,-rpath,{runner}", "-s"]
    subprocess.run([*compiler, *source, "-o", str(program), *link], check=True)
    order = [*built.names, *reversed(built.names)]
    raw = [file.with_suffix(".raw") for file in built.files]
    done = _run(program, built.path, target, *raw, folder / "all.raw", *order, emulator=emulator)
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "all.raw").read_bytes() == b"".join(y.tobytes() for name in order for y in expected[name])


def test_on_this_machine(built: Built, host: Path, tmp_path: Path) -> None:
    expected = _expected(built)
    assert len({array.tobytes() for arrays in expected.values() for array in arrays}) >= 2 * len(built.names) - 1
    _check_program(built, host / "t3c-run", tmp_path, expected, None)
    _check_switching(built, host, ["cc"], "x86_64", tmp_path, expected, None)


def test_on_arm64(built: Built, device: Path, arm64: Any, tmp_path: Path) -> None:
    expected = arm64.run_profiles(built.path, "arm64", *built.inputs)
    _check_program(built, device / "t3c-run", tmp_path, expected, _emulator(arm64))
    compiler = [*ZIG.split(), "cc", *ARM64.split()]
    _check_switching(built, device, compiler, "arm64", tmp_path, expected, _emulator(arm64))


def test_what_lies_on_a_device(built: Built, host: Path, device: Path) -> None:
    """Without Python, and small."""
    for runner, target in ((host, "x86_64"), (device, "arm64")):
        library = json.loads((built.path / MANIFEST).read_text())["targets"][target]["library"]
        files = [runner / name for name in ("t3c-run", "libt3c.so", "libtvm_runtime.so", "libtvm_ffi.so")]
        assert sum(file.stat().st_size for file in (*files, built.path / library)) <= MOST_BYTES
    symbols = subprocess.run(["nm", "-DC", host / "libt3c.so"], capture_output=True, text=True, check=True).stdout
    # Of TVM, the C functions of its FFI alone.
    assert {"U TVMFFIFunctionGetGlobal", "T t3c_run"} <= {line[17:] for line in symbols.splitlines()}
    assert not [line for line in symbols.splitlines() if " U " in line and "tvm::" in line]


def test_the_list_is_the_sessions(built: Built, host: Path) -> None:
    done = _run(host / "t3c-run", built.path, "--list")
    assert done.returncode == 0, done.stderr
    target, *rest = done.stdout.splitlines()
    session = t3c_compile.load(built.path)
    assert target == "target x86_64"
    assert rest[:2] == [f"input {e['name']} {e['dtype']}[batch, {e['shape'][1]}]" for e in session.inputs]
    for line, profile in zip(rest[3:], session.profiles, strict=True):
        name, size, latency, energy, drift, source = line.split(None, 5)
        numbers = f"{profile.size_mb:.4g} {profile.latency_ms:.4g} {profile.energy_mj:.4g}"
        assert (name, f"{size} {latency} {energy}", drift) == (profile.name, numbers, "-")
        assert source == profile.latency_source


def _edit(path: Path, change: Callable[[Any], Any]) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    (path / MANIFEST).write_bytes(sealed(manifest))


def _certified_and_measured(manifest: Any) -> None:
    entry = manifest["targets"]["x86_64"]
    count = len(entry["costs"])
    for i, cost in enumerate(entry["costs"]):
        cost |= {"latency_ms": 1.0 + i, "latency_p90_ms": 2.0 + i, "energy_mj": 0.5 + i, "source": "measured here"}
    bounds = [
        {"drift": {"linf": 1.0, "l2": 4.0 - i, "kl": 1.0}, "scaled": {}, "agreement": 0.9, "to_greatest": 1.0}
        for i in range(count)
    ]
    entry["conformal"] = {"alpha": 0.05, "delta": 0.05, "samples": 100, "reference": "full", "statement": "-"}
    entry["conformal"]["profiles"] = bounds


@pytest.mark.parametrize(
    "budget",
    [
        {"latency_ms": 2.1},  # a margin of 1.1 on what was measured
        {"latency_ms": 2.3},
        {"latency_ms": 3.5, "energy_mj": 9},
        {"energy_mj": 1.6},
        {"size_mb": 1e-4},
        {"latency_ms": 0.5, "energy_mj": 0.1, "size_mb": 1e-4},
        {"max_drift": 3.2},
        {"max_drift": 3.2, "energy_mj": 0.6},
        {"max_drift": 0.25},
        {"max_drift": 9, "size_mb": 50},
    ],
)
def test_a_budget_chooses_as_the_session_does(
    built: Built, host: Path, tmp_path: Path, budget: dict[str, float]
) -> None:
    path = built.copy(tmp_path)
    _edit(path, _certified_and_measured)
    words = [word for name, value in budget.items() for word in (f"--{name.replace('_', '-')}", value)]
    done = _run(host / "t3c-run", path, *_given(built), *words)
    session = t3c_compile.load(path)
    try:
        chosen = session.set_budget(Budget(**budget)).name
    except BudgetError as error:
        message = str(error)
        assert (done.returncode, done.stderr) == (3, f"t3c-run: {message}\n")
        assert "needs" in message or "least drift that can be had" in message
    else:
        assert (done.returncode, done.stdout) == (0, f"{chosen}\n")


def test_damage_is_refused_as_the_session_refuses_it(built: Built, host: Path, tmp_path: Path) -> None:
    entry = json.loads((built.path / MANIFEST).read_text())["targets"]
    here = entry["x86_64"]["library"]

    def edit(change: Callable[[Any], Any]) -> Callable[[Path], None]:
        return lambda path: _edit(path, change)

    damages: list[Callable[[Path], Any]] = [
        lambda p: (p / MANIFEST).unlink(),
        lambda p: (p / STORE).unlink(),
        lambda p: os.truncate(p / STORE, 1000),
        lambda p: _flip(p / STORE),
        lambda p: _flip(p / MANIFEST),
        lambda p: _flip(p / here),
        edit(lambda m: m.update(schema=1)),
        edit(lambda m: m.update(schema=True)),
        edit(lambda m: m.pop("schema")),
        edit(lambda m: m.pop("profiles")),
        edit(lambda m: m.update(targets=None)),
        edit(lambda m: m.update(inputs=None)),
        edit(lambda m: m["profiles"].pop()),
        edit(lambda m: m["files"].pop(here)),
        edit(lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": ""}})),
        edit(lambda m: m["profiles"][0].pop("size_bytes")),
        edit(lambda m: m["profiles"][0].update(size_bytes=1.5)),
        edit(lambda m: m["targets"]["x86_64"]["costs"][0].update(latency_ms="1")),
        edit(lambda m: m["targets"]["x86_64"]["packs"]["pack_0"].append("nothing")),
        edit(lambda m: m["targets"]["x86_64"]["features"].append("avx9000")),
        edit(lambda m: m["targets"]["x86_64"].update(machine="riscv64")),
    ]
    for i, damage in enumerate(damages):
        path = built.copy(tmp_path / str(i))
        damage(path)
        with pytest.raises(ArtifactError) as refused:
            t3c_compile.load(path)
        done = _run(host / "t3c-run", path, "--list")
        assert (done.returncode, done.stderr) == (4, f"t3c-run: {refused.value}\n")

    ours: list[tuple[Callable[[Path], Any], str]] = [
        (edit(lambda m: m["targets"]["x86_64"]["functions"].__setitem__(0, "f")), "loaded: it has no function f"),
        (edit(lambda m: m["targets"]["x86_64"].update(packs={})), "failed: "),
        (edit(lambda m: m.update(schema=99)), "has schema 99, this version reads 3: build a newer runner"),
        (lambda p: os.truncate(p / MANIFEST, 300), "manifest.json is damaged: "),
        (lambda p: (p / MANIFEST).write_text("[" * 100_000), "manifest.json is damaged: it is nested too deeply"),
        (lambda p: _rewrite_store(p, b"\xff" * 8), "weights.safetensors is damaged: it ends within its header"),
        (
            lambda p: _rewrite_store(p, (p / STORE).read_bytes()[:8] + b"[" + (p / STORE).read_bytes()[9:]),
            "weights.safetensors is damaged: ",
        ),
        (lambda p: _rewrite_store(p, (p / STORE).read_bytes()[:-64]), "is not in the file"),
    ]
    for i, (damage, message) in enumerate(ours):
        path = built.copy(tmp_path / f"ours{i}")
        damage(path)
        done = _run(host / "t3c-run", path, *_given(built))
        assert done.returncode == 4, done.stderr
        assert message in done.stderr


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _rewrite_store(path: Path, data: bytes) -> None:
    """Another store, with the hash the manifest says."""
    (path / STORE).write_bytes(data)
    _edit(path, lambda m: m["files"].update({STORE: described(path / STORE)}))


def test_no_code_is_loaded_before_the_checks(built: Built, host: Path, tmp_path: Path) -> None:
    """A library that writes a line when it is loaded stands in the artifact."""
    path = built.copy(tmp_path)
    name = json.loads((path / MANIFEST).read_text())["targets"]["x86_64"]["library"]
    source = tmp_path / "loud.c"
    source.write_text(
        '#include <stdio.h>\n__attribute__((constructor)) void f(void) { puts("loaded"); fflush(stdout); }'
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", path / name, source], check=True)

    def library_entry(manifest: Any) -> None:
        manifest["files"][name] = {"bytes": (path / name).stat().st_size, "sha256": "0" * 64}

    _edit(path, library_entry)
    done = _run(host / "t3c-run", path, "--list")
    assert (done.returncode, done.stdout) == (4, "")
    assert f"{name} is damaged: its SHA-256 is not the manifest's" in done.stderr
    # With its hash in the manifest it is loaded, and is none of ours.
    _edit(path, lambda m: m["files"].update({name: described(path / name)}))
    done = _run(host / "t3c-run", path, "--list")
    assert (done.returncode, done.stdout) == (4, "loaded\n")
    assert f"{name} cannot be loaded: " in done.stderr


def test_wrong_inputs_and_usage_are_named(built: Built, host: Path, tmp_path: Path) -> None:
    good = built.inputs[0]
    arrays = {
        "float64": good.astype(np.float64),
        "short": good[:, :60],
        "two": good[:2],
        "none": good[:0],
        "fortran": np.asfortranarray(good),
        "complex": good.astype(np.complex64),
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    (tmp_path / "text.npy").write_text("no array at all")
    (tmp_path / "cut.npy").write_bytes(built.files[0].read_bytes()[:-4])
    (tmp_path / "odd.raw").write_bytes(good.tobytes()[:-4])
    second = built.files[1]
    for words, status, message in (
        ((tmp_path / "float64.npy", second), 1, "input 'x' is float64, the model takes float32"),
        ((tmp_path / "short.npy", second), 1, "input 'x' has shape [3, 60], the model takes ['batch', 64]"),
        ((tmp_path / "two.npy", second), 1, "input 'y' has shape [3, 32], the model takes ['batch', 32]"),
        ((tmp_path / "none.npy", second), 1, "input 'x' has shape [0, 64]"),
        ((tmp_path / "fortran.npy", second), 1, "Fortran order: save numpy.ascontiguousarray"),
        ((tmp_path / "complex.npy", second), 1, "knows no values of type <c8"),
        ((tmp_path / "text.npy", second), 1, "text.npy: it is not a .npy file"),
        ((tmp_path / "cut.npy", second), 1, "it holds 764 bytes of values, its header says 768"),
        ((tmp_path / "odd.raw", second), 1, "it has 764 bytes, input x takes a multiple of 256"),
        ((tmp_path / "absent.npy", second), 1, "absent.npy: it cannot be read"),
        ((second,), 1, "1 inputs given, the model takes 2"),
        ((*built.files, "--profile", "p9"), 1, "there is no profile 'p9'; there are p0, "),
        ((*built.files, "--max-drift", 1), 1, "a budget of max_drift needs a certificate: run t3c-compile certify"),
        ((*built.files, "--target", "z80"), 4, "has no target 'z80'; it has x86_64, arm64"),
        ((*built.files, "--target", "arm64"), 4, "arm64: it is for aarch64, this is x86_64"),
        ((*built.files, "--output", tmp_path / "y.npy"), 1, "1 outputs named, the model has 2"),
        ((*built.files, "--latency-ms", 0), 2, "--latency-ms 0 is not a positive number"),
        ((*built.files, "--repeat", 0.5), 2, "--repeat takes a whole number"),
        ((*built.files, "--nonsense"), 2, "--nonsense is unknown"),
        ((), 2, "either --list or inputs"),
    ):
        files = [word for word in words if isinstance(word, Path) and word.suffix != "" and word.name != "y.npy"]
        given = [part for file in files for part in ("--input", file)]
        done = _run(host / "t3c-run", built.path, *given, *words[len(files) :])
        assert done.returncode == status, (words, done.stderr)
        assert message in done.stderr


def test_repeated_calls_are_timed(built: Built, host: Path) -> None:
    done = _run(host / "t3c-run", built.path, *_given(built), "--repeat", 20)
    name, _, rest = done.stdout.partition(": 20 calls, p50 ")
    p50, p90 = rest.removesuffix(" ms\n").split(" ms, p90 ")
    assert name == built.names[-1]
    assert 0 < float(p50) <= float(p90)


def test_mutated_bytes_give_a_clear_error_or_run(built: Built, host: Path, tmp_path: Path) -> None:
    """Bytes of the manifest, and of the store's header under its right hash, replaced: an exit code, never a signal."""
    path = built.copy(tmp_path)
    manifest, store = (path / MANIFEST).read_bytes(), (path / STORE).read_bytes()
    header = 8 + int.from_bytes(store[:8], "little")
    generator = np.random.default_rng(0)
    refused = 0
    for case in range(int(os.environ.get("T3C_FUZZ_CASES", 30))):
        data, end = ((manifest, len(manifest)), (store, header))[case % 2]
        changed = np.frombuffer(data, np.uint8).copy()
        places = generator.integers(0, end, generator.integers(1, 4))
        changed[places] = generator.choice(np.frombuffer(b'0179-{}[]",:e\\\x00\xffu', np.uint8), len(places))
        (path / MANIFEST).write_bytes(manifest)
        if case % 2:
            _rewrite_store(path, changed.tobytes())
        else:
            (path / STORE).write_bytes(store)
            (path / MANIFEST).write_bytes(changed.tobytes())
        done = _run(host / "t3c-run", path, *_given(built))
        assert done.returncode in (0, 1, 4), (case, places, done.stderr)
        assert (done.returncode == 0) == (done.stderr == "")
        refused += done.returncode == 4
    assert refused > 0
