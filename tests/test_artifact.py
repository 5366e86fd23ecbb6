"""The artifact and the runtime: one store, whole or absent, checked before use, switched between two calls."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import conv_net, parameter_bytes
from safetensors.numpy import load_file

import t3c_compile
from t3c_compile import ArtifactError, Budget, BudgetError, InputError, snapping
from t3c_compile import artifact as artifact_module
from t3c_compile.artifact import lower
from t3c_compile.backends.targets import get_target
from t3c_compile.energy import MODELLED, EnergyUnavailableError, open_meter
from t3c_compile.manifest import MANIFEST, STORE, read_manifest, write_manifest
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.specialize import specialize
from t3c_compile.profile import ProfileSet
from t3c_compile.runtime import ProfileInfo, choose, refusal
from t3c_compile.store import read_store
from t3c_compile.transforming import transform

TARGETS = ("x86_64", "arm64")


class Built:
    """A small network lowered once for the whole file."""

    def __init__(self, folder: Path) -> None:
        model, self.inputs = conv_net()
        self.elastic: ElasticGraphModule = transform(model, self.inputs)
        targets = [get_target(name) for name in TARGETS]
        torch.manual_seed(0)
        # Of an untrained network on noise hardly a profile is better than another: keep them all.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(snapping, "drop_dominated", lambda profiles: (profiles, []))
            self.profiles: ProfileSet = snapping.snap(self.elastic, [(torch.randn(64, 1, 8, 8),)], targets, count=3)
        self.path = lower(self.elastic, self.profiles, targets, folder / "net.t3c", self.inputs)
        self.x = torch.randn(9, 1, 8, 8)

    def reference(self, index: int) -> Any:
        profile = self.profiles.profiles[index]
        ranks = self.profiles.store_ranks()
        with torch.no_grad():
            return specialize(self.elastic, profile.options, profile.activations, ranks)(self.x).numpy()

    def copy(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.path, folder / "copy.t3c"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("artifact"))


def _close(found: Any, expected: Any) -> None:
    assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()


def test_every_profile_agrees_with_torch(built: Built) -> None:
    session = t3c_compile.load(built.path)
    assert len(session.profiles) == len(built.profiles.profiles) >= 3
    for profile in session.profiles:
        session.set_profile(profile.name)
        _close(session.run(built.x.numpy()), built.reference(profile.index))
        _close(session.run(built.x[:1].numpy()), built.reference(profile.index)[:1])


def test_arm64_agrees_with_torch(built: Built, arm64: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", built.x.numpy())
    code = (
        "import sys, numpy, t3c_compile; s = t3c_compile.load(sys.argv[1])\n"
        "out = []\n"
        "for p in s.profiles: s.set_profile(p.name); out.append(s.run(numpy.load(sys.argv[2])))\n"
        "assert s.target == 'arm64'; numpy.save(sys.argv[3], numpy.stack(out))"
    )
    done = arm64.run_python(["-c", code, str(built.path), str(tmp_path / "x.npy"), str(tmp_path / "y.npy")])
    assert done.returncode == 0, done.stderr
    for index, found in enumerate(np.load(tmp_path / "y.npy")):
        _close(found, built.reference(index))


def test_energy_is_measured_or_says_why_not(built: Built) -> None:
    """On this machine as it is; a target that does not run here keeps the model's estimate."""
    estimated = [profile.costs["x86_64"] for profile in built.profiles.profiles]
    costs = {name: entry["costs"] for name, entry in read_manifest(built.path)["targets"].items()}
    assert {cost["energy_source"] for cost in costs["arm64"]} == {MODELLED}
    try:
        source = f"measured: {open_meter('cpu').source}, idle power included"
    except EnergyUnavailableError as error:
        source = f"{MODELLED}; {error}"
        assert "RAPL: /sys/class/powercap" in source
        assert "INA3221: /sys/bus/i2c/drivers/ina3221 has no rail" in source
        assert [cost["energy_mj"] for cost in costs["x86_64"]] == [cost["energy_mj"] for cost in estimated]
    assert {cost["energy_source"] for cost in costs["x86_64"]} == {source}
    session = t3c_compile.load(built.path)
    assert {profile.energy_source for profile in session.profiles} == {source}


def test_the_store_holds_each_weight_once(built: Built) -> None:
    """The file is at most 1.05 times the greatest profile's own bytes, whatever the number of profiles."""
    store = load_file(built.path / STORE)
    assert len({(tensor.tobytes(), tensor.shape) for tensor in store.values() if tensor.dtype == np.int8}) == len(
        [tensor for tensor in store.values() if tensor.dtype == np.int8]
    )
    top = built.profiles.profiles[-1]
    alone = specialize(built.elastic, top.options, top.activations, built.profiles.store_ranks()).state_dict()
    assert (built.path / STORE).stat().st_size <= 1.05 * parameter_bytes(alone) + 4096
    assert sum(t.nbytes for t in store.values()) == parameter_bytes(alone)


