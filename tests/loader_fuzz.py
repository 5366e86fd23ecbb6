"""Mutated artifacts, checkpoints and training states, each read as a user would read it.

    python tests/loader_fuzz.py GROUP FOLDER FIRST COUNT

reads ``COUNT`` mutations, made from the seeds from ``FIRST`` on, and writes what came of them to ``FOLDER/GROUP.json``.
``FOLDER`` holds the good files (see :func:`fuzz`). The process ends at once where memory or time run away.
"""

import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from copy import deepcopy
from io import StringIO
from pathlib import Path
from typing import Any

SECONDS, BLOCKED, BYTES = 10, 300, 1 << 30
"""Of processor and of waiting that one mutation may take, and what all may beyond what the process has at its start."""

JUNK: list[Any] = [None, True, -1, 0, 1, 10**30, 10**400, 1e308, float("nan"), float("-inf"), 0.5, "", "x", "\ud800"]
JUNK += ["\0", "../../x", "/etc/passwd", "/dev/zero", ".", "[/b]", '"); import os; os.abort(); ("', "a" * 5000]
JUNK += [[], {}, [[]], [None] * 100, {"": None}, {"__class__": 0}, {"tuple": []}, {"node": "x"}]


def mutated_json(value: Any, rng: random.Random) -> Any:
    """``value`` with one to three places removed, replaced, copied to another, swapped, or nested deeply."""
    root = {"root": deepcopy(value)}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places: list[tuple[Any, Any]] = []
        stack: list[Any] = [root]
        while stack:
            item = stack.pop()
            for key in list(item) if isinstance(item, dict) else range(len(item)):
                places.append((item, key))
                if isinstance(item[key], dict | list):
                    stack.append(item[key])
        # Half of the time near the root, where fewer places mean more.
        place, key = rng.choice(places[: 1 + rng.randrange(len(places))] if rng.random() < 0.5 else places)
        other, from_key = rng.choice(places)
        kind = rng.randrange(8)
        if kind == 0 and place is not root:
            del place[key]
        elif kind == 1:
            place[key] = deepcopy(other[from_key])
        elif kind == 2 and isinstance(place[key], int | float) and abs(place[key]) < 1e300:
            place[key] = rng.choice((-place[key], place[key] + 1, place[key] * 1.001, place[key] * 10**9))
        elif kind == 3 and isinstance(place[key], str):
            place[key] = mutated_bytes(place[key].encode(errors="replace"), rng).decode(errors="replace")
        elif kind == 4 and isinstance(place, dict) and place is not root:
            place[rng.choice(("", "x", "../../x", "/abs", "a.b", "\ud800", "__init__", "x" * 999))] = place.pop(key)
        elif kind == 5 and rng.random() < 0.1:
            for _ in range(rng.choice((10, 500, 100_000))):
                place[key] = [place[key]] if rng.random() < 0.5 else {"tuple": place[key]}
            break
        else:
            place[key] = deepcopy(rng.choice(JUNK))
    return root["root"]


def dumped(value: Any) -> str:
    """JSON of a value however deep."""
    head, tail = [], []
    while isinstance(value, list | dict) and len(value) == 1:
        key = "" if isinstance(value, list) else f"{json.dumps(next(iter(value)))}:"
        head.append("[" if isinstance(value, list) else "{" + key)
        tail.append("]" if isinstance(value, list) else "}")
        value = value[0] if isinstance(value, list) else next(iter(value.values()))
    try:
        return "".join(head) + json.dumps(value) + "".join(reversed(tail))
    except RecursionError:
        return "".join(head) + "[" * 100_000 + "]" * 100_000 + "".join(reversed(tail))


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """``data`` with bits flipped, cut short, longer, overwritten, or another length in its first eight bytes."""
    found = bytearray(data)
    at = rng.randrange(len(found) + 1)
    kind = rng.randrange(7)
    if kind <= 1 and found:
        for _ in range(rng.choice((1, 1, 1, 8))):
            found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del found[at:]
    elif kind == 3:
        found[at:at] = rng.randbytes(rng.randrange(1, 64))
    elif kind == 4:
        found[at : at + 16] = rng.choice((bytes(16), b"\xff" * 16, rng.randbytes(16)))
    elif kind == 5:
        del found[at : at + rng.randrange(1, 64)]
    else:
        found[:8] = struct.pack("<Q", rng.choice((0, 1, len(data), max(0, len(data) - 8), 2**31, 2**63, 2**64 - 1)))
    return bytes(found)


