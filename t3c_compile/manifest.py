"""The manifest of an artifact: what is in the folder, checked before anything in it is used.

It holds the SHA-256 of every file, and of itself. Standard library only; reading an artifact never unpickles.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from t3c_compile.passes.errors import T3CError

SCHEMA = 3
MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
STORE = "weights.safetensors"

Manifest = dict[str, Any]

# How a manifest ends before its hash is there.
_NO_HASH = b"0" * 64 + b'"\n}'

_NUMBER = (int, float)
_COST = {"latency_ms": _NUMBER, "energy_mj": _NUMBER, "source": str}
_OPTION = {"form": str, "rank": int, "bits": int}
_PROFILE = {
    "name": str,
    "size_bytes": int,
    "options": {str: _OPTION},
    "quality": {"kl": _NUMBER, str: _NUMBER},
    "certificate": {"bound": _NUMBER},
}
_TARGET = {
    "machine": str,
    "features": [str],
    "library": str,
    "functions": [str],
    "packs": {str: [str]},
    "costs": [_COST],
}
_DRIFT = {"linf": _NUMBER, "l2": _NUMBER, "kl": _NUMBER, str: _NUMBER}
_BOUNDS = {
    "drift": _DRIFT,
    "scaled": {str: _NUMBER},
    "agreement": _NUMBER,
    "to_greatest": _NUMBER,
    "compared?": {"linf": _NUMBER, "l2": _NUMBER, "kl": _NUMBER},
}
# A target's certificate, where it has been certified.
_CONFORMAL = {
    "alpha": _NUMBER,
    "delta": _NUMBER,
    "samples": int,
    "reference": str,
    "statement": str,
    "profiles": [_BOUNDS],
}
# A type, a tuple of types, [element], or the fields a mapping must have (with a `?`: may have); its others are as `str`
# says, or free.
_SHAPE = {
    "files": {str: {"bytes": int, "sha256": str}},
    "inputs": [{"name": str, "shape": [(int, str)], "dtype": str}],
    "profiles": [_PROFILE],
    "targets": {str: _TARGET},
    "tools": {str: str},
    "sha256": str,
}
_DTYPES = ("float32", "float16", "float64", "int8", "uint8", "int16", "int32", "int64", "bool")


class ArtifactError(T3CError):
    """An artifact is missing, damaged, of a newer schema, or not for this machine."""


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of ``folder`` and check its schema version, structure and hash; its files are not opened.

    Raises:
        ArtifactError: it is missing or damaged, or of another schema.
    """
    return parse_manifest(folder, manifest_bytes(folder))


def manifest_bytes(folder: Path) -> bytes:
    """The manifest of ``folder`` as it stands there. Raises :class:`ArtifactError`."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder} is not a t3c artifact: it has no {MANIFEST}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error


def parse_manifest(folder: Path, data: bytes) -> Manifest:
    """What :func:`read_manifest` returns, of ``data`` that :func:`manifest_bytes` has read."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: {error}; lower the model again") from error
    _check_structure(path, manifest)
    if data != _with_hash(data[: -len(_NO_HASH)]):
        raise ArtifactError(f"{path} is damaged: its SHA-256 is not the one it holds; lower the model again")
    return manifest  # type: ignore[no-any-return]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put ``manifest`` in the place of the one in ``folder``, in one moment: whenever this is cut short, the old one or
    the new one stands there whole. It gets its own hash, and a signature of the old one is taken away.

    Raises:
        ArtifactError: it cannot be written; the old one is as it was.
    """
    data = sealed(manifest)
    temporary = folder / f".{MANIFEST}.{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        (folder / SIGNATURE).unlink(missing_ok=True)
        temporary.replace(folder / MANIFEST)
    except OSError as error:
        raise ArtifactError(f"cannot write {folder / MANIFEST}: {error}; it is as it was") from error
    finally:
        temporary.unlink(missing_ok=True)


def described(path: Path) -> dict[str, Any]:
    """What the manifest says of a file: its size and hexadecimal SHA-256."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def open_file(folder: Path, manifest: Manifest, name: str) -> BinaryIO:
    """The file ``name`` of an artifact, open and found to be what the manifest says.

    Who reads on from it reads what was hashed, also where another file has taken its place meanwhile.

    Raises:
        ArtifactError: it is missing, truncated or changed.
    """
    path, entry = folder / name, manifest["files"][name]
    try:
        if not path.is_file():
            raise ArtifactError(f"{folder} is incomplete: {name} is missing")
        file = path.open("rb")
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    try:
        size = os.fstat(file.fileno()).st_size
        if size != entry["bytes"]:
            raise ArtifactError(f"{path} is truncated or changed: {size} bytes, {entry['bytes']} expected")
        if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
            raise ArtifactError(f"{path} is damaged: its SHA-256 is not the manifest's; lower the model again")
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raises :class:`ArtifactError` where a file is not what the manifest says, as :func:`open_file` does."""
    for name in manifest["files"]:
        open_file(folder, manifest, name).close()


def sealed(manifest: Manifest) -> bytes:
    """A manifest as it is written, with its own hash last: that of the same bytes with zeros in its place."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return _with_hash(json.dumps(rest | {"sha256": "0" * 64}, indent=1).encode()[: -len(_NO_HASH)])


