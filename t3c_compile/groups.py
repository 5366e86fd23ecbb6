"""Groups: layers that read the same tensor and fuse into one product (query, key and value) are decided together."""

from collections.abc import Mapping
from typing import Any

from t3c_compile.passes.elastic import Table, elastic_layers
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.option import Option

Groups = tuple[tuple[str, ...], ...]


def layer_groups(elastic: ElasticGraphModule) -> Groups:
    """The elastic layers in module order, each in one group.

    Linears are together where they read the same tensors, convolutions where they also walk alike; tables stand alone.
    """
    inputs: dict[str, list[Any]] = {}
    for node in elastic.eval_graph.nodes:
        if node.op == "call_module":
            inputs.setdefault(str(node.target), []).append(node.args[0])
    groups: dict[Any, list[str]] = {}
    for name, layer in elastic_layers(elastic):
        walk = (getattr(layer, "conv", None), layer.dense_shape()[2:])
        key = name if isinstance(layer, Table) else (*inputs[name], walk)
        groups.setdefault(key, []).append(name)
    return tuple(tuple(group) for group in groups.values())


def group_top(group: tuple[str, ...], chains: Mapping[str, tuple[Option, ...]]) -> int:
    """The greatest level of a group: that of its longest chain."""
    return max(len(chains[name]) for name in group) - 1


def member_level(level: int, top: int, own_top: int) -> int:
    """A layer's level when its group is at ``level`` of ``top``: in proportion, so equal chains have equal levels."""
    return (2 * level * own_top + top) // (2 * top) if top else 0


def member_levels(group: tuple[str, ...], level: int, chains: Mapping[str, tuple[Option, ...]]) -> dict[str, int]:
    """The level of every layer of ``group``; none falls as ``level`` rises."""
    top = group_top(group, chains)
    return {name: member_level(level, top, len(chains[name]) - 1) for name in group}
