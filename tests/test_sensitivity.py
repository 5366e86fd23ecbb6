"""Sensitivity: each option alone, held against the specialized graph at that option."""

import copy
import json
import re
import sys
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import conv_net, mlp
from torch import Tensor

import t3c_compile
from t3c_compile.backends.targets import get_target
from t3c_compile.chain import Grid, chains
from t3c_compile.cli import main
from t3c_compile.passes.elastic import elastic_layers
from t3c_compile.passes.errors import T3CError
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.option import Option
from t3c_compile.passes.specialize import as_dense, specialize
from t3c_compile.report import ReportError, figures
from t3c_compile.sensing import Effect
from t3c_compile.transforming import transform


def _ranges(elastic: ElasticGraphModule, name: str, option: Option, samples: list[Tensor]) -> dict[str, tuple]:
    """Ranges of one layer's int8 tensors, from its own inputs: the moving average over batches."""
    layer, seen = elastic.get_submodule(name), []
    layer = as_dense(layer) if option.form == "dense" != layer.form else copy.deepcopy(layer)
    hook = elastic.get_submodule(name).register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    for x in samples:
        elastic(x)
    hook.remove()
    if layer.x_quant is None:
        layer.add_quantizers()
    layer.gate.set(option.rank, option.bits)
    for quantizer in (layer.x_quant, layer.h_quant, layer.g_quant):
        if quantizer is not None:
            quantizer.reset()
            quantizer.train()
    for x in seen:
        layer(x)
    return layer.eval().activations()


