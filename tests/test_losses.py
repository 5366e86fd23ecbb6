"""The loss terms against values worked out by hand, and their gradients against finite differences."""

import math

import pytest
import torch
from torch import Tensor, nn

from t3c_compile.backends.targets import get_target
from t3c_compile.chain import Grid, chains
from t3c_compile.cost import profile_cost
from t3c_compile.losses import (
    LevelsCost,
    budget_penalty,
    certificate_penalty,
    consistency,
    self_distillation,
    task_loss,
)
from t3c_compile.passes.elastic import elastic_layers
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.transforming import Config, transform

TARGET = get_target("cortex-a76")


def logits(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def test_task_loss_is_cross_entropy() -> None:
    two = torch.cat([logits(0.5, 0.5), logits(0.2, 0.8)])
    assert float(task_loss(two, torch.tensor([0, 1]))) == pytest.approx(-(math.log(0.5) + math.log(0.8)) / 2)
    # Tokens are samples too.
    assert float(task_loss(two[None], torch.tensor([[0, 1]]))) == pytest.approx(-(math.log(0.5) + math.log(0.8)) / 2)


def test_label_smoothing_mixes_in_the_uniform_distribution() -> None:
    expected = -(0.9 * math.log(0.8) + 0.1 * (math.log(0.8) + math.log(0.2)) / 2)
    assert float(task_loss(logits(0.2, 0.8), torch.tensor([1]), label_smoothing=0.1)) == pytest.approx(expected)


def test_self_distillation_is_kl_from_full_to_elastic() -> None:
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert float(self_distillation(logits(0.75, 0.25), logits(0.5, 0.5))) == pytest.approx(expected)


def test_self_distillation_at_a_temperature() -> None:
    # softmax(log([16, 1]) / 2) = [4, 1] / 5.
    expected = 4 * (0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5))
    found = self_distillation(logits(16.0, 1.0), logits(0.5, 0.5), temperature=2.0)
    assert float(found) == pytest.approx(expected)


def test_consistency_is_a_mean_over_samples() -> None:
    same, moved = logits(0.75, 0.25), logits(0.5, 0.5)
    expected = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    assert float(consistency(torch.cat([same, same]), torch.cat([same, moved]))) == pytest.approx(expected)


@pytest.mark.parametrize("term", [self_distillation, consistency])
def test_only_the_student_gets_a_gradient(term) -> None:  # type: ignore[no-untyped-def]
    teacher, student = logits(0.7, 0.3).requires_grad_(), logits(0.4, 0.6).requires_grad_()
    term(teacher, student).backward()
    assert teacher.grad is None
    # d KL / d logits = softmax(student) - softmax(teacher).
    torch.testing.assert_close(student.grad, torch.tensor([[-0.3, 0.3]], dtype=torch.float64))


@pytest.mark.parametrize(("drift", "expected"), [(0.2, 0.0), (0.5, 0.0), (0.75, 0.25)])
def test_certificate_penalty_starts_at_epsilon(drift: float, expected: float) -> None:
    assert float(certificate_penalty(torch.tensor(drift), 0.5)) == expected


def test_budget_penalty_sums_relative_excess() -> None:
    cost = torch.tensor([1.5, 0.5, 0.3])
    assert float(budget_penalty(cost, torch.tensor([1.0, 1.0, 0.2]))) == pytest.approx(0.5 + 0.5)
    assert float(budget_penalty(cost, torch.tensor([2.0, 0.5, 0.3]))) == 0.0


def test_gradients_agree_with_finite_differences() -> None:
    torch.manual_seed(0)
    student = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    teacher, labels = torch.randn(3, 5, dtype=torch.float64), torch.tensor([0, 3, 4])
    drift = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    cost = torch.tensor([1.5, 0.5, 0.3], dtype=torch.float64, requires_grad=True)
    budget = torch.tensor([1.0, 1.0, 0.2], dtype=torch.float64)
    check = torch.autograd.gradcheck
    assert check(lambda z: task_loss(z, labels, 0.1), student)
    assert check(lambda z: self_distillation(teacher, z, 3.0), student)
    assert check(lambda z: consistency(teacher, z), student)
    assert check(lambda d: certificate_penalty(d, 0.5), drift)
    assert check(lambda c: budget_penalty(c, budget), cost)


@pytest.fixture(scope="module")
def elastic() -> ElasticGraphModule:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 48, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(768, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    return transform(model, (torch.randn(2, 3, 8, 8),), Config(rank_multiple=8))


def test_levels_cost_is_the_profile_cost(elastic: ElasticGraphModule) -> None:
    options = chains(elastic, Grid(8, (4, 6, 8)))
    cost = LevelsCost(elastic, options, TARGET)
    most = profile_cost(elastic, {name: chain[-1] for name, chain in options.items()}, TARGET)
    longest = max(map(len, options.values()))
    for pick in (0, 1, -1):
        one = profile_cost(elastic, {name: chain[pick] for name, chain in options.items()}, TARGET)
        expected = [one.latency_ms / most.latency_ms, one.energy_mj / most.energy_mj, one.size_bytes / most.size_bytes]
        levels = torch.stack([torch.eye(longest)[range(len(chain))[pick]] for chain in options.values()])
        torch.testing.assert_close(cost(levels), torch.tensor(expected), rtol=1e-5, atol=0)
        if pick == 0:
            torch.testing.assert_close(cost.least, torch.tensor(expected), rtol=1e-5, atol=0)


def test_levels_cost_counts_a_dense_option_as_dense(elastic: ElasticGraphModule) -> None:
    # No rank on this grid pays, so chains fall back to dense options of factored layers.
    options = chains(elastic, Grid(512, (4, 8)))
    layers = dict(elastic_layers(elastic))
    assert any(layers[name].form != "dense" and chain[-1].form == "dense" for name, chain in options.items())
    levels = torch.tensor([[0.0, 1.0]]).expand(len(options), 2)
    torch.testing.assert_close(LevelsCost(elastic, options, TARGET)(levels), torch.ones(3))


def test_a_greater_level_costs_more_size(elastic: ElasticGraphModule) -> None:
    options = chains(elastic, Grid(8, (4, 6, 8)))
    levels = torch.zeros(len(options), max(map(len, options.values())), requires_grad=True)
    LevelsCost(elastic, options, TARGET)(levels)[2].backward()
    assert levels.grad is not None
    for (name, chain), gradient in zip(options.items(), levels.grad, strict=True):
        assert bool((gradient[1 : len(chain)] > gradient[: len(chain) - 1]).all()), name
