"""Modules and graphs as JSON and named tensors. There is no pickle in it: reading one runs nobody's code.

Nor do names get into the Python that ``torch.fx`` makes of a graph unless they are plain names.

Everything an elastic model holds is one of a few kinds: plain containers, this package's own modules, ``torch.fx``
graphs of registered ops, and values (numbers, shapes, dtypes, dimensions, the package's dataclasses). What is none of
these is refused when it is written, by name.
"""

import json
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils._pytree import treespec_dumps, treespec_loads

from t3c_compile.passes.errors import T3CError

_PACKAGE = "t3c_compile."
_MODULE_INTERNALS = frozenset(vars(nn.Module()))
_FUNCTIONS = {"_operator": operator, "math": math, "torch": torch}
# Those of `operator` that do more than arithmetic: with them a graph could come at any object.
_NO_ARITHMETIC = {"attrgetter", "itemgetter", "methodcaller", "call", "setitem", "delitem"}
_NODE_KINDS = {"placeholder", "get_attr", "call_function", "call_module", "output"}
_LAYER = "t3c_layer"
_TORCH_VALUES = (torch.dtype, torch.layout, torch.memory_format)


class FormatError(T3CError):
    """Something cannot be written as JSON, or what was read is not what was written."""


class Writer:
    """Turns values into JSON; tensors go to :attr:`tensors` by name, each once however many names it has."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}
        self._where = ""

    def module(self, module: nn.Module, name: str = "") -> dict[str, Any]:
        """A module and all below it; its tensors are named as in ``state_dict``, behind ``name``."""
        self._where = name or "the model"
        data: dict[str, Any] = {}
        if isinstance(module, GraphModule):
            data["graph"] = self.graph(module.graph)
        elif type(module) is not nn.Module:
            cls = next((c for c in type(module).__mro__ if c.__module__.startswith(_PACKAGE)), None)
            if cls is None:
                raise FormatError(f"{self._where} is a {type(module).__name__}, which this format does not hold")
            data["class"] = _class_name(cls)
            # Torch keeps what it knows of a module (that it is sharded, say) under names with two underscores.
            own = {k: v for k, v in vars(module).items() if k not in _MODULE_INTERNALS and not k.startswith("__")}
            data["attributes"] = {name: self.value(value) for name, value in own.items()}
        return data | self.contents(module, name)

    def contents(self, module: nn.Module, name: str = "") -> dict[str, Any]:
        """The tensors and modules below a module, which itself stays out."""
        prefix = f"{name}." if name else ""
        tensors = {}
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                tensors[leaf] = {
                    "tensor": self.tensor(f"{prefix}{leaf}", tensor),
                    "parameter": isinstance(tensor, nn.Parameter),
                    "trained": tensor.requires_grad,
                    "saved": leaf not in module._non_persistent_buffers_set,
                }
        children = {leaf: self.module(child, f"{prefix}{leaf}") for leaf, child in module.named_children()}
        return {"tensors": tensors, "children": children}

    def tensor(self, name: str, tensor: Tensor) -> str:
        """Keeps ``tensor`` as ``name``; the name it has already where it was kept before."""
        if id(tensor) not in self._names:
            self._names[id(tensor)] = name
            self.tensors[name] = tensor.detach().contiguous()
        return self._names[id(tensor)]

    def graph(self, graph: Graph) -> dict[str, Any]:
        data: dict[str, Any] = {"nodes": [self._node(node) for node in graph.nodes]}
        if isinstance(graph._codegen, _PyTreeCodeGen):
            info = graph._codegen.pytree_info
            data["arguments"] = info.orig_args
            data["in"] = _checked_spec(treespec_dumps(info.in_spec))
            data["out"] = None if info.out_spec is None else _checked_spec(treespec_dumps(info.out_spec))
        return data

    def _node(self, node: Node) -> list[Any]:
        self._where = f"node {node.name}"
        target = _function_name(node) if node.op == "call_function" else str(node.target)
        meta = {key: self.value(value) for key, value in node.meta.items() if key.startswith("t3c_")}
        if stack := node.meta.get("nn_module_stack"):
            meta[_LAYER] = list(stack.values())[-1][0]
        return [node.op, node.name, target, self.value(node.args), self.value(node.kwargs), meta]

    def value(self, value: Any) -> Any:
        """JSON of a value; a list stands for itself, everything JSON does not know is a dict of one entry."""
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Node):
            return {"node": value.name}
        if isinstance(value, list):
            return [self.value(item) for item in value]
        if isinstance(value, tuple):
            return {"tuple": [self.value(item) for item in value]}
        if isinstance(value, Mapping):
            return {"dict": [[self.value(key), self.value(item)] for key, item in value.items()]}
        if isinstance(value, slice):
            return {"slice": [self.value(part) for part in (value.start, value.stop, value.step)]}
        if isinstance(value, Tensor):
            return {"tensor": self.tensor(f"/{len(self.tensors)}", value)}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if isinstance(value, _TORCH_VALUES):
            return {"torch": str(value).removeprefix("torch.")}
        if isinstance(value, type(Dim.AUTO)):
            return {"hint": [value.type.name, value.min, value.max]}
        if type(value) is Dim:
            return {"dim": [value.__name__, int(value.min), None if value.max >= 2**31 else int(value.max)]}
        if is_dataclass(value) and type(value).__module__.startswith(_PACKAGE):
            parts = {field.name: self.value(getattr(value, field.name)) for field in fields(value)}
            return {"dataclass": _class_name(type(value)), "fields": parts}
        raise FormatError(f"{self._where} holds a {type(value).__name__}, which this format does not")


class Reader:
    """Turns what :class:`Writer` wrote back; two names of one tensor are one tensor again."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._made: dict[str, Tensor] = {}

    def module(self, data: Mapping[str, Any]) -> nn.Module:
        """Raises :class:`FormatError` where the data is not a module's."""
        with _as_format_errors():
            return self._module(data)

    def _module(self, data: Mapping[str, Any]) -> nn.Module:
        if "class" in data:
            cls = _package_class(data["class"])
            if not issubclass(cls, nn.Module):
                raise FormatError(f"{data['class']} is not a module")
            module: nn.Module = cls.__new__(cls)
            nn.Module.__init__(module)
            for name, value in data["attributes"].items():
                setattr(module, _checked_name(name), self._value(value))
        else:
            module = nn.Module()
        for name, entry in data["tensors"].items():
            tensor = self._tensor(entry)
            if entry["parameter"]:
                module.register_parameter(name, tensor)  # type: ignore[arg-type]
            else:
                module.register_buffer(name, tensor, persistent=entry["saved"])
        for name, child in data["children"].items():
            module.add_module(name, self._module(child))
        return GraphModule(module, self._graph(data["graph"])) if "graph" in data else module

    def _tensor(self, entry: Mapping[str, Any]) -> Tensor:
        name = entry["tensor"]
        if name not in self._made:
            tensor = self._tensors[name]
            self._made[name] = nn.Parameter(tensor, entry["trained"]) if entry["parameter"] else tensor
        return self._made[name]

    def graph(self, data: Mapping[str, Any]) -> Graph:
        """Raises :class:`FormatError` where the data is not a graph's, or an op of it is not registered."""
        with _as_format_errors():
            return self._graph(data)

    def _graph(self, data: Mapping[str, Any]) -> Graph:
        graph = Graph()
        nodes: dict[str, Node] = {}
        for op, name, target, args, kwargs, meta in data["nodes"]:
            if op not in _NODE_KINDS:
                raise FormatError(f"node {name} is a {op}")
            names: dict[str, Callable[[str], Any]] = {"call_function": _function, "placeholder": _checked_name}
            where = names.get(op, _checked_path)(target)
            named = {_checked_name(key): value for key, value in self._value(kwargs, nodes).items()}
            node = graph.create_node(op, where, self._value(args, nodes), named, name)
            # What torch keeps of the module that a node is from; errors name it.
            if layer := meta.pop(_LAYER, None):
                node.meta["nn_module_stack"] = {str(layer): (str(layer), "")}
            node.meta.update({key: self._value(value) for key, value in meta.items() if key.startswith("t3c_")})
            nodes[name] = node
        if "in" in data:
            out = None if data["out"] is None else treespec_loads(_checked_spec(data["out"]))
            into = treespec_loads(_checked_spec(data["in"]))
            keywords = into.child(1).context if into.num_children == 2 and into.child(1).type is dict else []
            for name in (*data["arguments"], *keywords):
                _checked_name(name)
            graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(data["arguments"], into, out)))
        return graph

    def value(self, data: Any) -> Any:
        """Raises :class:`FormatError` where the data is not a value's."""
        with _as_format_errors():
            return self._value(data)

    def _value(self, data: Any, nodes: Mapping[str, Node] | None = None) -> Any:
        if isinstance(data, list):
            return [self._value(item, nodes) for item in data]
        if not isinstance(data, dict):
            return data
        kind, content = next(iter(data.items()))
        if kind == "node":
            return (nodes or {})[content]
        if kind == "tuple":
            return tuple(self._value(item, nodes) for item in content)
        if kind == "dict":
            return {self._value(key, nodes): self._value(item, nodes) for key, item in content}
        if kind == "slice":
            return slice(*(self._value(part, nodes) for part in content))
        if kind == "tensor":
            return self._tensors[content]
        if kind == "device":
            return torch.device(content)
        if kind == "torch" and isinstance(getattr(torch, content, None), _TORCH_VALUES):
            return getattr(torch, content)
        if kind == "hint":
            name, least, most = content
            hint = getattr(Dim, name)
            return hint if least is most is None else hint(min=least, max=most)
        if kind == "dim":
            name, least, most = content
            return Dim(name, min=least, max=most)
        if kind == "dataclass" and is_dataclass(cls := _package_class(content)):
            return cls(**{name: self._value(part) for name, part in data["fields"].items()})
        raise FormatError(f"unknown value {kind} {content!r}")


