"""What NVIDIA's driver says of this machine's GPU, for artifacts with CUDA code."""

import ctypes

_DRIVER = "libcuda.so.1"
# From cuda.h: attributes that hold the compute capability.
_MAJOR, _MINOR = 75, 76
_WAY_OUT = "load the artifact on a machine that has one, or lower for this machine's CPU too"


def refusal(arch: str) -> str | None:
    """Why machine code for ``arch`` (``sm_80``) does not run on this machine's first GPU; None where it does.

    Machine code runs on later GPUs of the same generation, the first digit, alone:
    https://docs.nvidia.com/cuda/cuda-c-programming-guide/#binary-compatibility
    """
    number = arch.removeprefix("sm_")
    wanted = int(number[:-1]), int(number[-1])
    needs = f"it needs an NVIDIA GPU of compute capability {wanted[0]}.{wanted[1]}"
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return f"{needs}, and there is no NVIDIA driver ({_DRIVER}) here: {_WAY_OUT}"
    count = ctypes.c_int()
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status or not count.value:
        return f"{needs}, and the NVIDIA driver here finds no GPU (status {status}): {_WAY_OUT}"
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(device), 0)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    if major.value != wanted[0] or minor.value < wanted[1]:
        found = f"{major.value}.{minor.value}"
        way_out = f"lower for cuda-sm_{found.replace('.', '')}"
        return f"{needs} or a later one of its generation, and this GPU's is {found}: {way_out}"
    return None
