"""The manifest of an artifact: what is in the folder, checked before anything in it is used.

Standard library only; reading an artifact never unpickles.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t3c_compile.passes.errors import T3CError

SCHEMA = 2
MANIFEST = "manifest.json"
STORE = "weights.safetensors"

Manifest = dict[str, Any]

_NUMBER = (int, float)
_COST = {"latency_ms": _NUMBER, "energy_mj": _NUMBER, "source": str}
_OPTION = {"form": str, "rank": int, "bits": int}
_PROFILE = {"name": str, "size_bytes": int, "options": {str: _OPTION}, "quality": {str: _NUMBER}, "certificate": dict}
_TARGET = {
    "machine": str,
    "features": [str],
    "library": str,
    "functions": [str],
    "packs": {str: [str]},
    "costs": [_COST],
}
_DRIFT = {"linf": _NUMBER, "l2": _NUMBER, "kl": _NUMBER}
_BOUNDS = {"drift": _DRIFT, "scaled": {str: _NUMBER}, "agreement": _NUMBER, "to_greatest": _NUMBER}
# A target's certificate, where it has been certified.
_CONFORMAL = {
    "alpha": _NUMBER,
    "delta": _NUMBER,
    "samples": int,
    "reference": str,
    "statement": str,
    "profiles": [_BOUNDS],
}
# A type, a tuple of types, [element], {str: value}, or the fields a mapping must have (it may have others).
_SHAPE = {
    "files": {str: {"bytes": int, "sha256": str}},
    "inputs": [{"name": str, "shape": [(int, str)], "dtype": str}],
    "profiles": [_PROFILE],
    "targets": {str: _TARGET},
    "tools": {str: str},
}


class ArtifactError(T3CError):
    """An artifact is missing, damaged, of a newer schema, or not for this machine."""


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``folder``: schema version, structure, and size and SHA-256 of every file.

    Raises:
        ArtifactError: says which file is missing, truncated or changed, or that the schema is newer.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder} is not a t3c artifact: it has no {MANIFEST}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path} is damaged: {error}; lower the model again") from error
    _check_structure(path, manifest)
    for name, entry in manifest["files"].items():
        _check_file(folder, name, entry)
    return manifest  # type: ignore[no-any-return]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put ``manifest`` in the place of the one in ``folder``, in one moment: whenever this is cut short, the old one or
    the new one stands there whole.

    Raises:
        ArtifactError: it cannot be written; the old one is as it was.
    """
    temporary = folder / f".{MANIFEST}.{os.getpid()}.tmp"
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / MANIFEST)
    except OSError as error:
        raise ArtifactError(f"cannot write {folder / MANIFEST}: {error}; it is as it was") from error
    finally:
        temporary.unlink(missing_ok=True)


def _check_structure(path: Path, manifest: Any) -> None:
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if not isinstance(schema, int) or isinstance(schema, bool):
        raise ArtifactError(f"{path} is damaged: it has no schema version")
    if schema != SCHEMA:
        way_out = "install a newer t3c-compile" if schema > SCHEMA else "lower the model again"
        raise ArtifactError(f"{path} has schema {schema}, this version reads {SCHEMA}: {way_out}")
    wrong = _mismatch(manifest, _SHAPE, "")
    if wrong:
        raise ArtifactError(f"{path} is damaged: {wrong}")
    if not manifest["profiles"] or not manifest["targets"]:
        raise ArtifactError(f"{path} is damaged: it has no profiles or no targets")
    for target, entry in manifest["targets"].items():
        wrong = _mismatch(entry["conformal"], _CONFORMAL, f"{target}/conformal") if "conformal" in entry else None
        if wrong:
            raise ArtifactError(f"{path} is damaged: {wrong}")
        lists = {"functions": entry["functions"], "costs": entry["costs"]}
        if "conformal" in entry:
            lists["certified profiles"] = entry["conformal"]["profiles"]
        for field, values in lists.items():
            if len(values) != len(manifest["profiles"]):
                raise ArtifactError(f"{path} is damaged: target {target!r} has {len(values)} {field}")
        for name in (entry["library"], STORE):
            if name not in manifest["files"]:
                raise ArtifactError(f"{path} is damaged: {name} has no hash")


def _mismatch(value: Any, shape: Any, place: str) -> str | None:
    """Where ``value`` first differs from ``shape``, in words; None when it does not."""
    if isinstance(shape, type | tuple):
        # JSON's true is Python's int too; nowhere does a manifest hold one.
        right = isinstance(value, shape) and not isinstance(value, bool)
        return None if right else f"{place} is missing or of the wrong type"
    if not isinstance(value, type(shape)):
        return f"{place} is missing or of the wrong type"
    if isinstance(shape, list):
        inner = [(str(i), item, shape[0]) for i, item in enumerate(value)]
    elif str in shape:
        inner = [(key, item, shape[str]) for key, item in value.items()]
    else:
        inner = [(key, value.get(key), kind) for key, kind in shape.items()]
    found = (_mismatch(item, kind, f"{place}/{key}".lstrip("/")) for key, item, kind in inner)
    return next((wrong for wrong in found if wrong), None)


def _check_file(folder: Path, name: str, entry: Mapping[str, Any]) -> None:
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ArtifactError(f"{folder / MANIFEST} is damaged: bad file entry {name!r}")
    if not path.is_file():
        raise ArtifactError(f"{folder} is incomplete: {name} is missing")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise ArtifactError(f"{path} is truncated or changed: {size} bytes, {entry.get('bytes')} expected")
    if sha256(path) != entry["sha256"]:
        raise ArtifactError(f"{path} is damaged: its SHA-256 is not the manifest's; lower the model again")
