"""The workloads of exported programs."""

from collections import Counter
from collections.abc import Mapping

import torch

from t3c_compile.backends.tvm.convert import CONVERTERS
from t3c_compile.backends.tvm.kernels.emit import Sizes
from t3c_compile.backends.tvm.kernels.isa import Isa
from t3c_compile.backends.tvm.lowering import Lowering
from t3c_compile.backends.tvm.prepare import prepare
from t3c_compile.backends.tvm.tuning.workload import Workload


def workloads_of(programs: Mapping[str, torch.export.ExportedProgram], isa: Isa) -> Counter[Workload]:
    """Each kernel that has a choice of tiles, and how often one call of every program calls it in all.

    Raises:
        UnsupportedOpError: a graph holds an op with no lowering.
    """
    found: Counter[Workload] = Counter()
    for program in prepare(programs).values():
        lowering = Lowering(isa, program)
        lowering.run(CONVERTERS)
        found += lowering.workloads
    return found


def measured_sizes(programs: Mapping[str, torch.export.ExportedProgram]) -> Sizes:
    """The symbols in the programs' inputs as they are measured: 1 for a batch, else as the program was traced."""
    sizes: dict[str, int] = {}
    for program in programs.values():
        for node in program.graph.find_nodes(op="placeholder"):
            value = node.meta.get("val")
            for axis, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
                if isinstance(size, torch.SymInt):
                    sizes.setdefault(str(size), 1 if axis == 0 else int(size.node.hint))
    return sizes
