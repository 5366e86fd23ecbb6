"""Profiles as MLIR, one of them compiled and run by IREE: `python examples/export_mlir.py [FOLDER]`.

IREE is one user of such files; anything that reads Linalg on tensors, TOSA or StableHLO is another. It needs the
package's `mlir` extra.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from iree import compiler, runtime
from torch import Tensor, nn

import t3c_compile as t3c
from t3c_compile.backends.mlir import export_mlir
from t3c_compile.backends.targets import get_target
from t3c_compile.passes.specialize import specialize


class Net(nn.Module):
    """Two convolutions and a linear, [N, 3, 8, 8] to [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, 2, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.wide(F.relu(self.stem(x))))
        return self.head(x.mean((2, 3)))


def main(folder: Path) -> float:
    """The largest difference between IREE and torch over the largest logit."""
    torch.manual_seed(0)
    model, example = Net().eval(), torch.randn(4, 3, 8, 8)
    elastic = t3c.transform(model, (example,))
    profiles = t3c.snap(elastic, [(torch.randn(32, 3, 8, 8),)], [get_target("x86_64")], count=2).profiles
    for dialect in ("linalg-on-tensors", "tosa", "stablehlo"):
        written = export_mlir(elastic, profiles, folder / dialect, (example,), dialect)
        print(f"{written}: {', '.join(sorted(file.name for file in written.iterdir()))}")

    least = profiles[0]
    binary = compiler.compile_file(
        str(folder / "linalg-on-tensors" / f"{least.name}.mlir"),
        target_backends=["llvm-cpu"],
        extra_args=["--iree-llvmcpu-target-cpu=host"],
    )
    context = runtime.SystemContext(config=runtime.Config("local-task"))
    context.add_vm_module(runtime.VmModule.copy_buffer(context.instance, binary))
    x = torch.randn(7, 3, 8, 8)
    found = context.modules.module.main(x.numpy()).to_host()
    expected = specialize(elastic, least.options, least.activations)(x).detach().numpy()
    difference = float(np.abs(found - expected).max() / np.abs(expected).max())
    print(f"{least.name} in IREE at batch {len(x)}: {difference:.1e} of the largest logit from torch")
    return difference


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else scratch))
