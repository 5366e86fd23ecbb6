"""Folders that are written whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from t3c_compile.passes.errors import T3CError


@contextmanager
def whole_folder(path: str | os.PathLike[str], suffixes: tuple[str, ...], error: type[T3CError]) -> Iterator[Path]:
    """A folder to write into: it takes the place of ``path`` when the block ends well, and is removed when it does not.

    Raises:
        error: ``path`` cannot be written, or holds files of other suffixes, which an earlier export has not written.
    """
    final = Path(path)
    if not final.absolute().parent.is_dir():
        raise error(f"{final.parent} is not a folder: make it first, or choose another output")
    if final.exists() and not final.is_dir():
        raise error(f"{final} is a file: choose another output, a folder is written")
    for file in final.iterdir() if final.exists() else ():
        if file.suffix not in suffixes:
            raise error(f"{final} holds other files ({file.name}): choose another output")
    temporary = final.parent / f".{final.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir()
        yield temporary
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
    except OSError as failure:
        raise error(f"cannot write {final}: {failure}; nothing was left behind") from failure
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
