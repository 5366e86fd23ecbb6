"""Infer values: what every node makes (shape and dtype) again, where a pickle, a file or another pass has lost it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv


@dataclass(frozen=True)
class InputSpec:
    """A tensor input as captured; a free size is ``(its symbol's name, the size it was captured with)``."""

    shape: tuple[int | tuple[str, int], ...]
    dtype: torch.dtype


def input_specs(graph: Graph) -> tuple[Any, ...]:
    """What :func:`infer_values` needs to know of each input of a captured graph; one that is no tensor is itself."""
    values = [node.meta["val"] for node in graph.nodes if node.op == "placeholder"]
    return tuple(
        InputSpec(tuple(map(_size, value.shape)), value.dtype) if isinstance(value, Tensor) else value
        for value in values
    )


def _size(size: Any) -> int | tuple[str, int]:
    fixed = size if isinstance(size, int) else size.node.maybe_as_int()
    return (str(size), int(size.node.hint)) if fixed is None else int(fixed)


@torch.no_grad()
def infer_values(gm: GraphModule, specs: tuple[Any, ...]) -> None:
    """Set ``meta["val"]`` of every node of a graph without modules; ``specs`` are those of the captured graph."""
    shapes = ShapeEnv()
    # Python's own kernels, as in export: some of ATen's (lstm) ask a size for its number.
    with enable_python_dispatcher(), FakeTensorMode(allow_non_fake_inputs=True, shape_env=shapes) as mode:
        symbols: dict[str, Any] = {}

        def sized(size: int | tuple[str, int]) -> Any:
            if isinstance(size, int):
                return size
            name, hint = size
            if name not in symbols:
                source = ConstantSource(name)
                symbol = shapes.create_symbol(hint, source, DimDynamic.DYNAMIC)
                symbols[name] = shapes.create_symintnode(symbol, hint=hint, source=source)
            return symbols[name]

        inputs = [
            torch.empty([sized(size) for size in spec.shape], dtype=spec.dtype) if isinstance(spec, InputSpec) else spec
            for spec in specs
        ]
        _Values(gm, mode).run(*inputs, enable_io_processing=False)


class _Values(Interpreter):
    def __init__(self, gm: GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(gm)
        self._mode = mode

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self._mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.op != "output":
            n.meta["val"] = value
        return value
