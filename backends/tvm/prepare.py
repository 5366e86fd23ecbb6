"""Exported programs made ready for import: decomposed to what the importer knows."""

import warnings
from collections.abc import Mapping

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from t3c_compile.backends.tvm.order_rows import order_rows
from t3c_compile.backends.tvm.round_early import round_early
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
    torch.ops.aten.max_pool2d.default,
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
        round_early(program.graph)
        order_rows(program.graph)
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
    table[torch.ops.aten.group_norm.default] = _group_norm
    # ATen's own decomposition joins batch and channels, and TVM's importer wants that product to be a number.
    table[torch.ops.aten.instance_norm.default] = _instance_norm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, from a class of its that it copies
        decomposed: ExportedProgram = program.run_decompositions(table)
    return decomposed


def _group_norm(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> torch.Tensor:
    """TVM's importer needs weight and bias."""
    rows, channels = x.shape[:2]
    weight = x.new_ones(channels) if weight is None else weight
    bias = x.new_zeros(channels) if bias is None else bias
    pixels = x.shape[2:].numel()
    return torch.native_group_norm(x, weight, bias, rows, channels, pixels, groups, eps)[0]


def _instance_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> torch.Tensor:
    """Without statistics of its own it is a group norm of one channel a group."""
    if use_input_stats:
        return _group_norm(x, x.shape[1], weight, bias, eps)
    return torch.batch_norm(x, weight, bias, running_mean, running_var, False, momentum, eps, cudnn_enabled)
