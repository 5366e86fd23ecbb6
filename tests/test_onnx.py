"""ONNX: exported profiles against torch in ONNX Runtime, their one file of weights, and ONNX files as models."""

import json
import platform
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from nets import NETS
from test_ops import _samples
from torch import Tensor, nn

from examples.models.language import MODELS as LANGUAGE
from examples.models.vision import MODELS as VISION
from t3c_compile.backends import cpu
from t3c_compile.backends.onnx import OnnxError, export_onnx, read_profiles
from t3c_compile.backends.onnx.export import _translated
from t3c_compile.backends.onnx.qdq import Expansion
from t3c_compile.backends.onnx.shared_data import SharedData
from t3c_compile.cli import main
from t3c_compile.loading import load_elastic
from t3c_compile.onnx_import import UnsupportedOnnxError, load_onnx
from t3c_compile.passes.elastic import elastic_layers
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.ops import DEPLOYMENT_OPS
from t3c_compile.passes.option import Option
from t3c_compile.passes.specialize import specialize, store_ranks
from t3c_compile.profile import Profile
from t3c_compile.transforming import Config, observe, transform

Level = onnxruntime.GraphOptimizationLevel
# Rounds a convolution's bias to an int32, and so moves one int8 step in a thousand values.
ROUNDS = ["WeightBiasQuantization"]


