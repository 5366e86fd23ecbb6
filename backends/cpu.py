"""What the processor this program runs on has: its features and its cores."""

import ctypes
import os
import platform
from pathlib import Path

# From Linux's asm/hwcap.h for arm64.
_AT_HWCAP = 16
_ARM_HWCAP = {"asimd": 1, "asimdhp": 10, "asimddp": 20}


def features() -> frozenset[str]:
    """CPU features as Linux names them: from ``/proc/cpuinfo`` on x86, from the auxiliary vector on arm64."""
    if platform.machine() in ("aarch64", "arm64"):
        # An emulator shows its host's cpuinfo; the auxiliary vector is the program's own.
        capabilities = ctypes.CDLL(None).getauxval(_AT_HWCAP)
        return frozenset(name for name, bit in _ARM_HWCAP.items() if capabilities >> bit & 1)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").partition(":")[2].split())


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
