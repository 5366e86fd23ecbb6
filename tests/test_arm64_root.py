"""The emulated arm64 system runs, and runs what is cross-compiled on this machine."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from t3c_compile import qemu

ABOUT = """
import json, platform, numpy, tvm
from tvm.base import _RUNTIME_ONLY
import t3c_compile
print(json.dumps({"machine": platform.machine(), "numpy": numpy.__version__, "tvm": tvm.__version__,
                  "runtime_only": bool(_RUNTIME_ONLY)}))
"""

KERNEL = """
import sys, numpy as np, tvm.runtime
library, inputs, output = sys.argv[1:]
x = tvm.runtime.tensor(np.load(inputs))
y = tvm.runtime.empty(x.shape, "float32")
tvm.runtime.load_module(library)["scale"](x, y)
np.save(output, y.numpy())
"""


def test_versions_are_the_hosts(arm64: ModuleType) -> None:
    done = arm64.run_python(["-c", ABOUT])
    assert done.returncode == 0, done.stderr
    tvm, numpy = version("apache-tvm"), version("numpy")
    expected = {"machine": "aarch64", "numpy": numpy, "tvm": tvm, "runtime_only": True}
    assert json.loads(done.stdout) == expected


@pytest.mark.parametrize("cpu", ["cortex-a76", "neoverse-n1", "max"])
def test_cross_compiled_kernel(arm64: ModuleType, tmp_path: Path, cpu: str) -> None:
    import tvm
    from tvm import te

    x = te.placeholder((64, 24), name="x")
    y = te.compute(x.shape, lambda i, j: x[i, j] * 3.0 + 1.0, name="y")
    mcpu = "cortex-a76" if cpu == "max" else cpu
    target = tvm.target.Target({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": mcpu})
    function = te.create_prim_func([x, y]).with_attr("global_symbol", "scale")
    library = tmp_path / "scale.so"

    def link(output: str, objects: list[str], **_: object) -> None:
        zig = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-gnu.2.28", "-shared"]
        subprocess.run([*zig, "-o", output, *objects], check=True)

    tvm.compile(tvm.IRModule({"scale": function}), target=target).export_library(str(library), fcompile=link)

    inputs = np.random.default_rng(0).standard_normal((64, 24), dtype=np.float32)
    np.save(tmp_path / "x.npy", inputs)
    done = arm64.run_python(["-c", KERNEL, library, tmp_path / "x.npy", tmp_path / "y.npy"], cpu=cpu)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), inputs * 3 + 1, rtol=1e-6, atol=1e-6)


def test_a_missing_root_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("T3C_ARM64_ROOT", str(tmp_path))
    monkeypatch.setattr(qemu, "emulator", lambda: "qemu-aarch64")
    assert str(tmp_path) in (qemu.unavailable() or "")
    with pytest.raises(RuntimeError, match="cannot run arm64 programs"):
        qemu.run_python(["-c", "pass"])
