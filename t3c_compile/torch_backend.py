"""``torch.compile(model, backend="t3c", options={...})``: inference on this machine's CPU through TVM.

Options, all optional:

- none: float32, nothing compressed; outputs equal eager's to 1e-3 of the largest, which the first call checks.
- ``size``: a fraction of the int8 size of the layers, above 0: every graph becomes elastic and the greatest profile
  that fits is run in int8. Ranges of activations are set on the first call's inputs, so make that a typical batch. For
  calibrated or trained profiles, lower an artifact and give its path instead.
- ``artifact``: path of an artifact of this model, with ``profile``, the name of one of its profiles (its greatest
  otherwise). Its weights are its own.

A graph is compiled at its first call. Its weights are read then; when they have been written to since, or another
module runs the same graph, it is compiled again. What cannot run this way (a graph under autograd, in training mode,
with an op TVM has no lowering for, off the CPU) runs in eager, and the logger ``t3c_compile.torch_backend`` warns of
the reason once. A graph break gives several graphs, each handled by itself.
"""

import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from t3c_compile.artifact import lower
from t3c_compile.backends.targets import host_target
from t3c_compile.cost import dense_int8_bytes
from t3c_compile.passes.capture import capture
from t3c_compile.passes.errors import NothingToCompressError, T3CError
from t3c_compile.passes.graph import ElasticGraphModule, place_tensor
from t3c_compile.profile import Profile, ProfileSet
from t3c_compile.runtime import Session, load
from t3c_compile.snapping import snap
from t3c_compile.transforming import transform

_log = logging.getLogger(__name__)
# Past this many weights (optimizer steps between two calls, say) a graph stays eager.
_MOST_COMPILED = 4
_LONG_SECONDS = 10.0
_FLOAT_TOLERANCE = 1e-3
_DTYPES = (torch.float32, torch.int64, torch.int32, torch.bool)


class BackendError(T3CError):
    """Options are wrong, or a graph cannot run compiled; the message says why."""


@dataclass(frozen=True)
class Options:
    """What ``options`` of ``torch.compile`` may hold; see the module's docstring."""

    size: float | None = None
    artifact: str | os.PathLike[str] | None = None
    profile: str | None = None

    @staticmethod
    def of(options: Mapping[str, Any] | None) -> "Options":
        """Raises :class:`BackendError` for an unknown option or a value out of range."""
        unknown = set(options or {}) - {field.name for field in fields(Options)}
        if unknown:
            raise BackendError(f"unknown options {', '.join(sorted(unknown))}: there are size, artifact and profile")
        parsed = Options(**(options or {}))
        if parsed.size is not None and not parsed.size > 0:
            raise BackendError(f"size={parsed.size!r} must be a fraction of the int8 size, above 0")
        if parsed.size is not None and parsed.artifact is not None:
            raise BackendError("size makes profiles and artifact brings its own: give one of them")
        if parsed.profile is not None and parsed.artifact is None:
            raise BackendError("profile names one of an artifact's: give artifact too")
        return parsed


