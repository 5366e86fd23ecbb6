"""Specialize: the elastic graph at one profile becomes a plain graph of ``t3c::`` ops."""

import copy
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from t3c_compile.passes.base import Pass, elastic_calls, erase_dead_attrs
from t3c_compile.passes.elastic import DenseConv2d, DenseLinear, ElasticLayer, Table, elastic_layers
from t3c_compile.passes.elastic.conv import SvdConv2d, ThreeFactorConv2d
from t3c_compile.passes.elastic.layer import Activation, of_call
from t3c_compile.passes.fold_batch_norm import FoldBatchNorm
from t3c_compile.passes.graph import ElasticGraphModule, place_tensor
from t3c_compile.passes.infer_values import infer_values
from t3c_compile.passes.option import Option
from t3c_compile.passes.pin_float_stages import PinFloatStages
from t3c_compile.passes.quantize_attention import take_integer_attention
from t3c_compile.passes.quantize_residuals import deploy_residuals
from t3c_compile.passes.state import named_tensors

aten = torch.ops.aten
t3c = torch.ops.t3c


@dataclass(frozen=True)
class Specialize(Pass):
    """Replaces every elastic call by ``t3c::quantize_int8`` and its deployed op at the layer's option.

    A layer at 32 bits, which is at full rank, becomes the float32 product it stands for; its dense weight is stored as
    ``float_weight``, beside the integers of other profiles.

    ``options`` and ``activations`` (scale and zero point of ``x`` and the middles) are by layer name. A layer whose
    activations are empty takes them in float32: a linear layer becomes its weight-only op, without quantization.
    ``store_ranks`` is the greatest rank any profile uses: factors are stored to that rank, so all profiles of one
    model name the same tensors.
    """

    name: ClassVar[str] = "specialize"
    options: Mapping[str, Option] = field(default_factory=dict)
    activations: Mapping[str, Mapping[str, Activation]] = field(default_factory=dict)
    store_ranks: Mapping[str, int] = field(default_factory=dict)

    def requires(self, gm: GraphModule) -> None:
        for node, layer in elastic_calls(gm):
            name = str(node.target)
            option = self.options.get(name)
            if option is None:
                raise self.fail(f"layer {name}: the profile has no option for it")
            if option.form not in (layer.form, "dense"):
                raise self.fail(f"layer {name}: option {option} does not fit an elastic layer of form {layer.form}")
            if option.bits != 32 and option.rank > self.store_ranks.get(name, layer.max_rank):
                raise self.fail(f"layer {name}: rank {option.rank} is beyond the stored rank")
            if option.bits == 32 and option.form != "dense" and option.rank < layer.max_rank:
                raise self.fail(f"layer {name}: 32 bits is for full rank, {layer.max_rank}; {option} has 4 to 8 bits")

            if option.bits != 32 and layer.weight_only_op is None and self.activations.get(name) == {}:
                raise self.fail(
                    f"layer {name}: the profile has no scale for its activations, and a convolution cannot take them "
                    "in float32; snap the model again"
                )

    def apply(self, gm: GraphModule) -> bool:
        calls: dict[str, list[Node]] = {}
        for node, _ in elastic_calls(gm):
            calls.setdefault(str(node.target), []).append(node)
        for name, nodes in calls.items():
            option, layer = self.options[name], gm.get_submodule(name)
            assert isinstance(layer, ElasticLayer)
            deployed = as_dense(layer) if option.form == "dense" or option.bits == 32 else layer
            stored = self._put_store(gm, name, deployed)
            for node in nodes:
                self._replace(gm, node, deployed, stored)
        _drop_dropout(gm)
        _merge_quantizers(gm)
        erase_dead_attrs(gm)
        gm.graph.eliminate_dead_code()
        return True

    def _put_store(self, gm: GraphModule, name: str, layer: ElasticLayer) -> dict[str, str]:
        """Put the layer's tensors in its place; their qualified names by argument of the deployed op."""
        holder = nn.Module()
        if self.options[name].bits == 32:
            tensors = {"float_weight": layer.dense_weight()}
            if layer.bias is not None:
                tensors["bias"] = layer.bias.detach().clone()
        else:
            tensors = layer.store(self.store_ranks.get(name, layer.max_rank))
        for key, tensor in tensors.items():
            holder.register_buffer(key, tensor.detach())
        gm.add_submodule(name, holder)
        return {key.removeprefix("float_"): f"{name}.{key}" for key in tensors}

    def _activations(self, name: str, layer: ElasticLayer) -> Mapping[str, Activation]:
        given = self.activations.get(name)
        return layer.activations() if given is None else given

    def _replace(self, gm: GraphModule, node: Node, layer: ElasticLayer, stored: Mapping[str, str]) -> None:
        name, option, graph = str(node.target), self.options[str(node.target)], gm.graph
        op, values = layer.op, {"rank": option.rank, "bits": option.bits, **layer.geometry()}
        look_up = isinstance(layer, Table) and "product" not in node.kwargs
        with graph.inserting_before(node):
            if look_up:
                op = aten.embedding.default if option.bits == 32 else layer.op
                values["indices"] = node.args[0]
            elif option.bits == 32:
                op, values["input"] = layer.float_op, node.args[0]
            elif not (activations := self._activations(name, layer)):
                op, values["x"] = layer.weight_only_op, node.args[0]
            else:
                op = layer.product_op if isinstance(layer, Table) else layer.op
                number: Any = node.kwargs.get("call", 0)
                scale, zero_point = activations[of_call("x", number)]
                values |= {"x_scale": scale, "x_zero_point": zero_point}
                values |= {f"{m}_scale": activations[of_call(m, number)][0] for m in layer.middles}
                values["x"] = graph.call_function(t3c.quantize_int8.default, (node.args[0], scale, zero_point))
                values["x"].meta = dict(node.meta)
            values |= {argument: graph.get_attr(target) for argument, target in stored.items()}
            arguments = tuple(values.get(a.name, a.default_value) for a in op._schema.arguments)
            call = graph.call_function(op, arguments)
        call.meta = {**node.meta, "t3c_pass": self.name, "t3c_layer": name}
        node.replace_all_uses_with(call)
        graph.erase_node(node)


