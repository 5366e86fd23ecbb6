"""``relax_module``: a profile as a Relax module of its own, for a TVM pipeline that is not ours."""

from typing import TYPE_CHECKING, Any

import torch
import tvm
from tvm import relax

from t3c_compile.backends.targets import Target, get_target
from t3c_compile.backends.tvm.default_schedule import schedule_module
from t3c_compile.backends.tvm.kernels.isa import isa_for
from t3c_compile.backends.tvm.kernels.pack import pack
from t3c_compile.backends.tvm.legalize import legalize
from t3c_compile.backends.tvm.lowering import Lowering
from t3c_compile.backends.tvm.prepare import prepare
from t3c_compile.backends.tvm.processor import cpu_processor
from t3c_compile.passes.capture import traced_inputs
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.specialize import specialize

if TYPE_CHECKING:
    from t3c_compile.profile import Profile


def relax_module(
    model: ElasticGraphModule, profile: "Profile", example_inputs: tuple[Any, ...], target: Target | str
) -> tuple[tvm.IRModule, list[tvm.runtime.Tensor]]:
    """``model`` at ``profile`` as it is before any Relax pass, and its weights.

    The module has ``main(*inputs, *weights)`` with ``num_input``, as TVM's importers give it: Relax ops, and
    ``call_tir`` of the int8 kernels for ``target``'s instructions, in which weights are packed too; with
    ``relax.transform.LiftTransformParams`` that is done once. :func:`schedule` takes it to scheduled kernels, which
    ``pipelines`` builds. The weights are cut to the profile's ranks.

    Args:
        example_inputs: what the graph is traced with, as for ``transform``.

    Raises:
        UnsupportedOpError: a graph holds an op with no lowering.
        UnknownTargetError, UnsupportedTargetError: there is no such target, or it is no CPU.
    """
    isa = isa_for(get_target(target) if isinstance(target, str) else target)
    ranks = {layer: option.rank for layer, option in profile.options.items()}
    graph = specialize(model, profile.options, profile.activations, ranks)
    inputs = traced_inputs(model, example_inputs)
    shapes = model.meta["t3c_dynamic_shapes"]
    program = torch.export.export(graph, inputs, dynamic_shapes=shapes, strict=False)
    # A pass of the user's sees every op.
    lowering = Lowering(isa, prepare({"main": program})["main"], take_over=False)
    module = _pack_inside(lowering, lowering.run(cpu_processor(isa).converters))
    weights = [graph.state_dict()[lowering.names[name]] for name in _weight_names(module)]
    return module, [tvm.runtime.tensor(weight.detach().contiguous().numpy()) for weight in weights]


def schedule(target: Target | str) -> tvm.ir.transform.Pass:
    """A module pass: Relax ops become kernels, element-wise neighbours are fused, every kernel is scheduled."""
    processor = cpu_processor(isa_for(get_target(target) if isinstance(target, str) else target))

    def apply(module: tvm.IRModule, _: tvm.ir.transform.PassContext) -> tvm.IRModule:
        return schedule_module(legalize(module, processor.kernels), processor.schedule_default)

    return tvm.ir.transform.module_pass(apply, opt_level=0, name="t3c-schedule")


def _weight_names(module: tvm.IRModule) -> list[str]:
    main = module["main"]
    return [parameter.name for parameter in main.params[int(main.attrs["num_input"]) :]]


def _pack_inside(lowering: Lowering, module: tvm.IRModule) -> tvm.IRModule:
    """``module`` with the packed tensors, which are free in ``main``, computed there from the stored ones."""
    main = module["main"]
    stored = {lowering.names[var.name]: var for var in main.params[int(main.attrs["num_input"]) :]}
    builder = relax.BlockBuilder(module)
    bindings = []
    for (name, packing), packed in lowering.tensors.items():
        assert packing is not None
        kernel = builder.add_func(pack(packing), f"pack_{packing.layout}")
        bindings.append(relax.VarBinding(packed, relax.call_tir(kernel, [stored[name]], packed.ty)))
    blocks = [relax.DataflowBlock(bindings) if bindings else None, *main.body.blocks]
    body = relax.SeqExpr([block for block in blocks if block is not None], main.body.body)
    function = relax.Function(main.params, body, main.ret_ty, attrs=main.attrs)
    packed_module = builder.get()
    packed_module.update_func(packed_module.get_global_var("main"), function)
    return relax.transform.Normalize()(packed_module)
