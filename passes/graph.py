"""The elastic graph: a training graph and an evaluation graph over one tree of modules."""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from t3c_compile.passes.base import Report, report_of
from t3c_compile.passes.elastic import elastic_layers
from t3c_compile.passes.errors import T3CError
from t3c_compile.passes.option import Option


class ElasticGraphModule(GraphModule):
    """A ``torch.fx.GraphModule`` that runs its training graph in ``train()`` and its evaluation graph in ``eval()``.

    Dropout, drop-path and batch norm differ between the two, so they are two captures; parameters, buffers and elastic
    layers are one tree, so a state_dict, an optimizer or DDP sees one model. Deep copies and pickles keep both.
    """

    def __init__(self, root: nn.Module, eval_graph: Graph, train_graph: Graph) -> None:
        super().__init__(root, eval_graph)
        # The constructor copies only what the evaluation graph names.
        self._copy_missing(root, train_graph)
        with _quiet():
            self._graphs = {False: self.graph, True: copy.deepcopy(train_graph)}
        # Export's tracer cannot trace again; None is what lets copies and pickles be made.
        self._tracer_cls = None
        for graph in self._graphs.values():
            graph._tracer_cls = None
        self._select(self.training)

    def _copy_missing(self, root: nn.Module, graph: Graph) -> None:
        extra = GraphModule(root, graph)
        tensors = [*extra.named_parameters(remove_duplicate=False), *extra.named_buffers(remove_duplicate=False)]
        for name, tensor in tensors:
            if not _has(self, name):
                place_tensor(self, name, tensor)
        for node in graph.nodes:
            if node.op == "call_module" and not _has(self, str(node.target)):
                self.add_submodule(str(node.target), root.get_submodule(str(node.target)))

    def _select(self, training: bool) -> None:
        graph = self._graphs[training]
        if self.graph is not graph:
            self.graph = graph

    def train(self, mode: bool = True) -> "ElasticGraphModule":
        super().train(mode)
        self._select(mode)
        return self

    def recompile(self) -> Any:
        code = super().recompile()
        cls = type(self)
        # FSDP2 runs a module in a subclass of its own. There recompiling wraps the call a second time, and the two
        # wrappers would call each other for ever.
        if any("_wrapped_call" in vars(base) for base in cls.__mro__[1:]):
            for name in ("_wrapped_call", "__call__"):
                delattr(cls, name)
        return code

    def run_pass(self, apply: Any) -> None:
        """Run a pass (a callable on a GraphModule) over both graphs in turn, evaluation first."""
        for training in (False, True):
            self.graph = self._graphs[training]
            apply(self)
            self._graphs[training] = self.graph
        self._select(self.training)

    @property
    def eval_graph(self) -> Graph:
        return self._graphs[False]

    @property
    def train_graph(self) -> Graph:
        return self._graphs[True]

    @property
    def report(self) -> Report:
        """Elastic layers, and kept layers with their reasons."""
        return report_of(self)

    def set_options(self, options: dict[str, Option]) -> None:
        """Put every named layer at its option's rank and bits; layers not named are left as they are.

        Raises:
            KeyError: a name is not an elastic layer of this model.
        """
        layers = dict(elastic_layers(self))
        for name, option in options.items():
            layer = layers[name]
            if layer.gate is None:
                raise KeyError(f"layer {name!r} has no controller hook: run the insert-hooks pass first")
            layer.gate.set(option.rank or layer.max_rank, option.bits)

    def set_full(self) -> None:
        """Full rank, floating point everywhere: the model that was transformed."""
        for _, layer in elastic_layers(self):
            if layer.gate is not None:
                layer.gate.open()

    def set_activation_dtype(self, dtype: str) -> None:
        """``float32``: linear layers and tied tables keep integer weights and take float32 activations, here, in
        training and in every profile snapped from now on; ``int8``: they take int8 ones, as after ``transform``.

        For decoding, which the weights' bytes alone cost. No stored integer depends on it; a checkpoint keeps it.
        Convolutions take int8 activations always.

        Raises:
            T3CError: another ``dtype``.
        """
        _require_dtype("activations", dtype)
        for _, layer in elastic_layers(self):
            layer.float_activations = dtype == "float32" and layer.weight_only_op is not None

    def set_attention_dtype(self, dtype: str) -> None:
        """``int8``: scaled dot-product attention multiplies integers in every profile snapped from now on
        (``t3c::attention_int8``: each row of query, key and value rounded by its greatest number, nothing to
        calibrate), and training sees that rounding; ``float32``: in floats, as after ``transform``. The full model is
        in floats always. Attention written as two products stays in floats.

        Raises:
            T3CError: another ``dtype``.
        """
        from t3c_compile.passes.infer_values import infer_values
        from t3c_compile.passes.quantize_attention import FloatAttention, QuantizeAttention

        _require_dtype("attention", dtype)

        def quantize(gm: GraphModule) -> None:
            infer_values(gm, self.meta["t3c_inputs"])
            QuantizeAttention()(gm)

        self.run_pass(quantize if dtype == "int8" else FloatAttention())

    def set_residual_dtype(self, dtype: str) -> None:
        """``int8``: an image that a convolution reads as int8 and that is added elsewhere, too, is added as that int8,
        in training and in every profile snapped from now on; ``float32``: as it was, as after ``transform``.

        Raises:
            T3CError: another ``dtype``.
        """
        from t3c_compile.passes.quantize_residuals import FloatResiduals, QuantizeResiduals

        _require_dtype("residuals", dtype)
        self.run_pass(QuantizeResiduals() if dtype == "int8" else FloatResiduals())

    def to_dense(
        self, model: nn.Module | None = None, options: Mapping[str, Option] | None = None
    ) -> dict[str, Tensor]:
        """Back to the original architecture: see :func:`t3c_compile.passes.to_dense.to_dense`."""
        from t3c_compile.passes.to_dense import to_dense

        return to_dense(self, model, options)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ElasticGraphModule":
        with _quiet():
            parts = copy.deepcopy(self._parts(), memo)
        copied = _rebuild(*parts)
        memo[id(self)] = copied
        return copied

    def __reduce__(self) -> Any:
        return _rebuild, self._parts()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()

    def _parts(self) -> tuple[GraphModule, GraphModule, dict[str, Any], bool]:
        plain = []
        for graph in self._graphs.values():
            module = GraphModule(self, graph)
            module._tracer_cls = None
            module.graph._tracer_cls = None
            plain.append(module)
        return plain[0], plain[1], dict(self.meta), self.training