def _store(folder: Path) -> Any:
    with (folder / STORE).open("rb") as file:
        return read_store(file)


def test_our_reader_reads_what_safetensors_writes(built: Built) -> None:
    ours, theirs = _store(built.path), load_file(built.path / STORE)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


_LEAN = """
import sys, numpy, t3c_compile
session = t3c_compile.load(sys.argv[1])
x = numpy.zeros((1, 1, 8, 8), numpy.float32)
def resident():
    # Not the library's code, which is a file's pages and counted when it first runs.
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
for _ in range(2000): session.run(x)
first = resident()
def all_profiles(rounds):
    for _ in range(rounds):
        for profile in session.profiles:
            session.set_profile(profile.name)
            session.run(x)
all_profiles(1)
once = resident()
all_profiles(200)
heavy = {"torch", "rich", "sympy"} & {name.partition(".")[0] for name in sys.modules}
print(once - first, resident() - first, *sorted(heavy))
"""


def test_running_all_profiles_takes_no_more_memory_and_loads_no_torch(built: Built) -> None:
    done = subprocess.run([sys.executable, "-c", _LEAN, str(built.path)], capture_output=True, text=True, check=True)
    once, often, *imported = done.stdout.split()
    assert int(once) <= 2 * resource.getpagesize()
    # What Python's own allocator moves in hundreds of calls.
    assert int(often) <= 256 * 1024
    assert imported == []


def test_the_compiler_is_not_loaded_by_the_runtime(built: Built) -> None:
    code = "import sys, t3c_compile; t3c_compile.load(sys.argv[1]); print(open('/proc/self/maps').read())"
    done = subprocess.run([sys.executable, "-c", code, str(built.path)], capture_output=True, text=True, check=True)
    assert "libtvm_runtime" in done.stdout
    assert "libtvm_compiler" not in done.stdout


@pytest.mark.parametrize("wanted", [None, "1"])
def test_a_session_uses_every_core_unless_told(built: Built, wanted: str | None) -> None:
    code = (
        "import sys, t3c_compile, tvm_ffi; t3c_compile.load(sys.argv[1]);"
        "print(tvm_ffi.get_global_func('runtime.NumThreads')())"
    )
    named = {"TVM_NUM_THREADS": wanted} if wanted else {}
    unset = {name: value for name, value in os.environ.items() if not name.endswith("NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(built.path)], capture_output=True, text=True, check=True, env=unset | named
    )
    listed = subprocess.run(["lscpu", "-p=CPU,CORE,SOCKET"], capture_output=True, text=True, check=True).stdout
    lines = [line.split(",") for line in listed.splitlines() if not line.startswith("#")]
    cores = {tuple(place) for processor, *place in lines if int(processor) in os.sched_getaffinity(0)}
    assert int(done.stdout) == int(wanted or len(cores))


def test_switching_is_quick(built: Built) -> None:
    """Median time of ``set_budget`` over many alternations; it picks a function and touches no weight."""
    session = t3c_compile.load(built.path)
    sizes = [profile.size_mb for profile in session.profiles]
    times = []
    for i in range(200):
        start = time.perf_counter()
        session.set_budget(Budget(size_mb=sizes[i % len(sizes)]))
        times.append(time.perf_counter() - start)
        assert session.active.index == i % len(sizes)
    assert np.median(times) < 1e-3


def test_budgets_choose_the_greatest_that_fits(built: Built) -> None:
    session = t3c_compile.load(built.path)
    top = session.profiles[-1]
    assert session.active is top
    assert session.set_budget(Budget()) is top
    for profile in session.profiles:
        assert session.set_budget(Budget(size_mb=profile.size_mb)).index == profile.index
    least = session.profiles[0]
    with pytest.raises(
        BudgetError, match=rf"size_mb=0.0001 \(needs {least.size_mb:.4g}\) is below the least profile, p0"
    ):
        session.run(built.x.numpy(), budget=Budget(size_mb=1e-4))
    assert session.active is top or session.active.index == top.index
    with pytest.raises(BudgetError, match="must be a positive number"):
        Budget(latency_ms=0)
    with pytest.raises(BudgetError, match="there is no profile 'p99'; there are p0, p1"):
        session.set_profile("p99")


def _profile(index: int, size: float, latency: float, source: str = "measured here") -> ProfileInfo:
    return ProfileInfo(index, f"p{index}", size, latency, source, size / 10, {}, {}, {})


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=6), st.floats(0.1, 20), st.floats(0.1, 20))
def test_a_looser_budget_never_chooses_less(sizes: list[float], low: float, high: float) -> None:
    profiles = [_profile(i, size, 2 * size) for i, size in enumerate(sorted(sizes))]
    low, high = min(low, high), max(low, high)
    for name in ("size_mb", "latency_ms", "energy_mj"):
        try:
            tight = choose(profiles, Budget(**{name: low})).index
        except BudgetError:
            tight = -1
        try:
            loose = choose(profiles, Budget(**{name: high})).index
        except BudgetError:
            loose = -1
        assert loose >= tight


