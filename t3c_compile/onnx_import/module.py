"""An ONNX graph as a ``torch.nn.Module`` that ``torch.export`` captures with free sizes.

Other importers (onnx2torch, onnx2fx) compute shapes in tensors, whose values ``torch.export`` does not know: it refuses
their modules, or fixes the batch. Here integers that follow from shapes and constants alone are numbers (symbolic ones
under export), and every other operator is the torch function it stands for.
"""

import inspect
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass
from torch import Tensor, nn

from t3c_compile.onnx_import.node import Numbers, OnnxNode, UnsupportedOnnxError, to_numbers, to_tensor
from t3c_compile.onnx_import.numbers import NUMBERS
from t3c_compile.onnx_import.ops import SCALARS, TENSORS
from t3c_compile.passes.graph import place_tensor

# Integer constants up to this size may be shapes or axes; greater ones are data.
_MOST_NUMBERS = 64


def load_onnx(path: str | os.PathLike[str]) -> "OnnxModule":
    """The model in an ONNX file; weights in external files are read from beside it.

    Floating-point initializers are parameters under their own names, where Python allows them (those of one element,
    with infinities, or of a batch norm's statistics are buffers). ``forward`` takes the graph's inputs by name and in
    order, and gives its output or a tuple of them.

    Raises:
        UnsupportedOnnxError: ``path`` is not an ONNX file, or holds operators that are not known; it names all of them.
    """
    model = _read(Path(path))
    inputs = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
    names = [f"{re.sub(r'^(?=[0-9])|[^0-9a-zA-Z]', '_', str(value.name))}" for value in inputs]
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", *names)]

    def forward(self: OnnxModule, *inputs: Tensor) -> Any:
        return self.evaluate(*inputs)

    # torch.export gives every named argument its own free sizes, and names the graph's inputs after them.
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return type("OnnxModule", (OnnxModule,), {"forward": forward})(model.graph, inputs)  # type: ignore[no-any-return]


class OnnxModule(nn.Module):
    """A graph as :func:`load_onnx` reads it. ``inputs`` has the sizes (a free one by its name) and dtype of each."""

    def __init__(self, graph: ir.Graph, inputs: Sequence[ir.Value]) -> None:
        super().__init__()
        self.inputs = [_described(value) for value in inputs]
        self._input_names = [str(value.name) for value in inputs]
        self._output_names = [str(value.name) for value in graph.outputs]
        self._nodes = [_node(node, graph.opset_imports[""]) for node in graph]
        self._tensors: dict[str, str] = {}
        self._numbers: dict[str, Numbers] = {}
        statistics = {name for node in self._nodes if node.op_type == "BatchNormalization" for name in node.inputs[3:]}
        for name, value in graph.initializers.items():
            assert value.const_value is not None
            self._add(name, np.array(value.const_value.numpy()), name in statistics)

    def evaluate(self, *inputs: Tensor) -> Any:
        values: dict[str, Any] = dict(zip(self._input_names, inputs, strict=True))
        for node in self._nodes:
            values |= dict(zip(node.outputs, self._run(node, values), strict=False))
        outputs = [to_tensor(self._value(name, values)) for name in self._output_names]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _run(self, node: OnnxNode, values: Mapping[str, Any]) -> tuple[Any, ...]:
        numbers = [self._number(name, values) for name in node.inputs]
        result: Any = NotImplemented
        if node.op_type in NUMBERS and all(n is not None for n, name in zip(numbers, node.inputs, strict=True) if name):
            result = NUMBERS[node.op_type](node, *numbers)
        if result is NotImplemented:
            function = TENSORS[node.op_type][0]
            result = function(node, *(self._argument(node, i, numbers[i], values) for i in range(len(numbers))))
        return result if isinstance(result, tuple) else (result,)

    def _argument(self, node: OnnxNode, position: int, numbers: Numbers | None, values: Mapping[str, Any]) -> Any:
        """An input of a node as its function takes it."""
        name = node.inputs[position]
        if not name:
            return None
        if position in TENSORS[node.op_type][1]:
            if numbers is None:
                raise UnsupportedOnnxError(
                    f"{node}: its input {name!r} is computed from data, and only what follows from sizes and constants "
                    "can stand there: export the model with that value as a constant"
                )
            return numbers
        if numbers is not None and numbers.size == 1 and numbers.ndim <= SCALARS.get(node.op_type, -1):
            return numbers.item()
        return to_tensor(self._value(name, values))

    def _value(self, name: str, values: Mapping[str, Any]) -> Any:
        if name in values:
            return values[name]
        owner, _, leaf = self._tensors[name].rpartition(".")
        return getattr(self.get_submodule(owner), leaf)

    def _number(self, name: str, values: Mapping[str, Any]) -> Numbers | None:
        found = values[name] if name in values else self._numbers.get(name)
        return found if isinstance(found, np.ndarray) else None

    def _add(self, name: str, array: "np.ndarray[Any, Any]", is_statistic: bool) -> None:
        tensor = torch.from_numpy(array)
        if tensor.is_floating_point() and array.size > 1 and np.isfinite(array).all() and not is_statistic:
            tensor = nn.Parameter(tensor)
        self._tensors[name] = _place(self, name, tensor)
        whole = array.dtype in (np.int64, np.int32, np.bool_) and array.size <= _MOST_NUMBERS
        if whole or (array.dtype == np.float32 and array.size == 1):
            self._numbers[name] = to_numbers(array)


def _read(path: Path) -> ir.Model:
    if not path.is_file():
        raise UnsupportedOnnxError(f"{path}: there is no such file")
    try:
        model = ir.load(path)
    except Exception as error:
        raise UnsupportedOnnxError(f"{path} is damaged or not an ONNX file: {error}") from error
    InlinePass()(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    opset = model.graph.opset_imports.get("", 0)
    known = TENSORS.keys() | NUMBERS.keys()
    unknown = {
        f"{node.domain or 'ai.onnx'}::{node.op_type} (opset {opset}, first at node {node.name!r})": None
        for node in reversed(list(model.graph))
        if node.domain not in ("", "ai.onnx") or node.op_type not in known
    }
    if unknown:
        raise UnsupportedOnnxError(
            f"{path}: no torch form of {', '.join(reversed(unknown))}: export the model without it, in float32 and "
            "with the operators of the default domain"
        )
    return model


def _node(node: ir.Node, opset: int) -> OnnxNode:
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    inputs = tuple("" if value is None else str(value.name) for value in node.inputs)
    outputs = tuple(str(value.name) for value in node.outputs)
    return OnnxNode(node.op_type, str(node.name), opset, attributes, inputs, outputs)


def _described(value: ir.Value) -> tuple[tuple[int | str, ...], str]:
    """Sizes (a free one by its name) and dtype of an input."""
    shape = () if value.shape is None else tuple(s if isinstance(s, int) else str(s.value) for s in value.shape)
    return shape, "float32" if value.dtype is None else str(value.dtype.numpy())


def _place(module: nn.Module, name: str, tensor: Tensor) -> str:
    """Put ``tensor`` in ``module`` under ``name``, or the nearest that Python allows and nothing else has."""
    parts = [re.sub(r"\W", "_", part) for part in name.split(".") if part]
    while True:
        try:
            place_tensor(module, ".".join(parts), tensor)
        except (KeyError, AttributeError, TypeError):
            parts[-1] += "_"
        else:
            return ".".join(parts)
