"""``bench``: profiles measured here and over RPC give the same outputs, and what is saved is what budgets go by."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from torch import nn
from tvm import rpc

import t3c_compile
from t3c_compile import snapping
from t3c_compile.artifact import lower
from t3c_compile.backends.targets import get_target
from t3c_compile.backends.tvm.farm.devices import DeviceError, Remote, find_devices
from t3c_compile.backends.tvm.farm.profiles import ProfileError, measure_profiles
from t3c_compile.benching import BenchError, bench
from t3c_compile.cli import main
from t3c_compile.manifest import SIGNATURE, check_files, read_manifest, write_manifest
from t3c_compile.passes.specialize import specialize
from t3c_compile.transforming import transform

X = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
TARGETS = ("x86_64", "arm64")


class Lowered:
    """An artifact of three profiles for this machine and for arm64, and each profile's outputs for ``X`` in torch."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        inputs = (torch.randn(5, 64),)
        elastic = transform(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10)).eval(), inputs)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(snapping, "drop_dominated", lambda profiles: (profiles, []))
            targets = [get_target(name) for name in TARGETS]
            profiles = snapping.snap(elastic, [(torch.randn(64, 64),)], targets, count=3)
        self._path = lower(elastic, profiles, TARGETS, folder / "net.t3c", inputs, measured=False)
        ranks = profiles.store_ranks()
        graphs = {p.name: specialize(elastic, p.options, p.activations, ranks) for p in profiles.profiles}
        self.outputs = {name: graph(torch.from_numpy(X)).detach().numpy() for name, graph in graphs.items()}
        assert len(self.outputs) == 3

    def copy(self, folder: Path) -> Path:
        return Path(shutil.copytree(self._path, folder / "net.t3c"))


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    return Lowered(tmp_path_factory.mktemp("lowered"))


@pytest.fixture
def server() -> Iterator[rpc.Server]:
    """An RPC server on this machine."""
    started = rpc.Server(host="127.0.0.1", key="here", silent=True)
    yield started
    started.terminate()


def test_boards_measure_side_by_side_and_one_is_lost(
    lowered: Lowered, boards: list[int], tracker: str, tmp_path: Path
) -> None:
    """The outputs are the reference's bits, and what was measured is in the manifest, for that target alone."""
    killed: list[int] = []

    def kill_one_at_work() -> None:
        while not killed:
            busy = [pid for pid in boards if psutil.Process(pid).children()]
            if busy:
                os.killpg(busy[0], signal.SIGKILL)
                killed.append(busy[0])
            time.sleep(0.005)

    path = lowered.copy(tmp_path)
    before = read_manifest(path)
    threading.Thread(target=kill_one_at_work, daemon=True).start()
    found = bench(path, [X], target="arm64", tracker=tracker, key="board", save=True)
    assert len(killed) == 1
    assert [measured.profile for measured in found] == list(lowered.outputs)
    for measured in found:
        np.testing.assert_array_equal(measured.outputs[0], lowered.outputs[measured.profile])
        assert 0 < measured.latency_ms <= measured.latency_p90_ms
        assert measured.source == (
            f"measured on a device with key 'board' of the tracker at {tracker} over RPC, 1 threads, batch 3, 50 calls"
        )
    after = read_manifest(path)
    check_files(path, after)
    costs = [
        {
            "latency_ms": m.latency_ms,
            "latency_p90_ms": m.latency_p90_ms,
            "source": m.source,
            "energy_mj": cost["energy_mj"],
        }
        | {"energy_source": cost["energy_source"]}
        for m, cost in zip(found, before["targets"]["arm64"]["costs"], strict=True)
    ]
    assert after["targets"]["arm64"].pop("costs") == costs
    del before["targets"]["arm64"]["costs"], before["sha256"], after["sha256"]
    assert after == before


def test_an_rpc_server_of_this_machine(lowered: Lowered, server: rpc.Server, tmp_path: Path) -> None:
    path, device = lowered.copy(tmp_path), Remote(f"127.0.0.1:{server.port}", "here")
    assert find_devices([device.address], key="here") == [device]
    with pytest.raises(DeviceError, match=rf"{device.address} does not take the key 'there': name its own \(--key\)"):
        find_devices([device.address], key="there")
    for measured in bench(path, [X], target="x86_64", rpc=[device.address], key="here"):
        np.testing.assert_array_equal(measured.outputs[0], lowered.outputs[measured.profile])
        assert measured.source.startswith(f"measured on {device.address} over RPC, ")
    names = list(lowered.outputs)
    # A library for another machine, and a profile that takes too long: neither takes the server with it.
    with pytest.raises(ProfileError, match=rf"{device}: profile p0 does not run there: .*Is it a device for .* arm64"):
        measure_profiles(path, "arm64", names, [X], [device], 1, 1, 30)
    with pytest.raises(ProfileError, match="profile p0 does not run there"):
        measure_profiles(path, "x86_64", names, [X], [device], 1, 10**8, 1)
    (found, *_) = measure_profiles(path, "x86_64", names, [X], [device], 1, 7, 30)
    assert len(found.seconds) == 7
    with pytest.raises(DeviceError, match=r"no device is left: 1 of 3 profiles were measured"):
        measure_profiles(path, "x86_64", names, [X], [device], 1, 1, 30, server.terminate)


