"""Which nodes each kernel takes over: the element-wise ones after it that its results alone go through.

A kernel that does so ends as :class:`~t3c_compile.backends.tvm.kernels.finish.Finish` says, and what stands between two
int8 layers is written to memory once, in int8.
"""

from dataclasses import dataclass, field

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from t3c_compile.backends.op_name import op_name
from t3c_compile.backends.tvm.kernels.finish import ACTIVATIONS, ADD, ADD_INT8, Finish

_HEADS = (
    "int8_linear",
    "svd_linear",
    "weight_only_linear",
    "svd_weight_only_linear",
    "int8_conv2d",
    "svd_conv2d",
    "tucker2_conv2d",
    "cp_conv2d",
    "max_pool2d",
    "layer_norm_f32",
    "rms_norm_f32",
)
# Their kernels write int8 forms, but take over nothing else.
_ATTENTION = ("attention_f32", "attention_int8")


@dataclass
class Fused:
    """A kernel's node and what it takes over; the kernel is called where ``last``, its float32 result, stands.

    ``added``: the nodes whose values are added, of int8 ones with scale and zero point in ``added_scales``.
    ``forms``: for each int8 form, the ``quantize_int8`` nodes that are it.
    """

    head: fx.Node
    last: fx.Node
    steps: list[str] = field(default_factory=list)
    added: list[fx.Node] = field(default_factory=list)
    added_scales: list[tuple[float, int]] = field(default_factory=list)
    forms: dict[tuple[float, int], list[fx.Node]] = field(default_factory=dict)
    floats: bool = True

    @property
    def before_last(self) -> list[fx.Node]:
        """The nodes from ``head`` to the one before ``last``."""
        nodes, node = [], self.head
        while node is not self.last:
            nodes.append(node)
            node = next(iter(node.users))
        return nodes

    @property
    def readers(self) -> list[fx.Node]:
        """The nodes that read ``last`` or one of its forms."""
        forms = {node for nodes in self.forms.values() for node in nodes}
        return [reader for user in self.last.users for reader in (user.users if user in forms else (user,))]

    @property
    def finish(self) -> Finish:
        return Finish(tuple(self.steps), self.floats, len(self.forms))


def fuse(graph: fx.Graph, take_over: bool = True) -> list[Fused]:
    """One for every node that has such a kernel. No node is taken over twice; none is unless ``take_over``."""
    taken: set[fx.Node] = set()
    found = []
    for node in graph.nodes:
        if op_name(node) not in (*_HEADS, *_ATTENTION) or (op_name(node) == "max_pool2d" and not _is_pooled_here(node)):
            continue
        fused = Fused(node, node)
        found.append(fused)
        if not take_over:
            continue
        while len(fused.last.users) == 1 and op_name(node) not in _ATTENTION:
            (user,) = fused.last.users
            if user in taken or not _take(fused, user):
                break
            taken.add(user)
            fused.last = user
        for user in fused.last.users:
            if op_name(user) == "quantize_int8":
                scale, zero_point = user.args[1:]
                fused.forms.setdefault((float(scale), int(zero_point)), []).append(user)  # type: ignore[arg-type]
        fused.floats = sum(map(len, fused.forms.values())) < max(1, len(fused.last.users))
    return found


def _is_pooled_here(node: fx.Node) -> bool:
    """Whether max pooling is of float32 or int8 images whose size is known, and not dilated."""
    x, *options = node.args
    images: torch.Tensor = x.meta["val"]  # type: ignore[union-attr]
    dilated = len(options) > 3 and set(options[3]) != {1}  # type: ignore[arg-type]
    known = images.dim() == 4 and all(isinstance(size, int) for size in images.shape[1:])
    return known and images.dtype in (torch.float32, torch.int8) and not dilated


def _take(fused: Fused, user: fx.Node) -> bool:
    """Add ``user`` to the steps where it is one."""
    if op_name(user) in ACTIVATIONS:
        fused.steps.append(op_name(user))
        return True
    if user.target != torch.ops.aten.add.Tensor or user.kwargs or len(user.args) != 2:
        return False
    # A value added to itself leaves none.
    other = next((value for value in user.args if value is not fused.last), None)
    if not isinstance(other, fx.Node):
        return False
    mine, theirs = fused.last.meta["val"], other.meta["val"]
    if not isinstance(theirs, torch.Tensor) or theirs.dtype != torch.float32 or theirs.dim() != mine.dim():
        return False
    if not all(statically_known_true(a == b) for a, b in zip(mine.shape, theirs.shape, strict=True)):
        return False
    if op_name(other) == "dequantize_int8":
        form, scale, zero_point = other.args
        fused.added_scales.append((float(scale), int(zero_point)))  # type: ignore[arg-type]
        fused.steps.append(ADD_INT8)
        fused.added.append(form)  # type: ignore[arg-type]
    else:
        fused.steps.append(ADD)
        fused.added.append(other)
    return True
