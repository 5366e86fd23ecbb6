"""One shared library from the exported programs of a profile set."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import tvm
from tvm import relax

from t3c_compile.backends.targets import Target
from t3c_compile.backends.tvm.assemble import Packs, TensorInfo, assemble
from t3c_compile.backends.tvm.kernels.isa import isa_for
from t3c_compile.backends.tvm.lowering import WAYS_OUT, UnsupportedOpError
from t3c_compile.backends.tvm.pipelines import KERNEL_PIPELINE, runtime_pipeline
from t3c_compile.backends.tvm.tuning.records import Tuned


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
    programs: Mapping[str, torch.export.ExportedProgram], target: Target, path: Path, records: Path | None = None
) -> Library:
    """Compile ``programs`` (function name -> exported program) for ``target`` into a shared library at ``path``.

    All programs take the same inputs and name the same tensors alike in their ``state_dict``. ``records``: a file
    that tuning wrote; its tiles go before the shipped ones. Raises :class:`UnsupportedOpError` where a graph holds an
    op with no lowering, :class:`RecordsError` where the records cannot be used, and ValueError where there is no
    program or the programs differ in their inputs.
    """
    if not programs:
        raise ValueError("no program to build: give at least one profile")
    module, inputs, packs = assemble(programs, isa_for(target), Tuned(target, records).tiles)
    kernels = {
        variable.name_hint: str(function.attrs["t3c.schedule"])
        for variable, function in module.functions_items()
        if isinstance(function, tvm.tirx.PrimFunc)
    }
    compiled_for = tvm.target.Target(dict(target.tvm))
    try:
        executable = relax.build(module, compiled_for, relax_pipeline=runtime_pipeline(), tir_pipeline=KERNEL_PIPELINE)
    except tvm.error.InternalError as error:
        # The importer knows the op, and nothing makes code of it.
        _, cannot, call = str(error).partition("Offending call:")
        if not cannot:
            raise
        raise UnsupportedOpError(f"TVM has no code for {call.strip()}\n{WAYS_OUT}") from error
    link(executable, target, path)
    return Library(path, target.name, tuple(programs), inputs, packs, kernels)


def link(module: tvm.runtime.Executable | tvm.runtime.Module, target: Target, path: Path) -> None:
    """Write a compiled module as a shared library for ``target``; RuntimeError where linking fails."""
    if target.zig_triple is None:
        module.export_library(str(path))
    else:
        module.export_library(str(path), fcompile=_zig_link(target.zig_triple))


def _zig_link(triple: str) -> Callable[..., None]:
    """A linker for ``export_library``: any host links for ``triple`` with the zig toolchain from PyPI."""

    def link(output: str, objects: list[str], options: list[str] | None = None) -> None:
        command = [
            sys.executable,
            "-m",
            "ziglang",
            "cc",
            "-target",
            triple,
            "-shared",
            "-o",
            output,
            *objects,
            *(options or []),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"linking for {triple} failed:\n{done.stderr}")

    return link
