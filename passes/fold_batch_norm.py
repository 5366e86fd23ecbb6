"""Fold evaluation-mode batch norm into the convolution or linear before it, for lowering."""

from collections import Counter
from collections.abc import Set
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from t3c_compile.passes.base import Pass, bound, erase_dead_attrs, get_attr
from t3c_compile.passes.parameter_view import readers

aten = torch.ops.aten
t3c = torch.ops.t3c

_FLOAT = (aten.conv2d.default, aten.conv2d.padding, aten.linear.default)
_CHAINS = (t3c.svd_conv2d.default, t3c.tucker2_conv2d.default, t3c.cp_conv2d.default, t3c.svd_linear.default)
_DENSE = (t3c.int8_conv2d.default, t3c.int8_linear.default)


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """``bn(f(x))`` becomes ``f'(x)``.

    For a ``t3c::`` op the norm goes into its float epilogue (``out_gain`` or ``scale``, and ``bias``), so no stored
    integer changes; for a float convolution or linear it goes into weight and bias. A norm in training mode, or one
    whose input is read elsewhere too, or comes from weights that another call shares, stays as it is.
    """

    name: ClassVar[str] = "fold-batch-norm"

    def apply(self, gm: GraphModule) -> bool:
        folded = 0
        shared = _shared(gm)
        for node in list(gm.graph.nodes):
            if node.op == "call_function" and node.target == aten.batch_norm.default and self._fold(gm, node, shared):
                folded += 1
        if folded:
            erase_dead_attrs(gm)
        return bool(folded)

    def _fold(self, gm: GraphModule, norm: Node, shared: Set[str]) -> bool:
        args = bound(norm)
        source = args["input"]
        if args["training"] or not isinstance(source, Node) or len(source.users) != 1:
            return False
        if source.op != "call_function" or source.target not in (*_FLOAT, *_CHAINS, *_DENSE):
            return False
        values = bound(source)
        tensors = [values[name] for name in ("weight", "bias") if name in values]
        if any(isinstance(tensor, Node) and tensor.op != "get_attr" for tensor in tensors):
            return False  # computed in the graph
        if any(isinstance(v, Node) and v.op == "get_attr" and str(v.target) in shared for v in values.values()):
            return False  # weights that another call shares
        mean, var = (get_attr(gm, str(args[name].target)) for name in ("running_mean", "running_var"))
        gain = torch.rsqrt(var + args["eps"])
        if args["weight"] is not None:
            gain = gain * get_attr(gm, str(args["weight"].target)).detach()
        shift = -mean * gain
        if args["bias"] is not None:
            shift = shift + get_attr(gm, str(args["bias"].target)).detach()
        bias = values["bias"]
        new_bias = shift if bias is None else shift + get_attr(gm, str(bias.target)).detach() * gain
        owner = owner_of(source)
        if source.target in _CHAINS:
            values["out_gain"] = self._attr(gm, source, f"{owner}.out_gain", gain)
        else:
            name = "scale" if source.target in _DENSE else "weight"
            old = get_attr(gm, str(values[name].target)).detach()
            values[name] = self._attr(gm, source, str(values[name].target), old * _column(gain, old.dim()))
        values["bias"] = self._attr(gm, source, f"{owner}.bias", new_bias)
        source.args, source.kwargs = tuple(values.values()), {}
        norm.replace_all_uses_with(source)
        gm.graph.erase_node(norm)
        return True

    def _attr(self, gm: GraphModule, node: Node, target: str, value: Tensor) -> Node:
        owner, _, leaf = target.rpartition(".")
        module = gm.get_submodule(owner)
        if hasattr(module, leaf):
            delattr(module, leaf)
        module.register_buffer(leaf, value.detach().clone())
        with gm.graph.inserting_before(node):
            return gm.graph.get_attr(target)


def owner_of(node: Node) -> str:
    """The module that holds a node's parameters."""
    for value in node.args:
        if isinstance(value, Node) and value.op == "get_attr":
            return str(value.target).rpartition(".")[0]
    raise AssertionError(f"{node.name} has no parameter")


def _shared(gm: GraphModule) -> set[str]:
    """Names of the tensors that more than one node reads."""
    reads = Counter(id(tensor) for tensor, _, _ in readers(gm, gm.graph))
    names = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    return {name for name in names if reads[id(get_attr(gm, name))] > 1}


def _column(values: Tensor, dims: int) -> Tensor:
    return values.reshape(-1, *[1] * (dims - 1))