class ResidualNet(nn.Module):
    """Two residual blocks (one depthwise) with batch norms that also turn signs, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 24, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(24, 24, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(24) for _ in range(2))
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.pointwise = nn.Conv2d(24, 24, 1)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.norms[1](self.convs[1](F.relu(self.norms[0](self.convs[0](x))))))
        x = F.relu(x + self.pointwise(self.depthwise(x)))
        return self.head(x.mean((2, 3)))


def residual_net() -> tuple[nn.Module, tuple[Tensor, ...], tuple[Tensor, ...], Any]:
    torch.manual_seed(0)
    model = ResidualNet()
    with torch.no_grad():
        model.norms[0].weight[::3] *= -1
        for _ in range(4):
            model(torch.randn(16, 1, 8, 8) * 2 + 0.5)
    return model.eval(), (torch.randn(9, 1, 8, 8),), (torch.randn(32, 1, 8, 8),), None


def _built(name: str, builder: Any) -> Callable[[], tuple[nn.Module, tuple[Tensor, ...], tuple[Tensor, ...], Any]]:
    return lambda: (
        builder.build(True),
        builder.inputs(True),
        builder.other_inputs(True),
        builder.dynamic_shapes(True),
    )


MODELS = {
    "cnn": residual_net,
    "vit": _built("vit", VISION["vit_b_16"]),
    "bert": _built("bert", LANGUAGE["bert_base"]),
}


def make_profiles(elastic: ElasticGraphModule, batches: list[tuple[Tensor, ...]], *levels: Any) -> list[Profile]:
    """A profile for each (rank, *widths), which the layers take in turn; ranges are those of ``batches``."""
    profiles = []
    for index, (rank, *widths) in enumerate(levels):
        options = {
            name: Option(layer.form, 0 if layer.form == "dense" else min(rank, layer.max_rank), widths[i % len(widths)])
            for i, (name, layer) in enumerate(elastic_layers(elastic))
        }
        elastic.set_options(options)
        observe(elastic, batches)
        activations = {name: layer.activations() for name, layer in elastic_layers(elastic)}
        profiles.append(Profile(f"p{index}", options, activations, 0, {"kl": 0.0}, {"bound": 0.0}))
    return profiles


class Exported:
    """A model, its profiles at 4, 4 to 8, and 8 bits, and the folder they were exported to."""

    def __init__(self, name: str, folder: Path) -> None:
        model, inputs, others, shapes = MODELS[name]()
        # Both batches are inside the ranges, so that no middle is cut off.
        self.batches = [inputs, others]
        self.elastic = transform(model, inputs, dynamic_shapes=shapes).eval()
        self.profiles = make_profiles(self.elastic, [inputs], (8, 4), (16, 6, 8, 4), (24, 8))
        for profile in self.profiles:
            self._widen(profile)
        self.folder = export_onnx(self.elastic, self.profiles, folder / f"{name}-onnx", inputs)

    def _widen(self, profile: Profile) -> None:
        for tensors in profile.activations.values():
            for key, (scale, zero_point) in tensors.items():
                tensors[key] = (2 * scale, zero_point)

    def reference(self, profile: Profile, inputs: tuple[Tensor, ...]) -> np.ndarray[Any, Any]:
        ranks = store_ranks(self.elastic, [p.options for p in self.profiles])
        with torch.no_grad():
            output = specialize(self.elastic, profile.options, profile.activations, ranks)(*inputs)
        return np.asarray(output)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    made: dict[str, Exported] = {}
    folder = tmp_path_factory.mktemp("onnx")
    return lambda name: made.setdefault(name, Exported(name, folder)) if name not in made else made[name]


def session(path: Path, level: Any = Level.ORT_ENABLE_ALL, **options: Any) -> onnxruntime.InferenceSession:
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = level
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 3
    # Its own choice for float inputs and int8 weights is to quantize the inputs.
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if saved := options.pop("saved", None):
        settings.optimized_model_filepath = str(saved)
    return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"], **options)


def run(path: Path, inputs: tuple[Tensor, ...], level: Any = Level.ORT_ENABLE_ALL, **options: Any) -> Any:
    made = session(path, level, **options)
    feed = {value.name: x.numpy() for value, x in zip(made.get_inputs(), inputs, strict=True)}
    return made.run(None, feed)[0]


def errors(found: Any, expected: Any) -> np.ndarray[Any, Any]:
    """Of every sample, relative to the greatest output."""
    differences: np.ndarray[Any, Any] = np.abs(found - expected).reshape(len(found), -1).max(1)
    return differences / np.abs(expected).max()


def assert_equal_but_for_ties(found: Any, expected: Any) -> None:
    """A value on a rounding tie may move one int8 step of a middle, which the layers behind it amplify."""
    assert found.shape == expected.shape
    assert np.median(errors(found, expected)) <= 1e-6
    assert errors(found, expected).max() <= 2e-2


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_profiles_equal_torch(exported: Callable[[str], Exported], name: str, index: int) -> None:
    """At two batch sizes (and lengths), as written and as ONNX Runtime optimizes it.

    Its kernels let products of bytes overflow int16 on an x86 processor without a dot product of them:
    https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
    """
    overflows = platform.machine() == "x86_64" and not cpu.features() & {"avx512_vnni", "avx_vnni"}
    found = exported(name)
    profile = found.profiles[index]
    path = found.folder / f"{profile.name}.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    for inputs in found.batches:
        expected = found.reference(profile, inputs)
        assert_equal_but_for_ties(run(path, inputs, Level.ORT_DISABLE_ALL), expected)
        if not overflows:
            assert_equal_but_for_ties(run(path, inputs, disabled_optimizers=ROUNDS), expected)
            assert errors(run(path, inputs), expected).max() <= 2e-2


# Products of integers in a deployed op.
STAGES = {"svd_linear": 2, "int8_linear": 1, "tucker2_conv2d": 3, "svd_conv2d": 2, "int8_conv2d": 1}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_onnx_runtime_finds_its_int8_kernels(exported: Callable[[str], Exported], name: str, index: int) -> None:
    """Every product with weights is one of integers, but for convolutions whose output is read as float32."""
    found = exported(name)
    profile = found.profiles[index]
    # Beside the weights: what is not folded still refers to them.
    saved = found.folder / "optimized.onnx"
    session(found.folder / f"{profile.name}.onnx", saved=saved)
    count = Counter(node.op_type for node in onnx.load(str(saved), load_external_data=False).graph.node)
    saved.unlink()
    graph = specialize(found.elastic, profile.options, profile.activations).graph
    ops = Counter(str(node.target).split(".")[1] for node in graph.nodes if str(node.target).startswith("t3c."))
    linears, convs = (sum(STAGES[op] * ops[op] for op in STAGES if kind in op) for kind in ("linear", "conv"))
    assert count["QLinearMatMul"] + count["MatMulIntegerToFloat"] >= linears
    # The stem and both blocks end in additions; the patches of the transformer do too.
    assert count["QLinearConv"] == convs - {"cnn": 3, "vit": 1, "bert": 0}[name]
    assert linears > 0


def test_dynamic_axes_have_names(exported: Callable[[str], Exported]) -> None:
    shapes = [value.shape for value in session(exported("bert").folder / "p0.onnx").get_inputs()]
    assert all(shape[0] == "batch" and isinstance(shape[1], str) for shape in shapes)
    assert session(exported("cnn").folder / "p0.onnx").get_inputs()[0].shape == ["batch", 1, 8, 8]


def _stored(path: Path) -> dict[str, ir.ExternalTensor]:
    """External tensors by name."""
    initializers = ir.load(path).graph.initializers
    return {
        name: value.const_value
        for name, value in initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    }


@pytest.mark.parametrize("name", MODELS)
def test_profiles_share_their_weights(exported: Callable[[str], Exported], name: str, tmp_path: Path) -> None:
    """Integers at 5 to 8 bits are first bytes of the greatest profile's; INT4 ones are the only ones added."""
    found = exported(name)
    low, middle, high = (_stored(found.folder / f"{profile.name}.onnx") for profile in found.profiles)
    shared = [key for key in middle if key.endswith(".int8") and key in high]
    assert shared
    for key in shared:
        assert middle[key].offset == high[key].offset, key
    assert {tensor.dtype for key, tensor in low.items() if key.endswith(".int4")} == {ir.DataType.INT4}
    assert not any(key.endswith(".int8") for key in low)
    alone = export_onnx(found.elastic, found.profiles[2:], tmp_path / "greatest", found.batches[0])
    folders = {"greatest": alone, "all": found.folder}
    sizes = {label: (folder / "weights.data").stat().st_size for label, folder in folders.items()}
    print(f"{name}: {sizes['all'] / sizes['greatest']:.3f} of the greatest profile's bytes for three profiles")
    int4 = {(t.offset, t.length) for t in (*low.values(), *middle.values()) if t.dtype == ir.DataType.INT4}
    small = sum(64 + tensor.nbytes for tensors in (low, middle) for key, tensor in tensors.items() if ".x16" in key)
    ends = {start: max(length for begin, length in int4 if begin == start) for start, _ in int4}
    assert sizes["all"] <= sizes["greatest"] + sum(64 + length for length in ends.values()) + small


