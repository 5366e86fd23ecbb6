"""Checkpoints hold everything, come back without the class or into it, are whole or refused; ``to_dense`` goes back."""

import copy
import json
import runpy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import NETS, conv_net, mlp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from t3c_compile.certificate import TrainingProxy
from t3c_compile.chain import Grid, chains
from t3c_compile.checkpoint import Checkpoint, CheckpointError, restore
from t3c_compile.controller import Controller
from t3c_compile.graph_json import FormatError, Reader
from t3c_compile.passes.decompose_conv import DecomposeConv
from t3c_compile.passes.decompose_linear import DecomposeLinear
from t3c_compile.passes.digest import digest
from t3c_compile.passes.elastic import elastic_layers
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.option import Option
from t3c_compile.passes.replace_table import ReplaceTable
from t3c_compile.passes.specialize import specialize
from t3c_compile.passes.state import StateError, load_state
from t3c_compile.training import LossWeights, train
from t3c_compile.transforming import Config, transform


class Variety(nn.Module):
    """Tied embedding and head, a packed weight in slices, [in, out] weights, a 1-d convolution, a dict of outputs."""

    def __init__(self, biased: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 32)
        self.packed = nn.Parameter(torch.randn(96, 32) / 6)
        self.shift = nn.Parameter(torch.randn(96) / 6)
        self.input_major = nn.Parameter(torch.randn(32, 64) / 6)
        self.conv = nn.Conv1d(64, 32, 3, padding=1, bias=biased)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.table.weight
        self.unread = nn.Linear(3, 3)
        self.register_buffer("constant", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.table(x)
        q, k, v = (
            F.linear(y, weight, bias) for weight, bias in zip(self.packed.chunk(3), self.shift.chunk(3), strict=True)
        )
        y = y + F.scaled_dot_product_attention(q, k, v)
        y = F.relu(y @ self.input_major) + self.constant
        return {"logits": self.head(self.conv(y.transpose(1, 2)).transpose(1, 2))}


def variety() -> tuple[nn.Module, tuple[Tensor]]:
    torch.manual_seed(0)
    return Variety().eval(), (torch.randint(0, 40, (3, 7)),)


ALL = {**NETS, "variety": variety}


def _equal(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def _logits(output: Any) -> Tensor:
    return output["logits"] if isinstance(output, dict) else output


def _profile(elastic: ElasticGraphModule) -> dict[str, Option]:
    return {
        name: Option(layer.form, 0 if layer.form == "dense" else min(8, layer.max_rank), 6)
        for name, layer in elastic_layers(elastic)
    }


def _calls(gm: nn.Module) -> list[Any]:
    """Ops called, but those whose result nobody reads."""
    return [node.target for node in gm.graph.nodes if node.op == "call_function" and node.users]


def _trained(elastic: ElasticGraphModule) -> ElasticGraphModule:
    """Every weight moved, a profile set."""
    with torch.no_grad():
        for parameter in elastic.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    elastic.set_options(_profile(elastic))
    return elastic


@pytest.mark.parametrize("net", ALL)
def test_a_file_is_the_model_without_its_class(net: str, tmp_path: Path) -> None:
    """Outputs, both modes, report, gates, ranges and controller; it trains, specializes and is saved again."""
    model, inputs = ALL[net]()
    elastic = _trained(transform(model, inputs, Config(keep=("nothing*",))))
    controller = Controller(chains(elastic, Grid()))
    Checkpoint(elastic, inputs, controller).save(tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    loaded = Checkpoint.load(tmp_path / "a.safetensors")
    assert torch.equal(_logits(loaded.model(*inputs)), _logits(elastic(*inputs)))
    assert _equal(loaded.model, elastic)
    assert str(loaded.model.report) == str(elastic.report)
    assert loaded.model.meta == elastic.meta
    assert all(torch.equal(a, b) for a, b in zip(loaded.example_inputs, inputs, strict=True))
    assert loaded.controller is not None
    assert _equal(loaded.controller, controller)
    assert loaded.controller.chains == controller.chains
    expected = specialize(elastic, _profile(elastic))
    torch.save(elastic, tmp_path / "pickled")
    for other in (loaded.model, torch.load(tmp_path / "pickled", weights_only=False)):
        found = specialize(other, _profile(elastic))
        # The same float stages are pinned, of which the outputs of small nets tell nothing.
        assert Counter(map(str, _calls(found))) == Counter(map(str, _calls(expected)))
        assert torch.equal(_logits(found(*inputs)), _logits(expected(*inputs)))
    (tmp_path / "pickled").unlink()
    for m in (loaded.model, elastic):
        torch.manual_seed(3)
        _logits(m.train()(*inputs)).sum().backward()
    grads = [{n: p.grad for n, p in m.named_parameters()} for m in (loaded.model, elastic)]
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    loaded.save(tmp_path / "b.safetensors")
    assert _equal(Checkpoint.load(tmp_path / "b.safetensors").model, loaded.model)


@pytest.mark.parametrize("net", ALL)
def test_restored_into_the_class_nothing_is_decomposed(
    net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The class with other weights, captured anew at another batch size."""
    model, inputs = ALL[net]()
    elastic = _trained(transform(model, inputs, calibration=[inputs]))
    Checkpoint(elastic, inputs).save(tmp_path / "a.safetensors")

    def fails(*_: object) -> None:
        raise AssertionError("decomposed")

    for decompose in (DecomposeLinear, DecomposeConv, ReplaceTable):
        monkeypatch.setattr(decompose, "_build", fails)
    fresh = type(model)().eval()
    restored = restore(fresh, tuple(x[:2] for x in inputs), tmp_path / "a.safetensors").model
    assert torch.equal(_logits(restored(*inputs)), _logits(elastic(*inputs)))
    assert _equal(restored, elastic)
    assert str(restored.report) == str(elastic.report)
    assert {n: layer.rows_out for n, layer in elastic_layers(restored)} == {
        n: layer.rows_out for n, layer in elastic_layers(elastic)
    }


def test_a_file_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    model, inputs = conv_net()
    Checkpoint(transform(model, inputs), inputs).save(tmp_path / "a.safetensors")
    for change, message in (
        (lambda m: setattr(m, "hidden", nn.Linear(64, 40)) or setattr(m, "head", nn.Linear(40, 10)), "layer hidden is"),
        (lambda m: setattr(m, "norm1", nn.BatchNorm2d(16, affine=False)), "has what the model does not: norm1.weight"),
        (lambda m: setattr(m, "dropout", nn.LayerNorm(64)), "lacks dropout.weight, dropout.bias"),
        (lambda m: setattr(m, "dropout", nn.Linear(64, 64)), "layer dropout is elastic in this model and not in the"),
        (lambda m: setattr(m, "head", nn.Identity()), "the model has no layers head"),
    ):
        other, _ = conv_net()
        change(other)
        with pytest.raises(CheckpointError, match=message):
            restore(other, inputs, tmp_path / "a.safetensors")


def _sealed(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """A checkpoint as its writer would have hashed it."""
    save_file(tensors, path, metadata | {"sha256": digest((metadata["plan"], sorted(tensors.items())))})


def test_damaged_newer_and_foreign_files_are_refused(tmp_path: Path) -> None:
    model, inputs = mlp()
    good = tmp_path / "good.safetensors"
    Checkpoint(transform(model, inputs), inputs).save(good)
    data = good.read_bytes()
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    (tmp_path / "text").write_text("hello")
    torch.save({"weight": torch.ones(3)}, tmp_path / "pickle")
    tensors = load_file(good)
    save_file(tensors, tmp_path / "plain")
    with safe_open(good, "pt") as file:
        metadata = dict(file.metadata())
    save_file(tensors, tmp_path / "newer", metadata | {"version": "5"})
    plan = json.loads(metadata["plan"])
    del plan["module"]["children"]["head"]
    _sealed(tensors, tmp_path / "edited", metadata | {"plan": json.dumps(plan)})
    _sealed({n: t for n, t in tensors.items() if n != "head.U"}, tmp_path / "lacking", metadata)
    save_file({n: t if n != "head.U" else t * 1.001 for n, t in tensors.items()}, tmp_path / "other weight", metadata)
    save_file(tensors, tmp_path / "other plan", metadata | {"plan": json.dumps(plan)})
    for name, message in (
        ("cut", "damaged or not a t3c checkpoint"),
        ("text", "damaged or not a t3c checkpoint"),
        ("pickle", "damaged or not a t3c checkpoint"),
        ("plain", "is not a t3c checkpoint: write one"),
        ("newer", "checkpoint of version 5; this t3c-compile reads 4"),
        ("edited", "damaged or of another version"),
        ("lacking", "damaged or of another version.*head.U"),
        ("other weight", "is damaged: its SHA-256"),
        ("other plan", "is damaged: its SHA-256"),
        ("gone", "there is no such file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.load(tmp_path / name)
    with pytest.raises(CheckpointError, match="cannot write"):
        Checkpoint(transform(model, inputs), inputs).save(tmp_path / "no" / "where")


def test_a_plan_reaches_nothing_outside() -> None:
    """A forged plan names no class or function beyond the package's modules and registered ops, and no name in it
    becomes code of the module that ``torch.fx`` makes."""
    reader = Reader({})
    for target in (
        "os:system",
        "torch:load",
        "builtins:eval",
        "torch.load",
        "operator:attrgetter",
        "_operator:attrgetter",
        "_operator:methodcaller",
        "_operator:call",
        "_operator:__call__",
        "_operator:gone",
        "math:__loader__",
        "load_library",
        "aten.relu",
        "aten.__class__",
    ):
        with pytest.raises(FormatError):
            reader.graph({"nodes": [["call_function", "f", target, {"tuple": []}, {"dict": []}, {}]]})
    code = "__import__('os').abort()"
    for op, target, kwargs in (
        ("placeholder", f"x={code}", []),
        ("get_attr", f'a", {code}, "', []),
        ("get_attr", "forward.__globals__", []),
        ("call_module", f'a", {code}, "', []),
        ("call_module", "aten", [[f"x={code}, y", 1]]),
        ("call_method", "item", []),
    ):
        with pytest.raises(FormatError):
            reader.graph({"nodes": [[op, "f", target, {"tuple": []}, {"dict": kwargs}, {}]]})

    def signature(arguments: list[str], type: str = "builtins.tuple", context: str = "null", key: str = "y") -> Any:
        leaf = {"type": None, "context": None, "children_spec": []}
        own = {"type": type, "context": context, "children_spec": [leaf]}
        named = {"type": "builtins.dict", "context": json.dumps([key]), "children_spec": [leaf]}
        whole = {"type": "builtins.tuple", "context": "null", "children_spec": [own, named]}
        nodes = [["placeholder", name, name, {"tuple": []}, {"dict": []}, {}] for name in "xy"]
        return {"nodes": nodes, "arguments": arguments, "in": json.dumps([1, whole]), "out": None}

    reader.graph(signature(["x", "y"]))
    enumeration = json.dumps([{"__enum__": True, "fqn": "antigravity:x", "name": "x"}])
    for forged in (
        signature([f"x={code}", "y"]),
        signature(["x", "y"], key=f"y': {code}, 'z"),
        signature(["x", "y"], type="builtins.dict", context=enumeration),
        signature(["x", "y"], type="collections.defaultdict", context="null"),
    ):
        with pytest.raises(FormatError):
            reader.graph(forged)
    assert "antigravity" not in sys.modules
    for name in ("os:PathLike", "..os:PathLike", "cli:main", "cli:Path", "checkpoint:nn"):
        with pytest.raises(FormatError):
            reader.module({"class": name, "attributes": {}, "tensors": {}, "children": {}})


def test_python_in_the_graph_is_refused_at_save(tmp_path: Path) -> None:
    model, inputs = mlp()
    elastic = transform(model, inputs)
    node = next(node for node in elastic.eval_graph.nodes if node.target == torch.ops.aten.relu.default)
    node.target = F.silu
    with pytest.raises(CheckpointError, match=r"node relu calls torch\.nn\.functional:silu"):
        Checkpoint(elastic, inputs).save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_states_load_across_wrappers(tmp_path: Path) -> None:
    """A plain state_dict, into and out of ``torch.compile`` (of the whole, or of one block), DDP and both."""
    model, inputs = conv_net()
    elastic = _trained(transform(model, inputs))
    state = elastic.state_dict()
    compiled = torch.compile(elastic)
    assert all(name.startswith("_orig_mod.") for name in compiled.state_dict())
    for given in (state, compiled.state_dict(), {f"module._orig_mod.{name}": t for name, t in state.items()}):
        for wrap in (lambda m: m, torch.compile):
            other = transform(model, inputs)
            load_state(wrap(other), given)
            assert _equal(other, elastic)
    Checkpoint(compiled, inputs).save(tmp_path / "a")
    assert _equal(Checkpoint.load(tmp_path / "a").model, elastic)

    # The user's own model before transform: compiled block by block, or itself with a part called "module".
    block = copy.deepcopy(model)
    block.head = torch.compile(block.head)
    load_state(block, {f"_orig_mod.{name}": t * 2 for name, t in model.state_dict().items()})
    assert torch.equal(block.head.weight, model.head.weight * 2)
    inner = nn.ModuleDict({"module": nn.Linear(3, 3)})
    load_state(inner, {f"module.{name}": t * 2 for name, t in inner.state_dict().items()})

    for change, message in (
        (lambda s: s.pop("head.V"), "it lacks head.V"),
        (lambda s: s.update({"head.W": s["head.V"]}), "it has what the model does not: head.W"),
        (
            lambda s: s.update({"head.V": s["head.V"][:3]}),
            r"other shapes: head.V \(\(3, 48\), the model has \(10, 48\)",
        ),
    ):
        wrong = dict(state)
        change(wrong)
        with pytest.raises(StateError, match=message):
            load_state(elastic, wrong)


@pytest.mark.parametrize("net", ALL)
def test_to_dense_is_the_original(net: str) -> None:
    """Untrained, its weights to 1e-6; trained, a new instance of the class computes what the elastic model does."""
    model, inputs = ALL[net]()
    elastic = transform(model, inputs, calibration=[inputs])
    for name, tensor in elastic.to_dense().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-5, atol=1e-6)
    _trained(elastic).set_full()
    fresh = type(model)().eval()
    state = elastic.to_dense(torch.compile(fresh))
    assert set(model.state_dict()) - set(state) == ({"unread.weight", "unread.bias"} if net == "variety" else set())
    expected = _logits(elastic(*inputs))
    torch.testing.assert_close(
        _logits(fresh(*inputs)), expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max())
    )
    loaded = copy.deepcopy(elastic)
    assert all(torch.equal(a, b) for a, b in zip(loaded.to_dense().values(), state.values(), strict=True))


def test_to_dense_keeps_ties_and_takes_a_profile() -> None:
    model, inputs = variety()
    elastic = _trained(transform(model, inputs))
    state = elastic.to_dense()
    assert state["head.weight"] is state["table.weight"]
    profile = _profile(elastic)
    cut = elastic.to_dense(options=profile)
    for name, layer in elastic_layers(elastic):
        if layer.form == "svd":
            assert torch.linalg.matrix_rank(layer.dense_weight(profile[name])) <= 8
    assert int(torch.linalg.matrix_rank(cut["input_major"])) <= 8
    assert int(torch.linalg.matrix_rank(state["input_major"])) == 32
    with pytest.raises(Exception, match="the profile has no option for it"):
        elastic.to_dense(options={})
    with pytest.raises(StateError, match="it lacks"):
        elastic.to_dense(nn.Linear(3, 3))


def test_a_run_with_a_certificate_goes_on_exactly(tmp_path: Path) -> None:
    """The power iteration's vectors are in the training checkpoint: a resumed run equals an uninterrupted one."""
    model, inputs = mlp()
    batches = [(torch.randn(8, 64), torch.randint(10, (8,))) for _ in range(2)]

    class Stops(list):  # type: ignore[type-arg]
        epochs = 0

        def __iter__(self) -> Any:
            self.epochs += 1
            if self.epochs == 3:
                raise KeyboardInterrupt
            return super().__iter__()

    def run(data: list[Any], checkpoint: Path | None = None, proxied: bool = True) -> Any:
        elastic = transform(model, inputs)
        options: dict[str, Any] = {"weights": LossWeights(certificate=0.1, epsilon=0), "checkpoint": checkpoint}
        proxy = TrainingProxy(elastic, [inputs]) if proxied else None
        return train(elastic, data, epochs=4, proxy=proxy, progress=False, **options), elastic

    whole, expected = run(batches)
    with pytest.raises(KeyboardInterrupt):
        run(Stops(batches), tmp_path / "run")
    resumed, found = run(batches, tmp_path / "run")
    assert resumed.history == whole.history
    assert _equal(found, expected)
    with pytest.raises(Exception, match="is of a run with a proxy"):
        run(batches, tmp_path / "run", proxied=False)


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    example = Path(__file__).resolve().parent.parent / "examples" / "checkpoints.py"
    runpy.run_path(str(example), run_name="__main__")
    printed = capsys.readouterr().out
    assert "without the class: equal" in printed
    assert "into the class: equal" in printed
    assert "back to dense: within" in printed
