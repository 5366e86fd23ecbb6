"""The t3c checkpoint: an elastic model with what later steps need, in one file.

It is a ``torch.save`` file holding Python objects: like any pickle, load only files you trust. Artifacts never are.
"""

import os
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from t3c_compile.controller import Controller
from t3c_compile.passes.errors import T3CError
from t3c_compile.passes.graph import ElasticGraphModule

_FORMAT, _VERSION = "t3c-checkpoint", 1


class CheckpointError(T3CError):
    """The file is not a t3c checkpoint this version reads."""


@dataclass
class Checkpoint:
    """An elastic model, the inputs it was captured with, and its controller once it has been trained."""

    model: ElasticGraphModule
    example_inputs: tuple[Any, ...]
    controller: Controller | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file whole or not at all."""
        final = Path(path)
        temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
        content = {"format": _FORMAT, "version": _VERSION, **vars(self)}
        try:
            torch.save(content, temporary)
            os.replace(temporary, final)
        except (OSError, RuntimeError) as error:
            # torch reports a full disk as a RuntimeError of its zip writer.
            raise CheckpointError(f"cannot write {final}: {error}; nothing was left behind") from error
        finally:
            temporary.unlink(missing_ok=True)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Checkpoint":
        """Raises :class:`CheckpointError` when the file is missing, damaged, something else or of a newer version."""
        if not Path(path).is_file():
            raise CheckpointError(f"{path}: there is no such file")
        if not zipfile.is_zipfile(path):
            raise CheckpointError(f"{path} is damaged or not a t3c checkpoint")
        try:
            content = torch.load(path, weights_only=False)
        except (RuntimeError, pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
            raise CheckpointError(f"{path} is damaged or of another version: {error}") from error
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise CheckpointError(f"{path} is not a t3c checkpoint: write one with `t3c-compile transform`")
        version = content.pop("version", None)
        if version != _VERSION:
            raise CheckpointError(f"{path} is a checkpoint of version {version}; this t3c-compile reads {_VERSION}")
        return Checkpoint(**content)