def t3c(gm: GraphModule, example_inputs: Sequence[Any], options: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """The backend as ``torch.compile`` calls it.

    Raises:
        BackendError: the options are wrong.
    """
    return _Graph(gm, example_inputs, Options.of(options))


Run = Callable[[list[Tensor]], tuple[Tensor, ...]]


class _Graph:
    """One graph of dynamo's, compiled when it is called."""

    def __init__(self, gm: GraphModule, example_inputs: Sequence[Any], options: Options) -> None:
        self._gm, self._options = gm, options
        nodes = [node for node in gm.graph.nodes if node.op == "placeholder"]
        self._weights = [i for i, (n, x) in enumerate(zip(nodes, example_inputs, strict=True)) if _is_weight(n, x)]
        rest = [i for i in range(len(nodes)) if i not in self._weights]
        self._inputs = [i for i in rest if _is_tensor(nodes[i]) and not _is_number(nodes[i])]
        # Where a free dimension can be read: dynamo gives its size as an input too.
        free = {i: _free_dims(nodes[i]) for i in self._inputs}
        self._sizes = {size: (i, dim) for i, dims in free.items() for dim, size in dims.items()}
        self._shapes = tuple(dict.fromkeys(dims, Dim.AUTO) for dims in free.values())
        # Numbers that are not sizes (an epsilon, where everything is dynamic) are compiled in.
        self._numbers = [
            i for i in rest if i not in self._inputs and str(nodes[i].meta["example_value"]) not in self._sizes
        ]
        self._runs: dict[Any, tuple[Run | None, list[Tensor]]] = {}
        self._told: set[str] = set()

    def __call__(self, *args: Any) -> Any:
        weights = [args[i] for i in self._weights]
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return self._eager(args, "autograd is on, and compiled code has no backward: call it under torch.no_grad()")
        key: tuple[Any, ...] = ()
        if not self._options.artifact:
            numbers = [_number(args[i]) for i in self._numbers]
            key = (*((id(w), 0 if w.is_inference() else w._version) for w in weights), *numbers)
        if key not in self._runs:
            if len(self._runs) == _MOST_COMPILED:
                return self._eager(args, f"its weights or numbers have changed more than {_MOST_COMPILED - 1} times")
            # The weights are kept, so that no other tensor gets their id.
            self._runs[key] = self._compiled(args), weights
        run = self._runs[key][0]
        return self._gm(*args) if run is None else run([args[i] for i in self._inputs])

    def _eager(self, args: tuple[Any, ...], reason: str) -> Any:
        if reason not in self._told:
            self._told.add(reason)
            _log.warning("a graph of %d nodes runs in eager: %s", len(self._gm.graph.nodes), reason)
        return self._gm(*args)

    def _compiled(self, args: tuple[Any, ...]) -> Run | None:
        """What runs the graph; None, and a warning, where it has to be eager."""
        began = time.monotonic()
        _log.info("compiling a graph of %d nodes", len(self._gm.graph.nodes))
        try:
            with torch.inference_mode(False), torch.no_grad():
                expected = self._reference(args)
                with torch.enable_grad():  # certificates are made of gradients
                    run = self._session_run(args)
                self._compare(run([args[i] for i in self._inputs]), expected)
        except Exception as error:
            # Export and TVM raise what they like; eager is right whatever it was.
            reason = str(error).strip().splitlines() or [""]
            _log.warning(
                "a graph of %d nodes runs in eager: %s: %s", len(self._gm.graph.nodes), type(error).__name__, reason[0]
            )
            return None
        seconds = time.monotonic() - began
        level = logging.WARNING if seconds > _LONG_SECONDS else logging.INFO
        _log.log(level, "compiling a graph of %d nodes took %.1f s", len(self._gm.graph.nodes), seconds)
        return run

    def _reference(self, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """What eager gives; the graph must be a function of its inputs."""
        for i in (*self._inputs, *self._weights):
            if args[i].device.type != "cpu" or args[i].dtype not in _DTYPES:
                raise BackendError(f"it takes a {args[i].dtype} tensor on {args[i].device}")
        copies = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
        versions = [copy._version for copy in copies if isinstance(copy, Tensor)]
        with torch.random.fork_rng(devices=[]):
            before = torch.get_rng_state()
            outputs = self._gm(*copies)
            if not torch.equal(before, torch.get_rng_state()):
                raise BackendError("it draws random numbers (dropout in training mode?): call model.eval() first")
        if versions != [copy._version for copy in copies if isinstance(copy, Tensor)]:
            raise BackendError("it writes to its inputs or buffers (batch norm in training mode?): call model.eval()")
        if not outputs or not all(isinstance(output, Tensor) for output in outputs):
            raise BackendError("it returns something that is not a tensor")
        return tuple(outputs)

    def _session_run(self, args: tuple[Any, ...]) -> Run:
        options, order = self._options, list(range(len(self._inputs)))
        if options.artifact is not None:
            session = load(options.artifact)
            order = self._order_of(session)
            if options.profile is not None:
                session.set_profile(options.profile)
        else:
            inputs = tuple(args[i].clone() for i in self._inputs)
            session = _lowered(self._module(args), inputs, self._shapes, options.size)

        def run(inputs: list[Tensor]) -> tuple[Tensor, ...]:
            arrays = [inputs[i].detach().numpy() for i in order]
            return tuple(torch.from_numpy(array) for array in _flat(session.run(*arrays)))

        return run

    def _module(self, args: tuple[Any, ...]) -> GraphModule:
        """The graph with weights as attributes, numbers as constants and tensors alone as inputs."""
        graph = Graph()
        graph.output(graph.graph_copy(self._gm.graph, {}))
        module = GraphModule(self._gm, graph)
        names = [_name(node) for node in self._gm.graph.nodes if node.op == "placeholder"]
        nodes = [node for node in graph.nodes if node.op == "placeholder"]
        with graph.inserting_after(nodes[-1]):
            for i, node in enumerate(nodes):
                if i in self._inputs:
                    continue
                if i in self._weights:
                    place_tensor(module, names[i], args[i])
                    node.replace_all_uses_with(graph.get_attr(names[i]))
                elif i in self._numbers:
                    _make_constant(node, _number(args[i]))
                else:
                    source, dim = self._sizes[str(node.meta["example_value"])]
                    node.replace_all_uses_with(graph.call_function(torch.ops.aten.sym_size.int, (nodes[source], dim)))
                graph.erase_node(node)
        module.recompile()
        return module

    def _order_of(self, session: Session) -> list[int]:
        """Where each of the artifact's inputs stands among the graph's: dynamo orders them by first use."""
        nodes = [node for node in self._gm.graph.nodes if node.op == "placeholder"]
        own = [_name(nodes[i]) for i in self._inputs]
        wanted = [str(entry["name"]) for entry in session.inputs]
        if len(own) == len(wanted) == 1:
            return [0]
        if sorted(own) != sorted(wanted):
            raise BackendError(f"it takes {', '.join(own) or 'nothing'}, the artifact {', '.join(wanted)}")
        return [own.index(name) for name in wanted]

    def _compare(self, found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
        """Raises :class:`BackendError` where compiled outputs are of another shape or, in float32, not equal."""
        described = [[(tuple(x.shape), x.dtype) for x in outputs] for outputs in (found, expected)]
        if described[0] != described[1]:
            raise BackendError(f"compiled it returns {described[0]}, in eager {described[1]}")
        worst = 0.0
        for ours, theirs in zip(found, expected, strict=True):
            if theirs.numel():
                largest = float(theirs.double().abs().max()) or 1.0
                worst = max(worst, float((ours.double() - theirs.double()).abs().max()) / largest)
        _log.info("compiled outputs are within %.2g of eager's largest", worst)
        compressed = self._options.size is not None or self._options.artifact is not None
        if not compressed and not worst <= _FLOAT_TOLERANCE:
            raise BackendError(f"compiled outputs differ from eager's by {worst:.2g} of the largest")


def _lowered(
    module: GraphModule, inputs: tuple[Tensor, ...], shapes: tuple[dict[int, Any], ...], size: float | None
) -> Session:
    """``module`` compiled for this machine: the greatest profile within ``size``, or float32 where it is None."""
    target = host_target()
    elastic: ElasticGraphModule | None = None
    if size is not None:
        try:
            elastic = transform(module, inputs, dynamic_shapes=shapes)
        except NothingToCompressError as error:
            _log.info("float32: %s", error)
    if elastic is not None and size is not None:
        limit = size * dense_int8_bytes(elastic)
        found = snap(elastic.eval(), [inputs], [target]).profiles
        fitting = [profile for profile in found if profile.size_bytes <= limit]
        if not fitting:
            raise BackendError(f"no profile is within {limit:.0f} bytes, the least has {found[0].size_bytes}")
        profile = fitting[-1]
    else:
        elastic = capture(module, inputs, shapes).eval()
        cost = {"latency_ms": 0.0, "energy_mj": 0.0, "source": "not measured"}
        profile = Profile("float32", {}, {}, 0, {"kl": 0.0}, {"bound": 0.0}, {target.name: cost})
    with tempfile.TemporaryDirectory() as folder:
        # The library stays mapped, and the weights are packed, after the files are gone.
        path = lower(
            elastic, ProfileSet([profile], "one"), [target], Path(folder) / "graph.t3c", inputs, measured=False
        )
        return load(path)


def _is_weight(node: Node, example: Any) -> bool:
    """Whether an input is a parameter or buffer, which dynamo lifts out of the module."""
    return isinstance(example, nn.Parameter) or "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {})


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta["example_value"], Tensor)


def _is_number(node: Node) -> bool:
    """Whether an input is a float that dynamo passes as a tensor."""
    value = node.meta["example_value"]
    items = all(user.op == "call_method" and user.target == "item" for user in node.users)
    return value.dtype == torch.float64 and value.dim() == 0 and items


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _make_constant(node: Node, value: Any) -> None:
    """Put ``value`` where ``node``, or the float read from it, is used."""
    for user in list(node.users):
        if user.op == "call_method" and user.target == "item":
            _make_constant(user, value)
            user.graph.erase_node(user)
        else:
            user.args = map_arg(user.args, lambda used: value if used is node else used)
            user.kwargs = map_arg(user.kwargs, lambda used: value if used is node else used)


def _free_dims(node: Node) -> dict[int, str]:
    """The dimensions of an input that dynamo left free, and their symbols."""
    shape = node.meta["example_value"].shape
    return {dim: str(size) for dim, size in enumerate(shape) if isinstance(size, torch.SymInt)}


def _name(node: Node) -> str:
    """The user's name: of a weight its name in the model, of an input the argument's; else the node's."""
    source = getattr(node, "_dynamo_source", None)
    text = "" if source is None else str(source.name if isinstance(source.name, str) else source.name())
    parts = re.findall(r"_(?:modules|parameters|buffers)\['([^']+)'\]", text)
    argument = re.fullmatch(r"L\['(\w+)'\]", text)
    return ".".join(parts) if parts else argument[1] if argument else node.name


def _flat(output: Any) -> list[np.ndarray[Any, Any]]:
    return [output] if isinstance(output, np.ndarray) else [array for part in output for array in _flat(part)]
