"""The benchmark of the paper's tables: loaders, what each baseline really does to weights, the page from the cells."""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.paper import files, table
from benchmarks.paper.__main__ import Run, read
from benchmarks.paper.baselines import BASELINES, low_rank, pruned, sparse_gpt
from benchmarks.paper.deploy import Compressed, logits_of, lower, torch_logits
from benchmarks.paper.latency import measure
from benchmarks.paper.tasks import Task
from benchmarks.paper.training import Start, fit
from t3c_compile.passes.elastic import elastic_layers
from t3c_compile.passes.errors import T3CError

# -- data ---------------------------------------------------------------------------------------------------------


def test_package_windows_share_no_words_and_leave_tests_out(tmp_path: Path) -> None:
    # Words of one length, so that no cut is inside one, each there once: one seen in two parts would show.
    known = [w for w in (f"word{i:04d}" for i in range(5000)) if files.words(w.encode())[0] > 1]
    unique = list({int(files.words(w.encode())[0]): w for w in known}.values())[:960]
    for index, name in enumerate(("one", "two")):
        (tmp_path / name / "tests").mkdir(parents=True)
        (tmp_path / name / "a.py").write_text(" ".join(unique[480 * index :][:480]))
        (tmp_path / name / "tests" / "test_a.py").write_text("never " * 500)
    parts = files.package_windows([tmp_path / "one", tmp_path / "two"], 9, 40)
    assert [x.shape[1] for x, _ in parts] == [9, 9, 9]
    assert [len(y) for _, y in parts] == [80, 10, 12]
    assert all((np.bincount(y) == len(y) // 2).all() for _, y in parts)
    assert all((x[:, 0] == 0).all() for x, _ in parts)
    seen = [set(x[:, 1:].flatten().tolist()) for x, _ in parts]
    assert [len(ids) for ids in seen] == [640, 80, 96]
    assert len(seen[0] | seen[1] | seen[2]) == 816
    second = set(files.words((tmp_path / "two" / "a.py").read_bytes()).tolist())
    assert all(set(row[1:].tolist()) <= second for x, y in parts for row in x[y == 1])
    with pytest.raises(T3CError, match="no Python source"):
        files.package_windows([tmp_path / "one" / "tests"], 9, 8)


def test_texts_from_a_folder_or_one_file(tmp_path: Path) -> None:
    for name in ("train", "valid", "test"):
        (tmp_path / f"wiki.{name}.tokens").write_bytes(name.encode() * 10)
    texts = files.read_texts(tmp_path)
    assert [text[:4] for text in texts] == [b"trai", b"vali", b"test"]
    x, y = files.next_bytes(texts[0], 4, 100)
    assert bytes(x[1].astype(np.uint8)) == texts[0][5:9]
    assert (x[:, 1:] == y[:, :-1]).all()
    alone = tmp_path / "wiki.train.tokens"
    assert b"".join(files.read_texts(alone)) == alone.read_bytes()
    (tmp_path / "wiki.test.tokens").unlink()
    with pytest.raises(T3CError, match=r"one file each.*\['test'\]"):
        files.read_texts(tmp_path)
    with pytest.raises(T3CError, match="no piece"):
        files.next_bytes(b"abc", 4, 1)


def test_image_folders(tmp_path: Path) -> None:
    with pytest.raises(T3CError, match="no folder train and no val"):
        files.image_folders(tmp_path, 8)
    for part, count in (("train", 8), ("val", 2)):
        for shade, name in ((40, "dark"), (220, "light")):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (12, 10), (shade,) * 3).save(tmp_path / part / name / f"{index}.png")
    train, calibration, test = files.image_folders(tmp_path, 8)
    assert (len(train), len(calibration), len(test)) == (12, 4, 4)
    assert not set(train.indices) & set(calibration.indices)
    x, y = test[3]
    assert x.shape == (3, 8, 8)
    assert y == test.class_to_idx["light"]
    assert x[0, 0, 0].item() == pytest.approx((220 / 255 - 0.485) / 0.229, abs=1e-5)
    (tmp_path / "val" / "grey").mkdir()
    (tmp_path / "val" / "grey" / "0.png").write_bytes((tmp_path / "val" / "dark" / "0.png").read_bytes())
    with pytest.raises(T3CError, match="other classes"):
        files.image_folders(tmp_path, 8)


def test_glue_without_datasets_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(T3CError, match="pip install datasets"):
        files.read_glue(tmp_path, 8)


# -- what baselines do to weights ---------------------------------------------------------------------------------


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 4))


