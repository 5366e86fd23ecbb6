"""TVM's virtual machine by way of its FFI.

The FFI and ``libtvm_runtime`` are all that is loaded: TVM's Python package takes half a second and 40 MB more, and
torch would come with it.
"""

import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from t3c_compile.backends import cpu
from t3c_compile.store import ALIGNMENT

Array = np.ndarray[Any, Any]

# TVM's numbers for the host as a device, and for the allocator that keeps what is given back.
_CPU, _POOLED = 1, 2


class VirtualMachine:
    """A compiled library, loaded. Memory of a call is kept for the next one until :meth:`release_memory`.

    Fresh pages would cost a fifth of a call. ``functions``: what compiled code of this process is to find by name.
    """

    def __init__(self, library: Path, functions: Mapping[str, Callable[..., Any]]) -> None:
        self._ffi = _load_ffi()
        for name, function in functions.items():
            self._ffi.register_global_func(name, function, override=True)
        self._machine = self._ffi.load_module(str(library))["vm_load_executable"]()
        self._machine["vm_initialization"](_CPU, 0, _POOLED)
        self.release_memory: Callable[[], None] = self._ffi.get_global_func("vm.builtin.memory_manager.clear")

    def __getitem__(self, function: str) -> Any:
        return self._machine[function]

    def watch(self, instrument: Callable[..., int]) -> None:
        """Have ``instrument(function, name, before, result, *arguments)`` called before and after every step, kernels
        and the machine's own; it returns 0 to let the step run."""
        self._machine["set_instrument"](self._ffi.convert(instrument))

    def tensor(self, array: Array) -> Any:
        """``array`` as an argument: itself where it may be, else a copy."""
        if array.ctypes.data % ALIGNMENT or not array.flags.writeable or not array.flags.c_contiguous:
            memory = np.empty(array.nbytes + ALIGNMENT, np.uint8)
            start = -memory.ctypes.data % ALIGNMENT
            aligned = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
            aligned[...] = array
            array = aligned
        return self._ffi.from_dlpack(array)

    def tuple(self, tensors: list[Any]) -> Any:
        """``tensors`` as one argument."""
        return self._ffi.convert(tensors)

    def array(self, value: Any) -> Any:
        """A result as a numpy array of its own, or a tuple of them."""
        if isinstance(value, self._ffi.Tensor):
            return np.from_dlpack(value).copy()
        return tuple(self.array(item) for item in value)


def _load_ffi() -> Any:
    cpu.let_tvm_use_all_cores()
    # It would load torch where that is installed, for nothing.
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import tvm_ffi
        from tvm_ffi.libinfo import load_lib_ctypes
    finally:
        if hidden:
            del sys.modules["torch"]
    found = find_spec("tvm")
    if found is None or found.origin is None:
        raise ImportError("apache-tvm is not installed: pip install apache-tvm")
    load_lib_ctypes("tvm", "tvm_runtime", "RTLD_GLOBAL", extra_lib_paths=[Path(found.origin).parent / "lib"])
    return tvm_ffi
