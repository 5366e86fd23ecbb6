"""From elastic back to dense: trained weights under the names and in the layout that the user's own class has."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from t3c_compile.passes.base import get_attr
from t3c_compile.passes.elastic import elastic_layers
from t3c_compile.passes.errors import T3CError
from t3c_compile.passes.graph import ElasticGraphModule, place_tensor
from t3c_compile.passes.option import Option
from t3c_compile.passes.parameter_view import ParameterView
from t3c_compile.passes.specialize import as_dense
from t3c_compile.passes.state import load_state, named_tensors, unsharded


@dataclass(frozen=True)
class Source:
    """Where an elastic layer's weight or bias came from: the view of a parameter, and that parameter's shape."""

    view: ParameterView
    shape: tuple[int, ...]

    @staticmethod
    def of(gm: GraphModule, view: ParameterView) -> "Source":
        return Source(view, tuple(get_attr(gm, view.target).shape))


@torch.no_grad()
def to_dense(
    elastic: ElasticGraphModule, model: nn.Module | None = None, options: Mapping[str, Option] | None = None
) -> dict[str, Tensor]:
    """The ``state_dict`` of the model that ``elastic`` was made from, with the weights as they are now.

    Factors are multiplied out; packed, transposed and reshaped weights stand as in the original, and tied ones are one
    tensor. What the original's ``forward`` never reads was not captured and may be absent.

    Args:
        model: an instance of the original class (bare, or in ``torch.compile`` or DDP): the weights are copied into it.
        options: a profile's, for the weights it multiplies by; None is full rank in float32.

    Raises:
        T3CError: ``options`` lacks a layer, or ``model`` has not the original's names and shapes.
    """
    names: dict[str, str] = elastic.meta["t3c_state"]
    with unsharded(elastic):
        # Not from state_dict, which FSDP2 makes of shards.
        held = {name: tensor.detach().clone() for name, tensor in named_tensors(elastic)}
        # The last of two entries counts below: what elastic layers stand for.
        held = held | _multiplied_out(elastic, held, options)
    by_first = {names[name]: tensor for name, tensor in held.items() if name in names}
    dense = {name: by_first[first] for name, first in names.items() if first in by_first}
    if model is not None:
        load_state(model, dense, unused=names.keys() - dense.keys())
    return dense


def _multiplied_out(
    elastic: ElasticGraphModule, held: Mapping[str, Tensor], options: Mapping[str, Option] | None
) -> dict[str, Tensor]:
    """The parameters that elastic layers stand for, each filled through the views the layers had of it."""
    sources: dict[str, dict[str, Source]] = elastic.meta["t3c_sources"]
    root = nn.Module()
    targets: set[str] = set()
    for name, layer in elastic_layers(elastic):
        option = None if options is None else options.get(name)
        if options is not None and option is None:
            raise T3CError(f"to_dense: layer {name}: the profile has no option for it")
        plain = as_dense(layer) if option is not None and option.form == "dense" else layer
        for leaf, tensor in (("weight", plain.dense_weight(option)), ("bias", layer.bias)):
            source = sources[name].get(leaf)
            if source is None or tensor is None:
                continue
            target = source.view.target
            if target not in targets:
                # Of a packed parameter only some views may be elastic. A whole layer's own weight has the same name as
                # the parameter, and a shape of its own.
                kept = held.get(target)
                found = kept if kept is not None and kept.shape == source.shape else tensor.new_zeros(source.shape)
                place_tensor(root, target, found)
                targets.add(target)
            source.view.of(root).copy_(tensor.detach())
    return {target: get_attr(root, target) for target in targets}
