"""Profiles of one model are one graph with other numbers in its ``t3c::`` ops (ranks, bits, scales): tracing it once
serves them all."""

import copy
from typing import Any

from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.fx.node import map_arg


def differ_in_numbers_alone(one: Graph, other: Graph) -> bool:
    """Whether the graphs are equal but for the scalars of ``t3c::`` ops, and the names of nodes."""
    if len(one.nodes) != len(other.nodes):
        return False
    places = {node: i for graph in (one, other) for i, node in enumerate(graph.nodes)}
    for mine, theirs in zip(one.nodes, other.nodes, strict=True):
        if mine.op != theirs.op or (mine.op != "placeholder" and mine.target != theirs.target):
            return False
        arguments = ((node.args, node.kwargs) for node in (mine, theirs))
        first, second = (map_arg(found, lambda n: f"%{places[n]}") for found in arguments)
        if _is_ours(mine):
            if mine.kwargs or len(mine.args) != len(theirs.args):
                return False
            pairs = zip(first[0], second[0], strict=True)
            if any(a != b and not (_is_number(a) and _is_number(b)) for a, b in pairs):
                return False
        elif first != second:
            return False
    return True


def renumbered(program: ExportedProgram, source: Graph) -> ExportedProgram | None:
    """``program`` with the scalars that the ``t3c::`` ops of ``source`` have, over the same tensors.

    ``program`` was traced from a graph that differs from ``source`` in numbers alone. None where its ``t3c::`` ops are
    not those of ``source`` in order, so that it must be traced again.
    """
    graph = copy.deepcopy(program.graph)
    for copied, node in zip(graph.nodes, program.graph.nodes, strict=True):
        copied.name = node.name  # a copy renames what is called like a Python builtin; the signature does not
    mine, theirs = ([node for node in g.nodes if _is_ours(node)] for g in (graph, source))
    if [node.target for node in mine] != [node.target for node in theirs]:
        return None
    for node, other in zip(mine, theirs, strict=True):
        if node.kwargs or len(node.args) != len(other.args):
            return None
        node.args = tuple(b if _is_number(b) else a for a, b in zip(node.args, other.args, strict=True))
    return ExportedProgram(
        program.graph_module,
        graph,
        copy.deepcopy(program.graph_signature),
        program.state_dict,
        program.range_constraints,
        program.module_call_graph,
        program.example_inputs,
        program.constants,
        verifiers=program.verifiers,
    )


def _is_ours(node: Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "namespace", "") == "t3c"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
