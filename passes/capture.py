"""Capture: an ``nn.Module`` becomes an evaluation and a training graph over one module tree."""

import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule

from t3c_compile.passes.base import erase_dead_attrs, get_attr, report_of
from t3c_compile.passes.errors import BadWeightsError, CaptureError
from t3c_compile.passes.graph import ElasticGraphModule, place_tensor, tensors_are_finite
from t3c_compile.passes.infer_values import input_specs
from t3c_compile.passes.inline_regions import inline_regions
from t3c_compile.passes.state import named_tensors, state_names
from t3c_compile.passes.unwrap_subclasses import unwrap_subclasses

_TORCH = Path(torch.__file__).parent


def capture(
    model: nn.Module, example_inputs: tuple[Any, ...], dynamic_shapes: Any = None, share: bool = False
) -> ElasticGraphModule:
    """Capture ``model`` with ``torch.export`` (non-strict), once in eval and once in train mode.

    ``example_inputs`` are positional. With ``dynamic_shapes`` None, dimension 0 of every tensor input is the batch and
    is kept free where the model allows it; where it does not, it is fixed and the report says so. A program already
    exported (a ``.pt2`` file's module) has one graph, which then serves both modes. With ``share``, parameters stay the
    model's until ``own_parameters`` copies those that are left: what passes replace needs no copy.

    Raises:
        CaptureError: the inputs do not fit the model, or it cannot be exported (with the reason and the line).
        BadWeightsError: a parameter holds NaN or infinity.
    """
    bad = tensors_are_finite(model)
    if bad is not None:
        raise BadWeightsError(f"parameter {bad!r} holds NaN or infinity: repair the checkpoint before transforming it")
    was_training = model.training
    modes = {name: module.training for name, module in model.named_modules()}
    try:
        exported = not _set_mode(model, training=False)
        _check_inputs(model, example_inputs)
        notes: list[str] = []
        shapes = dynamic_shapes
        inputs = example_inputs
        if dynamic_shapes is None:
            inputs = two_rows(example_inputs)
            shapes = tuple({0: Dim.AUTO} if isinstance(x, Tensor) and x.dim() else None for x in inputs)
        reason = "the model computes with its value"
        try:
            evaluated = _export(model, inputs, shapes)
        except CaptureError as error:
            if dynamic_shapes is not None:
                raise
            evaluated, reason = None, str(error).splitlines()[0]
        if dynamic_shapes is None and (evaluated is None or not _batch_is_free(evaluated)):
            inputs, shapes = example_inputs, None
            evaluated = _export(model, inputs, shapes)
            notes.append(f"the batch size is fixed at that of the example inputs: {reason}")
        assert evaluated is not None
        trained = evaluated
        if exported:
            notes.append("the training graph is the evaluation graph: the model was already exported")
        else:
            _set_mode(model, training=True)
            trained = _export(model, inputs, shapes)
    finally:
        for name, module in model.named_modules():
            module.training = modes[name]
    _rename_clashes(evaluated, trained)
    for captured in (evaluated, trained):
        # What forward never reads would be a parameter without a gradient, which DDP does not allow.
        erase_dead_attrs(captured)
    elastic = ElasticGraphModule(_Both(evaluated, trained, share), evaluated.graph, trained.graph)
    report_of(elastic).kept.update(report_of(evaluated).kept)
    elastic.meta["t3c_dynamic_shapes"] = _one_by_one(shapes, len(inputs))
    elastic.meta["t3c_inputs"] = input_specs(evaluated.graph)
    elastic.meta["t3c_two_rows"] = inputs is not example_inputs
    elastic.meta["t3c_batch_is_free"] = _batch_is_free(evaluated)
    elastic.meta["t3c_state"] = state_names(model)
    report_of(elastic).notes.extend(notes)
    return elastic.train(was_training)


def _batch_is_free(gm: GraphModule) -> bool:
    """Whether dimension 0 of every tensor input stayed free; one that was specialized is a symbol worth a number."""
    values = [node.meta.get("val") for node in gm.graph.nodes if node.op == "placeholder"]
    tensors = [value for value in values if isinstance(value, Tensor) and value.dim()]
    sizes = [value.shape[0] for value in tensors]
    return bool(sizes) and all(not isinstance(size, int) and size.node.maybe_as_int() is None for size in sizes)


