"""A library with CUDA code: the host's half by LLVM, the device's as machine code inside it.

TVM packs CUDA *source* where it is built without a GPU, for its loader to compile in every process. Here the packed
source is replaced by a cubin, in the serialization that TVM's loader reads:
https://github.com/apache/tvm/blob/main/src/runtime/cuda/cuda_module.cc
"""

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.s_tir.pipeline import finalize_host_passes
from tvm.tirx.compilation_pipeline import register_tir_pipeline

from t3c_compile.backends.tvm.cuda.nvrtc import compile_cuda

CUDA_PIPELINE = "t3c_cuda"
_SYMBOL = "__tvm_ffi__library_bin"


def _kernel_passes() -> tuple[tvm.ir.transform.Pass, object, object]:
    # The CPU's passes with those that threads need. Barriers are where kernels have them, loops are unrolled by the
    # compiler of the source, and no two buffers of a kernel share memory: their barriers are not made for that.
    passes = [
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.LiftThreadBinding(),
        s_tir.transform.UnifyThreadBinding(),
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
        tirx.transform.NarrowDataType(32),
        tirx.transform.VectorizeLoop(True),
        s_tir.transform.RewriteUnsafeSelect(),
        tirx.transform.VerifyMemory(),
        tirx.transform.AnnotateEntryFunc(),
        tirx.transform.SplitHostDevice(),
        tirx.transform.MakePackedAPI(),
    ]
    return tvm.ir.transform.Sequential(passes), finalize_host_passes, tirx.transform.LowerIntrin


register_tir_pipeline(CUDA_PIPELINE, _kernel_passes)


@contextmanager
def own_compiler(arch: str) -> Iterator[None]:
    """Where the CUDA runtime is loaded TVM compiles at once, by this callback; elsewhere :func:`packer` does."""
    name = "tvm_callback_cuda_compile"
    theirs = tvm_ffi.get_global_func(name, allow_missing=True)
    tvm_ffi.register_global_func(name, lambda source: compile_cuda(source, arch), override=True)
    try:
        yield
    finally:
        if theirs is None:
            tvm_ffi.remove_global_func(name)
        else:
            tvm_ffi.register_global_func(name, theirs, override=True)


def packer(arch: str, assemble: Callable[[str, str], None]) -> Callable[..., str]:
    """For ``export_library``: packs what a module imports with machine code for ``arch`` in place of CUDA source.

    ``assemble(source, object)`` makes an object file of assembly for the host.
    """

    def pack(module: tvm.runtime.Module, is_system_lib: bool, prefix: str, folder: str) -> str:
        packed = tvm_ffi.get_global_func("runtime.ModulePackImportsToTensor")(module).numpy().tobytes()
        packed = with_binary(packed, lambda source: compile_cuda(source, arch))
        blob, assembly, out = (str(Path(folder) / f"t3c_imports.{end}") for end in ("bin", "s", "o"))
        Path(blob).write_bytes(packed)
        Path(assembly).write_text(
            f'.section .rodata\n.globl {prefix}{_SYMBOL}\n.balign 64\n{prefix}{_SYMBOL}:\n.incbin "{blob}"\n'
            '.section .note.GNU-stack,"",%progbits\n'
        )
        assemble(assembly, out)
        return out

    return pack


def with_binary(packed: bytes, compiled: Callable[[str], bytes]) -> bytes:
    """TVM's packed imports with the CUDA source in them ``compiled``.

    ``packed``: its size but for these eight bytes; the tree of modules (two lists of numbers); and of each module its
    kind and its bytes, for CUDA the format (``cuda`` or ``cubin``), what each kernel takes, and the code. Every text
    has its size before it. ValueError where it is not so.
    """
    reader = _Reader(packed[8:])
    try:
        for _ in range(2):
            reader.take(8 * reader.number())
        out = [reader.data[: reader.at]]
        while reader.at < len(reader.data):
            kind = reader.text()
            out.append(_text(kind))
            if kind in (b"_lib", b"_import_tree"):
                continue
            module = reader.text()
            out.append(_text(_with_binary(module, compiled) if kind == b"cuda" else module))
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise ValueError("TVM packs CUDA modules in another way than this version of t3c-compile knows") from error
    whole = b"".join(out)
    return struct.pack("<Q", len(whole)) + whole


def _with_binary(module: bytes, compiled: Callable[[str], bytes]) -> bytes:
    reader = _Reader(module)
    written = reader.text()
    if written in (b"cubin", b"ptx"):  # compiled by :func:`own_compiler`
        return module
    start = reader.at
    for _ in range(reader.number()):
        reader.text()  # the kernel's name, and as it is called
        reader.text()
        reader.take(4 * reader.number())  # types of its arguments
        for _ in range(reader.number()):
            reader.text()  # what a launch says besides
        reader.take(4 * reader.number())  # and of arguments
    functions, source = module[start : reader.at], reader.text()
    if written != b"cuda" or reader.at != len(module):
        raise IndexError("bytes are left")
    return _text(b"cubin") + functions + _text(compiled(source.decode()))


class _Reader:
    """Takes bytes from the front of ``data``."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise IndexError("the bytes end early")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self) -> int:
        return int(struct.unpack("<Q", self.take(8))[0])

    def text(self) -> bytes:
        return self.take(self.number())


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value