@pytest.fixture(scope="module")
def start() -> Start:
    """A small network trained on what a teacher of random weights says."""
    torch.manual_seed(0)
    teacher, x = net(), torch.randn(480, 48)
    data = TensorDataset(x, teacher(3 * x).argmax(1))
    parts = [torch.utils.data.Subset(data, range(a, b)) for a, b in ((0, 320), (320, 400), (400, 480))]
    task = Task("toy", "accuracy", net, *parts, 32, 8, 2, 1e-2, 1e-3)
    model = task.build()
    fit(task, model, model.parameters(), epochs=task.float_epochs, lr=task.float_lr, seed=0)
    return Start(task, model.eval(), 0)


@pytest.fixture(scope="module")
def compressed(start: Start) -> dict[str, Compressed]:
    before = copy.deepcopy(start.model.state_dict())
    # Rank and plain quantization-aware training have layers and a test of their own.
    found = {name: BASELINES[name].compress(start) for name in BASELINES if name not in ("lr_ft", "qat8")}
    # Each method starts from the same model, so none may change it.
    assert all(torch.equal(before[name], tensor) for name, tensor in start.model.state_dict().items())
    return found


def levels(found: Compressed) -> dict[str, int]:
    """The greatest number of different values in a row of each layer's weight, as deployed."""
    counts = {}
    for name, layer in elastic_layers(found.elastic):
        weight = layer.dense_weight(found.options[name])
        counts[name] = max(len(row.unique()) for row in weight)
    return counts


@pytest.mark.parametrize("name", ["ptq4", "kd_ptq"])
def test_four_bits_are_four_bits(compressed: dict[str, Compressed], name: str) -> None:
    found = compressed[name]
    assert {option.bits for option in found.options.values()} == {4}
    assert max(levels(found).values()) <= 15
    assert max(levels(compressed["ptq8"]).values()) > 15


def test_mixed_precision_has_the_width_it_says(compressed: dict[str, Compressed]) -> None:
    found = compressed["mp_qat"]
    sizes = {name: layer.dense_weight().numel() for name, layer in elastic_layers(found.elastic)}
    bits = {name: option.bits for name, option in found.options.items()}
    assert set(bits.values()) == {4, 8}
    mean = sum(sizes[name] * bits[name] for name in sizes) / sum(sizes.values())
    assert mean <= 5.0
    assert found.facts["mean_bits"] == mean
    assert all(levels(found)[name] <= 15 for name in sizes if bits[name] == 4)


@pytest.mark.parametrize(("name", "sparsity"), [("magprune", 0.8), ("moveprune", 0.8), ("sparsegpt", 0.5)])
def test_pruned_weights_are_gone_from_what_is_deployed(
    compressed: dict[str, Compressed], name: str, sparsity: float
) -> None:
    found = compressed[name]
    weights = [layer.store(0)["weight"] for _, layer in elastic_layers(found.elastic)]
    zeros, numbers = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
    # Rounding to int8 makes a few more zeros.
    assert sparsity - 0.005 <= zeros / numbers <= sparsity + 0.03
    assert found.facts["sparsity"] == zeros / numbers
    assert found.saved == pytest.approx(numbers - (numbers / 8 + numbers - zeros), abs=len(weights))


def test_sparse_bytes_is_the_better_of_two_ways() -> None:
    weight = torch.ones(16, 10, dtype=torch.int8)
    assert pruned.sparse_bytes(weight) == 160
    weight[:12] = 0
    assert pruned.sparse_bytes(weight) == 20 + 40


def test_sparse_gpt_beats_magnitude_on_correlated_inputs() -> None:
    torch.manual_seed(0)
    # More columns than one block, so that errors are handed on from block to block.
    weight, x = torch.randn(24, 160), torch.randn(2000, 20) @ torch.randn(20, 160) + 0.1 * torch.randn(2000, 160)
    pruned_weight = sparse_gpt.prune_columns(weight, x.T @ x, 0.5)
    assert (pruned_weight == 0).float().mean().item() == pytest.approx(0.5, abs=0.001)
    smallest = torch.where(weight.abs() > weight.abs().median(), weight, 0)
    ours, theirs = (float((x @ (w - weight).T).norm()) for w in (pruned_weight, smallest))
    assert ours < 0.5 * theirs


