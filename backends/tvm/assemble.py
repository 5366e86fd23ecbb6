"""Profiles into one module: shared run-time tensors, functions that pack them, equal kernels kept once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
import tvm
import tvm_ffi
from tvm import relax

from t3c_compile.backends.tvm.default_schedule import schedule_module
from t3c_compile.backends.tvm.kernels.tile import Tiles
from t3c_compile.backends.tvm.legalize import legalize
from t3c_compile.backends.tvm.lowering import Key, Lowering
from t3c_compile.backends.tvm.prepare import prepare
from t3c_compile.backends.tvm.processor import Processor
from t3c_compile.backends.tvm.relax_shapes import dims, shape_of
from t3c_compile.backends.tvm.tuning.workload import Workload

# Bytes of the store that one function packs, about: what is held twice while a session starts.
_PACKED_AT_ONCE = 16 << 20

# Raw parameters by the name of the function that packs them.
Packs = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class TensorInfo:
    """An input of a profile function; a dynamic dimension stands by its name."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


def assemble(
    programs: Mapping[str, torch.export.ExportedProgram], processor: Processor, tiles: Callable[[Workload], Tiles]
) -> tuple[tvm.IRModule, tuple[TensorInfo, ...], Packs]:
    """One Relax module with ``f(*inputs, tensors)`` for each profile and functions that pack; the inputs; those.

    Every PrimFunc in it is scheduled and carries ``t3c.schedule``. ``tiles`` gives those of each kernel.
    """
    lowered = {name: _Profile(program, processor, tiles) for name, program in prepare(programs).items()}
    used = {key: var for profile in lowered.values() for key, var in profile.tensors.items()}
    keys = sorted(used, key=lambda key: (key[0], str(key[1])))
    merged = _Merged()
    for name, profile in lowered.items():
        legal = legalize(profile.with_tensors(keys, used), processor.kernels)
        merged.add(name, schedule_module(legal, processor.schedule_default))
    types = {name: ty for profile in lowered.values() for name, ty in profile.raw_types.items()}
    packs = {f"pack_{i}": group for i, group in enumerate(_groups(sorted({name for name, _ in keys}), types))}
    for function, group in packs.items():
        params = [relax.Var(name.replace(".", "_"), types[name]) for name in group]
        merged.add(function, _pack_module(params, group, [key for key in keys if key[0] in group], processor))
    return merged.module, _common_inputs(lowered), packs


def _groups(names: list[str], types: Mapping[str, relax.TensorType]) -> list[tuple[str, ...]]:
    """``names`` in order, in groups of at least :data:`_PACKED_AT_ONCE` bytes but for the last."""
    groups: list[tuple[str, ...]] = []
    group: list[str] = []
    size = 0
    for name in names:
        group.append(name)
        size += prod(int(d) for d in types[name].shape.values) * np.dtype(str(types[name].dtype)).itemsize
        if size >= _PACKED_AT_ONCE or name == names[-1]:
            groups.append(tuple(group))
            group, size = [], 0
    return groups


def _common_inputs(profiles: Mapping[str, "_Profile"]) -> tuple[TensorInfo, ...]:
    inputs = {
        name: tuple(TensorInfo(v.name, dims(shape_of(v)), str(v.ty.dtype)) for v in profile.inputs)
        for name, profile in profiles.items()
    }
    first, expected = next(iter(inputs.items()))
    for name, found in inputs.items():
        if [(i.dtype, len(i.shape)) for i in found] != [(i.dtype, len(i.shape)) for i in expected]:
            raise ValueError(f"programs {first!r} and {name!r} take different inputs: {expected} and {found}")
    return expected


