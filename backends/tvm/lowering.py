"""One profile on its way from an exported program to Relax: what converters of ops read and emit.

Weights are asked for by :meth:`Lowering.packed`, which makes a parameter of the packed tensor and records how it comes
from the raw one.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import tvm
from torch import fx
from tvm import relax, te
from tvm.relax.frontend.torch import from_exported_program
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from t3c_compile.backends.tvm.fuse import Fused, fuse
from t3c_compile.backends.tvm.kernels.finish import Finish
from t3c_compile.backends.tvm.kernels.isa import Isa
from t3c_compile.backends.tvm.kernels.pack import Packing
from t3c_compile.passes.base import bound
from t3c_compile.passes.errors import T3CError

# A run-time tensor: the raw parameter's name and how it is packed, None where it is used as stored.
Key = tuple[str, Packing | None]
Arguments = Mapping[str, Any]

# Ops that a kernel may take over and that have no converter of their own.
_TAKEN_OVER = ("relu.default", "add.Tensor")


class UnsupportedOpError(T3CError):
    """The graph holds ops with no lowering; the message names every node, its op and layer, and the way out."""


class Lowering:
    """One profile on its way to Relax; ``program`` has been through :func:`prepare`.

    ``take_over``: kernels take over the nodes after them; else each op is one of the module's.
    """

    def __init__(self, isa: Isa, program: torch.export.ExportedProgram, take_over: bool = True) -> None:
        self.isa = isa
        self.program = program
        self.names = {
            spec.arg.name: str(spec.target) for spec in self.program.graph_signature.input_specs if spec.target
        }
        self.tensors: dict[Key, relax.Var] = {}
        # Attention's results that lie as [batch, tokens, heads, width], by node.
        self.tokens_first: dict[fx.Node, relax.Var] = {}
        self.node: Any = None
        self._importer: Any = None
        found = fuse(program.graph, take_over)
        self._called_at = {fused.last: fused for fused in found}
        self._taken_over = {node for fused in found for node in fused.before_last}
        self._fused: Any = None
        # What kernels have made of the quantize nodes after them.
        self._forms: dict[fx.Node, relax.Var] = {}

    def run(self, converters: Mapping[str, "Converter"]) -> tvm.IRModule:
        """Import as ``main(*inputs, *stored)``; the packed tensors in :attr:`tensors` are free in its body."""
        _check_ops(self.program.graph, converters)
        return from_exported_program(
            self.program,
            keep_params_as_input=True,
            unwrap_unit_return_tuple=True,
            run_ep_decomposition=False,
            custom_convert_map={name: self._converter(converters) for name in {*converters, *_TAKEN_OVER}},
        )

    def _converter(self, converters: Mapping[str, "Converter"]) -> Callable[[fx.Node, Any], relax.Var | None]:
        def run(node: fx.Node, importer: Any) -> relax.Var | None:
            self.node, self._importer = node, importer
            if node in self._forms:
                return self._forms[node]
            if node in self._taken_over:
                return None
            self._fused = self._called_at.get(node)
            head = node if self._fused is None else self._fused.head
            convert = converters.get(head.target.__name__)  # type: ignore[union-attr]
            return self.default() if convert is None else convert(self, bound(head))

        return run

    def value(self, node: fx.Node) -> relax.Expr:
        """What ``node`` has become."""
        return self._importer.env[node]

    def packed(self, node: fx.Node, packing: Packing) -> relax.Var:
        """The parameter ``node``, packed at load."""
        key = (self.names[node.name], packing)
        if key not in self.tensors:
            self.tensors[key] = relax.Var(
                f"{node.name}_{packing.layout}", relax.TensorType(packing.shape, packing.packed_dtype)
            )
        return self.tensors[key]

    def call(self, kernel: tvm.tirx.PrimFunc, args: list[relax.Expr | None], shape: list[Any], dtype: str) -> relax.Var:
        """Emit a call of ``kernel`` on the arguments that are there, giving one tensor."""
        return self._call(kernel, args, relax.TensorType(shape, dtype))

    def _call(self, kernel: tvm.tirx.PrimFunc, args: list[relax.Expr | None], types: Any) -> relax.Var:
        builder = self._importer.block_builder
        function = builder.add_func(kernel, str(kernel.attrs["t3c.schedule"]).rpartition(" ")[2])
        return builder.emit(relax.call_tir(function, [argument for argument in args if argument is not None], types))

    @property
    def finish(self) -> Finish:
        """How the kernel called for the present node ends."""
        finish: Finish = self._fused.finish
        return finish

    def call_fused(
        self, kernel: tvm.tirx.PrimFunc, args: list[relax.Expr | None], shape: list[Any]
    ) -> relax.Var | None:
        """Emit a call of ``kernel``, which ends as :attr:`finish`; its float32 result, None where it has none."""
        fused: Fused = self._fused
        forms = [number for scale, zero_point in fused.forms for number in (1 / scale, zero_point)]
        args = [*args, *map(self.value, fused.added), scalars(*forms) if forms else None]
        types = [relax.TensorType(shape, "float32")] * fused.floats + [relax.TensorType(shape, "int8")] * len(
            fused.forms
        )
        called = self._call(kernel, args, types if len(types) > 1 else types[0])
        results = [called] if len(types) == 1 else [self.emit(called[i]) for i in range(len(types))]
        for nodes, result in zip(fused.forms.values(), results[fused.floats :], strict=True):
            self._forms |= dict.fromkeys(nodes, result)
        return results[0] if fused.floats else None

    def emit(self, expression: relax.Expr) -> relax.Var:
        return self._importer.block_builder.emit(expression)

    def expression(self, function: Callable[..., te.Tensor], *args: Any) -> relax.Var:
        """Emit a tensor expression, which operator fusion may join with its neighbours."""
        return self._importer.block_builder.emit_te(function, *args, primfunc_name_hint=function.__name__)

    def default(self) -> relax.Var:
        """What TVM's importer makes of the node."""
        return ExportedProgramImporter.create_convert_map(self._importer)[self.node.target.__name__](self.node)

    def optional(self, node: fx.Node | None) -> relax.Expr | None:
        return None if node is None else self.value(node)


# None is for a node whose value nobody reads: all its users were taken over.
Converter = Callable[[Lowering, Arguments], relax.Var | None]


def scalars(*values: float) -> relax.Expr:
    """What a kernel takes of the op's scalars, each rounded to float32 once, as the reference does."""
    return relax.const(np.array(values, np.float32))


def _check_ops(graph: fx.Graph, converters: Mapping[str, Converter]) -> None:
    known = ExportedProgramImporter().convert_map.keys() | converters.keys()
    offenders = []
    for node in graph.nodes:
        if node.op == "call_function" and node.target.__name__ not in known:
            stack = node.meta.get("nn_module_stack")
            layer = list(stack.values())[-1][0] if stack else ""
            offenders.append(f"  {node.name}: {node.target}" + (f" in layer {layer!r}" if layer else ""))
    if offenders:
        raise UnsupportedOpError(
            "no lowering for these nodes:\n"
            + "\n".join(offenders)
            + "\nWrite the layer with supported ops, run it outside "
            "the compiled model, or add a converter for the op to CONVERTERS in t3c_compile.backends.tvm.convert."
        )
