"""What a profile needs of a target's memory: its weights, and the activations of one call."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from t3c_compile.backends.targets import OWN_TARGETS, Target
from t3c_compile.passes.errors import T3CError
from t3c_compile.passes.graph import ElasticGraphModule


class MemoryLimitError(T3CError):
    """A profile does not fit into a target's memory; the message says what it needs and what would do."""


def activation_bytes(model: ElasticGraphModule, inputs: tuple[Any, ...]) -> int:
    """The most bytes of float32 activations alive at once in a call on ``inputs``, of one sample if the batch is free.

    Counted are the tensors between the nodes of the evaluation graph, views once; what a node holds within itself is
    not, and compiled code needs less where it fuses.
    """
    free = model.meta["t3c_batch_is_free"]
    one = [x[:1].clone() if free and isinstance(x, Tensor) and x.dim() else x for x in inputs]
    run = _Alive(model)
    with torch.no_grad():
        run.run(*one, enable_io_processing=False)
    return run.most


class _Alive(Interpreter):
    """Runs the evaluation graph, each value kept until its last use; ``most``: bytes alive at once."""

    def __init__(self, model: ElasticGraphModule) -> None:
        super().__init__(model, graph=model.eval_graph)
        own = [*model.parameters(), *model.buffers()]
        self._weights = {tensor.untyped_storage().data_ptr() for tensor in own}
        self.most = 0

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        alive: dict[int, int] = {}
        torch.utils._pytree.tree_map_only(
            Tensor,
            lambda t: alive.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()),
            [result, list(self.env.values())],
        )
        self.most = max(self.most, sum(size for place, size in alive.items() if place not in self._weights))
        return result


def needed_bytes(size_bytes: float, activations: int, target: Target) -> int:
    """Bytes that weights and float32 ``activations`` need on ``target``; an NPU holds the latter in int8."""
    return round(size_bytes) + (activations // 4 if target.kind == "ethos-u" else activations)


def fits(size_bytes: float, activations: int, targets: Sequence[Target]) -> bool:
    """Whether a profile fits into the memory of every one of ``targets``."""
    return all(needed_bytes(size_bytes, activations, target) <= target.memory_bytes for target in targets)


def require_fit(what: str, size_bytes: float, activations: int, targets: Sequence[Target], way_out: str) -> None:
    """Raise :class:`MemoryLimitError` where the profile called ``what`` does not fit one of ``targets``."""
    for target in targets:
        needed = needed_bytes(size_bytes, activations, target)
        if needed > target.memory_bytes:
            raise MemoryLimitError(
                f"{what} needs {needed} bytes on target {target.name} ({round(size_bytes)} of weights, "
                f"{needed - round(size_bytes)} of activations), and it has {target.memory_bytes}: {way_out}, or "
                f"describe your device in a file named in {OWN_TARGETS}"
            )