def _one_by_one(shapes: Any, inputs: int) -> Any:
    """``shapes`` with those of ``*args`` one by one, as the captured graph takes them."""
    if isinstance(shapes, tuple | list) and len(shapes) != inputs:
        return (*shapes[:-1], *shapes[-1])
    return shapes


def _set_mode(model: nn.Module, training: bool) -> bool:
    """Put ``model`` in train or eval mode; False where it is an exported program, which has no modes."""
    try:
        model.train(training)
    except NotImplementedError:
        return False
    return True


def _check_inputs(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    if not isinstance(inputs, tuple):
        raise CaptureError(f"example_inputs must be a tuple of positional inputs, not {type(inputs).__name__}")
    try:
        with torch.no_grad():
            model(*inputs)
    except Exception as error:
        described = ", ".join(
            f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__ for x in inputs
        )
        raise CaptureError(
            f"the model does not run on the example inputs ({described}): {error}\n  at {_user_line(error)}"
        ) from error


def two_rows(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Export reads a size of 1 as a constant; a batch of one is doubled so that the batch can stay free."""
    tensors = [x for x in inputs if isinstance(x, Tensor) and x.dim()]
    if not tensors or any(x.shape[0] != 1 for x in tensors):
        return inputs
    return tuple(torch.cat([x, x]) if isinstance(x, Tensor) and x.dim() else x for x in inputs)


def traced_inputs(elastic: ElasticGraphModule, example_inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs to export a graph of ``elastic`` with, so that what is free in it stays free."""
    return two_rows(example_inputs) if elastic.meta["t3c_two_rows"] else example_inputs


def _export(model: nn.Module, inputs: tuple[Any, ...], shapes: Any) -> GraphModule:
    try:
        program = torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)
        module = program.module(check_guards=False)
    except Exception as error:
        mode = "train" if model.training else "eval"
        first = str(error).strip().splitlines()
        reason = first[0] if first else type(error).__name__
        raise CaptureError(
            f"torch.export cannot capture the model in {mode} mode: {reason}\n  at {_user_line(error)}\n"
            "  remove data-dependent Python (if, int(), .item()) from forward, or export a submodule"
        ) from error
    fresh = GraphModule(module, module.graph)
    fresh._tracer_cls = None
    fresh.graph._tracer_cls = None
    inline_regions(fresh)
    unwrap_subclasses(fresh)
    return fresh


def _user_line(error: BaseException) -> str:
    """The last line of the user's own code in a traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    here = Path(__file__)
    for frame in reversed(frames):
        path = Path(frame.filename)
        if _TORCH not in path.parents and path != here:
            return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return "(no line of the model's own code)"


def _rename_clashes(evaluated: GraphModule, trained: GraphModule) -> None:
    """Constants of the two captures may share a name and not a value; the training one gets a name of its own."""
    for node in list(trained.graph.nodes):
        if node.op != "get_attr":
            continue
        target = str(node.target)
        mine, other = get_attr(trained, target), get_attr(evaluated, target)
        if other is None or other is mine or isinstance(mine, nn.Parameter):
            continue
        if mine.shape != other.shape or mine.dtype != other.dtype or not torch.equal(mine, other):
            owner, _, leaf = target.rpartition(".")
            trained.get_submodule(owner).register_buffer(f"{leaf}_train", mine)
            node.target = f"{target}_train"


class _Both(nn.Module):
    """The tensors of both captures by name, copied (export shares them with the model); tied ones stay tied.

    With ``share``, parameters are not copied.
    """

    def __init__(self, evaluated: GraphModule, trained: GraphModule, share: bool) -> None:
        super().__init__()
        copies: dict[int, Tensor] = {}
        for module in (trained, evaluated):
            for name, tensor in named_tensors(module):
                if id(tensor) not in copies:
                    copy = tensor.detach()
                    if not (share and isinstance(tensor, nn.Parameter)):
                        copy = copy.clone(memory_format=torch.contiguous_format)
                    needs = tensor.requires_grad
                    copies[id(tensor)] = nn.Parameter(copy, needs) if isinstance(tensor, nn.Parameter) else copy
                place_tensor(self, name, copies[id(tensor)])