def _class_name(cls: type) -> str:
    return f"{cls.__module__.removeprefix(_PACKAGE)}:{cls.__qualname__}"


def _package_class(name: str) -> type:
    """A class of this package by name: no name reaches out of it."""
    module, _, qualified = name.partition(":")
    found = getattr(import_module(_PACKAGE + module), qualified)
    if not isinstance(found, type) or found.__module__ != _PACKAGE + module:
        raise FormatError(f"{name} is not a class of this package")
    return found


def _function_name(node: Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order.{target.__name__}"
    name = f"{getattr(target, '__module__', '')}:{getattr(target, '__name__', target)}"
    if _python_function(name) is not target:
        raise FormatError(f"node {node.name} calls {name}, which is neither a registered op nor arithmetic")
    return name


def _function(name: str) -> Callable[..., Any]:
    if ":" in name:
        function = _python_function(name)
    else:
        function = torch.ops
        for part in name.split("."):
            function = getattr(function, part, None)
        if not isinstance(function, torch._ops.OpOverload | torch._ops.HigherOrderOperator):
            function = None
    if function is None:
        raise FormatError(f"op {name} is not registered: import the library that defines it first")
    return function  # type: ignore[no-any-return]


def _python_function(name: str) -> Any:
    """Arithmetic on sizes: of ``operator`` and ``math`` all functions, of ``torch`` those called ``sym_``."""
    module, _, function = name.partition(":")
    if function.startswith("_") or function in _NO_ARITHMETIC or (module == "torch" and function[:4] != "sym_"):
        return None
    return getattr(_FUNCTIONS.get(module), function, None)


def _checked_name(name: str) -> str:
    if not name.isidentifier() or name.startswith("__"):
        raise FormatError(f"{name!r} is not a name")
    return name


def _checked_path(path: str) -> str:
    """Where a module or tensor lies; ``torch.fx`` writes it between quotes."""
    if re.search(r'["\\\n]|(^|\.)(__|\.|$)', path):
        raise FormatError(f"{path!r} is not the place of a module or tensor")
    return path


def _checked_spec(text: str) -> str:
    """The structure of inputs or outputs as ``torch`` writes it; :class:`FormatError` where reading it would import
    what it names (enumerations, factories of dictionaries)."""

    def check(data: Any) -> None:
        if isinstance(data, dict) and ("__enum__" in data or data.get("type") == "collections.defaultdict"):
            raise FormatError("inputs or outputs have an enumeration or a defaultdict in their structure")
        if isinstance(data, str) and "__enum__" in data:
            check(json.loads(data))
        for item in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
            check(item)

    check(json.loads(text))
    return text


@contextmanager
def _as_format_errors() -> Iterator[None]:
    try:
        yield
    except FormatError:
        raise
    except Exception as error:
        # What torch raises for such data is not documented.
        raise FormatError(f"it is not what this version writes: {type(error).__name__} {error}") from error
