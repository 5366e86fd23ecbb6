"""An NPU's partitions on a host that has no NPU: the TOSA reference model computes what their command streams would.

A compiled host library calls ``t3c.npu.run`` for each partition. On a device its program registers a function of that
name which hands the partition's command stream to the NPU's driver.
"""

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from t3c_compile.manifest import ArtifactError, Manifest, open_file

RUN = "t3c.npu.run"

# By name, for all loaded artifacts: a name is the hash of the flatbuffer.
_PARTITIONS: dict[str, tuple[bytes, int]] = {}
_LOCK = threading.Lock()


def partition_runner(folder: Path, manifest: Manifest, target: str) -> Callable[..., None]:
    """What a library is to find as :data:`RUN`: it runs the partitions of all artifacts loaded so far, this one's too.

    Raises:
        ArtifactError: the TOSA reference model is not installed, or a partition's file is damaged.
    """
    try:
        import tosa_reference_model  # noqa: F401
    except ImportError as error:
        raise ArtifactError(
            f"{folder} is for an NPU, which the TOSA reference model stands in for here, and that is not installed "
            f"({error}): pip install 't3c-compile[npu]'"
        ) from error
    for name, entry in manifest["targets"][target]["npu"]["partitions"].items():
        with open_file(folder, manifest, entry["tosa"]) as file:
            _PARTITIONS[name] = (file.read(), len(entry["inputs"]))
    return _run


def _run(name: Any, *tensors: Any) -> None:
    """Inputs, then the outputs to be written."""
    import tosa_reference_model

    flatbuffer, count = _PARTITIONS[str(name)]
    arrays = [np.from_dlpack(tensor) for tensor in tensors]
    with _LOCK, quiet():
        outputs, status = tosa_reference_model.run(flatbuffer, [np.ascontiguousarray(x) for x in arrays[:count]])
    if status.name != "TOSA_VALID":
        raise RuntimeError(f"partition {name}: the TOSA reference model says {status.name}")
    for into, output in zip(arrays[count:], outputs, strict=True):
        # numpy's views of others' tensors cannot be written to.
        ctypes.memmove(into.ctypes.data, np.ascontiguousarray(output).ctypes.data, into.nbytes)


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing on standard output: the model writes there, at every call, that 1.0 flatbuffers are older than itself."""
    library = ctypes.CDLL(None)
    sys.stdout.flush()
    library.fflush(None)
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
        library.fflush(None)
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
