"""An op's name, as tables of ops are keyed by."""

import torch
from torch import fx


def op_name(node: fx.Node) -> str:
    """The op's name without namespace and overload; "" of what is no ATen or ``t3c::`` op."""
    return str(node.target._opname) if isinstance(node.target, torch._ops.OpOverload) else ""
