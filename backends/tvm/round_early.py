"""What rounds results stands right after what made them, before they are moved, cut anew or pooled.

Rounding is element by element and keeps order, so to move or to take the greatest and then round is to round first.
After it kernels write int8 themselves, and float32 results four times as large are never written.
"""

import torch
from torch import fx

from t3c_compile.backends.op_name import op_name

aten = torch.ops.aten

_ATTENTION = ("attention_f32", "attention_int8")
_POOL = aten.max_pool2d.default
_MOVES = {
    op.default
    for op in (aten.permute, aten.view, aten.reshape, aten._unsafe_view, aten.unsqueeze, aten.clone, aten.contiguous)
} | {aten.transpose.int, aten.squeeze.dim, aten.squeeze.dims, _POOL}


def round_early(graph: fx.Graph) -> None:
    """Rewrite ``graph``, of a decomposed program, in place; the results are the same bits."""
    for node in list(graph.nodes):
        if op_name(node) != "quantize_int8" or not node.users:
            continue
        moves, source = [], node.args[0]
        alike = [user for user in source.users if op_name(user) == op_name(node) and user.args[1:] == node.args[1:]]
        readers = alike
        while source.target in _MOVES and len(source.users) == len(readers):
            moves.append(source)
            source, readers = source.args[0], [source]
        pooled = any(move.target == _POOL for move in moves)
        if not moves or len(source.users) > 1 or not (pooled or op_name(source) in _ATTENTION):
            continue
        last = source
        for made_like in (node, *reversed(moves)):
            with graph.inserting_before(node):
                made = graph.call_function(made_like.target, (last, *made_like.args[1:]), made_like.kwargs)
            known = fx.node.map_arg(made.args, lambda n: n.meta["val"])
            made.meta["val"] = made_like.target(*known, **made_like.kwargs)
            last = made
        for rounding in alike:
            rounding.replace_all_uses_with(last)
    graph.eliminate_dead_code()
