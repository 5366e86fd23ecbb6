"""One fixed rank for every layer, fine-tuned; and frozen 4-bit weights beside trained adapters."""

import copy

import torch
from torch import Tensor, nn

from benchmarks.paper.baselines.pruned import prunable
from benchmarks.paper.deploy import Compressed, dense_options, elastic_of
from benchmarks.paper.training import Start, fit, ranges_follow
from t3c_compile.cost import layer_cost
from t3c_compile.passes.elastic import elastic_layers
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.ops.nested import keep_top_bits, quantize_weight, weight_scale
from t3c_compile.passes.option import Option
from t3c_compile.transforming import observe

_RANK_STEP = 16
_SHARE = 0.25
ADAPTER_RANK = 8


def fine_tuned(start: Start) -> Compressed:
    """SVD and Tucker-2 (Kim et al., https://arxiv.org/abs/1511.06530) of the weights alone, tensorly's; fine-tuned in
    float32 at that rank, then rounded, and deployed in the same chain kernels as T3C's layers."""
    task = start.task
    elastic = elastic_of(start.model, task, _RANK_STEP)
    options = fixed_ranks(elastic, _SHARE)
    elastic.set_options({name: Option(option.form, option.rank, 32) for name, option in options.items()})
    fit(task, elastic, elastic.parameters(), epochs=task.epochs, lr=task.lr, seed=start.seed)
    return Compressed(elastic, options)


def fixed_ranks(elastic: ElasticGraphModule, share: float) -> dict[str, Option]:
    """The greatest rank whose multiply-adds are ``share`` of dense; a layer that has none stays dense. All 8 bits."""
    options = {}
    for name, layer in elastic_layers(elastic):
        cost, dense = layer_cost(layer), float(layer_cost(layer, "dense").at(0, 8)[0])
        fitting = [
            rank
            for rank in range(_RANK_STEP, layer.max_rank + 1, _RANK_STEP)
            if float(cost.at(rank, 8)[0]) <= share * dense
        ]
        form = layer.form if fitting else "dense"
        options[name] = Option(form, fitting[-1] if form != "dense" else 0, 8)
    return options


class Adapted(nn.Module):
    """``W x + b + B A x``: a layer and, beside it, ``A`` to ``ADAPTER_RANK`` channels and ``B`` back (LoRA, Hu et al.,
    https://arxiv.org/abs/2106.09685, equation 3). They start as the best of that rank for what 4 bits lose (LoftQ, Li
    et al., https://arxiv.org/abs/2310.08659, algorithm 1, one round)."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.base = layer
        weight = layer.weight.detach()
        lost = (weight - rounded(weight, 4)).flatten(1)
        u, s, v = torch.linalg.svd(lost, full_matrices=False)
        root = s[:ADAPTER_RANK].sqrt()
        if isinstance(layer, nn.Conv2d):
            self.down: nn.Module = nn.Conv2d(
                layer.in_channels, len(root), layer.kernel_size, layer.stride, layer.padding, layer.dilation, bias=False
            )
            self.up: nn.Module = nn.Conv2d(len(root), layer.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(layer.in_features, len(root), bias=False)
            self.up = nn.Linear(len(root), layer.out_features, bias=False)
        self.down.weight.data = (root[:, None] * v[: len(root)]).reshape(self.down.weight.shape).contiguous()
        self.up.weight.data = (u[:, : len(root)] * root).reshape(self.up.weight.shape).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


def rounded(weight: Tensor, bits: int) -> Tensor:
    """``weight`` as it is deployed at ``bits``, one scale an output channel."""
    scale = weight_scale(weight, tuple(range(1, weight.dim())))
    return keep_top_bits(quantize_weight(weight, scale), bits) * scale


def adapted(start: Start) -> Compressed:
    """The base is rounded and frozen; adapters, biases and norms are trained."""
    task = start.task
    model = copy.deepcopy(start.model)
    names = {id(module): name for name, module in model.named_modules()}
    for layer in prunable(model):
        name = names[id(layer)]
        # A layer no wider than a few adapters would grow.
        if getattr(layer, "groups", 1) == 1 and min(layer.weight.flatten(1).shape) > 2 * ADAPTER_RANK:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, Adapted(layer))
    elastic = elastic_of(model, task)
    options = {
        name: Option("dense", 0, 8 if name.endswith((".down", ".up")) else 4) for name in dense_options(elastic, 8)
    }
    frozen = {id(layer.weight) for name, layer in elastic_layers(elastic) if options[name].bits == 4}
    elastic.set_options(options)
    observe(elastic, task.calibration_inputs())
    trained = [parameter for parameter in elastic.parameters() if id(parameter) not in frozen]
    with ranges_follow(elastic):
        fit(task, elastic, trained, epochs=task.epochs, lr=5 * task.lr, seed=start.seed)
    return Compressed(elastic, options, facts={"adapter_rank": ADAPTER_RANK})