def test_integers_are_those_of_the_store(exported: Callable[[str], Exported]) -> None:
    found = exported("cnn")
    graph = specialize(found.elastic, found.profiles[2].options, found.profiles[2].activations)
    stored = graph.state_dict()
    low, high = _stored(found.folder / "p0.onnx"), _stored(found.folder / "p2.onnx")
    for key in ("convs.0.v", "convs.0.core", "convs.0.u", "stem.weight"):
        integers = stored[key].numpy()
        whole = high[f"{key}.int8"].numpy()
        assert np.array_equal(whole, integers[: len(whole)]), key
        narrow = low[f"{key}.int4"].numpy().astype(np.int64)
        assert np.array_equal(narrow, np.rint(integers[: len(narrow)] / 16)), key


class _Call(nn.Module):
    """A deployment op whose first argument is the input and whose other tensors are stored."""

    def __init__(self, name: str, *args: object) -> None:
        super().__init__()
        self.op, self.args = getattr(torch.ops.t3c, name).default, args
        for index, argument in enumerate(args):
            if isinstance(argument, Tensor):
                self.register_buffer(f"stored_{index}", argument)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, *(getattr(self, f"stored_{i}", argument) for i, argument in enumerate(self.args)))


def _export_op(module: nn.Module, x: Tensor, folder: Path) -> Path:
    program = torch.export.export(module, (x,)).module(check_guards=False)
    free = ({0: torch.export.Dim.AUTO},)
    model = _translated(torch.fx.GraphModule(program, program.graph), (x,), free, "op")
    with SharedData(folder / "op.data") as data:
        Expansion(model, data).run()
    ir.save(model, folder / "op.onnx")
    onnx.checker.check_model(str(folder / "op.onnx"), full_check=True)
    return folder / "op.onnx"


def _arguments(name: str) -> list[str]:
    """Of an op, but for its first."""
    return [argument.name for argument in getattr(torch.ops.t3c, name).default._schema.arguments][1:]


