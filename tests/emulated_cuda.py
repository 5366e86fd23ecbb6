"""A GPU on the processor: TVM's own CUDA runtime over a driver of ours, and kernels compiled by g++ from the CUDA code
that NVRTC is given. What it cannot show is how fast, and whether NVRTC's code does what the source says.
"""

import ctypes
import re
import subprocess
from hashlib import sha256
from pathlib import Path

from t3c_compile.backends.tvm.cuda.nvrtc import kernels_of

HERE = Path(__file__).with_name("cuda_emulator")
_PROTOTYPE = re.compile(r'extern "C" __global__ void __launch_bounds__\(\d+\) (\w+)\(([^)]*)\) \{')


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[:4000]}")


def load_driver(folder: Path) -> ctypes.CDLL:
    """Compile the driver and load it in place of NVIDIA's, so that TVM's runtime finds it."""
    driver, runtime = folder / "libcuda.so.1", folder / "libcudart.so.13"
    versions, nothing = folder / "versions", folder / "nothing.c"
    # One library has all functions, so that they share what they know; the other is there by name and version.
    versions.write_text("libcudart.so.13 { global: t3c_nothing; };\n")
    nothing.write_text("int t3c_nothing;\n")
    shared = ("-shared", "-fPIC", "-o")
    _run("gcc", *shared, str(runtime), f"-Wl,-soname,{runtime.name},--version-script={versions}", str(nothing))
    source, options = str(HERE / "driver.cc"), ("-std=c++17", "-O1", f"-Wl,-soname,{driver.name}")
    _run("g++", *options, *shared, str(driver), source, "-ldl")
    ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(driver), mode=ctypes.RTLD_GLOBAL)


def compile_emulated(source: str, folder: Path) -> bytes:
    """CUDA ``source`` as "machine code" for the driver: the path of a library, ended by a zero."""
    calls = []
    for name, parameters in _PROTOTYPE.findall(source):
        types = [re.sub(r"\s*\b\w+$", "", p.replace("__restrict__", "")) for p in parameters.split(",")]
        arguments = ", ".join(f"*({kind}*)p[{i}]" for i, kind in enumerate(types))
        calls.append(f'extern "C" void t3c_call_{name}(void** p) {{ {name}({arguments}); }}')
        calls.append(f'extern "C" int t3c_count_{name}; int t3c_count_{name} = {len(types)};')
    code = '#include "kernels.h"\n' + kernels_of(source) + "\n".join(calls) + "\n"
    # g++ wants the alignment first.
    code = code.replace("__shared__ alignas(64)", "alignas(64) static")
    path = folder / f"{sha256(code.encode()).hexdigest()[:16]}.so"
    path.with_suffix(".cc").write_text(code)
    options = ("-std=c++17", "-O1", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-w")
    _run("g++", *options, f"-I{HERE}", "-shared", str(path.with_suffix(".cc")), "-o", str(path))
    return str(path).encode() + b"\0"