@torch.no_grad()
def as_dense(layer: ElasticLayer) -> ElasticLayer:
    """The same layer with its factors multiplied out; a dense layer comes back as it is."""
    if layer.form == "dense":
        return layer
    weight = layer.dense_weight()
    if isinstance(layer, SvdConv2d | ThreeFactorConv2d):
        dense: ElasticLayer = DenseConv2d(weight, layer.bias, layer.conv, groups=1)
    else:
        dense = DenseLinear(weight, layer.bias)
    dense.rows_in, dense.rows_out, dense.calls = layer.rows_in, layer.rows_out, layer.calls
    dense.x_quant, dense.float_activations = layer.x_quant, layer.float_activations
    dense.add_gate()
    return dense.train(layer.training)


def with_dense(model: ElasticGraphModule, names: Iterable[str]) -> ElasticGraphModule:
    """A copy of ``model``, which shares its parameters, in which the named layers have their factors multiplied out."""
    copied = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for name in names:
        copied.add_submodule(name, as_dense(copied.get_submodule(name)))  # type: ignore[arg-type]
    return copied


def specialize(
    model: ElasticGraphModule,
    options: Mapping[str, Option],
    activations: Mapping[str, Mapping[str, Activation]] | None = None,
    store_ranks: Mapping[str, int] | None = None,
) -> GraphModule:
    """A plain ``GraphModule`` that runs ``model`` at one profile, batch norm folded and float stages pinned to the ops
    that mean the same on every target; ``model`` is not changed.

    Its state_dict is the weight store (int8 factors to ``store_ranks``, float32 scales and biases, kept parameters).
    """
    # Structure alone is copied; a model's tensors may be gigabytes, and few of them stay.
    tensors = [*model.parameters(), *model.buffers()]
    root = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}).eval()
    gm = GraphModule(root, root.eval_graph)
    del root
    integer_attention = take_integer_attention(gm, options)
    deploy_residuals(gm, options, activations or {})
    Specialize(options, activations or {}, store_ranks or {})(gm)
    FoldBatchNorm()(gm)
    infer_values(gm, model.meta["t3c_inputs"])
    PinFloatStages(integer_attention)(gm)
    gm.delete_all_unused_submodules()
    _drop_unused_tensors(gm)
    _copy_shared(gm, {tensor.data_ptr() for tensor in tensors})
    return gm.eval()


def store_ranks(model: ElasticGraphModule, profiles: list[Mapping[str, Option]]) -> dict[str, int]:
    """The greatest rank of every layer over ``profiles``."""
    return {name: max(profile[name].rank for profile in profiles) for name, _ in elastic_layers(model)}


def _drop_dropout(gm: GraphModule) -> None:
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target in (aten.dropout.default, aten.feature_dropout.default):
            if node.args[2]:
                continue
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)


def _merge_quantizers(gm: GraphModule) -> None:
    """One quantize node where several layers read the same tensor at the same scale (query, key and value)."""
    seen: dict[tuple[Any, ...], Node] = {}
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target == t3c.quantize_int8.default:
            first = seen.setdefault(tuple(node.args), node)
            if first is not node:
                node.replace_all_uses_with(first)
                gm.graph.erase_node(node)


def _drop_unused_tensors(gm: GraphModule) -> None:
    used = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    for name, _ in [*gm.named_parameters(), *gm.named_buffers()]:
        if name not in used:
            owner, _, leaf = name.rpartition(".")
            delattr(gm.get_submodule(owner), leaf)


def _copy_shared(gm: GraphModule, shared: Container[int]) -> None:
    """Give ``gm`` copies of its tensors whose memory is at one of the addresses ``shared``; tied ones stay tied."""
    copies: dict[int, Tensor] = {}
    for name, tensor in list(named_tensors(gm)):
        if tensor.data_ptr() in shared:
            if id(tensor) not in copies:
                copied = tensor.detach().clone()
                copies[id(tensor)] = nn.Parameter(copied) if isinstance(tensor, nn.Parameter) else copied
            place_tensor(gm, name, copies[id(tensor)])