class _Calls(nn.ModuleList):
    """Every call's result for one input."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [call(x) for call in self]


@pytest.mark.parametrize("name", DEPLOYMENT_OPS)
def test_every_op(name: str, tmp_path: Path) -> None:
    """Random int8 at its extremes, a middle scale under which nothing is cut off; every width, in one file."""
    x, *rest = _samples()[name]
    assert isinstance(x, Tensor)
    values = dict(zip(_arguments(name), rest, strict=True))
    for key, scale in {"h_scale": 20.0, "g_scale": 4000.0}.items():
        if key in values:
            values[key] = scale
    if values.get("out_gain") is not None:
        values["out_gain"] = values["out_gain"] * torch.tensor([-1.0, 1.0, 0.5]).repeat(3)
    widths = [{"bits": bits} for bits in (4, 5, 6, 8)] if "bits" in values else [{}]
    module = _Calls(_Call(name, *(values | width).values()) for width in widths)
    path = _export_op(module, x, tmp_path)
    for level in (Level.ORT_DISABLE_ALL, Level.ORT_ENABLE_ALL):
        made = session(path, level)
        results = made.run(None, {made.get_inputs()[0].name: x.numpy()})
        for width, found, reference in zip(widths, results, module(x), strict=True):
            expected = reference.numpy()
            assert found.dtype == expected.dtype
            np.testing.assert_allclose(
                found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max(), err_msg=str(width)
            )


def test_a_middle_that_is_cut_off_moves_one_step(tmp_path: Path) -> None:
    """QuantizeLinear ends at -128 where the op ends at -127."""
    x, v, u, mid, *_ = _samples()["svd_linear"]
    module = _Call("svd_linear", v, u, mid, None, None, 0.02, -7, 1e-3, 3, 8)
    assert isinstance(x, Tensor)
    found, expected = run(_export_op(module, x, tmp_path), (x,)), module(x).numpy()
    assert np.abs(found - expected).max() > 0
    assert isinstance(u, Tensor)
    assert np.all(np.abs(found - expected) <= np.abs(u[:3].numpy().astype(np.int64)).sum(0) * 1.0001e-3)


def test_a_channel_without_gain_keeps_its_bias(tmp_path: Path) -> None:
    """Runtimes count a bias in units of the product's scale, which is nothing here."""
    x, weight, scale, _, *rest = _samples()["int8_conv2d"]
    assert isinstance(x, Tensor)
    assert isinstance(scale, Tensor)
    scale[2] = 0
    module = _Call("int8_conv2d", weight, scale, torch.randn(8), *rest)
    found, expected = run(_export_op(module, x, tmp_path), (x,)), module(x).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


# -- the command line, and what is refused --------------------------------------------------------------------------