class _Profile:
    """An imported profile and the run-time tensors it reads."""

    def __init__(
        self,
        program: torch.export.ExportedProgram,
        processor: Processor,
        tiles: Callable[[Workload], Tiles],
    ) -> None:
        lowering = Lowering(processor.isa, program, tiles=tiles, kernels=processor.kernels)
        self.module = lowering.run(processor.converters)
        main = self.module["main"]
        count = int(main.attrs["num_input"])
        self.inputs = list(main.params[:count])
        stored = {lowering.names[var.name]: var for var in main.params[count:]}
        self.raw_types = {name: var.ty for name, var in stored.items()}
        read: set[relax.Var] = set()
        relax.analysis.post_order_visit(main.body, lambda e: read.add(e) if isinstance(e, relax.Var) else None)
        direct: dict[Key, relax.Var] = {(name, None): var for name, var in stored.items() if var in read}
        self.tensors = direct | lowering.tensors

    def with_tensors(self, keys: list[Key], types: Mapping[Key, relax.Var]) -> tvm.IRModule:
        """The module with ``main(*inputs, tensors)``, where ``tensors`` is a tuple in the order of ``keys``."""
        main = self.module["main"]
        tensors = relax.Var("tensors", relax.TupleType([types[key].ty for key in keys]))
        reads = [
            relax.VarBinding(self.tensors[key], relax.TupleGetItem(tensors, i))
            for i, key in enumerate(keys)
            if key in self.tensors
        ]
        body = relax.SeqExpr([relax.BindingBlock(reads), *main.body.blocks], main.body.body)
        function = relax.Function([*self.inputs, tensors], body, main.ret_ty).with_attr("global_symbol", "main")
        # What comes after the inputs stays as it is from call to call.
        function = function.with_attr("num_input", len(self.inputs))
        module = tvm.IRModule(dict(self.module.functions))
        module.update_func(module.get_global_var("main"), function)
        return relax.transform.Normalize()(module)


class _Merged:
    """A module that grows; a PrimFunc equal to one already in it is not added again."""

    def __init__(self) -> None:
        self.module = tvm.IRModule()
        self._kernels: dict[tvm_ffi.StructuralKey, tvm.ir.GlobalVar] = {}

    def add(self, name: str, module: tvm.IRModule) -> None:
        """Add ``main`` of ``module`` as ``name``, and its kernels."""
        renamed: dict[tvm.ir.GlobalVar, tvm.ir.GlobalVar] = {}
        for variable, function in module.functions_items():
            if isinstance(function, tvm.tirx.PrimFunc):
                renamed[variable] = self._kernel(variable, function)
        main = _Rename(renamed).visit_expr(module["main"]).with_attr("global_symbol", name)
        self.module.update_func(tvm.ir.GlobalVar(name), main)

    def _kernel(self, variable: tvm.ir.GlobalVar, function: tvm.tirx.PrimFunc) -> tvm.ir.GlobalVar:
        key = tvm_ffi.StructuralKey(function.without_attr("global_symbol"))  # type: ignore[call-arg]
        if key not in self._kernels:
            kernel = tvm.ir.GlobalVar(f"{variable.name_hint.rstrip('0123456789_')}_{len(self._kernels)}")
            relax.expr._update_type(kernel, variable.ty)
            self._kernels[key] = kernel
            self.module.update_func(kernel, function.with_attr("global_symbol", kernel.name_hint))
        return self._kernels[key]


@relax.expr_functor.mutator
class _Rename(relax.PyExprMutator):  # type: ignore[misc]
    def __init__(self, renamed: Mapping[tvm.ir.GlobalVar, tvm.ir.GlobalVar]) -> None:
        super().__init__()
        self._renamed = renamed

    def visit_global_var_(self, variable: tvm.ir.GlobalVar) -> tvm.ir.GlobalVar:
        return self._renamed[variable]


def _pack_module(params: list[relax.Var], raw: tuple[str, ...], keys: list[Key], processor: Processor) -> tvm.IRModule:
    builder = relax.BlockBuilder()
    by_name = dict(zip(raw, params, strict=True))
    with builder.function("main", params):
        result = []
        for name, packing in keys:
            tensor = by_name[name]
            if packing is not None:
                kernel = builder.add_func(processor.pack(packing), f"pack_{packing.layout}")
                packed = relax.TensorType(packing.shape, packing.dtype)
                tensor = builder.emit(relax.call_tir(kernel, [tensor], packed))
            result.append(tensor)
        builder.emit_func_output(relax.Tuple(result))
    return builder.finalize()
