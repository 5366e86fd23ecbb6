"""TVM's virtual machine by way of its FFI.

The FFI and ``libtvm_runtime`` are all that is loaded: TVM's Python package takes half a second and 40 MB more, and
torch would come with it.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

from t3c_compile.backends import cpu
from t3c_compile.store import ALIGNMENT

Array = np.ndarray[Any, Any]

# TVM's numbers for the host and the first GPU as devices, and for the allocator that keeps what is given back.
_CPU, _CUDA, _POOLED = 1, 2, 2


class VirtualMachine:
    """A compiled library, loaded. Memory of a call is kept for the next one until :meth:`release_memory`.

    Fresh pages would cost a fifth of a call. ``functions``: what compiled code of this process is to find by name.
    ``on_gpu``: the library is CUDA code; tensors are then copied to the GPU and back.
    """

    def __init__(self, library: Path, functions: Mapping[str, Callable[..., Any]], on_gpu: bool = False) -> None:
        self._ffi = _load_ffi(on_gpu)
        self._gpu = self._ffi.device("cuda", 0) if on_gpu else None
        for name, function in functions.items():
            self._ffi.register_global_func(name, function, override=True)
        self._machine = self._ffi.load_module(str(library))["vm_load_executable"]()
        devices = [_CUDA, _CPU] if on_gpu else [_CPU]
        self._machine["vm_initialization"](*(number for device in devices for number in (device, 0, _POOLED)))
        self.release_memory: Callable[[], None] = self._ffi.get_global_func("vm.builtin.memory_manager.clear")

    def __getitem__(self, function: str) -> Any:
        return self._machine[function]

    def watch(self, instrument: Callable[..., int]) -> None:
        """Have ``instrument(function, name, before, result, *arguments)`` called before and after every step, kernels
        and the machine's own; it returns 0 to let the step run."""
        self._machine["set_instrument"](self._ffi.convert(instrument))

    def tensor(self, array: Array) -> Any:
        """``array`` as an argument: itself where it may be, else a copy."""
        if self._gpu is not None:
            array = np.ascontiguousarray(array)
            tensor = self._runtime("AllocWithScope")(
                self._ffi.Shape(array.shape), self._ffi.dtype(str(array.dtype)), self._gpu, None
            )
            self._runtime("CopyFromBytes")(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)
            return tensor
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
        if not isinstance(value, self._ffi.Tensor):
            return tuple(self.array(item) for item in value)
        if self._gpu is None:
            return np.from_dlpack(value).copy()
        array = np.empty(tuple(value.shape), str(value.dtype))
        self._runtime("CopyToBytes")(value, ctypes.c_void_p(array.ctypes.data), array.nbytes)
        return array

    def _runtime(self, name: str) -> Any:
        return self._ffi.get_global_func(f"runtime.TVMTensor{name}")


@contextmanager
def loading_beside(on_gpu: bool) -> Iterator[None]:
    """Load the FFI and TVM's library in a thread beside what is done inside; it is loaded, or has failed, at the end.

    Reading and hashing weights leaves the interpreter to others, and takes about as long.
    """

    def load() -> None:
        # Said again, and to the caller, by whoever needs it.
        with suppress(ImportError, OSError):
            _load_ffi(on_gpu)

    thread = Thread(target=load)
    thread.start()
    try:
        yield
    finally:
        thread.join()


@cache
def _load_ffi(on_gpu: bool) -> Any:
    cpu.let_tvm_use_all_cores()
    # It would load these where they are installed, for nothing.
    hidden = {"torch", "cuda"} - ({"cuda"} if on_gpu else set()) - sys.modules.keys()
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        import tvm_ffi
        from tvm_ffi.libinfo import load_lib_ctypes
    finally:
        for name in hidden:
            del sys.modules[name]
    found = find_spec("tvm")
    if found is None or found.origin is None:
        raise ImportError("apache-tvm is not installed: pip install apache-tvm")
    folders = [Path(found.origin).parent / "lib"]
    load_lib_ctypes("tvm", "tvm_runtime", "RTLD_GLOBAL", extra_lib_paths=folders)
    if on_gpu:
        _load_cuda_runtime()
        load_lib_ctypes("tvm", "tvm_runtime_cuda", "RTLD_GLOBAL", extra_lib_paths=folders)
    return tvm_ffi


def _load_cuda_runtime() -> None:
    """Load libcudart, which TVM's library needs, from where the system, pip's package or PyTorch has it."""
    name = "libcudart.so.13"
    packages = find_spec("nvidia")
    folders = (
        []
        if packages is None
        else [Path(place) / "cu13" / "lib" for place in packages.submodule_search_locations or ()]
    )
    for path in (name, *(str(folder / name) for folder in folders)):
        try:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return
    raise ImportError(f"{name} is not there: pip install nvidia-cuda-runtime")