_USER_MODULE = """
import torch
from nets import mlp

def model():
    return mlp()[0]

def data():
    torch.manual_seed(1)
    xs = [torch.randn(32, 64) for _ in range(4)]
    return [(x, (x.sum(1) > 0).long()) for x in xs]
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "onnxuser.py").write_text(_USER_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("onnxuser", None)
    return tmp_path


def test_from_the_command_line_and_back(user_module: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model is exported, shown, and its float form goes in as an ONNX file."""
    arguments = ["--data", "onnxuser:data", "--profiles", "3", "--json"]
    assert main(["export", "onnxuser:model", "--input", "float32[4,64]", *arguments, "-o", "mlp-onnx"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["file"] for row in rows] == [f"p{i}.onnx" for i in range(len(rows))]
    assert all(row["size_kb"] > 0 and row["certificate"] > 0 for row in rows)
    assert main(["inspect", "mlp-onnx", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == rows
    x = torch.randn(3, 64)
    assert run(user_module / "mlp-onnx/p0.onnx", (x,)).shape == (3, 10)

    model, inputs = NETS["mlp"]()
    torch.onnx.export(model, inputs, "mlp.onnx", dynamic_shapes=({0: "batch"},), verbose=False)
    assert main(["transform", "mlp.onnx", "-o", "a.pt", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["layer"], row["form"]) for row in rows] == [("first", "svd"), ("second", "svd"), ("head", "svd")]
    assert main(["transform", "gone.onnx", "-o", "b.pt", "--json"]) == 1
    assert "there is no such file" in capsys.readouterr().err


def test_what_is_not_an_earlier_export_is_left_alone(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    found = exported("cnn")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OnnxError, match="holds other files"):
        export_onnx(found.elastic, found.profiles, tmp_path, found.batches[0])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_files_of_others_have_no_profiles(tmp_path: Path) -> None:
    model, inputs = NETS["mlp"]()
    torch.onnx.export(model, inputs, tmp_path / "mlp.onnx", verbose=False)
    with pytest.raises(OnnxError, match="was not written by t3c-compile"):
        read_profiles(tmp_path)


def test_missing_packages_are_named(
    exported: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = exported("cnn")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(OnnxError, match=r"pip install 't3c-compile\[onnx\]'"):
        export_onnx(found.elastic, found.profiles, tmp_path / "x", found.batches[0])


# -- ONNX files as models -------------------------------------------------------------------------------------------


def _float_models() -> Mapping[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...], tuple[Tensor, ...]]]]:
    def of(name: str) -> tuple[nn.Module, tuple[Tensor, ...], tuple[Tensor, ...]]:
        model, inputs, others, _ = MODELS[name]()
        return model, tuple(torch.cat([x, x]) for x in inputs), others

    def resnet() -> tuple[nn.Module, tuple[Tensor, ...], tuple[Tensor, ...]]:
        builder = VISION["resnet50"]
        return builder.build(True), tuple(torch.cat([x, x]) for x in builder.inputs(True)), builder.other_inputs(True)

    return {"resnet": resnet, "vit": lambda: of("vit"), "bert": lambda: of("bert")}


@pytest.mark.parametrize("name", _float_models())
@pytest.mark.parametrize("dynamo", [True, False])
def test_round_trip(name: str, dynamo: bool, tmp_path: Path) -> None:
    """torch.onnx (both exporters) -> transform -> equal to ONNX Runtime at full rank, at another batch size too."""
    model, inputs, others = _float_models()[name]()
    path = tmp_path / "model.onnx"
    if dynamo:
        torch.onnx.export(model, inputs, path, dynamic_shapes=({0: "batch"},) * len(inputs), verbose=False)
    else:
        names = [f"input_{i}" for i in range(len(inputs))]
        torch.onnx.export(
            model, inputs, path, dynamo=False, input_names=names, dynamic_axes={n: {0: "batch"} for n in names}
        )
    checkpoint = load_elastic(str(path), [], Config(), None, False)
    elastic = checkpoint.model.eval()
    assert not any("batch size is fixed" in note for note in elastic.report.notes)
    assert len(elastic.report.elastic) >= 6
    assert not elastic.report.kept
    # Lengths are fixed in the file; the batch is not.
    others = tuple(x[:, :16] if name == "bert" else x for x in others)
    for batch in (inputs, others):
        expected = run(path, batch)
        with torch.no_grad():
            assert errors(elastic(*batch).numpy(), expected).max() <= 1e-4


def _save(path: Path, *nodes: onnx.NodeProto, initializers: Mapping[str, Any] | None = None) -> Path:
    made = [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in (initializers or {}).items()]
    kind = onnx.TensorProto.FLOAT
    ends = [onnx.helper.make_tensor_value_info(name, kind, ["n", 6, 4]) for name in ("x", "y")]
    graph = onnx.helper.make_graph(list(nodes), "g", ends[:1], ends[1:], made)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, str(path))
    return path


def test_unknown_operators_are_named_all_at_once(tmp_path: Path) -> None:
    node = onnx.helper.make_node
    path = _save(
        tmp_path / "m.onnx",
        node("Hardmax", ["x"], ["a"], "first"),
        node("Mine", ["a"], ["b"], "second", domain="com.mine"),
        node("Relu", ["b"], ["y"]),
    )
    with pytest.raises(UnsupportedOnnxError, match=r"ai\.onnx::Hardmax \(opset 18.*'first'\), com\.mine::Mine"):
        load_onnx(path)


def test_shapes_from_data_are_refused(tmp_path: Path) -> None:
    node = onnx.helper.make_node
    path = _save(
        tmp_path / "m.onnx",
        node("ReduceMax", ["x"], ["a"], keepdims=0),
        node("Cast", ["a"], ["b"], to=onnx.TensorProto.INT64),
        node("Unsqueeze", ["b", "zero"], ["c"]),
        node("Reshape", ["x", "c"], ["y"], "shaped"),
        initializers={"zero": np.array([0])},
    )
    with pytest.raises(UnsupportedOnnxError, match=r"'shaped' .*its input 'c' is computed from data"):
        load_onnx(path)(torch.ones(2, 6, 4))


def test_not_onnx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("hello")
    with pytest.raises(UnsupportedOnnxError, match="is damaged or not an ONNX file"):
        load_onnx(tmp_path / "m.onnx")


