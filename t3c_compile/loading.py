"""Models, data and inputs as the command line names them."""

import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn

from t3c_compile.checkpoint import Checkpoint
from t3c_compile.passes.errors import T3CError
from t3c_compile.transforming import Config, transform

Inputs = tuple[Any, ...]


class LoadingError(T3CError):
    """A model, data set or input named on the command line cannot be had."""


def import_callable(spec: str) -> Callable[..., Any]:
    """``package.module:callable``, looked up on the path and in the current folder."""
    module_name, colon, name = spec.partition(":")
    if not colon or not name:
        raise LoadingError(f"{spec!r} is not package.module:callable")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise LoadingError(f"{spec}: {error}") from error
    if not callable(found):
        raise LoadingError(f"{spec} is a {type(found).__name__}, not a callable")
    return found  # type: ignore[no-any-return]


def _called(spec: str) -> Any:
    """What a callable of the user's gives; where it fails, the error is of one line and names the place."""
    function = import_callable(spec)
    try:
        return function()
    except T3CError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise LoadingError(
            f"{spec}() failed: {type(error).__name__}: {error} (at {place.filename}:{place.lineno}); it is called "
            "without arguments"
        ) from error


def parse_input(text: str) -> Tensor:
    """An example input: ``float32[1,3,224,224]`` (random normal), ``int64[1,128]`` (zeros), or a ``.npy`` file."""
    if text.endswith(".npy"):
        try:
            return torch.from_numpy(np.load(text, allow_pickle=False))
        except (OSError, ValueError) as error:
            raise LoadingError(f"input {text}: {error}") from error
    match = re.fullmatch(r"(float32|int64|int32|bool)\[([\d,\s]*)\]", text)
    if not match:
        raise LoadingError(
            f"input {text!r} is neither dtype[size,size,...] (float32, int64, int32, bool) nor a .npy file"
        )
    dtype, sizes = getattr(torch, match[1]), [int(size) for size in match[2].split(",") if size.strip()]
    if dtype is torch.float32:
        return torch.randn(sizes, generator=torch.Generator().manual_seed(0))
    return torch.zeros(sizes, dtype=dtype)


def load_elastic(
    spec: str,
    inputs: Sequence[str],
    config: Config | None,
    data: str | None,
    progress: bool,
    resume: Path | None = None,
) -> Checkpoint:
    """The elastic model ``spec`` names: a t3c checkpoint, or a model (``.pt2``, ``.onnx``, a callable) transformed now.

    Args:
        inputs: example inputs (see :func:`parse_input`); a ``.pt2`` file brings its own, and so does an ``.onnx`` file
            in which no size but the batch is free.
        data: ``package.module:callable`` whose batches whiten the decomposition.
        resume: folder where a transform that was cut short goes on.
    """
    own_inputs: Inputs | None = None
    if spec.endswith(".pt2"):
        model, own_inputs = _load_pt2(spec)
    elif spec.endswith(".onnx"):
        model, own_inputs = _load_onnx(spec)
    elif ":" in spec:
        model = _call_model(spec)
    else:
        return Checkpoint.load(spec)
    example = tuple(parse_input(text) for text in inputs) or own_inputs
    if example is None:
        raise LoadingError(f"{spec}: name its inputs, such as --input 'float32[1,3,224,224]'")
    calibration = None if data is None else calibration_of(data)[0]
    elastic = transform(model, example, config, calibration=calibration, progress=progress, resume=resume)
    return Checkpoint(elastic, example)


def _load_pt2(path: str) -> tuple[nn.Module, Inputs | None]:
    if not Path(path).is_file():
        raise LoadingError(f"{path}: there is no such file")
    try:
        program = torch.export.load(path)
    except Exception as error:
        raise LoadingError(f"{path} is damaged or not a torch.export file: {error}") from error
    return program.module(check_guards=False), None if program.example_inputs is None else program.example_inputs[0]


def _load_onnx(path: str) -> tuple[nn.Module, Inputs | None]:
    from t3c_compile.backends.onnx import require_onnx

    require_onnx()
    from t3c_compile.onnx_import import load_onnx

    model = load_onnx(path)
    if any(isinstance(size, str) for shape, _ in model.inputs for size in shape[1:]):
        return model, None
    described = [(["2" if isinstance(size, str) else str(size) for size in s], dtype) for s, dtype in model.inputs]
    return model, tuple(parse_input(f"{dtype}[{','.join(sizes)}]") for sizes, dtype in described)


def _call_model(spec: str) -> nn.Module:
    model = _called(spec)
    if not isinstance(model, nn.Module):
        raise LoadingError(f"{spec}() returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def batches_of(spec: str) -> Any:
    """What a data callable returns: batches ``(*inputs, labels)``, a list or a DataLoader."""
    batches = _called(spec)
    if not hasattr(batches, "__iter__"):
        raise LoadingError(f"{spec}() returned a {type(batches).__name__}, not batches of (*inputs, labels)")
    return batches


def calibration_of(spec: str, most: int = 16) -> tuple[list[Inputs], Tensor]:
    """The first ``most`` batches of a data callable as calibration inputs, and their labels."""
    batches = [tuple(batch) for batch in islice(batches_of(spec), most)]
    if not batches or any(len(batch) < 2 for batch in batches):
        raise LoadingError(f"{spec}() gave no batches of (*inputs, labels)")
    if not all(isinstance(batch[-1], Tensor) and batch[-1].dim() for batch in batches):
        raise LoadingError(
            f"{spec}() gave batches whose last entry is no tensor of labels: (*inputs, labels) is needed"
        )
    return [batch[:-1] for batch in batches], torch.cat([batch[-1] for batch in batches])


def read_samples(path: str, inputs: Sequence[Mapping[str, Any]]) -> list[np.ndarray[Any, Any]]:
    """Arrays named as an artifact's ``inputs``, from a ``.npz`` file or a folder of ``.npy`` files."""
    names = [entry["name"] for entry in inputs]
    place = Path(path)
    try:
        if place.is_dir():
            return [np.load(place / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names]
        with np.load(place, allow_pickle=False) as arrays:
            return [arrays[name] for name in names]
    except (OSError, ValueError, KeyError, TypeError, BadZipFile) as error:
        raise LoadingError(
            f"{path}: {error}; a .npz file or a folder of .npy files is needed, with arrays named {', '.join(names)}"
        ) from error


def read_reference(path: str) -> Any:
    """The full model that drift is measured from: its logits in a ``.npy`` file, or the model of a checkpoint."""
    if not path.endswith(".npy"):
        return Checkpoint.load(path).model
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise LoadingError(f"reference {path}: {error}") from error
