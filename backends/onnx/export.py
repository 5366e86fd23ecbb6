"""``export_onnx``: every profile of an elastic model as an ONNX file, over one file of weights."""

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from t3c_compile.backends.whole_folder import whole_folder
from t3c_compile.passes.capture import traced_inputs
from t3c_compile.passes.errors import T3CError
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.ops import DEPLOYMENT_OPS, FLOAT_ATEN
from t3c_compile.passes.specialize import specialize, store_ranks

if TYPE_CHECKING:
    from t3c_compile.profile import Profile

WEIGHTS = "weights.data"
_PROFILE = "t3c.profile"
# The first opset with INT4.
_OPSET = 21


class OnnxError(T3CError):
    """A profile cannot be written as ONNX."""


def export_onnx(
    model: ElasticGraphModule,
    profiles: "Sequence[Profile]",
    path: str | os.PathLike[str],
    example_inputs: tuple[Any, ...],
) -> Path:
    """Write the folder ``path``: ``NAME.onnx`` for every profile, and ``weights.data``, which all of them read.

    The files are of opset 21: int8 layers in QDQ form, INT4 initializers where a layer has 4 bits, the rest as
    ``torch.onnx`` writes it. Sizes that are free in the captured graph are free in the file; that of the first input's
    dimension 0 is named ``batch``. Each file's metadata holds its profile as JSON. One profile is in memory at a time
    and weights are written as they come, so models may be larger than protobuf's 2 GB.

    Args:
        profiles: some or all of one profile set, from least to greatest.
        example_inputs: what the graphs are traced with, as for ``transform``.

    Raises:
        OnnxError: the ``onnx`` extra is not installed, a stage has no ONNX form, or ``path`` cannot be written.
    """
    require_onnx()
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    from t3c_compile.backends.onnx.qdq import Expansion
    from t3c_compile.backends.onnx.shared_data import SharedData

    inputs = traced_inputs(model, example_inputs)
    ranks = store_ranks(model, [profile.options for profile in profiles])
    with (
        warnings.catch_warnings(),
        whole_folder(path, (".onnx", Path(WEIGHTS).suffix), OnnxError) as folder,
        SharedData(folder / WEIGHTS) as data,
    ):
        # Of torch's own code, by torch's own code.
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
        # The greatest first: the others are made of its first rows.
        for profile in reversed(profiles):
            graph = specialize(model, profile.options, profile.activations, ranks)
            translated = _translated(graph, inputs, model.meta["t3c_dynamic_shapes"], profile.name)
            Expansion(translated, data).run()
            # The exporter notes where in the user's files each node came from.
            ClearMetadataAndDocStringPass()(translated)
            translated.metadata_props[_PROFILE] = json.dumps(profile.to_json())
            onnx_ir.save(translated, folder / f"{profile.name}.onnx")
    return Path(path)


def read_profiles(path: str | os.PathLike[str]) -> "dict[str, dict[str, Any]]":
    """The profiles in ``path``, a folder that :func:`export_onnx` wrote: by file, as ``Profile.to_json`` gives them.

    Raises:
        OnnxError: the ``onnx`` extra is not installed, or the folder holds something else.
    """
    require_onnx()
    import onnx

    found: dict[str, dict[str, Any]] = {}
    for file in sorted(Path(path).glob("*.onnx")):
        properties = {entry.key: entry.value for entry in onnx.load(str(file), load_external_data=False).metadata_props}
        if _PROFILE not in properties:
            raise OnnxError(f"{file} was not written by t3c-compile")
        found[file.name] = json.loads(properties[_PROFILE])
    return found


def require_onnx() -> None:
    """Raises :class:`OnnxError` where the ``onnx`` extra is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise OnnxError(
            f"ONNX needs packages that are not installed ({error}): pip install 't3c-compile[onnx]'"
        ) from error


def _with_aten_floats(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The float stages as ATen ops, which ``torch.onnx`` has operators for; export traces through the functions."""
    for node in graph.graph.nodes:
        node.target = FLOAT_ATEN.get(node.target, node.target)
    graph.recompile()
    return graph


def _translated(graph: torch.fx.GraphModule, inputs: tuple[Any, ...], dynamic_shapes: Any, name: str) -> Any:
    """A profile as an ``onnx_ir.Model`` in which ``t3c::`` ops are still one node each."""
    from t3c_compile.backends.onnx.keep_ops import translations

    kept = translations(getattr(torch.ops.t3c, op).default for op in DEPLOYMENT_OPS)
    try:
        program = torch.export.export(_with_aten_floats(graph), inputs, dynamic_shapes=dynamic_shapes, strict=False)
        exported = torch.onnx.export(
            program, opset_version=_OPSET, dynamo=True, custom_translation_table=kept, verbose=False
        )
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise OnnxError(f"profile {name} has no ONNX form: {str(cause).splitlines()[0]}") from error
    assert exported is not None
    first = exported.model.graph.inputs[0].shape
    if first is not None and len(first) and not isinstance(first[0], int):
        exported.rename_axes({first[0]: "batch"})
    return exported.model
