"""Unwrap tensor subclasses: a parameter that another tool has quantized becomes the plain tensors it is made of."""

import torch
from torch.fx import GraphModule

from t3c_compile.passes.base import LayerRecord, erase_dead_attrs, get_attr, report_of

_INNER = torch.ops.export.access_subclass_inner_tensor.default


def unwrap_subclasses(gm: GraphModule) -> None:
    """Read inner tensors of subclass parameters (torchao's, for one) as buffers of their own, in place.

    Export writes what the subclass computes as plain ops on ``access_subclass_inner_tensor(weight, "qdata")``; here
    that is read as ``weight_qdata``. The layer is put into the report as kept: no pass finds a float32 weight in it.
    """
    wrapped = set()
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target != _INNER:
            continue
        source, attribute = node.args
        tensor = get_attr(gm, source.target)
        owner, _, leaf = str(source.target).rpartition(".")
        module = gm.get_submodule(owner)
        name = f"{leaf}_{attribute}"
        if not hasattr(module, name):
            module.register_buffer(name, getattr(tensor, attribute).detach())
        with gm.graph.inserting_before(node):
            inner = gm.graph.get_attr(f"{owner}.{name}" if owner else name)
        inner.meta = dict(node.meta)
        node.replace_all_uses_with(inner)
        gm.graph.erase_node(node)
        wrapped.add((module, leaf))
        kind = type(tensor)
        reason = f"its {leaf} is a tensor of {kind.__module__.partition('.')[0]}, kept as it is"
        report_of(gm).kept[owner] = LayerRecord(owner, kind.__name__, reason=reason)
    erase_dead_attrs(gm)
    for module, leaf in wrapped:
        delattr(module, leaf)
    gm.recompile()
