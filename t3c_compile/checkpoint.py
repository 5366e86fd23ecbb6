"""The t3c checkpoint: an elastic model with what later steps need, in one safetensors file.

The file's tensors are the model's ``state_dict`` (and, under names that begin with ``/``, example inputs and the
controller); its metadata hold the plan as JSON: the format's version, every elastic layer with its form, ranks,
geometry and quantizers, the two graphs, the choices and the report; and the SHA-256 of all this. There is no pickle in
it.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from t3c_compile import processes
from t3c_compile.controller import Controller
from t3c_compile.graph_json import FormatError, Reader, Writer
from t3c_compile.passes.capture import capture
from t3c_compile.passes.digest import digest
from t3c_compile.passes.elastic import elastic_layers
from t3c_compile.passes.errors import PassConditionError, T3CError
from t3c_compile.passes.graph import ElasticGraphModule
from t3c_compile.passes.state import StateError, load_state, unsharded, unwrapped
from t3c_compile.transforming import Config, pipeline_of

_FORMAT, _VERSION = "t3c-checkpoint", 4


class CheckpointError(T3CError):
    """The file is not a t3c checkpoint this version reads, or not one of the model it is restored into."""


@dataclass
class Checkpoint:
    """An elastic model, the inputs it was captured with, and its controller once it has been trained."""

    model: ElasticGraphModule
    example_inputs: tuple[Any, ...]
    controller: Controller | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file whole or not at all.

        ``model`` may be wrapped by ``torch.compile`` or DistributedDataParallel, or sharded by ``fully_shard``: then
        every process calls this, and the one of rank 0 writes.

        Raises:
            CheckpointError: the file cannot be written, or the graph calls Python that a file cannot hold.
        """
        model = unwrapped(self.model)
        assert isinstance(model, ElasticGraphModule)
        writer = Writer()
        try:
            with unsharded(model):
                plan = {
                    "module": writer.contents(model),
                    "graphs": [writer.graph(graph) for graph in (model.eval_graph, model.train_graph)],
                    "meta": writer.value({k: v for k, v in model.meta.items() if k.startswith("t3c_")}),
                    "training": model.training,
                    "inputs": writer.value(self.example_inputs),
                    "controller": None if self.controller is None else writer.module(self.controller, "/controller"),
                }
                if processes.is_first():
                    metadata = {"format": _FORMAT, "version": str(_VERSION), "plan": json.dumps(plan)}
                    _write(Path(path), writer.tensors, metadata | {"sha256": _sha256(metadata, writer.tensors)})
        except FormatError as error:
            raise CheckpointError(f"cannot write {path}: {error}") from error

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Checkpoint":
        """Read a checkpoint; the class of the model is not needed.

        Raises:
            CheckpointError: the file is missing, damaged, something else or of another version.
        """
        plan, reader = _read(Path(path))
        try:
            root = reader.module(plan["module"])
            eval_graph, train_graph = (reader.graph(graph) for graph in plan["graphs"])
            model = ElasticGraphModule(root, eval_graph, train_graph)
            model.meta.update(reader.value(plan["meta"]))
            model.train(plan["training"])
            return Checkpoint(model, reader.value(plan["inputs"]), _controller(plan, reader))
        except Exception as error:
            # What torch raises for graphs that are none is not documented.
            raise CheckpointError(f"{path} is damaged or of another version: {error}") from error


def restore(model: nn.Module, example_inputs: tuple[Any, ...], path: str | os.PathLike[str]) -> Checkpoint:
    """Capture ``model`` anew and make it elastic as the checkpoint at ``path`` says, with the checkpoint's weights.

    Nothing is decomposed: the saved layers are put into the new graphs. ``model`` is left as it was; its own weights
    do not matter. Use it where the class has changed (a fixed ``forward``) or the graph should be of other inputs.

    Raises:
        CheckpointError: the file cannot be read, or its layers and tensors are not this model's (they are named).
        CaptureError: as :func:`t3c_compile.transform`.
    """
    plan, reader = _read(Path(path))
    try:
        root, meta = reader.module(plan["module"]), reader.value(plan["meta"])
        controller, training = _controller(plan, reader), bool(plan["training"])
    except (FormatError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged or of another version: {error}") from error
    layers = dict(elastic_layers(root))
    elastic = capture(model, example_inputs, None if meta["t3c_two_rows"] else meta["t3c_dynamic_shapes"])
    config = meta.get("t3c_config", Config())
    elastic.meta |= {"t3c_config": config, "t3c_restored": layers}
    try:
        pipeline_of(config).run(elastic)
        left = layers.keys() - dict(elastic_layers(elastic)).keys()
        if left:
            raise StateError(f"the model has no layers {', '.join(sorted(left))}")
        load_state(elastic, root.state_dict())
    except (PassConditionError, StateError) as error:
        raise CheckpointError(f"{path} is not a checkpoint of this model: {error}") from error
    del elastic.meta["t3c_restored"]
    return Checkpoint(elastic.train(training), example_inputs, controller)


def _controller(plan: Mapping[str, Any], reader: Reader) -> Controller | None:
    if plan["controller"] is None:
        return None
    controller = reader.module(plan["controller"])
    if not isinstance(controller, Controller):
        raise FormatError("its controller is something else")
    return controller


def _write(final: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, final)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {final}: {error}; nothing was left behind") from error
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> tuple[dict[str, Any], Reader]:
    """The plan, and what reads modules and values from it."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            _check(path, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata["sha256"] != _sha256(metadata, tensors):
            raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one it holds")
        plan = json.loads(metadata["plan"])
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged or not a t3c checkpoint: {error}") from error
    return plan, Reader(tensors)


def _sha256(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    return digest((metadata["plan"], sorted(tensors.items())))


def _check(path: Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is not a t3c checkpoint: write one with `t3c-compile transform`")
    if metadata.get("version") != str(_VERSION):
        raise CheckpointError(
            f"{path} is a checkpoint of version {metadata.get('version')}; this t3c-compile reads {_VERSION}"
        )