def test_columns_of_a_convolution_are_what_its_weight_multiplies() -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False), torch.randn(2, 3, 7, 7)
    product = sparse_gpt.columns(layer, x) @ layer.weight.flatten(1).T
    torch.testing.assert_close(product, layer(x).permute(0, 2, 3, 1).reshape(-1, 5))


def test_movement_scores_fall_where_weights_move_to_zero() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(6, 8), torch.randn(5, 8)
    mask = pruned.Movement(weight)
    mask.sparsity = 0.5
    with torch.no_grad():
        mask.scores.copy_(torch.arange(48.0).view(6, 8))
    masked = mask(weight)
    assert torch.equal(masked, torch.where(torch.arange(48).view(6, 8) >= 24, weight, 0))
    masked.retain_grad()
    F.linear(x, masked).square().sum().backward()
    assert mask.scores.grad is not None
    assert masked.grad is not None
    # Equation 2: also for weights that are masked now, so that they may come back.
    torch.testing.assert_close(mask.scores.grad, masked.grad * weight)
    assert pruned.scheduled(0, 0.8) == 0
    assert pruned.scheduled(0.7, 0.8) == pruned.scheduled(1, 0.8) == 0.8


def test_fixed_ranks_take_a_quarter_of_the_products() -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(40, 256), torch.zeros(40, dtype=torch.int64))
    task = Task("wide", "accuracy", net, data, data, data, 20, 1, 1, 1e-3, 1e-3)
    found = low_rank.fine_tuned(Start(task, nn.Sequential(nn.Linear(256, 192), nn.Linear(192, 4)), 0))
    (name, layer), (narrow, _) = elastic_layers(found.elastic)
    option = found.options[name]
    assert (option.form, option.rank, option.bits) == ("svd", 16, 8)
    assert torch.linalg.matrix_rank(layer.dense_weight(option)) == 16
    # No rank of four outputs costs so little.
    assert found.options[narrow].form == "dense"


def test_adapters_start_as_what_four_bits_lose_and_alone_are_trained(
    start: Start, compressed: dict[str, Compressed]
) -> None:
    layer = copy.deepcopy(start.model[0])
    adapted = low_rank.Adapted(layer)
    rounded = low_rank.rounded(layer.weight, 4)
    assert max(len(row.unique()) for row in rounded) <= 15
    with torch.no_grad():
        left = layer.weight - rounded - adapted.up.weight @ adapted.down.weight
        # The best of rank 8: what stays are the other singular values.
        lost = torch.linalg.svdvals(layer.weight - rounded)
    assert float(left.norm()) == pytest.approx(float(lost[8:].norm()), rel=1e-3)
    found = compressed["lora_comp"]
    bits = {name: option.bits for name, option in found.options.items()}
    assert bits == {"0.base": 4, "0.down": 8, "0.up": 8, "2.base": 4, "2.down": 8, "2.up": 8, "4": 4}
    layers = dict(elastic_layers(found.elastic))
    assert torch.equal(layers["0.base"].weight, start.model[0].weight)
    assert not torch.equal(layers["0.up"].weight, adapted.up.weight)


def test_deployed_in_float32_and_in_eight_bits(start: Start, compressed: dict[str, Compressed], tmp_path: Path) -> None:
    full = torch_logits(start.model, start.task)
    for name, error, width in (("fp32", 1e-5, 4), ("ptq8", 0.05, 1)):
        path = tmp_path / f"{name}.t3c"
        size = lower(compressed[name], start.task, path)
        logits = logits_of(path, start.task)
        assert float((logits - full).norm() / full.norm()) < error
        numbers = 2 * 48 * 48 + 48 * 4
        outputs = 48 + 48 + 4
        assert size == width * numbers + 8 * outputs
    np.save(tmp_path / "input.npy", np.zeros((4, 48), np.float32))
    times = measure(tmp_path, 4)
    assert set(times) == {"fp32/p0", "ptq8/p0"}
    assert all(0 < found["p50"] <= found["p90"] for found in times.values())


# -- cells and the page -------------------------------------------------------------------------------------------


