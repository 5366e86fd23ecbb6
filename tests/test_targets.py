"""Targets as data: what ships, what a user adds, what profiles each gives, and every refusal."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from nets import mlp

from t3c_compile.artifact import lower
from t3c_compile.backends.targets import (
    TargetFileError,
    UnknownTargetError,
    UnsupportedTargetError,
    get_target,
    list_targets,
    machine,
    read_targets,
)
from t3c_compile.backends.tvm.kernels.isa import isa_for
from t3c_compile.backends.tvm.lowering import UnsupportedOpError
from t3c_compile.backends.tvm.relax_module import relax_module
from t3c_compile.cli import main
from t3c_compile.lowerable import require_lowering
from t3c_compile.memory import MemoryLimitError, activation_bytes
from t3c_compile.passes.errors import T3CError
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.specialize import specialize
from t3c_compile.profile import ProfileSet
from t3c_compile.snapping import snap
from t3c_compile.transforming import transform

CPUS = ("x86_64-v3", "x86_64-avxvnni", "x86_64-v4", "x86_64-vnni", "x86_64-amx")
CPUS += ("arm64", "cortex-a55", "cortex-a76", "cortex-x1", "neoverse-n1", "neoverse-v2")
ACCELERATORS = ("jetson-orin", "a100", "h100", "h200", "ethos-u55-128", "ethos-u55-256")
ACCELERATORS += ("ethos-u65-256", "ethos-u65-512", "ethos-u85-256", "ethos-u85-1024")

OWN = """
[my-board]
kind = "cpu"
features = ["asimd", "asimddp", "asimdhp", "asimdrdm", "atomics"]
simd = "dotprod"
rank_multiple = 4
bits = [5, 8]
accumulate = "int32"
memory_bytes = 1_000_000_000
peak_gops = 100
peak_gflops = 25.0
bandwidth_gbps = 10.0
cost = "measured"
roofline = "2 sdot a cycle at 1.6 GHz"
zig_triple = "aarch64-linux-gnu.2.28"
tvm = { kind = "llvm", mtriple = "aarch64-linux-gnu", mcpu = "cortex-a78", num-cores = 2 }
"""


@pytest.fixture(scope="module")
def elastic() -> ElasticGraphModule:
    return transform(*mlp())


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "boards.toml"
    path.write_text(OWN)
    monkeypatch.setenv("T3C_TARGETS", str(path))
    return path


def profiles_of(elastic: ElasticGraphModule, *targets: Any, count: int = 3) -> ProfileSet:
    torch.manual_seed(0)
    return snap(elastic, [(torch.randn(64, 64),)], targets, count=count)


def test_what_ships() -> None:
    assert set(list_targets()) - {"x86_64"} == {*CPUS, *ACCELERATORS}
    for name in list_targets():
        target = get_target(name)
        assert target.name == name
        assert (target.kind == "cpu") == (name in (*CPUS, "x86_64"))
        assert target.memory_bytes > 1e6
        if target.kind == "cpu":
            assert isa_for(target).name == target.simd
            needed = {
                "amx": {"amx_int8"},
                "avx512vnni": {"avx512_vnni"},
                "avxvnni": {"avx_vnni"},
                "avx2": {"avx2", "fma"},
            }
            needed |= {"i8mm": {"i8mm"}, "dotprod": {"asimddp"}, "neon": {"asimd"}}
            assert needed[target.simd] <= set(target.features)
        else:
            assert target.host == get_target(target.host.name if target.host else "")
    assert machine(get_target("jetson-orin")) == machine(get_target("ethos-u85-256")) == "aarch64"
    assert machine(get_target("h100")) == "x86_64"
    assert get_target("jetson-orin").tvm["arch"] == "sm_87"


def test_targets_are_listed_without_torch_and_tvm(own: Path) -> None:
    code = (
        "import sys; from t3c_compile.cli import main; code = main(['targets', '--json'])\n"
        "sys.exit(code or str(sys.modules.keys() & {'torch', 'tvm', 'numpy'}).replace('set()', '') or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {row["target"]: row for row in json.loads(done.stdout)}
    assert rows.keys() >= {*CPUS, *ACCELERATORS, "my-board"}
    assert rows["my-board"]["bits"] == "5 8"
    assert rows["h100"]["cost"] == "measured"
    assert rows["ethos-u85-256"]["cost"] == "vela"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rank_multiple = 4", "", r"\[my-board\]: rank_multiple: is missing"),
        ("rank_multiple = 4", "rank_multiple = 0", r"\[my-board\]: rank_multiple: 0 is not positive"),
        ("rank_multiple = 4", "rank_multiple = 4.5", r"\[my-board\]: rank_multiple: 4.5 is of the wrong type"),
        ("rank_multiple = 4", "rank_multiple = true", r"\[my-board\]: rank_multiple: True is of the wrong type"),
        ("rank_multiple = 4", "ranks = 4", r"\[my-board\]: rank_multiple: is missing"),
        ("[my-board]", "[my-board]\nhost = 'arm64'", r"\[my-board\]: host: is not a key of kind cpu; there are kind"),
        ("[5, 8]", "[5, 9]", r"\[my-board\]: bits: 9 is not one of 4, 5, 6, 7, 8"),
        ("[5, 8]", "[8, 5]", r"\[my-board\]: bits: \[8, 5\] does not rise"),
        ("[5, 8]", "[]", r"\[my-board\]: bits: is empty"),
        ("[5, 8]", "8", r"\[my-board\]: bits: 8 is of the wrong type"),
        ('kind = "cpu"', 'kind = "tpu"', r"\[my-board\]: kind: 'tpu' is not one of cpu, cuda, ethos-u"),
        ('kind = "cpu"', 'kind = "ethos-u"', r"\[my-board\]: host: is missing"),
        (
            '"dotprod"',
            '"sse2"',
            r"\[my-board\]: simd: 'sse2' is not one of amx, avx512vnni, avxvnni, avx2, i8mm, dotprod, neon",
        ),
        ('mcpu = "cortex-a78", ', "", r"\[my-board\]: tvm: mcpu is missing"),
        (
            'zig_triple = "aarch64-linux-gnu.2.28"',
            "",
            r"\[my-board\]: zig_triple: is missing, and the compiler of this",
        ),
        ("[my-board]", "[arm64]", r"\[arm64\]: a shipped target has this name"),
        ("[my-board]", "[my-board", "cannot read targets from .*boards.toml"),
        ("[my-board]", "name = 'x'", r"\[name\]: it is not a table of keys"),
    ],
)
def test_a_wrong_descriptor_is_named(own: Path, old: str, new: str, message: str) -> None:
    own.write_text(OWN.replace(old, new, 1))
    with pytest.raises(TargetFileError, match=message) as raised:
        get_target("arm64")
    assert str(own) in str(raised.value)


def test_a_host_must_be_a_cpu(own: Path) -> None:
    npu = 'kind = "ethos-u"\nhost = "a100"\nvela = { accelerator = "a", system_config = "b", memory_mode = "c" }'
    kept = [line for line in OWN.splitlines() if line.partition(" ")[0] not in ("kind", "simd", "zig_triple", "tvm")]
    own.write_text("\n".join([*kept, npu]))
    with pytest.raises(TargetFileError, match="host: 'a100' is no target of kind cpu"):
        read_targets(own)
    own.write_text(own.read_text().replace('"a100"', '"cortex-a55"'))
    assert read_targets(own)["my-board"].host == get_target("cortex-a55")


def test_profiles_differ_by_target_from_one_checkpoint(elastic: ElasticGraphModule, own: Path) -> None:
    found = {}
    for name in ("my-board", "arm64", "x86_64-vnni", "ethos-u85-256", "a100"):
        target = get_target(name)
        options = [o for p in profiles_of(elastic, target, count=4).profiles for o in p.options.values()]
        assert all(option.rank % target.rank_multiple == 0 and option.bits in target.bits for option in options)
        assert any(option.rank for option in options)
        found[name] = set(options)
    assert all(found[one] != found[other] for one, other in combinations(found, 2))


def test_a_core_of_the_users_is_lowered_and_runs(
    elastic: ElasticGraphModule, own: Path, tmp_path: Path, arm64: ModuleType
) -> None:
    """One descriptor is all it takes; the widest of the shipped cores beside it."""
    targets = [get_target("my-board"), get_target("neoverse-v2")]
    profiles = profiles_of(elastic, targets[0], replace(targets[1], bits=targets[0].bits), count=1)
    path = lower(elastic, profiles, [t.name for t in targets], tmp_path / "net.t3c", mlp()[1])
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    for target in targets:
        results = arm64.run_profiles(path, target.name, x.numpy())
        for profile in profiles.profiles:
            graph = specialize(elastic, profile.options, profile.activations, profiles.store_ranks())
            np.testing.assert_array_equal(results[profile.name][0], graph(x).detach().numpy())
    # A core without the features it names refuses the library.
    code = "import sys, t3c_compile; t3c_compile.load(sys.argv[1], sys.argv[2])"
    done = arm64.run_python(["-c", code, str(path), "my-board"], cpu="cortex-a72")
    assert "this CPU lacks asimddp" in done.stderr


@pytest.mark.parametrize("name", ["jetson-orin", "ethos-u85-256"])
def test_what_is_for_cpus_alone_is_refused_at_once(
    name: str, elastic: ElasticGraphModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = get_target(name)
    message = f"target {name} is of kind {target.kind}: tuning and Relax modules are for a CPU alone; lower for it"
    profiles = profiles_of(elastic, target, count=1)
    with pytest.raises(UnsupportedTargetError, match=message):
        relax_module(elastic, profiles.profiles[0], mlp()[1], name)
    # Before the model is even looked for.
    command = ["tune", "--records", str(tmp_path / "r.jsonl"), "gone.pt", "--data", "gone:data", "--target", name]
    assert main(command) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_unknown_targets_are_refused(elastic: ElasticGraphModule, tmp_path: Path) -> None:
    with pytest.raises(UnknownTargetError, match=r"unknown target 'z80'; known .* arm64.* file in .* T3C_TARGETS"):
        get_target("z80")
    profiles = profiles_of(elastic, get_target("arm64"), count=1)
    with pytest.raises(T3CError, match="snapped for arm64, not for cortex-a76: snap for all of them"):
        lower(elastic, profiles, ["cortex-a76"], tmp_path / "net.t3c", mlp()[1])
    assert list(tmp_path.iterdir()) == []


def test_memory_that_does_not_fit(elastic: ElasticGraphModule, tmp_path: Path) -> None:
    arm = get_target("arm64")
    whole = profiles_of(elastic, arm)
    # Of 64 -> 96 -> 48 -> 10 in float32, an input and an output of a relu at the most.
    activations = activation_bytes(elastic, (torch.randn(5, 64),))
    assert activations == 4 * (96 + 96)
    middle = whole.profiles[1].size_bytes + activations
    small = replace(arm, memory_bytes=middle)
    fitting = profiles_of(elastic, small)
    assert fitting.profiles[-1].size_bytes + activations <= middle < whole.profiles[-1].size_bytes + activations
    assert any("memory ends the climb" in note for note in fitting.notes)
    assert not any("memory" in note for note in whole.notes)
    tiny = replace(arm, memory_bytes=whole.profiles[0].size_bytes)
    with pytest.raises(MemoryLimitError, match=r"the least profile needs .* of activations\), and it has .*: name a"):
        profiles_of(elastic, tiny)
    with pytest.raises(MemoryLimitError, match=r"profile p\d needs .* bytes on target arm64 .*: snap again, for this"):
        lower(elastic, whole, [small], tmp_path / "net.t3c", mlp()[1])
    assert list(tmp_path.iterdir()) == []
    # An NPU holds int8 where the reference has float32.
    npu = get_target("ethos-u55-128")
    least = profiles_of(elastic, npu).profiles[0].size_bytes
    (only,) = profiles_of(elastic, replace(npu, memory_bytes=least + activations // 4)).profiles
    assert only.size_bytes == least


def test_activations_count_what_lives_at_once() -> None:
    """A view is no copy, and a residual lives until it is added."""

    class Residual(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(16, 64), torch.nn.Linear(64, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(self.up(x).view(-1, 8, 64).transpose(1, 2).transpose(1, 2))

    model = transform(Residual().eval(), (torch.randn(2, 8, 16),))
    assert activation_bytes(model, (torch.randn(6, 8, 16),)) == 4 * 8 * (16 + 64 + 16)


def test_a_grid_that_leaves_no_profile(elastic: ElasticGraphModule) -> None:
    arm = get_target("arm64")
    with pytest.raises(T3CError, match=r"multiples of 64, widths 8\) leaves every layer one option.* finer grid"):
        profiles_of(elastic, replace(arm, rank_multiple=64, bits=(8,)))
    assert profiles_of(elastic, replace(arm, rank_multiple=64)).profiles[0].options["first"].form == "dense"
    with pytest.raises(T3CError, match="arm64, a100 have no weight width in common: snap and lower for them apart"):
        profiles_of(elastic, replace(arm, bits=(5, 7)), get_target("a100"))


@pytest.fixture(scope="module")
def bessel() -> ElasticGraphModule:
    """A network with an op that no target has code for."""

    class Inner(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x)

    return transform(torch.nn.Sequential(torch.nn.Linear(64, 96), Inner()).eval(), mlp()[1])


@pytest.mark.parametrize("name", list_targets())
def test_every_target_refuses_by_name_before_long_work(
    name: str, elastic: ElasticGraphModule, bessel: ElasticGraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An op that it lacks, a grid that leaves nothing to choose, and too little memory."""
    target, inputs = get_target(name), mlp()[1]
    profiles = profiles_of(elastic, target, count=1)
    least = profiles.profiles[0].size_bytes
    monkeypatch.setattr("t3c_compile.artifact._write", lambda *_: pytest.fail("work was done"))
    with pytest.raises(UnsupportedOpError, match=r"aten.special_bessel_j0.default in layer '1'(.|\n)*CONVERTERS"):
        require_lowering(bessel, inputs, [target])
    with pytest.raises(
        MemoryLimitError, match=rf"profile p0 needs \d+ bytes on target {name} .* has {least}: snap again"
    ):
        lower(elastic, profiles, [replace(target, memory_bytes=least)], tmp_path / "net.t3c", inputs)
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setattr("t3c_compile.snapping._measure", lambda *_: pytest.fail("work was done"))
    with pytest.raises(
        MemoryLimitError, match=rf"the least profile needs .* on target {name} .*: name a target with more"
    ):
        profiles_of(elastic, replace(target, memory_bytes=least))
    monkeypatch.delattr("t3c_compile.snapping.SpectralProxy")
    # Half of 64 x 48 components, and more, cost as much as the dense layer.
    coarse = replace(target, rank_multiple=64, bits=(8,))
    with pytest.raises(
        T3CError, match=rf"the grid of {name} \(ranks .* multiples of 64, widths 8\) leaves every layer one"
    ):
        profiles_of(elastic, coarse)
