"""The kernels of float stages and moves, which every processor has with the same arguments and results."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import tvm

from t3c_compile.backends.tvm.kernels import floats, moves, pool, rows
from t3c_compile.backends.tvm.kernels.isa import Isa

Kernel = Callable[..., tvm.tirx.PrimFunc]


@dataclass(frozen=True)
class Kernels:
    """What makes each kernel; the functions of the CPU's, which have these names, say their arguments."""

    matmul: Kernel
    softmax: Kernel
    layer_norm: Kernel
    rms_norm: Kernel
    mean: Kernel
    max_pool2d: Kernel
    cumsum: Kernel
    index_copy: Kernel


def cpu_kernels(isa: Isa) -> Kernels:
    """Those for a CPU with ``isa``."""
    functions = (floats.matmul, rows.softmax, rows.layer_norm, rows.rms_norm, rows.mean)
    return Kernels(
        *(partial(function, isa) for function in (*functions, pool.max_pool2d, moves.cumsum, moves.index_copy))
    )