def test_what_is_saved_is_what_budgets_go_by(
    lowered: Lowered, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lowered.copy(tmp_path)
    np.save(tmp_path / "x.npy", X)
    before = (path / "manifest.json").read_bytes()
    command = ["bench", str(path), str(tmp_path / "x.npy"), "--json"]
    assert main(command) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["profile"] for row in rows] == list(lowered.outputs)
    assert {row["before"] for row in rows} == {"roofline"}
    assert (path / "manifest.json").read_bytes() == before

    assert main([*command, "--save"]) == 0
    rows = json.loads(capsys.readouterr().out)
    session = t3c_compile.load(path)
    for row, profile in zip(rows, session.profiles, strict=True):
        assert profile.latency_source == row["source"] == f"measured on {os.uname().nodename}, batch 3, 50 calls"
        assert profile.needs["latency_ms"] == row["latency_p90_ms"] * 1.1
    assert main(["inspect", str(path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {(row["target"], row["latency_source"]) for row in shown} == {("x86_64", "measured"), ("arm64", "roofline")}
    assert main(command) == 0
    assert {row["before"] for row in json.loads(capsys.readouterr().out)} == {"measured"}

    # Energy where there is a meter; where there is none the modelled one stays.
    assert all(profile.energy_source.startswith("modelled") for profile in session.profiles)
    found = {"latency_ms": 1.0, "latency_p90_ms": 2.0, "energy_mj": 3.0, "energy_source": "measured: a meter"}
    monkeypatch.setattr("t3c_compile.benching.measure", lambda *_: [dict(found) for _ in rows])
    bench(path, save=True)
    for profile in t3c_compile.load(path).profiles:
        assert (profile.latency_ms, profile.energy_mj, profile.energy_source) == (2.0, 3.0, "measured: a meter")


def test_a_signature_is_never_left_invalid(lowered: Lowered, tmp_path: Path) -> None:
    path, key = lowered.copy(tmp_path), Ed25519PrivateKey.generate()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    t3c_compile.sign(path, private)
    before = [(path / name).read_bytes() for name in ("manifest.json", SIGNATURE)]
    with pytest.raises(BenchError, match=r"is signed, .*give the key to sign it again \(--sign KEY\)"):
        bench(path, save=True)
    bench(path)
    assert [(path / name).read_bytes() for name in ("manifest.json", SIGNATURE)] == before
    bench(path, save=True, sign_key=private)
    session = t3c_compile.load(path, verify=public)
    assert all(profile.latency_source.startswith("measured on ") for profile in session.profiles)


def test_what_cannot_be_measured_is_refused_at_once(lowered: Lowered, tmp_path: Path) -> None:
    path = lowered.copy(tmp_path)
    with pytest.raises(BenchError, match=r"arm64: it is for aarch64, this is .*--rpc HOST:PORT, or --tracker"):
        bench(path, target="arm64")
    with pytest.raises(BenchError, match=r"has targets x86_64, arm64: name the one that the devices are \(--target\)"):
        bench(path, rpc=["127.0.0.1:1"])
    with pytest.raises(t3c_compile.ArtifactError, match="has no target 'z80'; it has x86_64, arm64"):
        bench(path, target="z80")
    with pytest.raises(t3c_compile.InputError, match="input 'input' has shape"):
        bench(path, [X[:, 1:]])
    with pytest.raises(DeviceError, match=r"the RPC server at 127.0.0.1:1 cannot be reached: .*refused"):
        bench(path, target="arm64", rpc=["127.0.0.1:1"])
    manifest = read_manifest(path)
    manifest["targets"]["x86_64"]["npu"] = {}
    write_manifest(path, manifest)
    with pytest.raises(
        BenchError, match="x86_64: an NPU's costs are its compiler's estimate; arm64: it is for aarch64"
    ):
        bench(path)
    manifest["targets"]["x86_64"] |= {"kind": "cuda", "arch": "sm_80"}
    write_manifest(path, manifest)
    with pytest.raises(BenchError, match="target x86_64 is of kind cuda, and over RPC only CPUs are measured"):
        bench(path, target="x86_64", rpc=["127.0.0.1:1"])
