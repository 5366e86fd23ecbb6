"""Worst-case bounds: nothing found in a box, at random or by climbing, drifts further."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from certified import Small, samples
from nets import attention_net
from sklearn.datasets import load_digits
from torch import Tensor, nn

from t3c_compile import affine, snapping
from t3c_compile.affine import Affine, BoundError, relu_beside
from t3c_compile.backends.targets import get_target
from t3c_compile.bounding import VacuousBoundError, WorstCase
from t3c_compile.checkpoint import Checkpoint
from t3c_compile.cli import main
from t3c_compile.manifest import read_manifest
from t3c_compile.passes.elastic import elastic_layers
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.option import Option
from t3c_compile.passes.specialize import specialize
from t3c_compile.profile import Profile
from t3c_compile.transforming import Config, observe, transform


class Residual(nn.Module):
    """Every kind of convolution the forms know, with batch norm, a residual and a mean, on 8x8 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 16, 1, stride=2)
        self.wide = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        y = self.pointwise(F.relu(self.depthwise(x)))
        x = F.relu(y + self.norm2(self.wide(x)))
        return self.head(x.mean((2, 3)))


def _mlp() -> nn.Module:
    layers = (nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10))
    return nn.Sequential(nn.Flatten(), *layers)


@dataclass
class Trained:
    """A network trained on digits, elastic, and profiles of it from the least to the greatest."""

    elastic: ElasticGraphModule
    profiles: list[Profile]
    images: Tensor


def _trained(net: Callable[[], nn.Module], conv: str) -> Trained:
    torch.manual_seed(0)
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(200):
        chosen = torch.randint(1500, (64,))
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert float((model(images[1500:]).argmax(1) == labels[1500:]).float().mean()) > 0.85
    seen = [(images[:300],)]
    elastic = transform(model, (images[:4],), Config(conv=conv), calibration=seen).eval()
    profiles = []
    for name, share, bits in (("least", 0.75, 6), ("greatest", 1.0, 8)):
        options = {n: Option(layer.form, int(share * layer.max_rank), bits) for n, layer in elastic_layers(elastic)}
        elastic.set_options(options)
        observe(elastic, seen)
        ranges = {n: layer.activations() for n, layer in elastic_layers(elastic)}
        profiles.append(Profile(name, options, ranges, 0))
    elastic.set_full()
    return Trained(elastic, profiles, images[1500:])


@pytest.fixture(scope="module", params=["mlp", "tucker2", "cp"])
def trained(request: pytest.FixtureRequest) -> Trained:
    return _trained(_mlp, "tucker2") if request.param == "mlp" else _trained(Residual, request.param)


class Attack:
    """Looks for inputs of a box where a profile drifts far from the full model."""

    def __init__(self, trained: Trained, profile: Profile) -> None:
        self.full, self.profile = trained.elastic, profile
        self.deployed = specialize(trained.elastic, profile.options, profile.activations)
        self.generator = torch.Generator().manual_seed(1)

    @torch.no_grad()
    def drift(self, x: Tensor) -> Tensor:
        """[n, logits], of the deployed integers from the full model in float32."""
        return self.deployed(x) - self.full(x)

    def trained_drift(self, x: Tensor) -> Tensor:
        """The same with gradients, which pass the roundings by."""
        full = self.full(x)
        layers = dict(elastic_layers(self.full))
        for name, activations in self.profile.activations.items():
            layers[name].set_activations(activations)
        self.full.set_options(self.profile.options)
        found = self.full(x) - full
        self.full.set_full()
        return found

    def worst(self, low: Tensor, high: Tensor) -> tuple[float, float]:
        """Greatest drift found, of a logit and in 2-norm."""
        shares = torch.rand(160, *low.shape[1:], generator=self.generator)
        shares[::2] = shares[::2].round()  # corners
        found = [low + (high - low) * shares]
        goals = torch.cat([torch.eye(10), -torch.eye(10)])
        x = low + (high - low) * torch.rand(len(goals), *low.shape[1:], generator=self.generator)
        for _ in range(12):
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad((self.trained_drift(x) * goals).sum(), x)
            x = torch.minimum(torch.maximum(x + (high - low) / 6 * slope.sign(), low), high)
            found.append(x)
        drift = self.drift(torch.cat(found).detach())
        return float(drift.abs().max()), float(drift.norm(dim=1).max())


