"""A profile for an Ethos-U: its graph at batch 1, split between NPU and host, and the host's part exported."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from t3c_compile.backends.ethosu.attention import take_attention_apart
from t3c_compile.backends.ethosu.partition import Split, split
from t3c_compile.backends.ethosu.products import take_products_apart
from t3c_compile.passes.base import erase_dead_attrs
from t3c_compile.passes.infer_values import InputSpec, infer_values


def split_profile(graph: fx.GraphModule, inputs: Sequence[Tensor], exact: bool = False) -> Split:
    """``graph``, a specialized profile, split; it is used up. ``inputs``: of batch 1; all sizes are fixed to theirs.

    ``exact``: results are those of the ``t3c::`` ops to the bit; the NPU has the products alone, the host all rounding.
    """
    take_attention_apart(graph)
    if exact:
        take_products_apart(graph)
    infer_values(graph, tuple(InputSpec(tuple(x.shape), x.dtype) for x in inputs))
    for node in list(graph.graph.nodes):
        # Sizes are numbers now.
        if node.op == "call_function" and isinstance(node.meta.get("val"), int):
            value: Any = node.meta["val"]
            _replace_by_number(node, value)
            graph.graph.erase_node(node)
    erase_dead_attrs(graph)
    graph.recompile()
    return split(graph, exact)


def _replace_by_number(node: fx.Node, number: int) -> None:
    for user in list(node.users):
        user.args = fx.node.map_arg(user.args, lambda n: number if n is node else n)
        user.kwargs = fx.node.map_arg(user.kwargs, lambda n: number if n is node else n)


def export_host(split: Split, inputs: Sequence[Tensor]) -> ExportedProgram:
    """The host's part as an exported program."""
    return torch.export.export(split.host, tuple(inputs), strict=False)