_OPERATORS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("Conv", {"group": 2, "strides": [2], "auto_pad": "SAME_UPPER"}, {"w": np.float32([[[1, 2, 3]] * 3] * 4)}),
    ("ConvTranspose", {"strides": [2], "pads": [1, 1], "output_padding": [1]}, {"w": np.ones((6, 2, 3), np.float32)}),
    ("MaxPool", {"kernel_shape": [2], "pads": [1, 0], "strides": [2]}, {}),
    ("AveragePool", {"kernel_shape": [3], "pads": [1, 1], "ceil_mode": 1, "strides": [2]}, {}),
    ("AveragePool", {"kernel_shape": [2], "pads": [1, 0], "count_include_pad": 1}, {}),
    ("GlobalAveragePool", {}, {}),
    ("GlobalMaxPool", {}, {}),
    ("InstanceNormalization", {}, {"a": np.float32(range(6)), "b": np.float32(range(6))}),
    ("GroupNormalization", {"num_groups": 3}, {"a": np.float32([1, 2, 3]), "b": np.float32([3, 1, 2])}),
    ("LayerNormalization", {"axis": 1}, {"a": np.ones((6, 4), np.float32) * 2}),
    ("Gather", {"axis": -1}, {"i": np.array([[-1, 0], [2, 1]])}),
    ("Gather", {"axis": 1}, {"i": np.array(-2)}),
    ("GatherElements", {"axis": 1}, {"i": np.full((3, 2, 4), -1)}),
    ("Pad", {}, {"p": np.array([1, 2, 0, 3]), "v": np.float32(5), "axes": np.array([2, 1])}),
    (
        "Slice",
        {},
        {"s": np.array([-3, 1]), "e": np.array([2**62, -1]), "axes": np.array([1, 2]), "st": np.array([2, 1])},
    ),
    ("ReduceMean", {"keepdims": 0}, {"axes": np.array([-1, 1])}),
    ("ReduceL2", {}, {"axes": np.array([2])}),
    ("ReduceLogSumExp", {}, {"axes": np.array([1])}),
    ("ReduceSumSquare", {"keepdims": 0}, {}),
    ("CumSum", {}, {"axis": np.array(1)}),
    ("ArgMax", {"axis": 2, "keepdims": 0}, {}),
    ("Flatten", {"axis": 0}, {}),
    ("Flatten", {"axis": -1}, {}),
    ("Split", {"axis": 1, "num_outputs": 4}, {}),
    ("Expand", {}, {"shape": np.array([2, 1, 1, 1, 1])}),
    ("Tile", {}, {"r": np.array([1, 2, 3])}),
    ("Trilu", {"upper": 0}, {"k": np.array(-1)}),
    ("Clip", {}, {"low": np.float32(-0.3), "high": np.float32(0.4)}),
    ("Softmax", {"axis": 1}, {}),
    ("Mod", {"fmod": 1}, {"b": np.float32(0.3)}),
    ("Div", {}, {"b": np.float32([3])}),
    ("Pow", {}, {"b": np.float32(2)}),
    ("PRelu", {}, {"s": np.full((6, 1), 0.2, np.float32)}),
    ("Max", {}, {"b": np.float32(0.1), "c": np.zeros((6, 1), np.float32)}),
    ("HardSigmoid", {"alpha": 0.3, "beta": 0.4}, {}),
    ("LeakyRelu", {"alpha": 0.3}, {}),
    ("Einsum", {"equation": "nij,kj->nik"}, {"b": np.ones((3, 4), np.float32)}),
]


@pytest.mark.parametrize(("op", "attributes", "constants"), _OPERATORS)
def test_operators_equal_onnx_runtime(
    op: str, attributes: dict[str, Any], constants: dict[str, Any], tmp_path: Path
) -> None:
    outputs = [f"y{i}" for i in range(attributes.get("num_outputs", 1))]
    node = onnx.helper.make_node(op, ["x", *constants], outputs, **attributes)
    made = [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 6, 4])
    ends = [onnx.ValueInfoProto(name=name) for name in outputs]
    graph = onnx.helper.make_graph([node], "g", [x], ends, made)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    model = onnx.shape_inference.infer_shapes(model)
    onnx.save(model, str(tmp_path / "op.onnx"))
    value = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    found = load_onnx(tmp_path / "op.onnx")(value)
    expected = session(tmp_path / "op.onnx").run(None, {"x": value.numpy()})
    for y, reference in zip(found if isinstance(found, tuple) else (found,), expected, strict=True):
        assert y.dtype == torch.from_numpy(reference).dtype
        np.testing.assert_allclose(y.detach().numpy(), reference, rtol=1e-5, atol=1e-6)
