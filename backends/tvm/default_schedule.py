"""A vectorized, parallel schedule for every PrimFunc that is not one of our kernel templates.

Element-wise stages are inlined; each block left has its outer loops fused and shared out among the threads, and its
innermost spatial loop vectorized; reductions keep their sums in a vector.
"""

from collections.abc import Callable
from math import gcd, prod
from typing import Any

import tvm
from tvm import s_tir

from t3c_compile.backends.tvm.kernels.emit import PARALLEL_WORK

# TVM would take a vector of these apart, element by element; LLVM has them for vectors.
for _op in ("tirx.nearbyint",):
    tvm.ir.register_op_attr(_op, "TVectorizable", True)

_SPATIAL, _REDUCTION = 0, 2  # tirx.IterVar kinds


def schedule_module(module: tvm.IRModule, default: Callable[[tvm.tirx.PrimFunc], tvm.tirx.PrimFunc]) -> tvm.IRModule:
    """``module`` with each PrimFunc scheduled, by ``default`` where it is not, and carrying ``t3c.schedule``, which
    says how."""
    result = tvm.IRModule(dict(module.functions))
    for variable, function in module.functions_items():
        if isinstance(function, tvm.tirx.PrimFunc) and "t3c.schedule" not in function.attrs:
            result.update_func(variable, default(function))
    return result


def schedule_default(function: tvm.tirx.PrimFunc, lanes: int) -> tvm.tirx.PrimFunc:
    """``function`` with the default schedule for vectors of ``lanes`` float32."""
    schedule = s_tir.Schedule(function)
    blocks = inline(schedule, schedule.get_child_blocks(schedule.get_sblock("root")))
    kinds = {_schedule_block(schedule, block, lanes) for block in blocks}
    kind = "reduction" if "reduction" in kinds else "elementwise"
    return schedule.mod["main"].with_attr("t3c.schedule", f"default: {kind}")


def inline(schedule: Any, blocks: list[Any]) -> list[Any]:
    """Inline every element-wise stage into its consumer; what is left.

    A stage with conditions (padding) stays before a reduction: in it they would be tested for every term, and TVM's
    vectors of them are wrong where a row is shorter than a vector.
    """
    left = []
    for block in blocks[:-1]:
        feeds_sum = any(is_reduction(schedule, consumer) for consumer in schedule.get_consumers(block))
        if is_reduction(schedule, block) or (feeds_sum and _has_condition(schedule, block)):
            left.append(block)
            continue
        try:
            schedule.compute_inline(block)
        except s_tir.ScheduleError:
            left.append(block)
    return [*left, blocks[-1]]


def is_reduction(schedule: Any, block: Any) -> bool:
    return any(int(v.iter_type) == _REDUCTION for v in schedule.get(block).iter_vars)


def is_spatial(schedule: Any, block: Any) -> list[bool]:
    """Of each loop around ``block`` whether its turns are independent."""
    return [int(v.iter_type) == _SPATIAL for v in schedule.get(block).iter_vars]


def _has_condition(schedule: Any, block: Any) -> bool:
    return "if_then_else" in schedule.get(block).script()


def _extent(schedule: Any, loop: Any) -> int | None:
    extent = schedule.get(loop).extent
    return int(extent.value) if isinstance(extent, tvm.tirx.IntImm) else None


def _schedule_block(schedule: Any, block: Any, lanes: int) -> str:
    kinds = is_spatial(schedule, block)
    loops = schedule.get_loops(block)
    if not loops:
        return "elementwise"
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind]
    reduction = [loop for loop, kind in zip(loops, kinds, strict=True) if not kind]
    extents = [_extent(schedule, loop) for loop in loops]
    # A dynamic dimension counts as one: a call too small to share out must not pay for waking the other threads.
    work = prod(e for e in extents if e is not None)
    schedule.reorder(*spatial, *reduction)
    vector = None
    if spatial:
        *outer, inner = spatial
        # Grow a short innermost loop until it fills a vector.
        while (
            outer and (size := _extent(schedule, inner)) is not None and size < lanes and _extent(schedule, outer[-1])
        ):
            inner = schedule.fuse(outer.pop(), inner)
        size = _extent(schedule, inner)
        width = 1 if size is None else gcd(size, lanes)
        if 2 * width < lanes:
            width = 1  # too ragged: LLVM vectorizes the plain loop better than a loop of short vectors
        if width > 1:
            rest, vector = schedule.split(inner, [None, width])
        else:
            rest = inner
        shared = schedule.fuse(*outer, rest)
        if reduction and vector is not None:
            schedule.reorder(shared, *reduction, vector)
        if work >= PARALLEL_WORK:
            schedule.parallel(shared)
    if vector is not None:
        schedule.vectorize(vector)
    if reduction:
        schedule.decompose_reduction(block, reduction[0])
    return "reduction" if reduction else "elementwise"
