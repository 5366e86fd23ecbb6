"""The controller: monotone in every budget coordinate, exact gates, gradients through the elastic graph."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from t3c_compile.controller import RESOURCES, Controller, GateTable, apply_gates, gumbel_levels
from t3c_compile.passes.elastic import elastic_layers
from t3c_compile.passes.errors import T3CError
from t3c_compile.passes.option import Option
from t3c_compile.transforming import transform

CHAINS = {
    "one": (Option("dense", 0, 8),),
    "dense": tuple(Option("dense", 0, bits) for bits in (4, 6, 8)),
    "long": tuple(Option("svd", 8 * (i + 1), 4 + i // 4) for i in range(17)),
}


def random_controller(seed: int, spread: float) -> Controller:
    torch.manual_seed(seed)
    controller = Controller(CHAINS)
    with torch.no_grad():
        for parameter in controller.parameters():
            parameter.copy_(torch.randn_like(parameter) * spread)
    return controller


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 30), st.floats(0, 1))
def test_levels_never_fall(seed: int, spread: float, step: float) -> None:
    """100 controllers x 100 pairs of budgets, ``low <= high`` element-wise; steps of a few ulps among them."""
    controller = random_controller(seed, spread)
    low = torch.rand(100, len(RESOURCES))
    raised = low + (1 - low) * torch.rand_like(low) * step
    high = torch.where(torch.rand_like(low) < 0.5, raised, torch.nextafter(low, torch.ones_like(low)))
    high = torch.where(torch.rand_like(low) < 0.3, low, high.clamp(max=1))
    assert bool((high >= low).all())
    assert bool((controller(high) >= controller(low)).all())
    assert bool((controller.levels(high) >= controller.levels(low)).all())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 30))
def test_zero_is_the_least_and_free_the_greatest(seed: int, spread: float) -> None:
    controller = random_controller(seed, spread)
    assert controller.options(torch.zeros(3)) == {name: chain[0] for name, chain in CHAINS.items()}
    assert controller.options(torch.ones(3)) == {name: chain[-1] for name, chain in CHAINS.items()}


def test_the_binding_resource_decides() -> None:
    controller = Controller(CHAINS)
    tight = controller.options(torch.tensor([1.0, 1.0, 0.3]))
    assert tight == controller.options(torch.tensor([0.3, 0.3, 0.3]))
    assert tight["long"] not in (CHAINS["long"][0], CHAINS["long"][-1])


def test_scores_name_layers_and_take_batches() -> None:
    scores = Controller(CHAINS).scores(torch.rand(5, 3))
    assert list(scores) == list(CHAINS)
    assert all(score.shape == (5,) for score in scores.values())
    assert bool((scores["one"] == 0).all())


@pytest.mark.parametrize("budget", [[0.5, 0.5], [0.5, 0.5, 1.5], [0.5, -0.1, 1.0], [0.5, float("nan"), 1.0]])
def test_a_bad_budget_is_refused(budget: list[float]) -> None:
    with pytest.raises(T3CError, match="latency, energy, size as fractions"):
        Controller(CHAINS).scores(torch.tensor(budget))


def test_no_options_are_refused() -> None:
    with pytest.raises(T3CError, match="no options for head"):
        Controller({"head": ()})


def test_sampled_levels_are_exactly_one_hot_and_near_the_score() -> None:
    scores = torch.full((4000,), 2.0)
    levels = gumbel_levels(scores, 6, generator=torch.Generator().manual_seed(0))
    assert bool(((levels == 0) | (levels == 1)).all())
    assert bool((levels.sum(-1) == 1).all())
    # Gumbel-max draws from softmax(-(2 - k)^2); four deviations of 4000 draws.
    expected = torch.softmax(-((2.0 - torch.arange(6)) ** 2), 0)
    assert float((levels.mean(0) - expected).abs().max()) < 4 * (0.25 / 4000) ** 0.5


def test_a_greater_score_raises_the_expected_level() -> None:
    score = torch.tensor(2.0, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    ranks = torch.arange(5.0)
    sum((gumbel_levels(score, 5, generator=generator) @ ranks for _ in range(50)), torch.zeros(())).backward()
    assert score.grad is not None
    assert float(score.grad) > 0


def test_gates_are_prefixes_and_exact() -> None:
    chain = (Option("svd", 2, 4), Option("svd", 3, 6), Option("dense", 0, 8))
    generator, table = torch.Generator().manual_seed(0), GateTable(chain, 5)
    assert table.above == [3, 5, 5]
    seen = set()
    for _ in range(60):
        mask, bits = table.gate(gumbel_levels(torch.tensor(1.0), 3, 1.0, generator))
        assert mask.tolist() in ([1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1])
        assert bits.dim() == 0
        seen.add((mask.sum().item(), bits.item()))
    assert seen == {(2.0, 4.0), (3.0, 6.0), (5.0, 8.0)}


def test_probabilities_weigh_the_prefixes() -> None:
    chain = (Option("svd", 1, 4), Option("svd", 3, 8))
    mask, bits = GateTable(chain, 4).gate(torch.tensor([0.25, 0.75]))
    assert mask.tolist() == [1.0, 0.75, 0.75, 0.0]
    assert float(bits) == 7.0


def test_a_dense_layer_has_an_empty_mask() -> None:
    mask, bits = GateTable((Option("dense", 0, 4), Option("dense", 0, 8)), 0).gate(torch.tensor([0.0, 1.0]))
    assert mask.shape == (0,)
    assert float(bits) == 8.0


@pytest.mark.parametrize("training", [True, False])
def test_gates_reach_the_model_and_gradients_the_controller(training: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64))
    x = torch.randn(16, 64)
    elastic = transform(model, (x,)).train(training)
    options = {name: tuple(Option("svd", rank, bits) for rank, bits in ((8, 4), (16, 6), (24, 8))) for name in "03"}
    controller = Controller(options)
    ranks = {name: layer.max_rank for name, layer in elastic_layers(elastic)}

    def gates(levels: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: GateTable(options[name], ranks[name]).gate(level) for name, level in levels.items()}

    scores = controller.scores(torch.full((3,), 0.5))
    sampled = gates({name: gumbel_levels(score, 3) for name, score in scores.items()})
    apply_gates(elastic, sampled, (x,)).square().mean().backward()
    for name, parameter in controller.named_parameters():
        assert parameter.grad is not None
        assert float(parameter.grad.norm()) > 0, name
    # The model's own gates are as they were: full rank.
    assert float(elastic.get_submodule("0").gate.mask.sum()) == 64

    if not training:
        least = apply_gates(elastic, gates({name: torch.eye(3)[0] for name in options}), (x,))
        elastic.set_options({name: chain[0] for name, chain in options.items()})
        assert torch.equal(least, elastic(x))
