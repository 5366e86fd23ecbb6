"""One small trainer for elastic models: the sandwich rule, sampled budgets, the five loss terms, resumable.

``ElasticLoss`` is the loss of one step, for a loop of your own; ``train`` is that loop.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from t3c_compile import losses, processes
from t3c_compile.backends.targets import Target, get_target
from t3c_compile.chain import Grid, chains
from t3c_compile.controller import RESOURCES, Controller, GateTable, apply_gates, gates_of
from t3c_compile.groups import layer_groups
from t3c_compile.passes.elastic import ActivationQuantizer, Gates, elastic_layers, full_width_known
from t3c_compile.passes.elastic.layer import first
from t3c_compile.passes.fit_inputs import require_fitting
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.progress import progress_bar
from t3c_compile.training_state import TrainError, TrainingState

# Of a sampled budget, how often a resource is free: users name one or two, seldom all three.
_FREE = 0.5
# How often a step trains the full model, and the least options; else it trains sampled ones.
_FULL_SHARE, _LEAST_SHARE = 1 / 3, 1 / 3
# How often such a step rounds activations, too. That is half of its time, and little of its error.
_ROUNDED_SHARE = 1 / 2


class Batches(Protocol):
    """A list or a DataLoader: iterated once an epoch, each item a tuple ``(*inputs, labels)``."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


class DriftProxy(Protocol):
    """The spectral certificate: an upper bound on logit drift (0-d, differentiable) at given gates."""

    def drift(self, gates: Gates) -> Tensor: ...


