"""Whether a model can be lowered at all, known before the long work of training and choosing profiles."""

from collections.abc import Sequence

import torch
from torch import Tensor

from t3c_compile.backends.targets import Target
from t3c_compile.chain import chains
from t3c_compile.passes.capture import traced_inputs
from t3c_compile.passes.elastic import elastic_layers
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.specialize import specialize
from t3c_compile.snapping import grid_of


def require_lowering(model: ElasticGraphModule, example_inputs: tuple[Tensor, ...], targets: Sequence[Target]) -> None:
    """Raise where ``lower`` would refuse an op of ``model`` for one of ``targets``.

    Profiles differ in numbers alone, so one is taken all the way to the kernels, none of which is compiled: about as
    much work as the transform of a small model.

    Args:
        example_inputs: as for ``transform``.

    Raises:
        UnsupportedOpError: it names every node, its op and layer, and the way out.
    """
    # The compiler takes a second to load.
    from t3c_compile.backends.tvm.build import require_code

    training = model.training
    options = {name: chain[0] for name, chain in chains(model.eval(), grid_of(targets)).items()}
    activations = {name: layer.activations() for name, layer in elastic_layers(model)}
    graph = specialize(model, options, activations, {name: option.rank for name, option in options.items()})
    model.train(training)
    inputs, shapes = traced_inputs(model, example_inputs), model.meta["t3c_dynamic_shapes"]
    program = torch.export.export(graph, inputs, dynamic_shapes=shapes, strict=False)
    # Targets of one kind differ in instructions, not in the ops they have. What an NPU leaves is its host's.
    for target in {target.kind == "cuda": target for target in targets}.values():
        require_code(program, target)
