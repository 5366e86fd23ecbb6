"""A weight as a graph reads it: a parameter or a view of one, such as its transpose or a slice."""

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from t3c_compile.passes.base import get_attr

aten = torch.ops.aten

# None of these copies a parameter, so writing to the result writes to the parameter.
_VIEWS: dict[str, Any] = {
    "t": aten.t.default,
    "numpy_T": aten.numpy_T.default,
    "mT": aten.mT.default,
    "transpose": aten.transpose.int,
    "permute": aten.permute.default,
    "unsqueeze": aten.unsqueeze.default,
    "squeeze": aten.squeeze.dim,
    "slice": aten.slice.Tensor,
    "select": aten.select.int,
    "chunk": aten.chunk.default,
    "split": aten.split.Tensor,
    "split_with_sizes": aten.split_with_sizes.default,
    "unbind": aten.unbind.int,
    "getitem": operator.getitem,
}
_NAMES = {function: name for name, function in _VIEWS.items()}


@dataclass(frozen=True)
class ParameterView:
    """The parameter at the qualified name ``target``, seen through ``steps``: names of view ops and their arguments."""

    target: str
    steps: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    def of(self, module: nn.Module) -> Tensor:
        """The tensor; it shares memory with the parameter in ``module``."""
        found: Any = get_attr(module, self.target)
        for name, arguments in self.steps:
            found = _VIEWS[name](found, *arguments)
        assert isinstance(found, Tensor)
        return found


def parameter_view(node: object) -> ParameterView | None:
    """How ``node`` reads a parameter or buffer; None where it is computed in another way."""
    steps: list[tuple[str, tuple[Any, ...]]] = []
    while isinstance(node, Node) and node.op == "call_function" and node.target in _NAMES:
        if node.kwargs or any(isinstance(argument, Node) for argument in node.args[1:]):
            return None
        steps.append((_NAMES[node.target], tuple(_plain(argument) for argument in node.args[1:])))
        node = node.args[0]
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    return ParameterView(str(node.target), tuple(reversed(steps)))


def _plain(argument: Any) -> Any:
    """A node's argument without ``torch.fx``'s own list type, so that it compares and pickles."""
    return list(argument) if isinstance(argument, list | tuple) else argument


def readers(module: nn.Module, graph: Graph) -> Iterator[tuple[Tensor, Node, Node]]:
    """(tensor, the node that stands for a view of it, the node that reads the view) for every read in ``graph``."""
    for node in graph.nodes:
        if node.op == "get_attr":
            tensor = get_attr(module, str(node.target))
            if isinstance(tensor, Tensor):
                yield from ((tensor, view, user) for view, user in _readers(node))


def _readers(node: Node) -> Iterator[tuple[Node, Node]]:
    for user in node.users:
        if user.op == "call_function" and user.target in _NAMES and user.args[0] is node:
            yield from _readers(user)
        else:
            yield node, user


def same_region(a: Tensor, b: Tensor) -> bool:
    """Whether two views are the same numbers in the same order."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the memory that two views span has a byte in common."""
    first, second = sorted((_span(a), _span(b)))
    return second[0] < first[1]


def _span(view: Tensor) -> tuple[int, int]:
    """First byte and the one past the last."""
    last = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
    return view.data_ptr(), view.data_ptr() + (last + 1) * view.element_size()
