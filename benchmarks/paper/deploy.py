"""How whatever was compressed becomes an artifact, and what it is worth there: every method takes this one way."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import t3c_compile
from benchmarks.paper.tasks import Task, numpy_inputs
from t3c_compile.backends.targets import get_target
from t3c_compile.cost import profile_cost
from t3c_compile.passes.elastic import elastic_layers
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.option import Option
from t3c_compile.profile import Profile, ProfileSet
from t3c_compile.transforming import Config, observe

_NO_RANK = 10**9
"""A rank that pays nowhere: every layer stays dense."""


@dataclass
class Compressed:
    """What a method made of the float32 model.

    Attributes:
        elastic: its weights, in the graph that is lowered.
        options: the form, rank and width of every layer.
        saved: bytes that a smaller way to store the same numbers saves (a mask and what it leaves).
        facts: for the table's reader: sparsity, mean width and the like.
    """

    elastic: ElasticGraphModule
    options: dict[str, Option]
    saved: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


def elastic_of(
    model: nn.Module, task: Task, rank_multiple: int = _NO_RANK, whitened: bool = False
) -> ElasticGraphModule:
    """``model`` as every method deploys it: linear and convolution in integers, attention and residuals too."""
    calibration = task.calibration_inputs()
    config = Config(rank_multiple=rank_multiple)
    elastic = t3c_compile.transform(model.eval(), calibration[0], config, calibration=calibration if whitened else None)
    elastic.set_attention_dtype("int8")
    elastic.set_residual_dtype("int8")
    return elastic.eval()


def dense_options(elastic: ElasticGraphModule, bits: int) -> dict[str, Option]:
    return {name: Option("dense", 0, bits) for name, _ in elastic_layers(elastic)}


def lower(compressed: Compressed, task: Task, path: Path) -> int:
    """Set activation ranges, compile for this machine, and give the bytes of the weights that are deployed."""
    elastic, options = compressed.elastic, compressed.options
    calibration = task.calibration_inputs()
    elastic.eval().set_options(options)
    observe(elastic, calibration)
    activations = {name: layer.activations() for name, layer in elastic_layers(elastic)}
    target = get_target("x86_64")
    size = round(profile_cost(elastic, options, target).size_bytes) - compressed.saved
    costs = {target.name: {"latency_ms": 0.0, "energy_mj": 0.0, "source": "not measured here"}}
    profile = Profile("p0", options, activations, size, {"kl": 0.0}, {"bound": 0.0}, costs)
    t3c_compile.lower(elastic, ProfileSet([profile], "by hand"), [target], path, calibration[0], measured=False)
    return size


def logits_of(path: Path, task: Task, profile: str = "p0") -> Tensor:
    """What the compiled library gives on the test split: [samples, ..., classes]."""
    session = t3c_compile.load(path)
    session.set_profile(profile)
    return torch.from_numpy(np.concatenate([session.run(x) for x in numpy_inputs(task.test)]))


@torch.no_grad()
def torch_logits(model: nn.Module, task: Task) -> Tensor:
    """The same in torch."""
    return torch.cat([model.eval()(torch.from_numpy(x)) for x in numpy_inputs(task.test)])


def drift(logits: Tensor, full: Tensor) -> Tensor:
    """2-norm by which each sample's logits differ: [samples]."""
    return (logits - full).flatten(1).norm(dim=1)
