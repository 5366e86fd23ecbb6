"""What differs between the processors that TVM compiles for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import tvm

from t3c_compile.backends.tvm.convert import CONVERTERS
from t3c_compile.backends.tvm.default_schedule import schedule_default
from t3c_compile.backends.tvm.kernels.isa import Isa
from t3c_compile.backends.tvm.kernels.pack import pack
from t3c_compile.backends.tvm.kernels.table import Kernels, cpu_kernels
from t3c_compile.backends.tvm.lowering import Converter


@dataclass(frozen=True)
class Processor:
    """``pack`` makes the kernel of a packing, ``schedule_default`` schedules what is no kernel of ours."""

    isa: Isa
    kernels: Kernels
    converters: Mapping[str, Converter]
    pack: Callable[[Any], tvm.tirx.PrimFunc]
    schedule_default: Callable[[tvm.tirx.PrimFunc], tvm.tirx.PrimFunc]


def cpu_processor(isa: Isa) -> Processor:
    """A CPU with ``isa``."""
    return Processor(isa, cpu_kernels(isa), CONVERTERS, pack, partial(schedule_default, lanes=isa.lanes))
