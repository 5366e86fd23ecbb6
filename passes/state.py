"""A model's state by name: through the wrappers that rename it, tied tensors and shards."""

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from t3c_compile.passes.errors import T3CError

_COMPILED, _PARALLEL = "_orig_mod", "module"


class StateError(T3CError):
    """A state and a model do not fit each other; the message names the tensors."""


def state_names(model: nn.Module) -> dict[str, str]:
    """The entries of a model's ``state_dict``; of tied ones each has the first one's name."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(tensor), name)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor)
    }


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under every name it has."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile`` and DistributedDataParallel."""
    while isinstance(model, torch._dynamo.OptimizedModule | nn.parallel.DistributedDataParallel):
        model = model._orig_mod if isinstance(model, torch._dynamo.OptimizedModule) else model.module
    return model


@torch.no_grad()
def load_state(model: nn.Module, state: Mapping[str, Tensor], unused: Set[str] = frozenset()) -> None:
    """Copy ``state`` into ``model``, whichever of the two ``torch.compile`` or DistributedDataParallel has wrapped.

    One name of a tied tensor is enough. ``unused`` names need not be there.

    Raises:
        StateError: names are missing or left over, shapes differ, or ``model`` is sharded; nothing is copied then.
    """
    inner = unwrapped(model)
    own = {_compiled_out(name): tensor for name, tensor in inner.state_dict(keep_vars=True).items()}
    given = {_compiled_out(name): tensor for name, tensor in state.items()}
    while given and all(name.startswith(f"{_PARALLEL}.") for name in given) and not given.keys() & own.keys():
        given = {name.removeprefix(f"{_PARALLEL}."): tensor for name, tensor in given.items()}
    loaded = {id(own[name]) for name in given if name in own}
    missing = [name for name, tensor in own.items() if id(tensor) not in loaded and name not in unused]
    shapes = {name: (tuple(given[name].shape), tuple(own[name].shape)) for name in given if name in own}
    wrong = [f"{name} ({found}, the model has {wanted})" for name, (found, wanted) in shapes.items() if found != wanted]
    for what, names in (
        ("lacks", missing),
        ("has what the model does not:", [name for name in given if name not in own]),
        ("has other shapes:", wrong),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise StateError(f"the state does not fit the model: it {what} {', '.join(names[:5])}{more}")
    if any(isinstance(tensor, DTensor) for tensor in own.values()):
        raise StateError("the model is sharded: load before fully_shard, or with torch.distributed.checkpoint")
    for name, tensor in given.items():
        own[name].copy_(tensor)


def _compiled_out(name: str) -> str:
    """A name without what ``torch.compile`` puts into it, of the model or of a block of it."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Parameters whole while inside, where FSDP2 (``fully_shard``) has sharded them; every process must come along."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