@pytest.mark.parametrize("net", [mlp, conv_net])
@torch.no_grad()
def test_effects_are_those_of_the_deployed_graph(net) -> None:
    """One layer specialized at its option by hand, all others as the float products they stand for."""
    model, (example,) = net()
    elastic = transform(model, (example,)).eval()
    torch.manual_seed(1)
    samples = [torch.randn(24, *example.shape[1:]) for _ in range(2)]
    labels = torch.cat([model(x).argmax(1) for x in samples])
    labels[::3] = 0  # the full model is not always right
    full = torch.cat([model(x) for x in samples])
    before = {name: tensor.clone() for name, tensor in elastic.state_dict().items()}

    # Named, so that every machine has the same ranks.
    target = get_target("x86_64-v3")
    effects = t3c_compile.sensitivity(elastic, [(x,) for x in samples], labels, [target])

    assert all(torch.equal(tensor, before[name]) for name, tensor in elastic.state_dict().items())
    ladder = chains(elastic, Grid(target.rank_multiple, target.bits))
    assert [(e.layer, e.option) for e in effects] == [(n, option) for n, chain in ladder.items() for option in chain]
    layers = dict(elastic_layers(elastic))
    others = {
        n: Option(chain[0].form, layers[n].max_rank * (chain[0].form != "dense"), 32) for n, chain in ladder.items()
    }
    right = float((full.argmax(1) == labels).float().mean())
    for effect in effects[:: max(1, len(effects) // 12)]:
        ranges = _ranges(elastic, effect.layer, effect.option, samples)
        graph = specialize(elastic, others | {effect.layer: effect.option}, {effect.layer: ranges})
        logits = torch.cat([graph(x) for x in samples])
        # A float on the other side of a rounding moves an int8 step of one sample.
        assert effect.drift == pytest.approx(float((logits - full).norm(dim=1).mean()), rel=2e-2, abs=1e-6), effect
        kl = float(F.kl_div(logits.log_softmax(1), full.log_softmax(1), reduction="batchmean", log_target=True))
        assert effect.kl == pytest.approx(kl, rel=4e-2, abs=2e-8), effect
        accuracy = float((logits.argmax(1) == labels).float().mean())
        assert effect.accuracy == pytest.approx(accuracy, abs=1 / len(labels)), effect
        assert effect.accuracy_change == pytest.approx(effect.accuracy - right, abs=1e-6)
        agreement = float((logits.argmax(1) == full.argmax(1)).float().mean())
        assert effect.agreement == pytest.approx(agreement, abs=1 / len(labels)), effect
    # Truncation and rounding are seen. Where a layer's options share a rank, any of them may drift most; in the layers'
    # mean the least drift at least 1.4 times as far as the greatest, over 24 seeds.
    by_layer = [[e.drift for e in effects if e.layer == name] for name in ladder]
    assert all(min(drifts) > 0 and len(set(drifts)) == len(drifts) for drifts in by_layer)
    assert np.mean([drifts[0] / drifts[-1] for drifts in by_layer]) > 1.2


def _effects(labels: bool = True) -> list[Effect]:
    accuracy = 0.75 if labels else None
    return [
        Effect(layer, Option("svd", 8 * (i + 1), bits), drift, drift / 10, 0.9, accuracy, accuracy and -drift)
        for layer, drifts in (("a$<b>", (0.4, 0.2, 0.1)), ("c", (0.3, 0.0)))
        for i, (bits, drift) in enumerate(zip((4, 6, 8), drifts, strict=False))
    ]


def test_the_map_has_a_cell_for_every_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = figures.plot_options(_effects()).axes[0]
    shown = np.ma.filled(axes.images[0].get_array().astype(float), np.nan)
    np.testing.assert_array_equal(shown, [[0.4, 0.2, 0.1], [0.3, 0.0, np.nan]])
    assert [text.get_text() for text in axes.texts] == ["r8\nw4", "r16\nw6", "r24\nw8", "r8\nw4", "r16\nw6"]
    changes = figures.plot_options(_effects(), "accuracy_change").axes[0].images[0]
    assert changes.get_clim() == (-0.4, 0.4)
    figures.draw_options(_effects(), tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    figures.draw_options(_effects(), tmp_path / "map.html")
    page = (tmp_path / "map.html").read_text()
    images = re.findall(r"base64,([^\"]+)\"", page)
    assert len(images) == 3
    assert all(b"<svg" in b64decode(image) for image in images)
    figures.draw_options(_effects(labels=False), tmp_path / "map.html")
    assert (tmp_path / "map.html").read_text().count("<img") == 2
    with pytest.raises(ReportError, match="no accuracy_change: measure sensitivity with labels"):
        figures.plot_options(_effects(labels=False), "accuracy_change")
    with pytest.raises(ReportError, match="no map of 'loss': name one of drift, kl, accuracy_change"):
        figures.plot_options(_effects(), "loss")
    with pytest.raises(ReportError, match=r"map\.bmp: name it \.html, or as an image \(.*png"):
        figures.draw_options(_effects(), tmp_path / "map.bmp")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sensed.py").write_text(
        "import torch\nfrom nets import mlp\n\n"
        "def model():\n    return mlp()[0]\n\n"
        "def data():\n    torch.manual_seed(1)\n    x = torch.randn(32, 64)\n    return [(x, (x.sum(1) > 0).long())]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("sensed", None)
    command = ["sensitivity", "sensed:model", "--input", "float32[4,64]", "--json"]
    data = ["--data", "sensed:data"]
    assert main([*command, *data, "-o", "map.svg"]) == 0
    rows = json.loads(capsys.readouterr().out)
    torch.manual_seed(1)
    x = torch.randn(32, 64)
    whitened = transform(*mlp(), calibration=[(x,)])
    expected = t3c_compile.sensitivity(whitened, [(x,)], (x.sum(1) > 0).long())
    assert [(r["layer"], r["rank"], r["bits"]) for r in rows] == [
        (e.layer, e.option.rank or None, e.option.bits) for e in expected
    ]
    assert [r["drift"] for r in rows] == pytest.approx([e.drift for e in expected], rel=1e-4)
    assert "<svg" in Path("map.svg").read_text()
    for arguments, said in (
        ([], "sensitivity needs --data"),
        ([*data, "-o", "map.bmp"], "cannot draw map.bmp"),
        ([*data, "--target", "z80"], "z80"),
    ):
        assert main([*command, *arguments]) == 1
        assert said in json.loads(capsys.readouterr().err)["message"]
    with pytest.raises(T3CError, match="sensitivity needs samples"):
        t3c_compile.sensitivity(transform(*mlp()), [])
