"""Kill -9 at random moments of train, tune, lower and certify: what was written is whole, and it goes on from there.

    python tests/kills.py FOLDER SEED KILLS STEP...

kills ``KILLS`` processes of each step in ``FOLDER``, each at a moment drawn uniformly from the time that a whole run
takes, looks at what stands there, and lets the next one go on; at the end one run is left alone. It prints how many
were killed and how many came to their end before, and fails where a result is not that of a run in one piece. Processes
are forked from one that has everything imported and has run nothing yet.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from certified import samples
from nets import mlp

import t3c_compile
import t3c_compile.backends.tvm.build
from t3c_compile import ArtifactError, certify, lower, snapping, tune
from t3c_compile.backends.targets import get_target
from t3c_compile.backends.tvm.tuning.records import read
from t3c_compile.checkpoint import Checkpoint
from t3c_compile.manifest import read_manifest
from t3c_compile.profile import ProfileSet
from t3c_compile.training import train
from t3c_compile.transforming import transform

TARGET = "x86_64"


def _fork(work: Callable[[], None]) -> int:
    """The id of a process that does ``work``, in a group of its own so that what it starts ends with it."""
    child = os.fork()
    # In both: whichever comes first, there is a group to kill.
    os.setpgid(child, child)
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


def _finish(child: int) -> None:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "a run that was left alone failed"


def _in_a_process(work: Callable[[], None]) -> None:
    _finish(_fork(work))


class Step:
    """``run`` writes into ``folder`` and goes on from what is there; ``check`` looks at what a killed run has left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.prepare()

    def prepare(self) -> None: ...

    def run(self, folder: Path) -> None: ...

    def check(self, folder: Path) -> None: ...

    def same(self, folder: Path, whole: Path) -> None: ...


class Train(Step):
    """Ten epochs of a small network, with its checkpoint after every one, into a file."""

    def run(self, folder: Path) -> None:
        model, inputs = mlp()
        elastic = transform(model, inputs)
        torch.manual_seed(1)
        batches = [(torch.randn(8, 64), torch.randint(10, (8,))) for _ in range(4)]
        result = train(elastic, batches, epochs=10, progress=False, checkpoint=folder / "run")
        Checkpoint(elastic, inputs, result.controller).save(folder / "trained.safetensors")

    def check(self, folder: Path) -> None:
        if (folder / "trained.safetensors").exists():
            Checkpoint.load(folder / "trained.safetensors")
        if (folder / "run").exists():
            torch.load(folder / "run", weights_only=True)

    def same(self, folder: Path, whole: Path) -> None:
        found, expected = (Checkpoint.load(f / "trained.safetensors").model.state_dict() for f in (folder, whole))
        assert all(torch.equal(found[name], expected[name]) for name in expected)


class _Profiles(Step):
    """What the other steps begin with: a model with profiles."""

    def prepare(self) -> None:
        model, self.inputs = mlp()
        self.elastic = transform(model, self.inputs)
        calibration = [(torch.from_numpy(samples(64, seed=1)),)]
        self.profiles: ProfileSet = snapping.snap(
            self.elastic, calibration, [get_target(TARGET)], count=1, full_model=True
        )


class Tune(_Profiles):
    """Tuning for 1.5 seconds of measuring, into a file of records."""

    def run(self, folder: Path) -> None:
        tune(self.elastic, self.profiles, TARGET, folder / "records", self.inputs, minutes=1.5 / 60, threads=1)

    def check(self, folder: Path) -> None:
        if (folder / "records").exists() and (folder / "records").stat().st_size:
            # Records stay as they were written: those of the run before are the beginning.
            before = folder / "before"
            whole = (folder / "records").read_bytes().rpartition(b"\n")[0]
            if before.exists():
                assert whole.startswith(before.read_bytes())
            before.write_bytes(whole)

    def same(self, folder: Path, whole: Path) -> None:
        for path in (folder, whole):
            records = [record for group in read(path / "records")[0].values() for record in group]
            assert records
            assert len({(record.key, record.threads, record.tiles) for record in records}) == len(records)


class Lower(_Profiles):
    """Lowering, into the place of an artifact that stands there already."""

    def run(self, folder: Path) -> None:
        lower(self.elastic, self.profiles, [TARGET], folder / "net.t3c", self.inputs)

    def check(self, folder: Path) -> None:
        """Whatever can be loaded, the hidden folder of a killed run too, gives the right outputs."""
        for path in folder.glob("net.t3c*"):
            _in_a_process(lambda path=path: self._right(path))  # type: ignore[misc]
        for path in folder.glob(".*"):
            _in_a_process(lambda path=path: self._right(path, hidden=True))  # type: ignore[misc]
            shutil.rmtree(path)

    def _right(self, path: Path, hidden: bool = False) -> None:
        try:
            session = t3c_compile.load(path)
        except ArtifactError:
            assert hidden, f"{path} does not load"
            return
        found = _outputs(session)
        expected = self.folder / "expected.npy"
        if expected.exists():
            assert np.array_equal(found, np.load(expected))
        else:
            np.save(expected, found)

    def same(self, folder: Path, whole: Path) -> None:
        self.check(whole)
        self.check(folder)
        assert (folder / "net.t3c").exists()


class Certify(Lower):
    """Certifying on 3000 samples, batches kept."""

    def prepare(self) -> None:
        super().prepare()
        _in_a_process(lambda: super(Certify, self).run(self.folder))

    def run(self, folder: Path) -> None:
        if not (folder / "net.t3c").exists():
            shutil.copytree(self.folder / "net.t3c", folder / "net.t3c.part")
            (folder / "net.t3c.part").rename(folder / "net.t3c")
        certify(folder / "net.t3c", [samples(3000, seed=2)], resume=folder / "kept")

    def check(self, folder: Path) -> None:
        shutil.rmtree(folder / "net.t3c.part", ignore_errors=True)
        super().check(folder)

    def same(self, folder: Path, whole: Path) -> None:
        assert read_manifest(folder / "net.t3c") == read_manifest(whole / "net.t3c")
        super().same(folder, whole)


def _outputs(session: Any) -> Any:
    found = []
    for profile in session.profiles:
        session.set_profile(profile.name)
        found.append(session.run(samples(4, seed=3)))
    return np.stack(found)


def kill(step: Step, kills: int, rng: random.Random) -> dict[str, int]:
    whole, folder = step.folder / "whole", step.folder / "killed"
    whole.mkdir()
    folder.mkdir()
    began = time.monotonic()
    _in_a_process(lambda: step.run(whole))
    seconds = time.monotonic() - began
    killed = ended = 0
    while killed < kills:
        child = _fork(lambda: step.run(folder))
        time.sleep(rng.random() * seconds)
        # What it has started, to measure, ends with it. One that ended by itself is there until it is waited for.
        os.killpg(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code != -signal.SIGKILL:
            assert code == 0, "a run that goes on after one that was killed failed"
            ended += 1
            step.same(folder, whole)
            if not isinstance(step, Lower) or isinstance(step, Certify):
                shutil.rmtree(folder)
                folder.mkdir()
            continue
        killed += 1
        step.check(folder)
    _in_a_process(lambda: step.run(folder))
    step.same(folder, whole)
    return {"killed": killed, "ended before": ended}


STEPS: dict[str, type[Step]] = {"train": Train, "tune": Tune, "lower": Lower, "certify": Certify}


def main(folder: str, seed: str, kills: str, *steps: str) -> None:
    for name in steps:
        step = STEPS[name](Path(folder) / name)
        print(json.dumps({"step": name, **kill(step, int(kills), random.Random(int(seed)))}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
