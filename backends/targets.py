"""Device descriptions: what code a target can run, its rank grid and how the cost of a layer is known.

Imports neither torch nor the compiler, so that the command line can list targets at once.
"""

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from t3c_compile.backends import cpu
from t3c_compile.passes.errors import T3CError


class UnknownTargetError(T3CError):
    """No target has that name, or this host cannot be one; the message says which are known."""


@dataclass(frozen=True)
class Target:
    """One device kind.

    ``simd`` names the instruction set the kernels are written for: ``avx512vnni``, ``avx2``, ``dotprod`` or ``neon``.
    ``tvm`` is TVM's target dictionary. ``zig_triple`` is the cross-linking triple, None where the host links.
    ``peak_gops`` (int8 multiply-adds counted as two, one core), ``peak_gflops`` (the same in float32) and
    ``bandwidth_gbps`` feed the roofline cost;
    ``cost_source`` says how a cost on this target comes about when nothing was measured.
    """

    name: str
    simd: str
    tvm: Mapping[str, object]
    zig_triple: str | None
    rank_multiple: int
    bits: tuple[int, ...]
    peak_gops: float
    peak_gflops: float
    bandwidth_gbps: float
    cost_source: str


_BITS = (4, 6, 8)
_ARM_TRIPLE = "aarch64-linux-gnu.2.28"
_VNNI_FLAGS = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni")


def _x86_64() -> Target:
    flags = cpu.features()
    if all(flag in flags for flag in _VNNI_FLAGS):
        # Cascade Lake is the oldest core with AVX512-VNNI: what it has, every later one has.
        tvm = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "cascadelake", "num-cores": cpu.cores()}
        return Target(
            "x86_64", "avx512vnni", tvm, None, 16, _BITS, 400.0, 100.0, 20.0, "roofline: nominal 400 GOP/s a core"
        )
    if "avx2" in flags and "fma" in flags:
        tvm = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v3", "num-cores": cpu.cores()}
        return Target("x86_64", "avx2", tvm, None, 8, _BITS, 60.0, 50.0, 20.0, "roofline: nominal 60 GOP/s a core")
    raise UnknownTargetError(
        "target x86_64 describes the host, and this host has no AVX2; cross-compile for another target"
    )


def _x86_64_v3() -> Target:
    tvm = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v3", "num-cores": 4}
    return Target("x86_64-v3", "avx2", tvm, None, 8, _BITS, 60.0, 50.0, 20.0, "roofline: nominal 60 GOP/s a core")


def _arm64() -> Target:
    tvm = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "generic", "mattr": ["+neon"], "num-cores": 4}
    return Target("arm64", "neon", tvm, _ARM_TRIPLE, 8, _BITS, 20.0, 12.0, 8.0, "roofline: nominal 20 GOP/s a core")


def _cortex_a76() -> Target:
    tvm = {
        "kind": "llvm",
        "mtriple": "aarch64-linux-gnu",
        "mcpu": "cortex-a76",
        "mattr": ["+neon", "+dotprod"],
        "num-cores": 4,
    }
    # Two 128-bit sdot a cycle at 2.4 GHz: 2 * 16 multiply-adds * 2.
    return Target(
        "cortex-a76", "dotprod", tvm, _ARM_TRIPLE, 8, _BITS, 153.0, 38.0, 12.0, "roofline: 2 sdot a cycle at 2.4 GHz"
    )


_TARGETS: dict[str, Callable[[], Target]] = {
    "x86_64": _x86_64,
    "x86_64-v3": _x86_64_v3,
    "arm64": _arm64,
    "cortex-a76": _cortex_a76,
}


def list_targets() -> tuple[str, ...]:
    """Names of the known targets."""
    return tuple(_TARGETS)


@cache
def get_target(name: str) -> Target:
    """The target called ``name``; :class:`UnknownTargetError` (a ValueError) lists the known ones."""
    try:
        make = _TARGETS[name]
    except KeyError:
        raise UnknownTargetError(f"unknown target {name!r}; known targets: {', '.join(_TARGETS)}") from None
    return make()


def host_target() -> Target:
    """The target that is this machine. Raises :class:`UnknownTargetError` where none is."""
    return get_target("arm64" if platform.machine() in ("aarch64", "arm64") else "x86_64")


# What a CPU must have to run code of each instruction set, as Linux names it.
_CPU_FEATURES = {
    "avx512vnni": _VNNI_FLAGS,
    "avx2": ("avx2", "fma"),
    "dotprod": ("asimd", "asimddp"),
    "neon": ("asimd",),
}


def cpu_features(target: Target) -> tuple[str, ...]:
    """The CPU features a library built for ``target`` needs; the runtime refuses to load it elsewhere."""
    return _CPU_FEATURES[target.simd]


def machine(target: Target) -> str:
    """The architecture as ``platform.machine()`` has it on Linux: ``x86_64`` or ``aarch64``."""
    return str(target.tvm["mtriple"]).partition("-")[0]
