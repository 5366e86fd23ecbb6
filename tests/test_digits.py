"""The digits models end to end: torch, the x86-64 library and the arm64 library on the whole test split.

Training here is a fraction of the example's; the accuracy bar is measured by ``benchmarks/digits.py``.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.fx import GraphModule, Node

import t3c_compile
from t3c_compile.artifact import export_profiles, lower
from t3c_compile.backends.targets import get_target
from t3c_compile.cost import dense_int8_bytes
from t3c_compile.passes.specialize import specialize
from t3c_compile.profile import ProfileSet
from t3c_compile.snapping import snap

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "digits"
TARGETS = ("x86_64", "arm64")
ON_ARM64 = """
import sys, numpy, t3c_compile
session, x, found = t3c_compile.load(sys.argv[1], "arm64"), numpy.load(sys.argv[2]), {}
for profile in session.profiles:
    session.set_profile(profile.name)
    result = session.run(x)
    for i, value in enumerate(result if isinstance(result, tuple) else (result,)):
        found[f"{profile.name}.{i}"] = value
numpy.savez(sys.argv[3], **found)
"""


class Digits:
    """One model, trained a little, snapped and lowered."""

    def __init__(self, name: str, folder: Path) -> None:
        sys.path.insert(0, str(EXAMPLE))
        with pytest.MonkeyPatch.context() as patch:
            import run
            import train_float

            patch.setitem(train_float._EPOCHS, name, 8)
            patch.setitem(run._EPOCHS, name, 1)
            prepared = run.prepare(name, seed=0, progress=False)
        self.name = name
        self.elastic = prepared.elastic
        self.test, self.truth = prepared.data.test
        self.example = prepared.calibration[0]
        targets = [get_target(target) for target in TARGETS]
        labels = prepared.data.calibration[1]
        self.profiles: ProfileSet = snap(
            self.elastic, prepared.calibration, targets, labels, prepared.controller, count=6
        )
        self.path = lower(self.elastic, self.profiles, targets, folder / f"{name}.t3c", self.example)

    def graph(self, index: int) -> GraphModule:
        profile = self.profiles.profiles[index]
        return specialize(self.elastic, profile.options, profile.activations, self.profiles.store_ranks())


@pytest.fixture(scope="module", params=["cnn", "vit"])
def digits(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Digits:
    return Digits(request.param, tmp_path_factory.mktemp(request.param))


def _on_x86_64(path: Path, x: Any) -> list[list[Any]]:
    session = t3c_compile.load(path, "x86_64")
    results = []
    for profile in session.profiles:
        session.set_profile(profile.name)
        result = session.run(x)
        results.append(list(result) if isinstance(result, tuple) else [result])
    return results


def _on_arm64(arm64: Any, path: Path, x: Any, profiles: ProfileSet) -> list[list[Any]]:
    np.save(path.parent / "x.npy", x)
    files = [str(path.parent / name) for name in ("x.npy", "y.npz")]
    done = arm64.run_python(["-c", ON_ARM64, str(path), *files])
    assert done.returncode == 0, done.stderr
    with np.load(files[1]) as found:
        outputs = len(found.files) // len(profiles.profiles)
        return [[found[f"{profile.name}.{i}"] for i in range(outputs)] for profile in profiles.profiles]


def test_every_profile_agrees_on_the_whole_test_split(digits: Digits, arm64: Any) -> None:
    """The convolutional network to the bit. The transformer's float stages round differently in every library, and a
    tie broken otherwise moves an int8 step: 95% of its images agree to 1e-3 of the image's largest logit, and the whole
    split to 5e-3 in 2-norm (torch against itself with float64 stages: the next test)."""
    x = digits.test.numpy()
    compiled = {"x86_64": _on_x86_64(digits.path, x), "arm64": _on_arm64(arm64, digits.path, x, digits.profiles)}
    for index in range(len(digits.profiles.profiles)):
        with torch.no_grad():
            expected = digits.graph(index)(digits.test).numpy()
        for target, results in compiled.items():
            error = np.abs(results[index][0] - expected)
            if digits.name == "cnn":
                assert np.linalg.norm(error) <= 1e-6 * np.linalg.norm(expected), (target, index)
            else:
                close = error.max(1) <= 1e-3 * np.abs(expected).max(1)
                assert close.mean() >= 0.95, (target, index)
                assert np.linalg.norm(error) <= 5e-3 * np.linalg.norm(expected), (target, index)


def with_stages(graph: GraphModule) -> tuple[GraphModule, list[tuple[Node, tuple[int, ...]]]]:
    """The graph with every ``t3c::`` op's output and input among its outputs; which outputs each op reads and makes."""
    output = next(node for node in graph.graph.nodes if node.op == "output")
    stages = [node for node in graph.graph.nodes if str(node.target).startswith("t3c.")]
    shown: list[Node] = []
    places = []
    for node in stages:
        for shown_node in (node.args[0], node):
            if shown_node not in shown:
                shown.append(shown_node)
        places.append((node, (shown.index(node.args[0]), shown.index(node))))
    output.args = (tuple(shown),)
    graph.graph._codegen = torch.fx.graph.CodeGen()
    graph.recompile()
    return graph, places


def test_every_stage_is_the_reference_op_on_its_own_input(
    digits: Digits, arm64: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each int8 stage of the compiled least and greatest profile, run in torch on what the library itself fed it.

    Quantized tensors and middles may differ by one step, and do not; float outputs to 1e-6 of the largest.
    """
    import t3c_compile.artifact as artifact

    some = ProfileSet([digits.profiles.profiles[0], digits.profiles.profiles[-1]], digits.profiles.order)
    monkeypatch.setattr(artifact, "specialize", lambda *a: with_stages(specialize(*a))[0])
    path = lower(digits.elastic, some, TARGETS, tmp_path / "stages.t3c", digits.example)
    x = digits.test[:64].numpy()
    compiled = {"x86_64": _on_x86_64(path, x), "arm64": _on_arm64(arm64, path, x, some)}
    for index, profile in enumerate(some.profiles):
        plain = specialize(digits.elastic, profile.options, profile.activations, some.store_ranks())
        graph, places = with_stages(plain)
        for target, results in compiled.items():
            for node, (source, place) in places:
                values = [getattr_of(graph, a) for a in node.args[1:]]
                expected = node.target(torch.from_numpy(results[index][source]), *values).numpy()
                found = results[index][place]
                if expected.dtype == np.int8:
                    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1, (target, index, node.name)
                else:
                    largest = np.abs(expected).max()
                    assert np.abs(found - expected).max() <= 1e-6 * largest, (target, index, node.name)


def getattr_of(graph: GraphModule, argument: Any) -> Any:
    """A node's argument as a value: the stored tensor where it is one."""
    if isinstance(argument, Node):
        return graph.get_buffer(str(argument.target))
    return list(argument) if isinstance(argument, list | tuple) else argument


def test_the_profiles_start_below_a_quarter_of_dense_int8(digits: Digits) -> None:
    sizes = [profile.size_bytes for profile in digits.profiles.profiles]
    assert sizes[0] < 0.25 * dense_int8_bytes(digits.elastic)
    assert sizes == sorted(sizes)


def test_programs_of_all_profiles_name_one_store(digits: Digits) -> None:
    programs, store = export_profiles(digits.elastic, digits.profiles, digits.example)
    for program in programs.values():
        assert program.state_dict.keys() == store.keys()