Augment = Callable[[tuple[Any, ...]], tuple[Any, ...]]
"""Makes an augmented copy of a batch's inputs, with torch's global generator."""


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms beside the task loss, and their constants.

    Attributes:
        distillation: of KL(full || elastic), at ``temperature``.
        consistency: of KL under augmentation; needs ``augment``.
        certificate: of max(0, drift - ``epsilon``), ``epsilon`` in logits; needs ``proxy``.
        budget: of the relative excess over the sampled budget.
    """

    distillation: float = 1.0
    consistency: float = 0.5
    certificate: float = 0.01
    budget: float = 1.0
    temperature: float = 2.0
    epsilon: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for f in fields(self):
            if not getattr(self, f.name) >= 0:
                raise TrainError(f"loss weight {f.name}={getattr(self, f.name)!r} must not be negative")
        if self.temperature == 0:
            raise TrainError("temperature must be positive")


@dataclass(frozen=True)
class TrainResult:
    """What training leaves beside the model: the controller, and by epoch the mean of every loss term over the
    steps that have it."""

    controller: Controller
    history: list[dict[str, float]]
    seconds: float


class ElasticLoss:
    """The loss terms of one step on one batch.

    The sandwich rule (https://arxiv.org/abs/1903.05134) taken apart: a step trains one of three, drawn from torch's
    global generator. The full model gets the task loss alone. The least options, and options sampled by the controller
    for a sampled budget, are taught by the full model too: on the batch that it was last trained on, with the logits it
    had there, so that (but at an epoch's start) it never runs for their sake. The batch handed in is then left out, as
    often as another is trained on again. All three in every step cost five plain steps, and at equal time they make no
    better profiles.
    """

    def __init__(
        self,
        elastic: ElasticGraphModule,
        controller: Controller,
        weights: LossWeights,
        target: Target,
        augment: Augment | None = None,
        proxy: DriftProxy | None = None,
    ) -> None:
        self.controller, self.weights, self.augment, self.proxy = controller, weights, augment, proxy
        layers = dict(elastic_layers(elastic))
        if set(layers) != set(controller.chains):
            raise TrainError("the controller was made for other layers: build its chains from this elastic model")
        self._layers = list(layers.values())
        tables = {name: GateTable(chain, layers[name].max_rank) for name, chain in controller.chains.items()}
        # Of all layers together, [layers, longest chain] and [layers, longest chain, greatest rank].
        self._widths = nn.utils.rnn.pad_sequence([table.widths for table in tables.values()], batch_first=True)
        self._masks = torch.zeros(*self._widths.shape, max(layer.max_rank for layer in self._layers))
        for of_layer, table in zip(self._masks, tables.values(), strict=True):
            of_layer[: table.masks.shape[0], : table.masks.shape[1]] = table.masks
        # By layer: its greatest rank, and by level the next rank that there is.
        self._ranks = {name: (layers[name].max_rank, table.above) for name, table in tables.items()}
        self._quantizers = [module for module in elastic.modules() if isinstance(module, ActivationQuantizer)]
        self._cost = losses.LevelsCost(elastic, controller.chains, target)
        self._least = {
            name: (table.masks[0, : round(float(table.masks[0].sum()))], table.widths[0])
            for name, table in tables.items()
        }
        self.start_epoch()

    def start_epoch(self) -> None:
        """Forget the last batch: what follows is then the same as after a checkpoint."""
        self._last: tuple[tuple[Any, ...], Tensor, Tensor] | None = None

    def __call__(self, model: nn.Module, batch: tuple[Any, ...]) -> dict[str, Tensor]:
        """Weighted terms by name (0-d, their sum is the loss); ``model`` is the elastic model, or DDP around it.

        The names are those of the terms that this step has.
        """
        *rest, labels = batch
        inputs, draw = tuple(rest), float(torch.rand(()))
        if draw < _FULL_SHARE:
            logits = self._full(model, inputs)
            self._last = inputs, labels, logits.detach()
            return {"task": losses.task_loss(logits, labels, self.weights.label_smoothing)}
        if self._last is None:
            with torch.no_grad():
                self._last = inputs, labels, self._full(model, inputs)
        inputs, labels, teacher = self._last
        with self._activations(float(torch.rand(())) < _ROUNDED_SHARE):
            if draw < _FULL_SHARE + _LEAST_SHARE:
                return self._taught(apply_gates(model, self._least, inputs), teacher, labels)
            return self._sampled(model, inputs, teacher, labels)

    @contextmanager
    def _activations(self, rounded: bool) -> Iterator[None]:
        """Inside, layers' inputs and middles are float32, unless ``rounded``."""
        layers = [] if rounded else [layer for layer in self._layers if not layer.float_activations]
        for layer in layers:
            layer.float_activations = True
        try:
            yield
        finally:
            for layer in layers:
                layer.float_activations = False

    def _sampled(self, model: nn.Module, inputs: tuple[Any, ...], teacher: Tensor, labels: Tensor) -> dict[str, Tensor]:
        weights, budget = self.weights, self.sample_budget()
        levels = self.controller.sample(budget)
        masks, widths = gates_of(levels, self._masks, self._widths)
        gates = {
            name: (first(mask, rank), width)
            for (name, (rank, _)), mask, width in zip(self._ranks.items(), masks.unbind(), widths.unbind(), strict=True)
        }
        # What is beyond is not multiplied. One option above is, and then closed: its gradient tells what opening it
        # would bring.
        cut = {
            name: (first(mask, self._ranks[name][1][place]), bits)
            for (name, (mask, bits)), place in zip(gates.items(), levels.argmax(-1).tolist(), strict=True)
        }
        logits = apply_gates(model, cut, inputs)
        terms = self._taught(logits, teacher, labels)
        terms["budget"] = weights.budget * losses.budget_penalty(self._cost(levels), budget)
        if self.augment is not None and weights.consistency:
            augmented = apply_gates(model, cut, self.augment(inputs))
            terms["consistency"] = weights.consistency * losses.consistency(logits, augmented)
        if self.proxy is not None and weights.certificate:
            drift = self.proxy.drift(gates)
            terms["certificate"] = weights.certificate * losses.certificate_penalty(drift, weights.epsilon)
        return terms

    def _taught(self, logits: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, Tensor]:
        weights = self.weights
        distilled = losses.self_distillation(teacher, logits, weights.temperature)
        return {
            "task": losses.task_loss(logits, labels, weights.label_smoothing),
            "distillation": weights.distillation * distilled,
        }

    def _full(self, model: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
        """Logits of the full model; activation ranges, which it does not use, stay as they are."""
        observing = [quantizer for quantizer in self._quantizers if quantizer.training]
        for quantizer in observing:
            quantizer.training = False
        try:
            with full_width_known(model):
                logits = model(*inputs)
        finally:
            for quantizer in observing:
                quantizer.training = True
        if not isinstance(logits, Tensor):
            raise TrainError(
                f"the model returns {type(logits).__name__}, not logits: write a loop with t3c_compile.losses"
            )
        return logits

    def sample_budget(self) -> Tensor:
        """A budget [3] that can be met: each resource free, or uniform above what the least options cost."""
        least = self._cost.least
        sampled = least + (1 - least) * torch.rand(len(RESOURCES))
        return torch.where(torch.rand(len(RESOURCES)) < _FREE, torch.ones(()), sampled)


def train(
    elastic: ElasticGraphModule,
    batches: Batches,
    *,
    epochs: int,
    controller: Controller | None = None,
    weights: LossWeights | None = None,
    augment: Augment | None = None,
    proxy: DriftProxy | None = None,
    target: Target | None = None,
    lr: float = 1e-3,
    progress: bool = True,
    seed: int = 0,
    checkpoint: Path | None = None,
) -> TrainResult:
    """Train ``elastic`` (in place) and the controller, so that every profile is accurate; full rank is set at the end.

    Activation ranges of a profile are set afterwards by ``transform.observe``. Torch's global generator is seeded anew
    every epoch (and put back at the end): with data order and augmentation drawn from it, the result depends on
    ``seed`` alone, interrupted or not.

    Where ``torch.distributed`` is initialized (``torchrun``), every process calls this with batches of its own, as many
    and as large as the others': losses, gradients and activation ranges are those of the joined batches. A model that
    ``fully_shard`` (FSDP2) was applied to stays sharded, another one is wrapped in DistributedDataParallel. All seed
    alike, so an order of data drawn from the global generator can be cut in slices by rank.

    Args:
        batches: a list or DataLoader of ``(*inputs, labels)``, labels int64.
        epochs: passes over ``batches``.
        controller: trained along; None makes one on the default grid.
        weights: of the loss terms.
        augment: makes augmented inputs, for the consistency term.
        proxy: a ``certificate.TrainingProxy``, for the certificate term; its ``state_dict`` goes into the checkpoint.
        target: whose roofline the budget term counts; None is ``cortex-a76``.
        lr: AdamW's peak, warmed up and then a cosine to zero.
        progress: show a progress bar with the time left (in the process of rank 0).
        checkpoint: written after every epoch and, where it exists, gone on from; delete it to start over. For a sharded
            model it is a folder of ``torch.distributed.checkpoint``, written by all processes.

    Raises:
        DataError: inputs or labels do not fit the model. Inputs in a list are looked at before training begins, those
            of a loader as they come.
        TrainError: no data, a loss or gradient that is not finite (the model is put back to the epoch's start), or a
            checkpoint of another run.
    """
    steps = _count(batches, epochs)
    # A list of a class of its own may not like to be read before its time.
    for index, batch in enumerate(batches if type(batches) in (list, tuple) else ()):
        _checked(elastic, batch, index)
    weights = weights or LossWeights()
    controller = controller or Controller(chains(elastic, Grid()), layer_groups(elastic))
    loss = ElasticLoss(elastic, controller, weights, target or get_target("cortex-a76"), augment, proxy)
    processes.broadcast(controller)
    run = TrainingState(elastic, controller, proxy, lr, steps * epochs)
    options = {name: [str(option) for option in chain] for name, chain in controller.chains.items()}
    setup = {"epochs": epochs, "steps": steps, "lr": lr, "seed": seed, "weights": asdict(weights), "options": options}
    history = run.load(checkpoint, setup) if checkpoint is not None and checkpoint.exists() else []
    start = len(history)
    model = processes.parallel(elastic)
    began = time.monotonic()
    shown = progress and processes.is_first()
    with _training(elastic), torch.random.fork_rng(devices=[]), progress_bar(shown) as bar:
        task = bar.add_task("elastic training", total=steps * epochs, completed=start * steps)
        for epoch in range(start, epochs):
            torch.manual_seed(seed + 1_000_003 * epoch)
            loss.start_epoch()
            good = {name: tensor.clone() for name, tensor in elastic.state_dict().items()}
            seen: dict[str, list[float]] = {}
            for index, batch in enumerate(batches):
                terms = loss(model, _checked(elastic, batch, index))
                joined = processes.mean(torch.stack([term.detach() for term in terms.values()]))
                values = dict(zip(terms, joined.tolist(), strict=True))
                if not run.step(sum(terms.values(), torch.zeros(())), epoch * steps + index):
                    elastic.load_state_dict(good)
                    raise TrainError(_not_finite(values, epoch, index, lr))
                for name, value in values.items():
                    seen.setdefault(name, []).append(value)
                bar.update(task, advance=1, description=f"elastic training, loss {sum(values.values()):.3f}")
            history.append({name: sum(of_steps) / len(of_steps) for name, of_steps in seen.items()})
            if checkpoint is not None:
                run.save(checkpoint, setup, history)
    return TrainResult(controller, history, time.monotonic() - began)


@contextmanager
def _training(elastic: ElasticGraphModule) -> Iterator[None]:
    """The evaluation graph with activation ranges following the data; full rank and the old mode afterwards.

    Batch norm therefore keeps the float model's statistics: they are what every profile is deployed with, whereas batch
    statistics of one profile are wrong for all others. Its gain and shift train like the rest. Dropout is off: sampled
    profiles are noise enough for fine-tuning.
    """
    training = elastic.training
    elastic.eval()
    elastic.set_full()
    for module in elastic.modules():
        if isinstance(module, ActivationQuantizer):
            module.training = True
    try:
        with processes.joined_ranges(elastic):
            yield
    finally:
        elastic.set_full()
        elastic.train(training)


def _count(batches: Batches, epochs: int) -> int:
    if epochs < 1:
        raise TrainError(f"epochs={epochs} must be positive")
    try:
        steps = len(batches)
    except TypeError:
        raise TrainError(
            "batches has no length: pass a list or a DataLoader, which every epoch iterates anew"
        ) from None
    if not processes.same(steps):
        raise TrainError(f"this process has {steps} batches and another one more or fewer: give all as many")
    if steps == 0:
        raise TrainError("there is no data: batches is empty (is the batch size above the number of samples?)")
    return steps


def _checked(elastic: ElasticGraphModule, batch: Any, index: int) -> tuple[Any, ...]:
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        raise TrainError(f"batch {index} is a {type(batch).__name__}, not a tuple (*inputs, labels)")
    require_fitting(elastic, tuple(batch[:-1]), f"batch {index}")
    for position, value in enumerate(batch):
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise TrainError(f"batch {index}: tensor {position} holds NaN or infinity; clean the data")
    return tuple(batch)


def _not_finite(values: Mapping[str, float], epoch: int, index: int, lr: float) -> str:
    described = ", ".join(f"{name} {value:g}" for name, value in values.items())
    return (
        f"the loss or its gradient is not finite in epoch {epoch}, batch {index} ({described}): lower lr (now {lr:g}) "
        "or the weight of the term at fault; the model is as it was at the start of the epoch"
    )
