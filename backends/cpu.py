"""What the machine this program runs on has: its processor's features, its cores and its memory."""

import ctypes
import os
import platform
from pathlib import Path

# From Linux's asm/hwcap.h for arm64: features by the word of the auxiliary vector and its bit.
_AT_HWCAP, _AT_HWCAP2 = 16, 26
_ARM_FEATURES = {
    _AT_HWCAP: {"asimd": 1, "atomics": 8, "asimdhp": 10, "asimdrdm": 12, "asimddp": 20, "sve": 22},
    _AT_HWCAP2: {"sve2": 1, "i8mm": 13, "bf16": 14},
}

# From Linux's asm/prctl.h and asm/fpu/types.h: a process has the tile registers of AMX only if it asks for them.
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILES = 158, 0x1023, 18


def features() -> frozenset[str]:
    """CPU features as Linux names them: from ``/proc/cpuinfo`` on x86, from the auxiliary vector on arm64.

    Where AMX is among them, this process may use it from now on: Linux has given its permission.
    """
    if platform.machine() in ("aarch64", "arm64"):
        # An emulator shows its host's cpuinfo; the auxiliary vector is the program's own.
        value = ctypes.CDLL(None).getauxval
        value.restype = ctypes.c_ulong
        return frozenset(
            name for word, bits in _ARM_FEATURES.items() for name, bit in bits.items() if value(word) >> bit & 1
        )
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    found = frozenset(next((line for line in lines if line.startswith("flags")), "").partition(":")[2].split())
    if "amx_tile" in found and ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILES) != 0:
        return frozenset(feature for feature in found if not feature.startswith("amx"))
    return found


def let_tvm_use_all_cores() -> None:
    """Have TVM run a thread on every core, where the environment does not say how many.

    Left alone it takes every other processor for the second thread of a core, and on machines without such threads
    half of the cores are idle. It reads the variable when it first runs something in parallel.
    """
    if not {"TVM_NUM_THREADS", "OMP_NUM_THREADS"} & os.environ.keys():
        os.environ["TVM_NUM_THREADS"] = str(cores())


def cores() -> int:
    """Cores, not their threads, among the processors this process may use."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    processors = os.sched_getaffinity(0)
    siblings = set()
    for processor in processors:
        path = Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list")
        try:
            siblings.add(path.read_text())
        except OSError:
            return len(processors)
    return len(siblings)


def memory_bytes() -> int:
    """Physical memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
