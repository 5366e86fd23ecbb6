"""Profiles as MLIR: every dialect verified, and run by IREE against the specialized graph in torch."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from iree import compiler, runtime
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.graph import CodeGen
from torch_mlir import ir
from torch_mlir.dialects import torch as torch_dialect

from t3c_compile.backends.mlir import DIALECTS, MlirError, export_mlir, lower_program, to_mlir
from t3c_compile.cli import main
from t3c_compile.passes.elastic import elastic_layers
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.option import Option
from t3c_compile.passes.specialize import specialize
from t3c_compile.profile import Profile
from t3c_compile.transforming import observe, transform

PROFILES = {"p0": (8, 4), "p1": (16, 6), "p2": (24, 8)}
# What IREE calls them. It has no input of the torch dialect.
IREE = {"linalg-on-tensors": "none", "tosa": "tosa", "stablehlo": "stablehlo"}


class SmallCnn(nn.Module):
    """A dense stem, a residual Tucker-2 block, a depthwise and a 1x1 convolution, a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, 2, 1)
        self.norm = nn.BatchNorm2d(32)
        self.block = nn.Conv2d(32, 32, 3, padding=1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.pointwise = nn.Conv2d(32, 48, 1)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + F.relu(self.block(x))
        return self.head(F.relu(self.pointwise(self.depthwise(x))).mean((2, 3)))


class SmallTransformer(nn.Module):
    """One block over tokens [N, 7, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


SHAPES: dict[type[nn.Module], tuple[int, ...]] = {SmallCnn: (1, 8, 8), SmallTransformer: (7, 32)}


class Case:
    """An elastic model, and its profiles."""

    def __init__(self, cls: type[nn.Module]) -> None:
        torch.manual_seed(0)
        self.shape = SHAPES[cls]
        self.inputs = (torch.randn(4, *self.shape),)
        self.model: ElasticGraphModule = transform(cls().eval(), self.inputs)
        observe(self.model, [(torch.randn(64, *self.shape),)])
        self.profiles = {name: self._profile(name, *choice) for name, choice in PROFILES.items()}

    def _profile(self, name: str, rank: int, bits: int) -> Profile:
        options = {
            layer: Option(found.form, 0 if found.form == "dense" else min(rank, found.max_rank), bits)
            for layer, found in elastic_layers(self.model)
        }
        return Profile(name, options, {}, 0)

    def graph(self, name: str) -> GraphModule:
        profile = self.profiles[name]
        return specialize(self.model, profile.options, profile.activations)


@pytest.fixture(scope="module", params=SHAPES, ids=lambda cls: cls.__name__)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.fixture(scope="module")
def transformer() -> Case:
    return Case(SmallTransformer)


def run(text: str, dialect: str) -> Callable[[Tensor], Any]:
    """Compile with IREE for this machine."""
    binary = compiler.compile_str(
        text, target_backends=["llvm-cpu"], input_type=IREE[dialect], extra_args=["--iree-llvmcpu-target-cpu=host"]
    )
    context = runtime.SystemContext(config=runtime.Config("local-task"))
    context.add_vm_module(runtime.VmModule.copy_buffer(context.instance, binary))
    main = context.modules.module.main
    return lambda x: main(x.numpy())


def assert_like(found: Any, expected: Tensor) -> None:
    """Logits to 2e-3 of the largest: what an int8 step does where a float stage rounds a tie the other way."""
    expected = expected.detach()
    assert float(np.abs(found.to_host() - expected.numpy()).max()) <= 2e-3 * float(expected.abs().max())


def with_stages(graph: GraphModule) -> tuple[GraphModule, list[str]]:
    """A graph that also returns every int8 tensor between its layers."""
    stages = [node for node in graph.graph.nodes if "quantize_int8" in str(node.target)]
    output = graph.graph.output_node()
    output.args = ((*output.all_input_nodes, *stages),)
    graph.graph.set_codegen(CodeGen())
    return GraphModule(graph, graph.graph), [node.name for node in stages]


# IREE takes seconds for each: the least profile of one network and the top one of the other.
@pytest.mark.parametrize(
    ("case", "name"), [(SmallCnn, "p0"), (SmallTransformer, "p2")], indirect=["case"], ids=["cnn-p0", "transformer-p2"]
)
def test_linalg_runs_as_in_torch(case: Case, name: str) -> None:
    """At two batch sizes: every int8 stage to one step (and hardly any moved), logits to an int8 step."""
    graph, stages = with_stages(case.graph(name))
    assert len(stages) >= 5
    shapes = case.model.meta["t3c_dynamic_shapes"]
    program = torch.export.export(graph, case.inputs, dynamic_shapes=shapes)
    compiled = run(str(lower_program(program, "linalg-on-tensors")), "linalg-on-tensors")
    for batch in (1, 6):
        x = torch.randn(batch, *case.shape) * 1.5
        logits, *found = compiled(x)
        expected, *integers = graph(x)
        assert_like(logits, expected)
        for stage, mine, torchs in zip(stages, found, integers, strict=True):
            assert torchs.dtype == torch.int8
            moved = np.abs(mine.to_host().astype(int) - torchs.numpy().astype(int))
            assert moved.max() <= 1, stage
            assert moved.mean() <= 0.01, stage


def test_profiles_differ(case: Case) -> None:
    """The tolerance above could not hold if one profile's module ran for another."""
    x = torch.randn(6, *case.shape)
    low, high = case.graph("p0")(x), case.graph("p2")(x)
    assert float((low - high).abs().max()) > 0.02 * float(high.abs().max())


@pytest.mark.parametrize("dialect", DIALECTS)
def test_least_and_top_in_every_dialect(case: Case, dialect: str, tmp_path: Path) -> None:
    """Files that are read back and verified, of this dialect alone; int8 weights cut to the profile's rank."""
    profiles = [case.profiles["p0"], case.profiles["p2"]]
    folder = export_mlir(case.model, profiles, tmp_path / "out", case.inputs, dialect)
    assert sorted(file.name for file in folder.iterdir()) == ["p0.mlir", "p2.mlir"]
    own = dialect.removesuffix("-on-tensors")
    for name, rank in (("p0", 8), ("p2", 24)):
        text = (folder / f"{name}.mlir").read_text()
        if dialect != "stablehlo":  # which torch-mlir's Python does not parse; IREE does, below
            context = ir.Context()
            torch_dialect.register_dialect(context)
            assert ir.Module.parse(text, context).operation.verify()
        used = set(re.findall(r'(?:^|[=(\s])"?(torch|linalg|tosa|stablehlo)\.\w+', text))
        assert used == {own}
        # The first factor of the 1x1 convolution, or of the linear behind the attention.
        assert re.search(rf"\[{rank},32\],si8|<{rank}x32(x1x1)?xi8>", text)
        assert not re.search(r"\[32,32\],si8|<32x32(x1x1)?xi8>", text)
        assert ("?" in text) == (dialect != "tosa")
        assert dialect != "tosa" or "f64" not in text


@pytest.mark.parametrize("dialect", ["tosa", "stablehlo"])
def test_other_dialects_run_too(transformer: Case, dialect: str, tmp_path: Path) -> None:
    """From the file, sizes fixed (IREE takes no dynamic StableHLO)."""
    chosen = [transformer.profiles["p1"]]
    folder = export_mlir(transformer.model, chosen, tmp_path / "out", transformer.inputs, dialect, dynamic_batch=False)
    compiled = run((folder / "p1.mlir").read_text(), dialect)
    x = torch.randn(4, *transformer.shape)
    assert_like(compiled(x), transformer.graph("p1")(x))


class _Awkward(nn.Module):
    """A buffer that no state_dict has, a slice without a start, a roll, a norm: [N, 6, 8] to [N, 6, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", torch.arange(9)[None], persistent=False)
        self.table, self.norm = nn.Embedding(9, 8), nn.GroupNorm(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.ops.aten.slice.Tensor(self.positions, 1, None, x.shape[1])
        return torch.roll(self.norm(x) + self.table(positions), (2, -1), (1, 2))


@pytest.mark.parametrize("dialect", ["linalg-on-tensors", "tosa"])
def test_awkward_ops_run(dialect: str) -> None:
    torch.manual_seed(0)
    model, x = _Awkward(), torch.randn(3, 6, 8)
    module = lower_program(torch.export.export(model, (x,)), dialect)
    found = run(module.operation.get_asm(print_generic_op_form=dialect == "tosa"), dialect)(x).to_host()
    assert np.allclose(found, model(x).detach().numpy(), atol=1e-5)


class _Odd(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_what_torch_mlir_refuses_is_named() -> None:
    def program(function: Callable[[Tensor], Tensor]) -> torch.export.ExportedProgram:
        model = nn.Sequential(nn.Linear(8, 8), _Odd(function))
        return torch.export.export(model, (torch.randn(4, 8),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))

    with pytest.raises(MlirError) as unknown:
        lower_program(program(torch.special.bessel_j0), "linalg-on-tensors")
    message = str(unknown.value)
    assert "aten.special_bessel_j0 in layer '1'" in message
    assert f"{Path(__file__)}:" in message
    assert "torch-mlir does not know these" in message

    erfinv = program(torch.erfinv)
    assert lower_program(erfinv, "torch").operation.verify()
    for dialect, other in (("linalg-on-tensors", "torch"), ("tosa", "linalg-on-tensors")):
        with pytest.raises(MlirError, match=f"as {dialect}:\n  aten.erfinv in layer '1'") as lacking:
            lower_program(erfinv, dialect)
        assert f"or take {other}, which carries more, or fix the sizes" in str(lacking.value)

    with pytest.raises(MlirError, match="there is no dialect 'linalg'"):
        lower_program(erfinv, "linalg")


def test_missing_packages_are_named(transformer: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_mlir.fx", None)
    with pytest.raises(MlirError, match=r"pip install 't3c-compile\[mlir\]'"):
        to_mlir(transformer.model, transformer.profiles["p0"], transformer.inputs, "torch")


_USER_MODULE = """
import torch
from nets import mlp

def model():
    return mlp()[0]

def data():
    torch.manual_seed(1)
    return [(x, (x.sum(1) > 0).long()) for x in torch.randn(4, 32, 64)]
"""


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mlir_usermodule.py").write_text(_USER_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    source = ["mlir_usermodule:model", "--input", "float32[4,64]", "--data", "mlir_usermodule:data"]
    assert main(["export", *source, "--format", "mlir-linalg", "--profiles", "2", "-o", "out", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["file"] for row in rows] == [f"p{i}.mlir" for i in range(len(rows))]
    for row in rows:
        assert "linalg." in (tmp_path / "out" / row["file"]).read_text()
    (tmp_path / "out" / "mine.txt").write_text("")
    assert main(["export", *source, "--format", "mlir-tosa", "--profiles", "2", "-o", "out"]) == 1
    assert "out holds other files (mine.txt)" in capsys.readouterr().err
