"""Exported programs made ready for import: decomposed to what the importer knows."""

from collections.abc import Mapping

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from t3c_compile.passes.renumber import differ_in_numbers_alone, renumbered

# ATen ops with a converter here, or with a better Relax form than their decomposition.
_KEPT_WHOLE = (
    torch.ops.aten.linear.default,
    torch.ops.aten.conv_transpose3d.input,
    torch.ops.aten.layer_norm.default,
    torch.ops.aten.scaled_dot_product_attention.default,
    torch.ops.aten.index_copy.default,
    torch.ops.aten.hardsigmoid.default,
    torch.ops.aten.hardswish.default,
)


def prepare(programs: Mapping[str, ExportedProgram]) -> dict[str, ExportedProgram]:
    """Each program decomposed, its stored buffers as parameters, so that none is baked in.

    Decomposing traces the graph, which takes seconds; profiles of one model are traced once.
    """
    prepared: dict[str, ExportedProgram] = {}
    for name, program in programs.items():
        twin = next((known for known in prepared if _are_twins(programs[known], program)), None)
        like = renumbered(prepared[twin], program.graph) if twin else None
        prepared[name] = like or _decomposed(program)
    for program in prepared.values():
        for spec in program.graph_signature.input_specs:
            if spec.kind is InputKind.BUFFER and spec.target in program.state_dict:
                spec.kind = InputKind.PARAMETER
    return prepared


def _are_twins(one: ExportedProgram, other: ExportedProgram) -> bool:
    def signature(program: ExportedProgram) -> list[tuple[object, str | None]]:
        return [(spec.kind, spec.target) for spec in program.graph_signature.input_specs]

    def constants(program: ExportedProgram) -> dict[str, torch.Tensor]:
        return {name: value for name, value in program.constants.items() if isinstance(value, torch.Tensor)}

    mine, theirs = constants(one), constants(other)
    return (
        signature(one) == signature(other)
        and mine.keys() == theirs.keys()
        and all(torch.equal(mine[name], theirs[name]) for name in mine)
        and differ_in_numbers_alone(one.graph, other.graph)
    )


def _decomposed(program: ExportedProgram) -> ExportedProgram:
    table = torch.export.default_decompositions()
    for op in _KEPT_WHOLE:
        table.pop(op, None)  # type: ignore[no-untyped-call]
    return program.run_decompositions(table)
