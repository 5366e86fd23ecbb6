"""What rounds attention's results stands right after attention, before they are moved and cut anew.

Rounding is element by element, so to move and then round is to round and then move. After it the kernel of attention
writes int8 itself, and float32 results of a quarter the size are never written.
"""

import torch
from torch import fx

aten = torch.ops.aten

_ATTENTION = ("attention_f32", "attention_int8")
_MOVES = {
    op.default
    for op in (aten.permute, aten.view, aten.reshape, aten._unsafe_view, aten.unsqueeze, aten.clone, aten.contiguous)
} | {aten.transpose.int, aten.squeeze.dim, aten.squeeze.dims}


def round_before_moves(graph: fx.Graph) -> None:
    """Rewrite ``graph``, of a decomposed program, in place; the results are the same bits."""
    for node in list(graph.nodes):
        if _name(node) != "quantize_int8":
            continue
        moves, source = [], node.args[0]
        while source.target in _MOVES and len(source.users) == 1:
            moves.append(source)
            source = source.args[0]
        if not moves or _name(source) not in _ATTENTION or len(source.users) > 1:
            continue
        last = source
        for made_like in (node, *reversed(moves)):
            with graph.inserting_before(node):
                made = graph.call_function(made_like.target, (last, *made_like.args[1:]), made_like.kwargs)
            known = fx.node.map_arg(made.args, lambda n: n.meta["val"])
            made.meta["val"] = made_like.target(*known, **made_like.kwargs)
            last = made
        node.replace_all_uses_with(last)
    graph.eliminate_dead_code()


def _name(node: fx.Node) -> str:
    return getattr(node.target, "_opname", "")
