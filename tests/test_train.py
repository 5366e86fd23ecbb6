"""The trainer on real digits: it helps, resumes, repeats, and refuses bad input; over processes: test_distributed."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from t3c_compile.backends.targets import get_target
from t3c_compile.chain import Grid, chains
from t3c_compile.controller import Controller, Gates
from t3c_compile.losses import LevelsCost, budget_penalty
from t3c_compile.passes.elastic import elastic_layers
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.training import ElasticLoss, LossWeights, TrainError, TrainResult, train
from t3c_compile.transforming import Config, observe, transform

DIGITS = Path(__file__).resolve().parent.parent / "examples" / "digits"
GRID = Grid(8, (4, 6, 8))
TARGET = get_target("cortex-a76")
# Only the task term, so that a test adds the one it is about.
PLAIN = LossWeights(distillation=0, consistency=0, certificate=0, budget=0)


@pytest.fixture(scope="module")
def digits() -> Iterator[object]:
    pytest.importorskip("sklearn")
    sys.path.insert(0, str(DIGITS))
    import data

    yield data
    sys.path.remove(str(DIGITS))


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def elastic_model() -> ElasticGraphModule:
    return transform(small_model().eval(), (torch.randn(8, 1, 8, 8),), Config(rank_multiple=8))


def random_batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 1, 8, 8, generator=generator), torch.randint(10, (16,), generator=generator))
        for _ in range(count)
    ]


def quick(elastic: ElasticGraphModule, batches, **options) -> TrainResult:  # type: ignore[no-untyped-def]
    return train(elastic, batches, **{"epochs": 2, "progress": False, "target": TARGET, **options})


def same_state(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture(scope="module")
def trained(digits) -> nn.Module:  # type: ignore[no-untyped-def]
    """The small model, trained for a few seconds in float32."""
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(12):
        for x, y in digits.Batches(digits.load().train, 32, augmented=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def set_least(elastic: ElasticGraphModule, images: Tensor) -> None:
    elastic.set_options({name: chain[0] for name, chain in chains(elastic, GRID).items()})
    observe(elastic, [(part,) for part in images.split(60)])


def test_training_raises_the_least_profile(digits, trained: nn.Module) -> None:  # type: ignore[no-untyped-def]
    data = digits.load()
    elastic = transform(trained, (data.train[0][:60],), Config(rank_multiple=8))
    full = digits.accuracy(elastic, data.test)
    set_least(elastic, data.calibration[0])
    before = digits.accuracy(elastic, data.test)
    controller = Controller(chains(elastic, GRID))
    quick(elastic, digits.Batches(data.train, 64, augmented=True), epochs=6, controller=controller)
    assert digits.accuracy(elastic, data.test) >= full - 0.01
    set_least(elastic, data.calibration[0])
    # Of what it is below the full model untrained, half at least is made good.
    assert full - before >= 0.03
    assert digits.accuracy(elastic, data.test) >= (full + before) / 2


def test_the_model_is_left_at_full_rank() -> None:
    elastic = elastic_model()
    set_least(elastic, random_batches()[0][0])
    quick(elastic, random_batches(), epochs=1)
    for _, layer in elastic_layers(elastic):
        assert layer.gate is not None
        assert float(layer.gate.bits) == 32
        assert bool((layer.gate.mask == 1).all())


def observed_model() -> ElasticGraphModule:
    elastic = elastic_model()
    observe(elastic, [random_batches()[0][:1]])
    return elastic.eval()


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole, file = elastic_model(), tmp_path / "deep" / "run.pt"
    controller = Controller(chains(whole, GRID))
    result = quick(whole, random_batches(), epochs=4, controller=controller)

    class Stops(list):  # type: ignore[type-arg]
        epochs = 0

        def __iter__(self) -> Iterator[object]:
            self.epochs += 1
            if self.epochs == 3:
                raise KeyboardInterrupt
            return super().__iter__()

    broken = elastic_model()
    started = Controller(chains(broken, GRID))
    with pytest.raises(KeyboardInterrupt):
        quick(broken, Stops(random_batches()), epochs=4, controller=started, checkpoint=file)
    assert [path.name for path in file.parent.iterdir()] == ["run.pt"]

    fresh, again = elastic_model(), Controller(chains(whole, GRID))
    resumed = quick(fresh, random_batches(), epochs=4, controller=again, checkpoint=file)
    assert same_state(whole, fresh)
    assert same_state(controller, again)
    assert resumed.history == result.history
    # All is done: nothing is trained further.
    quick(fresh, random_batches(), epochs=4, checkpoint=file)
    assert same_state(whole, fresh)


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    models = [elastic_model() for _ in range(3)]
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    for model, seed in zip(models, (0, 0, 1), strict=True):
        quick(model, random_batches(), epochs=1, seed=seed)
    assert torch.equal(torch.rand(3), expected)
    assert same_state(models[0], models[1])
    assert not same_state(models[0], models[2])


def test_batch_norm_statistics_stay_and_the_mode_comes_back() -> None:
    elastic = elastic_model().train()
    before = elastic.get_buffer("1.running_mean").clone()
    gain = elastic.get_parameter("1.weight").detach().clone()
    quick(elastic, random_batches(), epochs=1)
    assert elastic.training
    assert torch.equal(elastic.get_buffer("1.running_mean"), before)
    assert not torch.equal(elastic.get_parameter("1.weight"), gain)


def test_the_controller_learns_to_fit_the_budget() -> None:
    """After training with the budget term, sampled options cost less beyond the budget than before, and less than
    after training without it (the task term moves the controller, too)."""
    excess = []
    for weight in (None, 0.0, 10.0):
        elastic = elastic_model()
        controller = Controller(chains(elastic, GRID))
        if weight is not None:
            weights = replace(PLAIN, budget=weight)
            quick(elastic, random_batches(40), epochs=12, lr=1e-5, controller=controller, weights=weights)
        loss = ElasticLoss(elastic, controller, PLAIN, TARGET)
        cost = LevelsCost(elastic, controller.chains, TARGET)
        torch.manual_seed(3)
        with torch.no_grad():
            budgets = [loss.sample_budget() for _ in range(100)]
            excess.append(sum(float(budget_penalty(cost(controller.sample(b)), b)) for b in budgets))
    before, without, with_term = excess
    assert with_term < 0.7 * before
    assert with_term < 0.95 * without


def final(result: TrainResult, term: str, weight: float) -> float:
    return result.history[-1][term] / weight


def test_distillation_brings_profiles_to_the_full_model(digits, trained: nn.Module) -> None:  # type: ignore[no-untyped-def]
    data = digits.load()
    found = []
    for weight in (1e-3, 1.0):
        elastic = transform(trained, (data.train[0][:60],), Config(rank_multiple=8))
        weights = replace(PLAIN, distillation=weight)
        result = quick(elastic, digits.Batches(data.train, 64, augmented=True), epochs=6, weights=weights)
        found.append(final(result, "distillation", weight))
    assert found[1] < 0.75 * found[0]


def test_consistency_makes_profiles_indifferent_to_the_augmentation(digits, trained: nn.Module) -> None:  # type: ignore[no-untyped-def]
    data = digits.load()
    found = []
    for weight in (1e-3, 10.0):
        elastic = transform(trained, (data.train[0][:60],), Config(rank_multiple=8))
        weights = replace(PLAIN, consistency=weight)
        batches, augment = digits.Batches(data.train, 64), lambda inputs: (digits.augment(*inputs),)
        found.append(final(quick(elastic, batches, epochs=8, weights=weights, augment=augment), "consistency", weight))
    assert found[1] < 0.75 * found[0]


def test_the_certificate_term_opens_the_gates() -> None:
    """A proxy that charges for closed components makes the controller keep more of them."""

    class Closed:
        def drift(self, gates: Gates) -> Tensor:
            return 5 * sum(((1 - mask).mean() for mask, _ in gates.values() if len(mask)), torch.zeros(()))

    scores = []
    for weight in (0.0, 10.0):
        elastic = elastic_model()
        controller = Controller(chains(elastic, GRID))
        weights = replace(PLAIN, certificate=weight, epsilon=0.1)
        quick(elastic, random_batches(10), epochs=40, seed=1, controller=controller, weights=weights, proxy=Closed())
        scores.append(float(controller(torch.full((3,), 0.5)).detach().sum()))
    assert scores[1] > scores[0] + 0.1


def test_profiles_are_taught_on_the_full_models_last_batch() -> None:
    """Whatever batch a step is handed that trains least or sampled options: its terms are of the one before."""
    elastic, (first, second, _) = observed_model(), random_batches()
    loss = ElasticLoss(elastic, Controller(chains(elastic, GRID)), LossWeights(), TARGET)
    kinds = set()
    for seed in range(20):
        loss.start_epoch()
        torch.manual_seed(seed)
        before = loss(elastic, first)
        if before.keys() != {"task"}:
            torch.manual_seed(seed)
            assert loss(elastic, second) == before
            kinds.add(tuple(before))
    assert kinds == {("task", "distillation"), ("task", "distillation", "budget")}


def test_cost_of_the_least_gates_is_what_no_budget_goes_below() -> None:
    elastic = elastic_model()
    controller = Controller(chains(elastic, GRID))
    loss = ElasticLoss(elastic, controller, LossWeights(), TARGET)
    least = LevelsCost(elastic, controller.chains, TARGET).least
    budgets = torch.stack([loss.sample_budget() for _ in range(200)])
    assert bool((budgets >= least).all())
    assert bool((budgets <= 1).all())
    assert 0.35 < float((budgets == 1).float().mean()) < 0.65


def test_a_loss_that_is_not_finite_loses_nothing() -> None:
    elastic = elastic_model()
    before = {name: tensor.clone() for name, tensor in elastic.state_dict().items()}
    batches = random_batches()
    # Finite, but its sums are not. Not every batch is trained on.
    huge = [*batches[:2], *[(torch.full_like(batches[2][0], 3e38), batches[2][1])] * 8]
    with pytest.raises(TrainError, match=r"not finite in epoch 0, batch [2-9].*lower lr"):
        quick(elastic, huge)
    assert all(torch.equal(tensor, before[name]) for name, tensor in elastic.state_dict().items())


def test_bad_input_is_refused() -> None:
    elastic, batches = elastic_model(), random_batches()
    with pytest.raises(TrainError, match="no data"):
        quick(elastic, [])
    with pytest.raises(TrainError, match="pass a list or a DataLoader"):
        quick(elastic, (batch for batch in batches))
    with pytest.raises(TrainError, match="epochs=0"):
        quick(elastic, batches, epochs=0)
    with pytest.raises(TrainError, match=r"not a tuple \(\*inputs, labels\)"):
        quick(elastic, [batches[0][0]])
    with pytest.raises(TrainError, match="batch 0: tensor 0 holds NaN"):
        quick(elastic, [(batches[0][0] * float("nan"), batches[0][1])])
    with pytest.raises(TrainError, match="loss weight budget=-1"):
        LossWeights(budget=-1)
    other = Controller({"elsewhere": next(iter(chains(elastic, GRID).values()))})
    with pytest.raises(TrainError, match="made for other layers"):
        quick(elastic, batches, controller=other)


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    quick(elastic_model(), random_batches(), epochs=1, checkpoint=file)
    with pytest.raises(TrainError, match="a run with other epochs: delete it"):
        quick(elastic_model(), random_batches(), epochs=2, checkpoint=file)
    other = elastic_model()
    with pytest.raises(TrainError, match="a run with other options: delete it"):
        quick(other, random_batches(), epochs=1, controller=Controller(chains(other, Grid(16))), checkpoint=file)
    wider = transform(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), (torch.randn(8, 1, 8, 8),))
    with pytest.raises(TrainError, match="a run with other options: delete it"):
        quick(wider, random_batches(), epochs=1, checkpoint=file)
    file.write_bytes(b"torn")
    with pytest.raises(TrainError, match="cannot be read"):
        quick(elastic_model(), random_batches(), epochs=1, checkpoint=file)
