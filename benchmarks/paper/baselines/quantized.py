"""Dense models with rounded weights.

What trains sees the integers that are deployed: the quantizers of this project's dense layers. torchao's know linear
layers alone and round to another grid, from which the deployed integers would have to be rounded a second time.
"""

import copy
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.paper.deploy import Compressed, dense_options, elastic_of
from benchmarks.paper.training import Start, fit, ranges_follow
from t3c_compile.losses import self_distillation
from t3c_compile.passes.elastic import elastic_layers
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.option import Option
from t3c_compile.transforming import observe

_MEAN_BITS = 5.0


def float32(start: Start) -> Compressed:
    elastic = elastic_of(start.model, start.task)
    return Compressed(elastic, dense_options(elastic, 32))


def ptq(bits: int) -> Callable[[Start], Compressed]:
    """Round-to-nearest, one scale an output channel; activations int8, their ranges from the calibration data."""

    def compress(start: Start) -> Compressed:
        elastic = elastic_of(start.model, start.task)
        return Compressed(elastic, dense_options(elastic, bits))

    return compress


def qat8(start: Start) -> Compressed:
    """Jacob et al., https://arxiv.org/abs/1712.05877: straight-through gradients, ranges as moving averages."""
    elastic = elastic_of(start.model, start.task)
    options = dense_options(elastic, 8)
    _train_rounded(start, elastic, options)
    return Compressed(elastic, options)


def mixed_precision(start: Start) -> Compressed:
    """Widths by sensitivity, as HAQ (https://arxiv.org/abs/1811.08886) and HAWQ (https://arxiv.org/abs/1905.03696) give
    them, here measured: the change in outputs that 4 bits in one layer make."""
    elastic = elastic_of(start.model, start.task)
    options = mixed_options(elastic, start.task.calibration_inputs())
    _train_rounded(start, elastic, options)
    sizes = {name: layer.dense_weight().numel() for name, layer in elastic_layers(elastic)}
    mean = sum(sizes[name] * option.bits for name, option in options.items()) / sum(sizes.values())
    return Compressed(elastic, options, facts={"mean_bits": mean})


def distilled(start: Start) -> Compressed:
    """Knowledge distillation into the rounded model (ZeroQuant's, https://arxiv.org/abs/2206.01861, section 4.2, over
    the whole model at once): the float32 model's outputs are all it is trained on."""
    elastic = elastic_of(start.model, start.task)
    options = dense_options(elastic, 4)
    teacher = copy.deepcopy(start.model).eval()

    def loss(logits: Tensor, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            taught = teacher(x)
        return self_distillation(taught, logits, 2.0)

    _train_rounded(start, elastic, options, loss)
    return Compressed(elastic, options)


def _train_rounded(
    start: Start,
    elastic: ElasticGraphModule,
    options: Mapping[str, Option],
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> None:
    task = start.task
    elastic.set_options(dict(options))
    observe(elastic, task.calibration_inputs())
    with ranges_follow(elastic):
        fit(task, elastic, elastic.parameters(), epochs=task.epochs, lr=task.lr, seed=start.seed, loss=loss)


@torch.no_grad()
def mixed_options(elastic: ElasticGraphModule, calibration: list[tuple[Tensor]]) -> dict[str, Option]:
    """4 bits for the layers that mind least for the bytes they save, until weights have ``_MEAN_BITS`` in the mean."""
    options = dense_options(elastic, 8)
    elastic.set_options(options)
    observe(elastic, calibration)
    wide = [elastic(*x).log_softmax(-1) for x in calibration]
    sizes = {name: layer.dense_weight().numel() for name, layer in elastic_layers(elastic)}
    worth = {}
    for name, size in sizes.items():
        elastic.set_options({name: Option("dense", 0, 4)})
        found = [elastic(*x).log_softmax(-1) for x in calibration]
        elastic.set_options({name: Option("dense", 0, 8)})
        divergence = sum(
            float(F.kl_div(a, b, reduction="sum", log_target=True)) for a, b in zip(found, wide, strict=True)
        )
        worth[name] = divergence / size
    total = sum(sizes.values())
    left = (8 - _MEAN_BITS) * total
    for name in sorted(worth, key=worth.__getitem__):
        if left > 0:
            options[name] = Option("dense", 0, 4)
            left -= 4 * sizes[name]
    return options
