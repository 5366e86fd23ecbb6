"""A CUDA GPU as TVM's lowering sees it, and the schedule of what is no kernel of ours."""

from typing import Any

import tvm
from tvm import s_tir

from t3c_compile.backends.tvm.cuda import float_gemm, per_element, rows
from t3c_compile.backends.tvm.cuda.convert import CUDA_CONVERTERS
from t3c_compile.backends.tvm.cuda.pack import pack
from t3c_compile.backends.tvm.default_schedule import inline, is_spatial
from t3c_compile.backends.tvm.kernels.isa import Isa
from t3c_compile.backends.tvm.kernels.table import Kernels
from t3c_compile.backends.tvm.processor import Processor

_THREADS = 128


def schedule_default(function: tvm.tirx.PrimFunc) -> tvm.tirx.PrimFunc:
    """``function`` with a thread for each result: element-wise stages inlined, a launch for each stage that is left.

    Sums stay in order, in one thread.
    """
    schedule = s_tir.Schedule(function)
    blocks = inline(schedule, schedule.get_child_blocks(schedule.get_sblock("root")))
    for block in blocks:
        loops = schedule.get_loops(block)
        spatial = is_spatial(schedule, block)
        outer = [loop for loop, kind in zip(loops, spatial, strict=True) if kind]
        inner = [loop for loop, kind in zip(loops, spatial, strict=True) if not kind]
        if not outer:
            outer = [schedule.add_unit_loop(loops[0] if loops else block)]
        schedule.reorder(*outer, *inner)
        shared, thread = schedule.split(schedule.fuse(*outer), [None, _THREADS])
        schedule.bind(shared, "blockIdx.x")
        schedule.bind(thread, "threadIdx.x")
        if inner:
            schedule.decompose_reduction(block, inner[0])
    return schedule.mod["main"].with_attr("t3c.schedule", "default: a thread for each result")


def _none(*_: Any) -> Any:
    raise NotImplementedError("CUDA kernels have no vectors")


CUDA = Processor(
    # Threads are scalar: the instruction set says only how images lie.
    Isa("cuda", 1, 0, False, _none),
    Kernels(
        float_gemm.matmul,
        rows.softmax,
        rows.layer_norm,
        rows.rms_norm,
        rows.mean,
        per_element.max_pool2d,
        per_element.cumsum,
        per_element.index_copy,
    ),
    CUDA_CONVERTERS,
    pack,
    schedule_default,
)
