"""The manifest of an artifact: what is in the folder, checked before anything in it is used.

Standard library only; reading an artifact never unpickles.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from t3c_compile.passes.errors import T3CError

SCHEMA = 1
MANIFEST = "manifest.json"
STORE = "weights.safetensors"

Manifest = dict[str, Any]

_FIELDS = {"files": dict, "inputs": list, "profiles": list, "targets": dict, "tools": dict}
_TARGET_FIELDS = {"library": str, "functions": list, "pack": str, "parameters": list, "costs": list, "machine": str}


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


def _check_structure(path: Path, manifest: Any) -> None:
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if not isinstance(schema, int) or isinstance(schema, bool):
        raise ArtifactError(f"{path} is damaged: it has no schema version")
    if schema > SCHEMA:
        raise ArtifactError(
            f"{path} has schema {schema}, this version reads up to {SCHEMA}: install a newer t3c-compile"
        )
    for field, kind in _FIELDS.items():
        if not isinstance(manifest.get(field), kind):
            raise ArtifactError(f"{path} is damaged: {field!r} is missing or not a {kind.__name__}")
    for target, entry in manifest["targets"].items():
        for field, kind in _TARGET_FIELDS.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(field), kind):
                raise ArtifactError(f"{path} is damaged: target {target!r} has no {field!r}")
        for field in ("functions", "costs"):
            if len(entry[field]) != len(manifest["profiles"]):
                raise ArtifactError(f"{path} is damaged: target {target!r} has {len(entry[field])} {field}")
        for name in (entry["library"], STORE):
            if name not in manifest["files"]:
                raise ArtifactError(f"{path} is damaged: {name} has no hash")


def _check_file(folder: Path, name: str, entry: Any) -> None:
    path = folder / name
    if not isinstance(entry, dict) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ArtifactError(f"{folder / MANIFEST} is damaged: bad file entry {name!r}")
    if not path.is_file():
        raise ArtifactError(f"{folder} is incomplete: {name} is missing")
    size = path.stat().st_size
    if size != entry.get("bytes"):
        raise ArtifactError(f"{path} is truncated or changed: {size} bytes, {entry.get('bytes')} expected")
    if sha256(path) != entry.get("sha256"):
        raise ArtifactError(f"{path} is damaged: its SHA-256 is not the manifest's; lower the model again")
