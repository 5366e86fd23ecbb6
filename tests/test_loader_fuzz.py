"""Mutated files are refused or harmless, in every loader; see ``loader_fuzz.py`` for how they are mutated.

``T3C_FUZZ_LOADS`` sets how many (200), ``T3C_FUZZ_SEED`` the first of their seeds (drawn and printed when not given).
"""

import os
import random
from pathlib import Path

import pytest
from certified import Small, samples
from loader_fuzz import SHARES, fuzz, training_state
from nets import mlp

import t3c_compile
from t3c_compile import certify, runtime
from t3c_compile.checkpoint import Checkpoint
from t3c_compile.manifest import STORE, ArtifactError, open_file, read_manifest
from t3c_compile.store import read_store

LOADS = int(os.environ.get("T3C_FUZZ_LOADS", "200"))
SEED = int(os.environ.get("T3C_FUZZ_SEED", str(random.SystemRandom().randrange(2**32))))


@pytest.fixture(scope="module")
def folder(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    small.copy(folder).rename(folder / "good.t3c")
    certify(folder / "good.t3c", [samples(200, seed=2)])
    run, setup = training_state()
    Checkpoint(run.model["elastic"], mlp()[1], run.model["controller"]).save(folder / "good.safetensors")
    run.save(folder / "good.state", setup, [{"task": 1.0}])
    return folder


def test_mutations_are_refused_or_harmless(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No other error, crash, hang or gigabyte, no changed meaning, no library opened but the one that was hashed."""
    failures = []
    with capsys.disabled():
        print(f"\nloader fuzz, T3C_FUZZ_SEED={SEED}")
        for group, shares in SHARES.items():
            count = LOADS * sum(shares.values()) // 100
            outcomes, found = fuzz(folder, group, SEED, count)
            for what, times in sorted(outcomes.items()):
                print(f"  {times:6d}  {what}")
            failures += found
            assert sum(outcomes.values()) + len(failures) >= count
    assert not failures, "\n".join(failures)


def test_a_library_is_hashed_before_it_is_opened(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small.copy(tmp_path)
    library = path / read_manifest(path)["targets"]["x86_64"]["library"]
    monkeypatch.setattr(runtime, "VirtualMachine", lambda _: pytest.fail("it was opened"))
    with library.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ArtifactError, match="truncated or changed"):
        t3c_compile.load(path)


def test_what_was_hashed_is_what_is_read(small: Small, tmp_path: Path) -> None:
    """Another store takes the place of the one that was checked, before it is read."""
    path = small.copy(tmp_path)
    before = {name: tensor.copy() for name, tensor in _store(path).items()}
    manifest = read_manifest(path)
    with open_file(path, manifest, STORE) as file:
        (tmp_path / "other").write_bytes(bytes((path / STORE).stat().st_size))
        (tmp_path / "other").rename(path / STORE)
        after = read_store(file)
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)


def _store(path: Path) -> "dict[str, object]":
    with open_file(path, read_manifest(path), STORE) as file:
        return read_store(file)
