"""``to_mlir``: a profile of an elastic model as an MLIR module; ``export_mlir``: all profiles as files."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram

from t3c_compile.backends.mlir.tosa_forms import tosa_forms
from t3c_compile.backends.whole_folder import whole_folder
from t3c_compile.passes.capture import traced_inputs
from t3c_compile.passes.errors import T3CError
from t3c_compile.passes.express_in_aten import decompositions
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.specialize import specialize

if TYPE_CHECKING:
    from t3c_compile.profile import Profile

# torch-mlir's output types.
DIALECTS = ("torch", "linalg-on-tensors", "tosa", "stablehlo")

# Where to turn when one of them lacks an op.
_CARRIES_MORE = {"linalg-on-tensors": "torch", "tosa": "linalg-on-tensors", "stablehlo": "linalg-on-tensors"}
_TORCH = Path(torch.__file__).parent


class MlirError(T3CError):
    """A profile cannot be written in an MLIR dialect."""


def to_mlir(
    model: ElasticGraphModule,
    profile: "Profile",
    example_inputs: tuple[Any, ...],
    dialect: str,
    dynamic_batch: bool = True,
) -> Any:
    """``model`` at ``profile`` as a verified ``torch_mlir.ir.Module`` with one function ``main(*inputs)``.

    ``str()`` of it is its text. Weights are int8 constants cut to the profile's ranks; what the ``t3c::`` ops mean is
    written out (see ``passes/express_in_aten.py``), so results equal the specialized graph's wherever the float stages
    of a runtime do. TOSA has no float64: there the epilogue of an int8 layer rounds twice.

    Args:
        profile: of ``snap``, or any with options and activations for every elastic layer.
        example_inputs: what the graph is traced with, as for ``transform``.
        dialect: one of :data:`DIALECTS`.
        dynamic_batch: keep the sizes free that are free in ``model``. Otherwise, and always in TOSA, where torch-mlir
            needs them, sizes are those of ``example_inputs``.

    Raises:
        MlirError: the ``mlir`` extra is not installed, there is no such dialect, or torch-mlir refuses an op; the
            message names it, where it is in the model, and the way out.
    """
    ranks = {layer: option.rank for layer, option in profile.options.items()}
    graph = specialize(model, profile.options, profile.activations, ranks)
    shapes = None
    if dynamic_batch and dialect != "tosa":
        shapes = model.meta["t3c_dynamic_shapes"]
        example_inputs = traced_inputs(model, example_inputs)
    return lower_program(torch.export.export(graph, example_inputs, dynamic_shapes=shapes, strict=False), dialect)


def lower_program(program: ExportedProgram, dialect: str) -> Any:
    """An exported program, with ``t3c::`` ops in it or not, as :func:`to_mlir` gives it."""
    if dialect not in DIALECTS:
        raise MlirError(f"there is no dialect {dialect!r}: known are {', '.join(DIALECTS)}")
    require_mlir()
    from torch_mlir import ir
    from torch_mlir.dialects import torch as torch_dialect
    from torch_mlir.extras.fx_decomp_util import get_decomposition_table
    from torch_mlir.extras.fx_importer import FxImporter
    from torch_mlir.fx import export_and_import

    table = {**get_decomposition_table(), **decompositions(float64=dialect != "tosa")}
    program = program.run_decompositions(table | tosa_forms() if dialect == "tosa" else table)
    # torch-mlir looks for every buffer there; export keeps those that a state_dict leaves out elsewhere.
    kept = {name: program.constants[name] for name in program.graph_signature.non_persistent_buffers}
    program.state_dict.update(kept)
    _clone_constant_indices(program.graph)
    context = ir.Context()
    torch_dialect.register_dialect(context)
    said: list[tuple[str, str]] = []

    def listen(diagnostic: Any) -> bool:
        said.append((diagnostic.message, str(diagnostic.location)))
        return True

    listener = context.attach_diagnostic_handler(listen)
    try:
        module = export_and_import(
            program, output_type=dialect, fx_importer=FxImporter(context=context), decomposition_table={}
        )
        module.operation.verify()
    except Exception as error:
        raise MlirError(_refusal(program, dialect, said, error)) from error
    finally:
        listener.detach()
    return module


def export_mlir(
    model: ElasticGraphModule,
    profiles: "Sequence[Profile]",
    path: str | os.PathLike[str],
    example_inputs: tuple[Any, ...],
    dialect: str,
    dynamic_batch: bool = True,
) -> Path:
    """Write the folder ``path`` with ``NAME.mlir`` for every profile, whole or not at all; see :func:`to_mlir`.

    TOSA is written in MLIR's generic form, because its short form is not the same in all versions of MLIR.
    """
    with whole_folder(path, (".mlir",), MlirError) as folder:
        for profile in profiles:
            module = to_mlir(model, profile, example_inputs, dialect, dynamic_batch)
            with (folder / f"{profile.name}.mlir").open("w", encoding="utf-8") as file:
                module.operation.print(file=file, print_generic_op_form=dialect == "tosa")
    return Path(path)


def require_mlir() -> None:
    """Raises :class:`MlirError` where the ``mlir`` extra is not installed."""
    try:
        import torch_mlir.fx  # noqa: F401
    except ImportError as error:
        raise MlirError(
            f"MLIR needs packages that are not installed ({error}): pip install 't3c-compile[mlir]'"
        ) from error


def _refusal(program: ExportedProgram, dialect: str, said: Iterable[tuple[str, str]], error: Exception) -> str:
    """torch-mlir's diagnostics in the model's terms; its own message where it gave none."""
    lines = []
    for message, location in said:
        named = re.search(r'name = "([^"]+)"', message) or re.search(r"failed to legalize operation '([^']+)'", message)
        op = named[1].removeprefix("torch.") if named else message.splitlines()[0]
        frames = re.findall(r'"([^"]+)":(\d+)', location)
        layer = _layer(program, op, frames)
        own = [f"{file}:{line}" for file, line in frames if _TORCH not in Path(file).parents]
        lines.append(f"  {op}" + (f" in layer {layer!r}" if layer else "") + (f" at {own[0]}" if own else ""))
    if not lines:
        first = str(error).strip().partition("\n")[0]
        unnamed = first.endswith("diagnostics:")  # and none follow
        lines = ["  its passes fail and name no op" if unnamed else f"  {type(error).__name__}: {first}"]
    way_out = "Write the layer with other ops"
    if any("'torch.operator'" in message for message, _ in said):
        way_out += ": torch-mlir does not know these"
    else:
        if dialect in _CARRIES_MORE:
            way_out += f", or take {_CARRIES_MORE[dialect]}, which carries more"
        if any(
            not isinstance(size, int) for node in program.graph.find_nodes(op="placeholder") for size in _sizes(node)
        ):
            way_out += ", or fix the sizes (dynamic_batch=False)"
    return f"torch-mlir cannot write this model as {dialect}:\n" + "\n".join(dict.fromkeys(lines)) + f"\n{way_out}."


def _layer(program: ExportedProgram, op: str, frames: list[tuple[str, str]]) -> str:
    """The layer of the first node that is this op, or else comes from these lines; empty where none is found."""
    nodes = [node for node in program.graph.nodes if node.meta.get("nn_module_stack")]
    same = [node for node in nodes if str(node.target).startswith(op)]
    traced = [
        node
        for node in same or nodes
        if frames and all(f'"{file}", line {line},' in (node.stack_trace or "") for file, line in frames)
    ]
    for node in traced or same:
        return str(list(node.meta["nn_module_stack"].values())[-1][0])
    return ""


def _clone_constant_indices(graph: torch.fx.Graph) -> None:
    """torch-mlir takes no constant within the list of an ``index`` op, but a copy of one."""
    aten = torch.ops.aten
    for node in graph.find_nodes(op="call_function", target=aten.index.Tensor):
        for index in [entry for entry in node.args[1] if entry is not None and entry.op == "placeholder"]:
            with graph.inserting_before(node):
                copied = graph.call_function(aten.clone.default, (index,))
            copied.meta = {**node.meta, **index.meta}
            node.replace_input_with(index, copied)


def _sizes(node: torch.fx.Node) -> Iterable[Any]:
    return getattr(node.meta.get("val"), "shape", ())
