"""One profile on its way from an exported program to Relax: what converters of ops read and emit.

Weights are asked for by :meth:`Lowering.packed`, which makes a parameter of the packed tensor and records how it comes
from the raw one.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import tvm
from torch import fx
from tvm import relax, te
from tvm.relax.frontend.torch import from_exported_program
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from t3c_compile.backends.tvm.fuse import Fused, fuse
from t3c_compile.backends.tvm.kernels.finish import ADD_INT8, Finish
from t3c_compile.backends.tvm.kernels.isa import Isa
from t3c_compile.backends.tvm.kernels.pack import Packing
from t3c_compile.backends.tvm.kernels.quantize import flip
from t3c_compile.backends.tvm.kernels.table import Kernels, cpu_kernels
from t3c_compile.backends.tvm.kernels.tile import Tiles
from t3c_compile.backends.tvm.relax_shapes import shape_of
from t3c_compile.backends.tvm.tuning.workload import Spec, Workload
from t3c_compile.passes.base import bound
from t3c_compile.passes.errors import T3CError
from t3c_compile.passes.ops.elementwise import FUNCTIONS

# A run-time tensor: the raw parameter's name and how it is packed, None where it is used as stored.
Key = tuple[str, Any]
Arguments = Mapping[str, Any]

# Element-wise ops, which give images back as they lie; and those of them that kernels take over.
_ELEMENTWISE = frozenset(
    f"{name}.default"
    for name in (*FUNCTIONS, "relu", "clamp", "hardswish", "hardsigmoid", "quantize_int8", "dequantize_int8")
) | {"add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor"}


WAYS_OUT = (
    "Write the layer with supported ops, run it outside the compiled model, or add a converter for the op to "
    "CONVERTERS in t3c_compile.backends.tvm.convert."
)


class UnsupportedOpError(T3CError):
    """The graph holds ops with no lowering; the message names every node, its op and layer, and the way out."""


class Lowering:
    """One profile on its way to Relax; ``program`` has been through :func:`prepare`.

    ``take_over``: kernels take over the nodes after them; else each op is one of the module's. ``tiles``: those of the
    kernels that have a choice; the defaults where it is not given. ``kernels``: those of float stages; a CPU's where
    they are not given.
    """

    def __init__(
        self,
        isa: Isa,
        program: torch.export.ExportedProgram,
        take_over: bool = True,
        tiles: Callable[[Workload], Tiles] = lambda _: (),
        kernels: Kernels | None = None,
    ) -> None:
        self.isa = isa
        self.kernels = kernels or cpu_kernels(isa)
        # How often a call of the profile calls each kernel that has a choice of tiles.
        self.workloads: Counter[Workload] = Counter()
        self._tiles = tiles
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
        # Images that lie as [batch, height, width, channels], by node; those in the dot product's form apart.
        self._channels_last: dict[fx.Node, relax.Var] = {}
        self._activations: dict[fx.Node, relax.Var] = {}

    def run(self, converters: Mapping[str, "Converter"]) -> tvm.IRModule:
        """Import as ``main(*inputs, *stored)``; the packed tensors in :attr:`tensors` are free in its body."""
        _check_ops(self.program.graph, converters)
        return from_exported_program(
            self.program,
            keep_params_as_input=True,
            unwrap_unit_return_tuple=True,
            run_ep_decomposition=False,
            custom_convert_map={name: self._converter(converters) for name in {*converters, *_ELEMENTWISE}},
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
            name = head.target.__name__  # type: ignore[union-attr]
            convert = converters.get(name)

            def converted() -> relax.Var | None:
                return self.default() if convert is None else convert(self, bound(head))

            return self._as_they_lie(node, converted) if name in _ELEMENTWISE else converted()

        return run

    def value(self, node: fx.Node) -> relax.Expr:
        """What ``node`` has become."""
        return self._importer.env[node]

    def exists(self, node: fx.Node) -> bool:
        """Whether ``node`` has become a tensor: what a kernel has taken over has not."""
        return self._importer.env.get(node) is not None

    def channels_last(self, node: fx.Node) -> relax.Var:
        """The images that ``node`` has become, as [batch, height, width, channels]."""
        if node not in self._channels_last:
            self._channels_last[node] = self._moved(self.value(node), (0, 2, 3, 1))
        return self._channels_last[node]

    def activations(self, node: fx.Node) -> relax.Var:
        """The int8 images that ``node`` has become, channels-last and in the form the dot product reads."""
        if node not in self._activations:
            images = self.channels_last(node)
            self._activations[node] = self.expression(flip, images, "uint8") if self.isa.unsigned else images
        return self._activations[node]

    def has_activations(self, node: fx.Node) -> bool:
        """Whether a kernel has made the images of ``node`` in that form."""
        return node in self._activations

    def int8_images(self, node: fx.Node, activations: relax.Var) -> relax.Var:
        """Keep ``activations`` as ``node``'s; what reads them otherwise has them moved and in int8."""
        self._activations[node] = activations
        images = self.expression(flip, activations, "int8") if self.isa.unsigned else activations
        return self._channels_first(node, images)

    def is_channels_last(self, node: fx.Node) -> bool:
        """Whether the images of ``node`` lie as [batch, height, width, channels]."""
        return node in self._channels_last

    def _as_they_lie(self, node: fx.Node, convert: Callable[[], relax.Var | None]) -> relax.Var | None:
        """``convert`` on images of which one at least is channels-last; the result is so, too."""
        inputs = node.all_input_nodes
        images = all(isinstance(v := x.meta["val"], torch.Tensor) and v.dim() == 4 for x in (node, *inputs))
        if not images or not any(map(self.is_channels_last, inputs)):
            return convert()
        moved = {x: self.channels_last(x) for x in inputs}
        kept = {x: self._importer.env[x] for x in inputs}
        self._importer.env.update(moved)
        result = convert()
        self._importer.env.update(kept)
        return self._channels_first(node, result)

    def _channels_first(self, node: fx.Node, images: relax.Var) -> relax.Var:
        """Keep ``images``, which are channels-last, as ``node``'s; what reads them otherwise has them moved."""
        self._channels_last[node] = images
        return self._moved(images, (0, 3, 1, 2))

    def _moved(self, images: relax.Expr, order: tuple[int, ...]) -> relax.Var:
        shape = [shape_of(images)[d] for d in order]
        size = shape[1:3] if order[-1] == 1 else shape[2:]
        if all(isinstance(d, int) and d == 1 for d in size):
            return self.emit(relax.op.reshape(images, shape))
        return self.emit(relax.op.permute_dims(images, list(order)))

    def packed(self, node: fx.Node, packing: Any) -> relax.Var:
        """The parameter ``node``, packed at load as ``packing`` (the processor's own class) says."""
        key = (self.names[node.name], packing)
        if key not in self.tensors:
            self.tensors[key] = relax.Var(
                f"{node.name}_{packing.layout}", relax.TensorType(packing.shape, packing.dtype)
            )
        return self.tensors[key]

    def weights(self, node: fx.Node, packing: Packing, bits: int) -> relax.Var:
        """The same of int8 weights, rounded to ``bits`` where the instruction set has that done at load."""
        return self.packed(node, replace(packing, bits=bits) if self.isa.rounds_at_load else packing)

    def kernel(self, spec: Spec) -> tvm.tirx.PrimFunc:
        """The kernel of ``spec``, with the tiles that are best by what is known."""
        workload = Workload(self.isa, spec)
        self.workloads[workload] += 1
        return workload.kernel(self._tiles(workload))

    def call(self, kernel: tvm.tirx.PrimFunc, args: list[relax.Expr | None], shape: list[Any], dtype: str) -> relax.Var:
        """Emit a call of ``kernel`` on the arguments that are there, giving one tensor."""
        return self._call(kernel, args, relax.TensorType(shape, dtype))

    def call_several(
        self, kernel: tvm.tirx.PrimFunc, args: list[relax.Expr | None], results: list[tuple[list[Any], str]]
    ) -> list[relax.Var]:
        """The same for several tensors, each of a (shape, dtype)."""
        called = self._call(kernel, args, [relax.TensorType(shape, dtype) for shape, dtype in results])
        return [self.emit(called[i]) for i in range(len(results))]

    def _call(self, kernel: tvm.tirx.PrimFunc, args: list[relax.Expr | None], types: Any) -> relax.Var:
        builder = self._importer.block_builder
        how = str(kernel.attrs["t3c.schedule"]).removeprefix("kernel template: ")
        function = builder.add_func(kernel, how.partition(",")[0])
        return builder.emit(relax.call_tir(function, [argument for argument in args if argument is not None], types))

    @property
    def is_fused(self) -> bool:
        """Whether the present node has a kernel that :func:`fuse` knows."""
        return self._fused is not None

    @property
    def readers(self) -> list[fx.Node]:
        """The nodes that read what the kernel called for the present node writes."""
        return list(self.node.users) if self._fused is None else self._fused.readers

    @property
    def finish(self) -> Finish:
        """How the kernel called for the present node ends."""
        finish: Finish = self._fused.finish
        return finish

    @property
    def image_finish(self) -> Finish:
        """The same for a kernel whose results are images, channels-last."""
        return replace(self.finish, offset=self.isa.offset)

    def call_fused(
        self,
        kernel: tvm.tirx.PrimFunc,
        args: list[relax.Expr | None],
        shape: list[Any],
        channels_last: bool = False,
        tokens_first: bool = False,
    ) -> relax.Var | None:
        """Emit a call of ``kernel``, which ends as :attr:`finish`; its float32 result, None where it has none.

        ``channels_last``: ``shape`` and all that the kernel adds and writes are so; it ends as :attr:`image_finish`.
        ``tokens_first``: what it writes lies as [batch, tokens, heads, width].
        """
        fused: Fused = self._fused
        forms = [number for scale, zero_point in fused.forms for number in (1 / scale, zero_point)]
        offset = self.isa.offset if channels_last else 0
        forms += [number for scale, zero_point in fused.added_scales for number in (scale, zero_point + offset)]
        added = [
            (self.activations if kind == ADD_INT8 else self.channels_last)(node) if channels_last else self.value(node)
            for kind, node in zip(fused.finish.added, fused.added, strict=True)
        ]
        args = [*args, *added, scalars(*forms) if forms else None]
        form_type = relax.TensorType(shape, self.isa.activation_dtype if channels_last else "int8")
        types = [relax.TensorType(shape, "float32")] * fused.floats + [form_type] * len(fused.forms)
        called = self._call(kernel, args, types if len(types) > 1 else types[0])
        results = [called] if len(types) == 1 else [self.emit(called[i]) for i in range(len(types))]
        for nodes, result in zip(fused.forms.values(), results[fused.floats :], strict=True):
            for node in nodes:
                if channels_last:
                    self._forms[node] = self.int8_images(node, result)
                else:
                    self._forms[node] = self.heads_first(node, result) if tokens_first else result
        if not fused.floats:
            return None
        if channels_last:
            return self._channels_first(fused.last, results[0])
        return self.heads_first(fused.last, results[0]) if tokens_first else results[0]

    def heads_first(self, node: fx.Node, heads: relax.Var) -> relax.Var:
        """Keep ``heads``, which lie as [batch, tokens, heads, width], as ``node``'s; what reads them otherwise has them
        moved."""
        self.tokens_first[node] = heads
        return self.emit(relax.op.permute_dims(heads, [0, 2, 1, 3]))

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
            "no lowering for these nodes, whose ops neither TVM nor a converter of ours knows:\n"
            + "\n".join(offenders)
            + f"\n{WAYS_OUT}"
        )