def test_measured_latency_keeps_a_margin() -> None:
    assert not _profile(0, 1, 1.0).fits(Budget(latency_ms=1.05))
    assert _profile(0, 1, 1.0).fits(Budget(latency_ms=1.11))
    assert _profile(0, 1, 1.0, "roofline").fits(Budget(latency_ms=1.05))


def test_threads_share_a_session(built: Built) -> None:
    """32 threads run and switch, ``T3C_THREAD_SECONDS`` long (2): every output is one profile's, computed whole."""
    session = t3c_compile.load(built.path)
    x = built.x.numpy()
    expected = []
    for profile in session.profiles:
        session.set_profile(profile.name)
        expected.append(session.run(x))
    end = time.monotonic() + float(os.environ.get("T3C_THREAD_SECONDS", "2"))
    wrong: list[str] = []
    calls = [0] * 32

    def work(seed: int) -> None:
        generator = np.random.default_rng(seed)
        while time.monotonic() < end:
            index, start = int(generator.integers(len(expected))), int(generator.integers(len(x)))
            possible = [index]
            if (way := generator.integers(4)) == 0:
                found = session.run(x[start:], budget=Budget(size_mb=session.profiles[index].size_mb))
            else:
                # Another thread may switch before this one's call; it is one of the profiles still.
                possible = list(range(len(expected)))
                if way == 1:
                    session.set_profile(f"p{index}")
                elif way == 2:
                    session.governor(slo_ms=float(generator.choice((0.01, 100))), violations=0.5)
                found = session.run(x[start:])
            if not any(np.array_equal(found, expected[i][start:]) for i in possible):
                wrong.append(f"thread {seed}, call {calls[seed]}, profile {index}")
            calls[seed] += 1

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert min(calls) > 0
    print(f"{sum(calls)} calls of {len(calls)} threads")


class _FixedBatch(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).reshape(4, 2, 48).sum(1)


@pytest.mark.parametrize("shapes", [None, ({1: torch.export.Dim("tokens", min=2, max=50)},)])
def test_a_fixed_batch_is_lowered_as_it_is(shapes: Any, tmp_path: Path) -> None:
    """Where the model fixes its batch, and where the user frees another dimension instead."""
    torch.manual_seed(0)
    model: torch.nn.Module = _FixedBatch() if shapes is None else torch.nn.Sequential(torch.nn.Linear(64, 96))
    x = torch.randn((4, 64) if shapes is None else (1, 7, 64))
    elastic = transform(model.eval(), (x,), dynamic_shapes=shapes)
    profiles = snapping.snap(elastic, [(x,)], [get_target("x86_64")], count=2)
    session = t3c_compile.load(lower(elastic, profiles, ["x86_64"], tmp_path / "a.t3c", (x,)))
    top = profiles.profiles[-1]
    for y in (x,) if shapes is None else (x, torch.randn(1, 11, 64)):
        _close(session.run(y.numpy()), specialize(elastic, top.options, top.activations)(y).detach().numpy())
    with pytest.raises(InputError, match="has shape"):
        session.run(np.concatenate([x.numpy(), x.numpy()]))
    assert "example inputs" in session.active.latency_source


def test_wrong_inputs_are_named(built: Built) -> None:
    session = t3c_compile.load(built.path)
    good = built.x.numpy()
    for inputs, message in (
        ((), "0 inputs given, the model takes 1"),
        ((good.astype(np.float64),), "input 'x' is float64, the model takes a numpy array of float32"),
        ((built.x,), "input 'x' is Tensor"),
        ((good[:, :, :7],), r"input 'x' has shape \[9, 1, 7, 8\], the model takes \['batch', 1, 8, 8\]"),
        ((good[:0],), "has shape"),
        ((good[0],), "has shape"),
    ):
        with pytest.raises(InputError, match=message):
            session.run(*inputs)
    _close(session.run(np.asfortranarray(good)), built.reference(len(session.profiles) - 1))


