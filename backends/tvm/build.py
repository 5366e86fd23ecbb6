"""One shared library from the exported programs of a profile set."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tvm
from tvm import relax

from t3c_compile.backends.targets import Target
from t3c_compile.backends.tvm.assemble import Packs, TensorInfo, assemble
from t3c_compile.backends.tvm.cuda.library import CUDA_PIPELINE, own_compiler, packer
from t3c_compile.backends.tvm.cuda.processor import CUDA
from t3c_compile.backends.tvm.kernels.isa import isa_for
from t3c_compile.backends.tvm.kernels.tile import Tiles
from t3c_compile.backends.tvm.lowering import WAYS_OUT, UnsupportedOpError
from t3c_compile.backends.tvm.pipelines import KERNEL_PIPELINE, runtime_pipeline
from t3c_compile.backends.tvm.processor import cpu_processor
from t3c_compile.backends.tvm.tuning.records import Tuned
from t3c_compile.backends.tvm.tuning.workload import Workload


@dataclass(frozen=True)
class Library:
    """What a built library holds.

    ``functions``: the VM function of each profile, ``f(*inputs, tensors)``. ``packs``: functions
    to be called once, each with the raw store tensors it names; what they give, joined in their order, are the
    ``tensors`` every profile takes.
    ``kernels``: how each compiled kernel was scheduled, by name.
    """

    path: Path
    target: str
    functions: tuple[str, ...]
    inputs: tuple[TensorInfo, ...]
    packs: Packs
    kernels: Mapping[str, str]


def build_library(
    programs: Mapping[str, torch.export.ExportedProgram],
    target: Target,
    path: Path,
    records: Path | None = None,
    cuda_graphs: bool = False,
) -> Library:
    """Compile ``programs`` (function name -> exported program) for ``target`` into a shared library at ``path``.

    All programs take the same inputs and name the same tensors alike in their ``state_dict``. ``records``: a file
    that tuning wrote; its tiles go before the shipped ones. ``cuda_graphs``: see :func:`runtime_pipeline`.

    Raises:
        UnsupportedOpError: a graph holds an op with no lowering.
        RecordsError: the records cannot be used.
        CudaCompilerError: NVRTC is not installed, or does not know the architecture.
        ValueError: there is no program, or the programs differ in their inputs.
    """
    if not programs:
        raise ValueError("no program to build: give at least one profile")
    tiles: Callable[[Workload], Tiles]
    if target.kind == "cuda":
        # Tuning measures on CPUs alone.
        processor, pipeline, tiles = CUDA, CUDA_PIPELINE, lambda _: ()
        compiled_for = tvm.target.Target(dict(target.tvm), host=dict((target.host or target).tvm))
    else:
        processor, pipeline = cpu_processor(isa_for(target)), KERNEL_PIPELINE
        tiles = Tuned(target, records).tiles
        compiled_for = tvm.target.Target(dict(target.tvm))
    module, inputs, packs = assemble(programs, processor, tiles)
    kernels = {
        variable.name_hint: str(function.attrs["t3c.schedule"])
        for variable, function in module.functions_items()
        if isinstance(function, tvm.tirx.PrimFunc)
    }
    relax_pipeline = runtime_pipeline(cuda_graphs)
    with _ops_named(), own_compiler(str(target.tvm["arch"])) if target.kind == "cuda" else nullcontext():
        executable = relax.build(module, compiled_for, relax_pipeline=relax_pipeline, tir_pipeline=pipeline)
    link(executable, target, path)
    return Library(path, target.name, tuple(programs), inputs, packs, kernels)


def require_code(program: torch.export.ExportedProgram, target: Target) -> None:
    """Raise :class:`UnsupportedOpError` where :func:`build_library` would for ``program``; no kernel is compiled."""
    processor = CUDA if target.kind == "cuda" else cpu_processor(isa_for(target.host or target))
    module, _, _ = assemble({"main": program}, processor, lambda _: ())
    with _ops_named(), tvm.target.Target(dict((target.host or target).tvm)):
        # What relax.build does before it compiles kernels.
        relax.vm_build._vmcodegen(relax.ExecBuilder(), runtime_pipeline()(module), "bytecode")


@contextmanager
def _ops_named() -> Iterator[None]:
    """TVM's error of an op that the importer knows and nothing makes code of becomes ours."""
    try:
        yield
    except tvm.error.InternalError as error:
        _, cannot, call = str(error).partition("Offending call:")
        if not cannot:
            raise
        raise UnsupportedOpError(f"TVM has no code for {call.strip()}\n{WAYS_OUT}") from error


# A process has AMX's registers (18 in Linux's asm/fpu/types.h) only if it asks for them (0x1023 in asm/prctl.h): the
# library does when it is loaded, whoever loads it.
_PERMISSION = """
#include <sys/syscall.h>
#include <unistd.h>

__attribute__((constructor)) static void ask_for_tile_registers(void) { syscall(SYS_arch_prctl, 0x1023, 18); }
"""


def link(module: tvm.runtime.Executable | tvm.runtime.Module, target: Target, path: Path) -> None:
    """Write a compiled module as a shared library for ``target``; RuntimeError where linking fails."""
    triple = (target.host or target).zig_triple
    compiler = ["cc"] if triple is None else [sys.executable, "-m", "ziglang", "cc", "-target", triple]
    options: dict[str, Callable[..., Any]] = {} if triple is None else {"fcompile": _linker(compiler)}
    if target.kind == "cuda":
        options["fpack_imports"] = packer(str(target.tvm["arch"]), _assembler(compiler))
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        if "amx_tile" in target.features:
            source = Path(folder, "permission.c")
            source.write_text(_PERMISSION)
            objects.append(f"{folder}/permission.o")
            _run([*compiler, "-c", "-O1", "-fPIC", "-o", objects[0], str(source)])
        module.export_library(str(path), addons=objects, **options)


def _linker(compiler: list[str]) -> Callable[..., None]:
    """A linker for ``export_library``: any host links for another with the zig toolchain from PyPI."""

    def link(output: str, objects: list[str], options: list[str] | None = None) -> None:
        _run([*compiler, "-shared", "-o", output, *objects, *(options or [])])

    return link


def _assembler(compiler: list[str]) -> Callable[[str, str], None]:
    def assemble(source: str, output: str) -> None:
        _run([*compiler, "-c", source, "-o", output])

    return assemble


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"linking failed: {' '.join(command)}\n{done.stderr}")
