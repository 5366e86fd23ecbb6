"""Our passes and modules inside other pipelines: torch.fx's PassManager, torchao, a TVM pipeline, MLIR files.

Each example is run as a user runs it; what it says of differences is held to a tolerance.
"""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from nets import packed
from tvm import relax

from t3c_compile.backends.targets import get_target
from t3c_compile.backends.tvm.build import build_library
from t3c_compile.backends.tvm.pipelines import KERNEL_PIPELINE, runtime_pipeline
from t3c_compile.backends.tvm.relax_module import relax_module, schedule
from t3c_compile.passes.elastic import elastic_layers
from t3c_compile.passes.option import Option
from t3c_compile.passes.specialize import specialize
from t3c_compile.profile import Profile
from t3c_compile.transforming import Config, transform

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def targets(graph: torch.fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "call_function"}


def test_fx_pass_manager() -> None:
    """The elastic graph to float rounding, 8 bits to 3% of the largest logit; each user pass has done its work."""
    module = example("fx_pass_manager")
    differences = module["main"]()
    assert differences["elastic"] <= 1e-5
    assert differences["8 bits"] <= 0.03
    elastic = module["make_elastic"](module["Net"]().eval(), torch.randn(4, 3, 8, 8))
    for graph in (elastic.eval_graph, elastic.train_graph):
        assert "aten.silu.default" in targets(graph)
        assert "aten.sigmoid.default" not in targets(graph)
    deployed = targets(module["deploy"](elastic, 6).graph)
    assert "aten.clamp_min.default" in deployed
    assert not [target for target in deployed if target.startswith("t3c") or "relu" in target or "batch_norm" in target]


def test_torchao_before_and_after() -> None:
    """Its int8 weights alone to 1% of the largest logit, with ours at 8 bits to 5%."""
    module = example("with_torchao")
    differences = module["main"]()
    assert differences["elastic"] <= 0.01
    assert max(differences["before"], differences["after"]) <= 0.05


def test_what_torchao_quantized_is_kept(tmp_path: Path) -> None:
    """Its tensors come through bit for bit, with the reason; the model as it was is not touched; TVM lowers it."""
    module = example("with_torchao")
    torch.manual_seed(0)
    model, x = module["Net"]().eval(), torch.randn(4, 32)
    module["quantize_"](model, module["Int8WeightOnlyConfig"](), filter_fn=lambda _, name: name == "first")
    expected = model(x)
    elastic = transform(model, (x,)).eval()
    record = elastic.report.kept["first"]
    assert (record.op, record.reason) == ("Int8Tensor", "its weight is a tensor of torchao, kept as it is")
    assert set(elastic.report.elastic) == {"second", "head"}
    assert torch.equal(elastic.get_buffer("first.weight_qdata"), model.first.weight.qdata)
    assert torch.allclose(elastic(x), expected, atol=1e-6)
    assert torch.allclose(elastic(x[:3]), expected[:3], atol=1e-6)
    assert type(model.first.weight).__name__ == "Int8Tensor"
    assert torch.equal(model(x), expected)

    graph = specialize(elastic, {name: Option("svd", 8, 6) for name, _ in elastic_layers(elastic)})
    program = torch.export.export(graph, (x,), dynamic_shapes=elastic.meta["t3c_dynamic_shapes"])
    library = build_library({"p": program}, get_target("x86_64"), tmp_path / "p.so")
    machine = relax.VirtualMachine(tvm.runtime.load_module(str(library.path)), tvm.cpu())
    state = graph.state_dict()
    found = machine["p"](tvm.runtime.tensor(x.numpy()), packed(machine, library, state)).numpy()
    reference = graph(x).detach().numpy()
    assert np.abs(found - reference).max() <= 2e-3 * np.abs(reference).max()


def test_relax_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    assert example("relax_pipeline")["main"]() <= 2e-3
    assert "2 relus before the user's pass, 0 after" in capsys.readouterr().out


def test_relax_module_packs_once_where_its_user_asks() -> None:
    """``main(*inputs, *weights)`` at the profile's ranks; TVM's own pass takes the packing out of it."""
    module = example("relax_pipeline")
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    elastic = transform(module["Net"]().eval(), (x,), Config(conv="cp"))
    options = {
        name: Option(layer.form, min(8, layer.max_rank), 6 if layer.form != "dense" else 8)
        for name, layer in elastic_layers(elastic)
    }
    imported, weights = relax_module(elastic, Profile("p0", options, {}, 0), (x,), "x86_64")
    main = imported["main"]
    assert int(main.attrs["num_input"]) == 1
    assert len(main.params) == 1 + len(weights)
    assert (8, 32) in {weight.shape for weight in weights}
    assert "pack_" in str(main)

    target = get_target("x86_64")
    lifted = schedule(target)(relax.transform.LiftTransformParams()(imported))
    assert "pack_" not in str(lifted["main"])
    executable = relax.build(
        lifted,
        tvm.target.Target(dict(target.tvm)),
        relax_pipeline=runtime_pipeline(),
        tir_pipeline=KERNEL_PIPELINE,
    )
    machine = relax.VirtualMachine(executable, tvm.cpu())
    packed = list(machine["main_transform_params"](weights))
    for batch in (1, 5):
        x = torch.randn(batch, 3, 8, 8)
        found = machine["main"](tvm.runtime.tensor(x.numpy()), *packed).numpy()
        expected = specialize(elastic, options)(x).detach().numpy()
        assert np.abs(found - expected).max() <= 2e-3 * np.abs(expected).max()


def test_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's promises: the greatest profile reads as well as the model in torch, nested sizes, a certificate that
    the profiles' own drifts on its samples keep."""
    monkeypatch.chdir(tmp_path)
    found = example("quickstart")
    session, certificate, test = found["session"], found["certificate"], found["test_x"]
    with torch.no_grad():
        full = found["elastic"](test).numpy()
        plain = found["accuracy"](found["model"](test))
    assert plain >= 0.7  # by chance it is 0.25
    sizes = [profile.size_mb for profile in session.profiles]
    assert len(sizes) > 1
    assert sizes == sorted(sizes)
    for profile, bounds in zip(session.profiles, certificate.profiles, strict=True):
        session.set_profile(profile.name)
        logits = session.run(test.numpy())
        assert (np.linalg.norm(logits - full, axis=1) <= bounds.drift["l2"]).mean() >= 0.9
    assert found["accuracy"](torch.from_numpy(logits)) >= plain - 0.03
    assert (tmp_path / "build/quickstart/reader.t3c/manifest.json").exists()


def test_export_mlir(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert example("export_mlir")["main"](tmp_path) <= 2e-3
    assert "stablehlo: p0.mlir" in capsys.readouterr().out