def cells(medium: float, dense: float, slow: float = 1.0) -> list[dict[str, Any]]:
    """Two seeds of four methods; T3C's score and the dense baselines' are given, and how much slower T3C is."""
    found: list[dict[str, Any]] = []
    for seed in (0, 1):
        head = {"task": "digits_cnn", "seed": seed, "metric": "accuracy", "epochs": [40, 10], "seconds": 1.0}
        for method, score, size in (("fp32", 99.0, 4000), ("ptq8", dense + seed, 1000), ("ptq4", dense - 1, 400)):
            sizes = {"size_bytes": size, "store_bytes": size}
            found.append({**head, "method": method, "score": score, **sizes, "drift": 0.5})
        profiles = [
            {"size": size, "profile": f"p{i}", "score": medium, "size_bytes": 100 * (i + 2), "drift": 0.1}
            | {"bound": 1.0, "held": 0.96}
            for i, size in enumerate(table.SIZES)
        ]
        found.append({**head, "method": "t3c", "profiles": profiles, "store_bytes": 900, "notes": []})
        times = {f"{name}/p0": 1.0 for name in ("fp32", "ptq8", "ptq4")} | {
            f"t3c/p{i}": slow * 0.1 * (i + 5) for i in range(5)
        }
        timed = {key: {"p50": v, "p90": v, "batch_p50": v, "violations": 0.25} for key, v in times.items()}
        found.append({**head, "method": "latency", "methods": [], "times": timed})
    return found


def test_page_has_means_sizes_and_commands_for_what_is_empty(tmp_path: Path) -> None:
    table.write_page(cells(98.8, 98.0), tmp_path / "docs" / "paper.md")
    page = (tmp_path / "docs" / "paper.md").read_text()
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in reversed(page.splitlines()) if " | " in line}
    assert "| 98.50 ± 0.71 | 1.000 ± 0.000 |" in lines["PTQ-8b"]
    assert "| 1.0 | 1.00 |" in lines["PTQ-8b"]
    assert "| 0.4 | 0.40 | 0.10 ± 0.00 | 1.00 ± 0.00 | 96.0% | 25.0% |" in lines["T3C Medium"]
    assert "`python -m benchmarks.paper --tasks digits_cnn --methods qat8`" in lines["QAT-8b"]
    assert "--tasks lm --methods t3c" in page


@pytest.mark.parametrize(
    ("medium", "dense", "reached"),
    [
        (98.8, 99.0, (True, True, True)),
        # PTQ-4b, as small as Medium, has 99.0 then; and Medium loses a point against float32.
        (98.0, 100.0, (False, False, True)),
    ],
)
def test_goals_say_what_was_missed(medium: float, dense: float, reached: tuple[bool, ...]) -> None:
    found = table.goals(cells(medium, dense))
    assert tuple(goal[2] for goal in found if goal[2] is not None) == reached
    assert "PTQ-4b" in found[0][1]
    assert "0.70 of its p50" in found[0][1]
    late = table.goals(cells(medium, dense, slow=1.2))
    assert late[0][2] is False
    assert "0.84 of its p50" in late[0][1]


def test_goals_without_a_baseline_as_small_say_so() -> None:
    slim = cells(98.8, 98.0)
    for cell in slim:
        for profile in cell.get("profiles", ()):
            profile["size_bytes"] //= 2
    assert "no baseline is as small (0 kB)" in table.goals(slim)[0][1]


def test_cells_that_are_there_are_not_run_again(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "paper.json"
    monkeypatch.setattr("benchmarks.paper.__main__.WORK", tmp_path)
    ran: list[str] = []
    monkeypatch.setattr(Run, "_method", lambda self, name: lambda: ran.append(name) or {"score": 1.0})
    task = replace(start.task, epochs=3)
    for _ in range(2):
        run = Run(task, 0, results, lambda text: None, Console(quiet=True))
        run.methods(["ptq8", "ptq4"], lambda: None)
        (run.folder / "ptq8.t3c").mkdir(exist_ok=True)
    # The second has no artifact, and nobody has timed it.
    assert ran == ["ptq8", "ptq4", "ptq4"]
    assert [cell["method"] for cell in read(results)] == ["ptq8", "ptq4"]
    other = Run(replace(task, epochs=4), 0, results, lambda text: None, run.console)
    assert other.cells() == {}
    assert len([json.loads(line) for line in results.read_text().splitlines()]) == 3