def _with_hash(start: bytes) -> bytes:
    digest = hashlib.sha256(start + _NO_HASH).hexdigest().encode()
    return start + digest + _NO_HASH[len(digest) :]


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
    for low, high in pairwise(manifest["profiles"]):
        if not _nested(low["options"], high["options"]):
            raise ArtifactError(
                f"{path} is damaged: a layer of {low['name']} has more rank or bits than in the next one"
            )
    for name in manifest["files"]:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ArtifactError(f"{path} is damaged: bad file entry {name!r}")
    if any(entry["dtype"] not in _DTYPES for entry in manifest["inputs"]):
        raise ArtifactError(f"{path} is damaged: an input is of none of the types {', '.join(_DTYPES)}")
    for target, entry in manifest["targets"].items():
        wrong = _mismatch(entry["conformal"], _CONFORMAL, f"{target}/conformal") if "conformal" in entry else None
        if (
            not wrong
            and "conformal" in entry
            and not all(0 < entry["conformal"][key] < 1 for key in ("alpha", "delta"))
        ):
            wrong = f"{target}/conformal has an alpha or delta that is no probability"
        if wrong:
            raise ArtifactError(f"{path} is damaged: {wrong}")
        if entry.get("kind") == "cuda" and not re.fullmatch(r"sm_\d{2,3}", str(entry.get("arch"))):
            raise ArtifactError(f"{path} is damaged: {target}/arch is no architecture of a GPU")
        lists = {"functions": entry["functions"], "costs": entry["costs"]}
        if "conformal" in entry:
            lists["certified profiles"] = entry["conformal"]["profiles"]
        for field, values in lists.items():
            if len(values) != len(manifest["profiles"]):
                raise ArtifactError(f"{path} is damaged: target {target!r} has {len(values)} {field}")
        for name in (entry["library"], STORE):
            if name not in manifest["files"]:
                raise ArtifactError(f"{path} is damaged: {name} has no hash")


def _nested(low: Mapping[str, Any], high: Mapping[str, Any]) -> bool:
    """Whether no layer of a profile has a lower rank or fewer bits than in the profile before it."""
    return low.keys() == high.keys() and all(
        low[layer]["rank"] <= high[layer]["rank"] and low[layer]["bits"] <= high[layer]["bits"] for layer in low
    )


def _mismatch(value: Any, shape: Any, place: str) -> str | None:
    """Where ``value`` first differs from ``shape``, in words; None when it does not."""
    if isinstance(shape, type | tuple):
        # JSON's true is Python's int too; nowhere does a manifest hold one.
        if not isinstance(value, shape) or isinstance(value, bool):
            return f"{place} is missing or of the wrong type"
        held = math.isfinite(value) if isinstance(value, float) else not isinstance(value, int) or abs(value) < 2**63
        return None if held else f"{place} is out of range"
    if not isinstance(value, type(shape)):
        return f"{place} is missing or of the wrong type"
    if isinstance(shape, list):
        inner = [(str(i), item, shape[0]) for i, item in enumerate(value)]
    else:
        named = {key.rstrip("?"): kind for key, kind in shape.items() if key is not str}
        inner = [(key, value.get(key), kind) for key, kind in named.items() if key in shape or key in value]
        if str in shape:
            inner += [(key, item, shape[str]) for key, item in value.items() if key not in shape]
    found = (_mismatch(item, kind, f"{place}/{key}".lstrip("/")) for key, item, kind in inner)
    return next((wrong for wrong in found if wrong), None)
