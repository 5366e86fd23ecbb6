"""Factors on disk as they are made, so that a decomposition that was cut short goes on where it was."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.fx import GraphModule

from t3c_compile.passes.digest import digest
from t3c_compile.passes.errors import T3CError

Factors = tuple[Tensor, ...]


def kept_factors(
    gm: GraphModule, layer: str, options: str, sources: Sequence[Tensor | None], make: Callable[[], Factors]
) -> Factors:
    """What ``make`` returns, or what it returned before for the same layer, options and ``sources``.

    Without a folder in ``gm.meta["t3c_resume"]``, ``make`` is called. A file there is complete or absent, whenever the
    process is killed; one that cannot be read is made again.

    Raises:
        T3CError: the folder cannot be written to.
    """
    folder: Path | None = gm.meta.get("t3c_resume")
    if folder is None:
        return make()
    path = folder / f"{digest((layer, options, sources))}.safetensors"
    try:
        kept = load_file(path)
        # Copies: the tensors read are the file's own pages.
        return tuple(kept[str(i)].clone() for i in range(len(kept)))
    except (FileNotFoundError, SafetensorError, KeyError):
        factors = make()
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file({str(i): factor.contiguous() for i, factor in enumerate(factors)}, temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise T3CError(
            f"layer {layer}: its factors cannot be kept in {folder}: {error}; choose another place"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return factors
