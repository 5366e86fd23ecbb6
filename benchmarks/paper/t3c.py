"""T3C: one checkpoint, five profiles; and the same without one of its parts."""

import copy
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import t3c_compile
from benchmarks.paper.deploy import drift, elastic_of, logits_of, torch_logits
from benchmarks.paper.training import Start, ranges_follow
from t3c_compile.backends.targets import get_target
from t3c_compile.certificate import TrainingProxy
from t3c_compile.chain import chains
from t3c_compile.controller import Controller
from t3c_compile.groups import layer_groups
from t3c_compile.manifest import STORE
from t3c_compile.passes.specialize import specialize
from t3c_compile.snapping import grid_of, snap
from t3c_compile.training import ElasticLoss, LossWeights, train

SIZES = ("Tiny", "Small", "Medium", "Large", "Max")


@dataclass(frozen=True)
class Variant:
    """Which parts of the method there are."""

    what: str
    whitened: bool = True
    joint: bool = True
    """Widths fall with the rank; else all are 8 bits."""
    distillation: float = 2.0
    certificate: float = 0.01


VARIANTS = {
    "t3c": Variant("all of it"),
    # What the others stand beside: of the same day's trainer, on the same machine, not deployed either.
    "t3c-all": Variant("all of it"),
    "t3c-no-whitening": Variant("without whitening: SVD of the weights alone", whitened=False),
    "t3c-no-joint": Variant("without joint rank and bits: 8 bits at every rank", joint=False),
    "t3c-no-distillation": Variant("without self-distillation", distillation=0.0),
    "t3c-no-certificate": Variant("without the certificate penalty", certificate=0.0),
}


def prepared(start: Start, variant: Variant) -> tuple[Any, Any, Controller, TrainingProxy, LossWeights]:
    """What training takes: the elastic model, its target, a controller, the proxy and the weights of the losses."""
    task, target = start.task, get_target("x86_64")
    if not variant.joint:
        target = replace(target, bits=(8,))
    elastic = elastic_of(start.model, task, target.rank_multiple, variant.whitened)
    controller = Controller(chains(elastic, grid_of([target])), layer_groups(elastic))
    proxy = TrainingProxy(elastic, task.calibration_inputs())
    weights = LossWeights(
        label_smoothing=task.label_smoothing, distillation=variant.distillation, certificate=variant.certificate
    )
    return elastic, target, controller, proxy, weights


def run(start: Start, variant: Variant, path: Path | None) -> dict[str, Any]:
    """Train, snap and lower to ``path``; the score, size and certificate of every profile, from the compiled library.

    Without ``path`` scores are those of the specialized graphs in torch, which give the same bits.
    """
    task = start.task
    elastic, target, controller, proxy, weights = prepared(start, variant)
    train(
        elastic,
        task.batches(),
        epochs=task.epochs,
        controller=controller,
        weights=weights,
        proxy=proxy if variant.certificate else None,
        target=target,
        lr=task.lr,
        progress=False,
        seed=start.seed,
    )
    calibration, labels = task.calibration_inputs(), task.labels(task.calibration)
    profiles = snap(elastic.eval(), calibration, [target], labels, controller, count=len(SIZES))
    if path is not None:
        t3c_compile.lower(elastic, profiles, [target], path, calibration[0], measured=False)
    full, truth = torch_logits(elastic, task), task.labels(task.test)
    last = len(profiles.profiles) - 1
    rows = []
    # Where fewer profiles were worth keeping, neighbours share one.
    for place, size in enumerate(SIZES):
        profile = profiles.profiles[round(place * last / (len(SIZES) - 1))]
        if path is not None:
            logits = logits_of(path, task, profile.name)
        else:
            graph = specialize(elastic, profile.options, profile.activations, profiles.store_ranks())
            logits = torch_logits(graph, task)
        moved, bound = drift(logits, full), profile.certificate["bound"]
        rows.append(
            {
                "size": size,
                "profile": profile.name,
                "score": task.score(logits, truth),
                "size_bytes": profile.size_bytes,
                "drift": float(moved.mean()),
                "bound": bound,
                "held": float((moved <= bound).float().mean()),
            }
        )
    return {
        "profiles": rows,
        "full_score": task.score(full, truth),
        "store_bytes": path and (path / STORE).stat().st_size,
        "notes": profiles.notes,
    }


def steps(start: Start, rounds: int = 64) -> dict[str, float]:
    """Milliseconds of a training step, elastic with and without the certificate's term and plain, in turn on the same
    batches: means, for elastic steps differ in what they train, and their ratios."""
    task = start.task
    elastic, target, controller, proxy, weights = prepared(start, VARIANTS["t3c"])
    plain = copy.deepcopy(start.model).train()
    losses = {"elastic": ElasticLoss(elastic, controller, weights, target, proxy=proxy)}
    losses["uncertified"] = ElasticLoss(elastic, controller, weights, target)
    parameters = {"elastic": [*elastic.parameters(), *controller.parameters()], "plain": list(plain.parameters())}
    parameters["uncertified"] = parameters["elastic"]
    optimizers = {name: torch.optim.AdamW(parameters[name], task.lr, fused=True) for name in ("elastic", "plain")}
    optimizers["uncertified"] = optimizers["elastic"]
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    batches = list(task.batches())
    with ranges_follow(elastic):
        for i in range(rounds):
            x, y = batches[i % len(batches)]
            for name, optimizer in optimizers.items():
                # The elastic ones draw alike what they train.
                torch.manual_seed(i)
                began = time.perf_counter()
                optimizer.zero_grad()
                value = task.loss(plain(x), y) if name == "plain" else sum(losses[name](elastic, (x, y)).values())
                value.backward()
                torch.nn.utils.clip_grad_norm_(parameters[name], 1.0)
                optimizer.step()
                times[name].append(1e3 * (time.perf_counter() - began))
    # The first rounds allocate.
    found = {name: float(torch.tensor(values[4:]).mean()) for name, values in times.items()}
    return {
        "elastic_ms": found["elastic"],
        "plain_ms": found["plain"],
        "ratio": found["elastic"] / found["plain"],
        "certificate_share": found["elastic"] / found["uncertified"] - 1,
    }