def _require_dtype(what: str, dtype: str) -> None:
    if dtype not in ("int8", "float32"):
        raise T3CError(f"{what} can be int8 or float32, not {dtype!r}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Copying a graph, torch's own tree specs warn of torch's own code."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
        yield


def _rebuild(
    eval_module: GraphModule, train_module: GraphModule, meta: dict[str, Any], training: bool
) -> ElasticGraphModule:
    root = nn.Module()
    for module in (train_module, eval_module):
        _merge(root, module)
    rebuilt = ElasticGraphModule(root, eval_module.graph, train_module.graph)
    rebuilt.meta.update(meta)
    return rebuilt.train(training)


def _merge(into: nn.Module, module: nn.Module) -> None:
    """Add what ``module`` holds to ``into``; plain containers that stand in both are merged."""
    for name, child in module.named_children():
        existing = into._modules.get(name)
        if existing is not None and type(existing) is nn.Module:
            _merge(existing, child)
        else:
            into.add_module(name, child)
    for name, parameter in module.named_parameters(recurse=False):
        into.register_parameter(name, parameter)
    for name, buffer in module.named_buffers(recurse=False):
        into.register_buffer(name, buffer)


def _has(module: nn.Module, target: str) -> bool:
    found: Any = module
    for part in target.split("."):
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def place_tensor(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Register a parameter or buffer at a qualified name, making plain containers on the way."""
    owner, _, leaf = name.rpartition(".")
    module = root
    for part in owner.split(".") if owner else []:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(leaf, tensor)
    else:
        module.register_buffer(leaf, tensor)


@torch.no_grad()
def own_parameters(module: nn.Module, model: nn.Module) -> None:
    """Give every parameter of ``module`` that lies in the memory of one of ``model``'s memory of its own."""
    plain = [parameter for parameter in model.parameters() if not is_traceable_wrapper_subclass(parameter)]
    foreign = {parameter.untyped_storage().data_ptr() for parameter in plain}
    for parameter in module.parameters():
        if parameter.untyped_storage().data_ptr() in foreign:
            parameter.data = parameter.detach().clone(memory_format=torch.contiguous_format)


@torch.no_grad()
def tensors_are_finite(module: nn.Module) -> str | None:
    """The name of the first parameter holding NaN or infinity; None when all are finite."""
    for name, parameter in module.named_parameters():
        if is_traceable_wrapper_subclass(parameter):  # what another tool has quantized
            continue
        # The extremes, because isfinite() of all would be a second tensor of the parameter's size.
        if parameter.is_floating_point() and parameter.numel() and not _is_finite(parameter):
            return name
    return None


def _is_finite(tensor: Tensor) -> bool:
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))