def test_no_input_of_a_box_drifts_beyond_the_bound(trained: Trained) -> None:
    """Boxes of one image, and of 0.2%, 0.5% and 2.5% of the pixels' range to each side."""
    ratios: dict[float, list[float]] = {}
    for profile in trained.profiles:
        worst_case, attack = WorstCase(trained.elastic, profile), Attack(trained, profile)
        for image, radius in product(trained.images[:40:20, None], (0.0, 0.004, 0.01, 0.05)):
            low, high = image - radius, image + radius
            try:
                bound = worst_case.bound(low, high)
            except VacuousBoundError:
                continue
            linf, l2 = attack.worst(low, high)
            assert linf <= bound.linf, (profile.name, radius)
            assert l2 <= bound.l2, (profile.name, radius)
            ratios.setdefault(radius, []).append(bound.l2 / l2)
    medians = {radius: float(torch.tensor(found).median()) for radius, found in ratios.items()}
    print("bound over the worst drift found, by radius:", medians)
    # Bounds are there, and tight.
    assert len(ratios[0.0]) == len(ratios[0.004]) == 4
    assert medians[0.0] < 1.05
    assert medians[0.004] < 16


def test_the_whole_range_of_the_data_is_refused_as_vacuous(trained: Trained) -> None:
    low = torch.full_like(trained.images[:1], -1.0)
    with pytest.raises(VacuousBoundError, match=r"vacuous: .* a smaller box or a greater profile"):
        WorstCase(trained.elastic, trained.profiles[0]).bound(low, -low)


