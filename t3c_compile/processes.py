"""Training in several processes: what DistributedDataParallel and FSDP2 leave to the trainer."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from t3c_compile.passes.elastic import ActivationQuantizer
from t3c_compile.passes.graph import ElasticGraphModule


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return count() == 1 or dist.get_rank() == 0


def is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` has been applied to ``module`` or to a part of it."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded, differentiable; every process calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def parallel(elastic: ElasticGraphModule) -> nn.Module:
    """What a step calls: the model, in DistributedDataParallel where processes hold copies of it.

    Every process gets rank 0's parameters and buffers. Later the buffers stay equal by themselves: activation ranges
    are joined.
    """
    if count() == 1 or is_sharded(elastic):
        return elastic
    return nn.parallel.DistributedDataParallel(elastic, forward_sync_buffers=False)


@contextmanager
def joined_ranges(elastic: ElasticGraphModule) -> Iterator[None]:
    """Activation ranges follow the batches of all processes while inside."""
    quantizers = [module for module in elastic.modules() if isinstance(module, ActivationQuantizer)]
    for quantizer in quantizers:
        quantizer.join = _join if count() > 1 else None
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.join = None


def _join(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    ends = torch.stack([-low, high])
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    return -ends[0], ends[1]


def broadcast(module: nn.Module) -> None:
    """Rank 0's parameters for every process."""
    if count() > 1:
        for parameter in module.parameters():
            dist.broadcast(parameter.detach(), 0)


def mean(values: Tensor) -> Tensor:
    """The mean over processes of a tensor that each has."""
    if count() > 1:
        dist.all_reduce(values)
        values /= count()
    return values


def mean_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Gradients of parameters that no wrapper reduces become their mean over processes."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if count() > 1 and gradients:
        flat = mean(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def same(number: int) -> bool:
    """Whether every process gave the same number."""
    ends = torch.tensor([number, -number])
    if count() > 1:
        dist.all_reduce(ends, dist.ReduceOp.MAX)
    return int(ends[0]) == -int(ends[1])