class Artifacts:
    """Copies of ``FOLDER/good.t3c``, whose library is not opened: that it would be is seen, and what it held then."""

    def __init__(self, folder: Path) -> None:
        from t3c_compile import manifest, runtime

        self._manifest, self._runtime = manifest, runtime
        self.good, self.path = folder / "good.t3c", folder / f"bad-{os.getpid()}.t3c"
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self.good, self.path)
        self.manifest = json.loads((self.good / manifest.MANIFEST).read_bytes())
        self.library = self.manifest["targets"]["x86_64"]["library"]
        self.known = {(self.good / name).read_bytes() for name in self.manifest["files"]}
        self.opened: list[Path] = []
        if os.environ.get("T3C_FUZZ_OPEN") != "1":
            runtime.VirtualMachine = self._machine  # type: ignore[assignment,misc]
        # What refuses the good one would refuse all, and nothing were tried.
        self._use(runtime.load(self.path, "x86_64"))

    def _machine(self, library: Path, functions: Any, on_gpu: bool) -> Any:
        self.opened.append(library)

        class Machine:
            def __getitem__(self, name: str) -> Any:
                return lambda *tensors: list(tensors)

            def tensor(self, array: Any) -> Any:
                return array

            tuple = list

        return Machine()

    def __call__(self, kind: str, rng: random.Random) -> str:
        from t3c_compile.cli import main

        names = {"store bytes": "weights.safetensors", "library bytes": self.library, "manifest bytes": "manifest.json"}
        changed, sealed = deepcopy(self.manifest), False
        self.opened.clear()
        written: dict[str, bytes] = {}
        if kind in names:
            written[names[kind]] = mutated_bytes((self.good / names[kind]).read_bytes(), rng)
        elif kind == "store sealed":
            sealed = True
            written["weights.safetensors"] = self._store(rng)
        elif kind == "files":
            self._other_files(rng)
        else:
            sealed = kind == "manifest sealed"
            changed = mutated_json(changed, rng)
        seal: bytes | None = None
        if sealed:
            for name, data in written.items():
                (self.path / name).write_bytes(data)
                changed["files"][name] = self._manifest.described(self.path / name)
            try:
                seal = self._manifest.sealed(changed)
            except (TypeError, AttributeError, RecursionError, ValueError):
                sealed = False
        if changed != self.manifest:
            written["manifest.json"] = seal or dumped(changed).encode()
        for name, data in written.items():
            (self.path / name).write_bytes(data)
        same = all((self.good / name).read_bytes() == data for name, data in written.items())
        try:
            session = self._runtime.load(self.path, "x86_64")
            outcome = "loaded"
            self._use(session)
        except self._manifest.T3CError:
            outcome = "refused"
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            main(["inspect", str(self.path), *rng.choice(([], ["--json"]))])
        for library in self.opened:
            assert library.read_bytes() in self.known, "a library that is not the hashed one would have run"
        if outcome == "loaded" and not sealed and kind != "files":
            held = json.loads((self.path / "manifest.json").read_bytes())
            assert same or (held == self.manifest and kind == "manifest bytes"), "another meaning was loaded"
        for name in (*written, *(self.manifest["files"] if kind == "files" else ())):
            if kind == "files" and not (self.path / name).is_symlink() and (self.path / name).is_dir():
                shutil.rmtree(self.path / name)
            (self.path / name).unlink(missing_ok=True)
            shutil.copy(self.good / name, self.path / name)
        return outcome

    def _use(self, session: Any) -> None:
        """What a session does with what the manifest says."""
        from t3c_compile.budget import Budget
        from t3c_compile.monitor import Monitor

        for budget in (Budget(), Budget(latency_ms=1.0, energy_mj=1.0, size_mb=1.0), Budget(max_drift=1.0)):
            try:
                session.set_budget(budget)
            except self._manifest.T3CError:
                continue
        try:
            monitor: Monitor = session.monitor(1.0)
        except self._manifest.T3CError:
            return
        assert monitor.wealth > 0

    def _store(self, rng: random.Random) -> bytes:
        data = (self.good / "weights.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        if rng.random() < 0.3:
            return mutated_bytes(data, rng)
        header = dumped(mutated_json(json.loads(data[8 : 8 + length]), rng)).encode()
        return struct.pack("<Q", len(header)) + header + data[8 + length :]

    def _other_files(self, rng: random.Random) -> None:
        """A file replaced by something that is not one, or not there, or by another one."""
        names = ("weights.safetensors", self.library)
        path, other = self.path / rng.choice(names), self.good / rng.choice(names)
        path.unlink()
        kind = rng.randrange(6)
        if kind == 0:
            path.symlink_to(rng.choice(("/dev/zero", "/", str(path), "nowhere", "/proc/self/mem")))
        elif kind == 1:
            path.symlink_to(other)
        elif kind == 2:
            path.mkdir()
        elif kind == 3:
            os.mkfifo(path)
        elif kind == 4:
            shutil.copy(other, path)
        # else it is missing


class Checkpoints:
    """``FOLDER/good.safetensors``, read without its class."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open
        from safetensors.torch import save_file

        from t3c_compile.checkpoint import Checkpoint, CheckpointError, _sha256

        self._load, self._error, self._seal, self._save = Checkpoint.load, CheckpointError, _sha256, save_file
        self.path = folder / f"bad-{os.getpid()}.safetensors"
        self.data = (folder / "good.safetensors").read_bytes()
        with safe_open(folder / "good.safetensors", "pt") as file:
            self.metadata = dict(file.metadata())
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.plan = json.loads(self.metadata["plan"])

    def __call__(self, kind: str, rng: random.Random) -> str:
        if kind == "checkpoint bytes":
            data = mutated_bytes(self.data, rng)
            self.path.write_bytes(data)
        else:
            metadata = self.metadata | {"plan": dumped(mutated_json(self.plan, rng))}
            if kind == "checkpoint sealed":
                metadata["sha256"] = self._seal(metadata, self.tensors)
            self._save(self.tensors, self.path, {k: v.encode(errors="replace").decode() for k, v in metadata.items()})
            data = b"" if metadata["plan"] != self.metadata["plan"] else self.data
        try:
            found = self._load(self.path)
        except self._error:
            return "refused"
        if kind != "checkpoint sealed":
            # Bytes that the format does not read may differ.
            state = found.model.state_dict()
            same = bool(data) and all(state[name].equal(self.tensors[name]) for name in state)
            assert same, "another meaning was loaded"
        return "loaded"


class TrainingStates:
    """``FOLDER/good.state``, gone on from by the network it belongs to."""

    def __init__(self, folder: Path) -> None:
        import torch

        from t3c_compile.training_state import TrainError

        self._torch, self._error = torch, TrainError
        self.run, self.setup = training_state()
        self.good, self.path = folder / "good.state", folder / f"bad-{os.getpid()}.state"
        self.data = self.good.read_bytes()
        self.run.load(self.good, self.setup)
        self.history = self.run.load(self.good, self.setup)
        self.weights = {name: tensor.clone() for name, tensor in self.run.model.state_dict().items()}

    def __call__(self, kind: str, rng: random.Random) -> str:
        self.path.write_bytes(mutated_bytes(self.data, rng))
        try:
            history = self.run.load(self.path, self.setup)
        except self._error:
            return "refused"
        state = self.run.model.state_dict()
        same = history == self.history and all(state[name].equal(self.weights[name]) for name in state)
        assert same, "another meaning was loaded"
        return "loaded"


def training_state() -> tuple[Any, dict[str, Any]]:
    """A run that could be gone on with."""
    from nets import mlp

    from t3c_compile.chain import Grid, chains
    from t3c_compile.controller import Controller
    from t3c_compile.training_state import TrainingState
    from t3c_compile.transforming import transform

    model, inputs = mlp()
    elastic = transform(model, inputs)
    run = TrainingState(elastic, Controller(chains(elastic, Grid())), None, 1e-3, 10)
    run.step(elastic(*inputs).sum() + sum(p.sum() for p in run.model["controller"].parameters()), 3)
    return run, {"epochs": 3}


SHARES: dict[str, dict[str, int]] = {
    "artifacts": {
        "manifest": 20,
        "manifest sealed": 25,
        "manifest bytes": 5,
        "store bytes": 5,
        "store sealed": 10,
        "library bytes": 5,
        "files": 2,
    },
    "checkpoints": {"checkpoint bytes": 10, "checkpoint plan": 3, "checkpoint sealed": 12, "training state": 3},
}
"""Of 100 mutations, how many are of which kind. What is sealed has the hashes that its writer would have given it."""


def fuzz(folder: Path, group: str, first: int, count: int) -> tuple[Counter[str], list[str]]:
    """How often which outcome came, and the failures with their seeds; a process that died is one, and goes on after.

    ``folder`` holds ``good.t3c``, ``good.safetensors`` and ``good.state``.
    """
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    place, results = folder / f"{group}.seed", folder / f"{group}.json"
    end = first + count
    while first < end:
        command = [sys.executable, __file__, group, str(folder), str(first), str(end - first)]
        place.write_text(str(first))
        results.write_text("{}")
        done = subprocess.run(command, capture_output=True, text=True)
        found = json.loads(results.read_text())
        outcomes.update(found.get("outcomes", {}))
        failures += found.get("failures", [])
        if done.returncode == 0:
            break
        first = int(place.read_text())
        failures.append(f"{group} {first}: the process ended with {done.returncode}: {done.stderr[-300:]}")
        first += 1
    return outcomes, failures


def main(group: str, folder: str, first: str, count: str) -> None:
    makers = {"artifacts": [Artifacts], "checkpoints": [Checkpoints, TrainingStates]}[group]
    readers = [make(Path(folder)) for make in makers]
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    # A process that hangs, in Python or below it, is ended.
    for ends in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(ends, signal.SIG_DFL)
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    shares, results, last = SHARES[group], Path(folder) / f"{group}.json", int(first) + int(count) - 1
    with (Path(folder) / f"{group}.seed").open("w") as place:
        for seed in range(int(first), last + 1):
            os.pwrite(place.fileno(), f"{seed:<20}".encode(), 0)
            signal.alarm(BLOCKED)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            rng = random.Random(seed)
            (kind,) = rng.choices(list(shares), list(shares.values()))
            try:
                outcomes[f"{kind}: {readers[kind == 'training state'](kind, rng)}"] += 1
            except Exception as error:
                failures.append(f"{kind} {seed}: {type(error).__name__}: {str(error)[:300]}")
                readers = [make(Path(folder)) for make in makers]
            if seed % 100 == 0 or seed == last:
                results.write_text(json.dumps({"outcomes": outcomes, "failures": failures}))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(*sys.argv[1:])
