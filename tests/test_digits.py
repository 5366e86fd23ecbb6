"""The digits models end to end: torch, the x86-64 library and the arm64 library on the whole test split.

Training here is a fraction of the example's; the accuracy bar is measured by ``benchmarks/digits.py``. ``T3C_DIGITS``
names the models (``cnn``): the transformer too (``cnn vit``) takes minutes more, and is in the demo.
"""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.fx import GraphModule, Node

import t3c_compile
from t3c_compile import qemu
from t3c_compile.artifact import export_profiles, lower
from t3c_compile.backends.targets import get_target
from t3c_compile.cost import dense_int8_bytes
from t3c_compile.passes.base import get_attr
from t3c_compile.passes.specialize import specialize
from t3c_compile.profile import ProfileSet
from t3c_compile.snapping import snap

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "digits"
TARGETS = ("x86_64", "arm64")


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
            self.elastic, prepared.calibration, targets, labels, prepared.controller, count=2
        )
        self.path = lower(self.elastic, self.profiles, targets, folder / f"{name}.t3c", self.example)

    def graph(self, index: int) -> GraphModule:
        profile = self.profiles.profiles[index]
        return specialize(self.elastic, profile.options, profile.activations, self.profiles.store_ranks())


@pytest.fixture(scope="module", params=os.environ.get("T3C_DIGITS", "cnn").split())
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


def _on_arm64(path: Path, x: Any, profiles: ProfileSet) -> list[list[Any]]:
    found = qemu.run_profiles(path, "arm64", x)
    return [found[profile.name] for profile in profiles.profiles]


def test_every_profile_agrees_on_the_whole_test_split(digits: Digits, arm64: Any) -> None:
    """Torch, x86-64 and arm64, bit for bit; QEMU gets every sixth image, and in ``benchmarks/digits.py`` all."""
    x = digits.test.numpy()
    compiled = {"x86_64": _on_x86_64(digits.path, x), "arm64": _on_arm64(digits.path, x[::6], digits.profiles)}
    for index in range(len(digits.profiles.profiles)):
        with torch.no_grad():
            expected = digits.graph(index)(digits.test).numpy()
        for target, results in compiled.items():
            of_target = expected[::6] if target == "arm64" else expected
            np.testing.assert_array_equal(results[index][0], of_target, err_msg=f"{target} {index}")


def with_stages(graph: GraphModule) -> tuple[GraphModule, list[Node]]:
    """The graph with what every ``t3c::`` op reads and makes as its outputs, in the order of the nodes."""
    output = next(node for node in graph.graph.nodes if node.op == "output")
    stages = [node for node in graph.graph.nodes if str(node.target).startswith("t3c.")]
    values = [value for node in stages for value in (*node.all_input_nodes, node) if value.op != "get_attr"]
    shown = list(dict.fromkeys(values))
    output.args = (tuple(shown),)
    graph.graph._codegen = torch.fx.graph.CodeGen()
    graph.recompile()
    return graph, shown


def test_every_stage_is_the_reference_op_on_its_own_input(
    digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stage of the compiled least profile, run in torch on what the library itself fed it."""
    import t3c_compile.artifact as artifact

    some = ProfileSet(digits.profiles.profiles[:1], digits.profiles.order)
    monkeypatch.setattr(artifact, "specialize", lambda *a: with_stages(specialize(*a))[0])
    path = lower(digits.elastic, some, TARGETS[:1], tmp_path / "stages.t3c", digits.example, measured=False)
    compiled = _on_x86_64(path, digits.test[:64].numpy())
    for index, profile in enumerate(some.profiles):
        plain = specialize(digits.elastic, profile.options, profile.activations, some.store_ranks())
        graph, shown = with_stages(plain)
        found = dict(zip(shown, compiled[index], strict=True))
        for node in (n for n in shown if str(n.target).startswith("t3c.")):
            values = [value_of(graph, a, found) for a in node.args]
            expected = node.target(*values).detach().numpy()
            np.testing.assert_array_equal(found[node], expected, err_msg=f"{index} {node.name}")


def value_of(graph: GraphModule, argument: Any, found: dict[Node, Any]) -> Any:
    """A node's argument as a value: what the library made, the stored tensor, or the number that it is."""
    if not isinstance(argument, Node):
        return list(argument) if isinstance(argument, list | tuple) else argument
    if argument in found:
        return torch.from_numpy(found[argument])
    return get_attr(graph, str(argument.target))


def test_the_profiles_start_below_a_quarter_of_dense_int8(digits: Digits) -> None:
    sizes = [profile.size_bytes for profile in digits.profiles.profiles]
    assert sizes[0] < 0.25 * dense_int8_bytes(digits.elastic)
    assert sizes == sorted(sizes)


def test_programs_of_all_profiles_name_one_store(digits: Digits) -> None:
    programs, store = export_profiles(digits.elastic, digits.profiles, digits.example)
    for program in programs.values():
        assert program.state_dict.keys() == store.keys()