def test_the_command(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact, checkpoint = small.copy(tmp_path), str(tmp_path / "m.safetensors")
    x = torch.from_numpy(samples(3, seed=5))
    Checkpoint(small.elastic, (x,)).save(checkpoint)
    np.savez(tmp_path / "samples.npz", x=x.numpy())
    command = ["bound", str(artifact), "--reference", checkpoint, "--data", str(tmp_path / "samples.npz"), "--json"]
    assert main([*command, "--radius", "0.01"]) == 0
    rows = json.loads(capsys.readouterr().out)
    profiles = [Profile.from_json(profile) for profile in read_manifest(artifact)["profiles"]]
    for row, profile in zip(rows, profiles, strict=True):
        worst_case = WorstCase(small.elastic, profile)
        expected = sorted(worst_case.bound(sample - 0.01, sample + 0.01).l2 for sample in x[:, None])
        assert (row["profile"], row["samples"], row["bounded"], row["reason"]) == (profile.name, 3, 3, None)
        assert [row["l2_median"], row["l2_greatest"]] == pytest.approx(expected[1:], rel=1e-6)
    # The greatest profile is the full model: what is left is what float32 rounds.
    assert 0 < rows[-1]["l2_greatest"] < 0.05 < rows[-2]["l2_median"]
    assert main([*command, "--radius", "2"]) == 0
    row = json.loads(capsys.readouterr().out)[0]
    assert (row["bounded"], row["linf_greatest"]) == (0, None)
    assert "the bound is vacuous" in row["reason"]
    assert main([*command, "--radius", "-1"]) == 1
    assert "must not be negative" in capsys.readouterr().err


# -- affine forms -----------------------------------------------------------------------------------------------------


def _forms(generator: torch.Generator) -> tuple[Affine, Affine, Callable[[Affine], Tensor], Tensor]:
    """Two forms of 400 elements that share two groups of symbols, what a form is at one draw of them (without its box),
    and draws of what a box may be."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    sizes = {next(affine._GROUPS): size for size in (3, 5)}
    draws = {g: 2 * torch.rand(200, n, generator=generator, dtype=torch.float64) - 1 for g, n in sizes.items()}
    for draw in draws.values():
        draw[:100].sign_()  # the ends
    first = Affine(random(1, 400) * 2, {g: random(n, 400) for g, n in sizes.items()}, random(1, 400).abs() / 4)
    near = {g: part + random(*part.shape) / 10 for g, part in first.parts.items()}
    other = Affine(first.center + random(1, 400) / 3, near, random(1, 400).abs() / 8)

    def at(form: Affine) -> Tensor:
        return form.center + sum(draws[g] @ part for g, part in form.parts.items() if g in draws)

    return first, other, at, 2 * torch.rand(200, 400, generator=generator, dtype=torch.float64) - 1


def _rest(form: Affine, known: Affine) -> Tensor:
    """What a form may be off by at given values of the symbols of ``known``."""
    return form.box + sum(part.abs().sum(0) for group, part in form.parts.items() if group not in known.parts)


def test_what_affine_forms_enclose() -> None:
    """Each draw's exact result lies in the form that is made, at the same symbols."""
    x, other, at, share = _forms(torch.Generator().manual_seed(0))
    real, beside = at(x) + share * x.box, at(other) + share.flip(0) * other.box

    def assert_encloses(form: Affine, values: Tensor) -> None:
        assert bool(((values - at(form)).abs() <= _rest(form, x) + 1e-12).all())

    matrix = torch.randn(30, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_encloses(x + other, real + beside)
    assert_encloses(x - other, real - beside)
    assert_encloses(x.scaled(matrix[:1]).shifted(matrix[1:2]), real * matrix[0] + matrix[1])
    assert_encloses(x.relu(), real.clamp_min(0))
    for step, least, greatest in ((0.1, -12.8, 12.7), (0.7, 0.0, 2.1), (0.3, -1.5, 0.9), (40.0, -80.0, 80.0)):
        rounded = torch.clamp(torch.round(real / step) * step, least, greatest)
        first, last = (torch.clamp(torch.round(end / step) * step, least, greatest) for end in x.bounds())
        assert_encloses(x.rounded(step, least, greatest, first, last), rounded)
    other_relu = other.relu().spread()
    y = relu_beside(x, other, other_relu)
    assert_encloses(y, real.clamp_min(0))
    # Side by side: the difference is enclosed more tightly than what each is by itself.
    alone = (x.relu() - other_relu).radius().sum()
    assert float((y - other_relu).radius().sum()) < 0.8 * float(alone)
    assert_encloses(Affine(x.center, dict(x.parts), x.box).mapped(lambda t: t @ matrix.T), real @ matrix.T)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_what_has_no_bound_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(model: nn.Module, *inputs: Tensor) -> WorstCase:
        elastic = transform(model.eval(), inputs).eval()
        return WorstCase(elastic, snapping.snap(elastic, [inputs], [get_target("x86_64")], count=1).profiles[0])

    with pytest.raises(BoundError, match=r"layer_norm\S* has no worst-case bound; there are those of .*svd_linear"):
        made(attention_net()[0], *attention_net()[1])

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.layer(x + y)

    with pytest.raises(BoundError, match="the model takes x, y: worst-case bounds are for one input"):
        made(Two(), torch.randn(4, 32), torch.randn(4, 32))

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer = nn.Embedding(40, 32), nn.Linear(32, 32)

        def forward(self, words: Tensor) -> Tensor:
            return self.layer(self.table(words).relu())

    with pytest.raises(BoundError, match="layer table has no worst-case bound"):
        made(Words(), torch.randint(0, 40, (4, 5)))
    small = made(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)), torch.randn(4, 64))
    x = torch.randn(1, 64)
    with pytest.raises(BoundError, match="ends of a box of one sample"):
        small.bound(x, x - 1)
    with pytest.raises(BoundError, match="ends of a box of one sample"):
        small.bound(torch.zeros(2, 64), torch.ones(2, 64))
    monkeypatch.setattr(affine, "_MOST", 1000)
    with pytest.raises(BoundError, match="too large for a worst-case bound"):
        small.bound(x - 0.1, x + 0.1)