def _edit(path: Path, change: Any) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    write_manifest(path, manifest)


def test_damage_is_found_before_anything_is_used(built: Built, tmp_path: Path) -> None:
    library = json.loads((built.path / MANIFEST).read_text())["targets"][TARGETS[0]]["library"]
    damages: list[tuple[Any, str]] = [
        (lambda p: (p / MANIFEST).unlink(), "is not a t3c artifact"),
        (lambda p: (p / MANIFEST).write_text((p / MANIFEST).read_text()[:-40]), "manifest.json is damaged"),
        (lambda p: (p / STORE).unlink(), "weights.safetensors is missing"),
        (lambda p: os.truncate(p / STORE, 1000), "truncated or changed: 1000 bytes"),
        (lambda p: _flip(p / STORE), "its SHA-256 is not the manifest's"),
        (lambda p: _flip(p / library), "its SHA-256 is not the manifest's"),
        (lambda p: _edit(p, lambda m: m.update(schema=99)), "schema 99, this version reads 3: install a newer"),
        (lambda p: _edit(p, lambda m: m.update(schema=2)), "schema 2, this version reads 3: lower the model again"),
        (lambda p: _edit(p, lambda m: m.pop("schema")), "no schema version"),
        (lambda p: _edit(p, lambda m: m.pop("profiles")), "profiles is missing"),
        (lambda p: _edit(p, lambda m: m["profiles"].pop()), "functions"),
        (
            lambda p: _edit(p, lambda m: m["profiles"][0]["options"]["head"].update(bits=9)),
            "a layer of p0 has more rank",
        ),
        (lambda p: _edit(p, lambda m: m["files"].pop(library)), "has no hash"),
        (lambda p: _edit(p, lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": ""}})), "bad file entry"),
        (lambda p: _edit(p, lambda m: m["profiles"][0].pop("quality")), "profiles/0/quality is missing"),
    ]
    for i, (damage, message) in enumerate(damages):
        path = built.copy(tmp_path / str(i))
        damage(path)
        with pytest.raises(ArtifactError, match=message):
            t3c_compile.load(path)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_machine_without_the_features_is_refused(built: Built, tmp_path: Path) -> None:
    path = built.copy(tmp_path)
    _edit(path, lambda m: m["targets"]["x86_64"]["features"].append("avx9000"))
    with pytest.raises(
        ArtifactError, match=r"no target of .* runs here: x86_64: this CPU lacks avx9000; arm64: it is for"
    ):
        t3c_compile.load(path)
    with pytest.raises(ArtifactError, match="has no target 'riscv'; it has x86_64, arm64"):
        t3c_compile.load(path, "riscv")
    assert refusal({"machine": "riscv64", "features": []}) is not None


def test_a_full_disk_leaves_nothing_and_keeps_the_old(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = built.copy(tmp_path)
    before = (path / MANIFEST).read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifact_module, "write_store", full)
    with pytest.raises(ArtifactError, match="the disk is full; nothing was left behind"):
        lower(built.elastic, built.profiles, TARGETS, path, built.inputs)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert (path / MANIFEST).read_bytes() == before


def test_an_artifact_replaced_under_a_loaded_one_is_loaded_anew(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, path = torch.randn(7, 64), tmp_path / "net.t3c"
    for outputs in (96, 80):
        elastic = transform(torch.nn.Sequential(torch.nn.Linear(64, outputs)).eval(), (x,))
        profiles = snapping.snap(elastic, [(x,)], [get_target("x86_64")], count=1)
        session = t3c_compile.load(lower(elastic, profiles, TARGETS[:1], path, (x,), measured=False))
        (only,) = profiles.profiles
        _close(session.run(x.numpy()), specialize(elastic, only.options, only.activations)(x).detach().numpy())


def test_bad_arguments_come_before_any_work(built: Built, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown target 'z80'; known targets: x86_64"):
        lower(built.elastic, built.profiles, ["z80"], tmp_path / "a.t3c", built.inputs)
    with pytest.raises(ArtifactError, match="is not a folder: make it first"):
        lower(built.elastic, built.profiles, TARGETS, tmp_path / "no" / "a.t3c", built.inputs)
    assert list(tmp_path.iterdir()) == []


def test_no_kernel_ships_unscheduled(built: Built) -> None:
    manifest = json.loads((built.path / MANIFEST).read_text())
    for target in TARGETS:
        kernels = manifest["targets"][target]["kernels"]
        assert kernels
        assert all(how.startswith(("kernel template", "default: ")) for how in kernels.values())
