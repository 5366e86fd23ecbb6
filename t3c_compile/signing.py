"""Ed25519 signatures of artifacts (RFC 8032, https://www.rfc-editor.org/rfc/rfc8032): hashes say that an artifact is
whole, a signature says who made it.

Signed are the bytes of the manifest, which holds the hash of every file. ``manifest.sig`` is the signature alone, 64
bytes, so others can check it too: ``openssl pkeyutl -verify -pubin -inkey public.pem -rawin -in manifest.json -sigfile
manifest.sig``.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t3c_compile.manifest import SIGNATURE, ArtifactError, Manifest, check_files, manifest_bytes, parse_manifest
from t3c_compile.passes.errors import T3CError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

Key = str | os.PathLike[str] | bytes
"""A PEM file, or its content as bytes."""

_HOW = "openssl genpkey -algorithm ed25519 -out private.pem; openssl pkey -in private.pem -pubout -out public.pem"


class SignatureError(ArtifactError):
    """An artifact is not signed, or not by the key that was given."""


class SigningKeyError(T3CError):
    """A key cannot be read, or is not an Ed25519 key of the kind that is needed."""


def private_key(key: Key) -> "Ed25519PrivateKey":
    """The key to sign with. Raises :class:`SigningKeyError`."""
    serialization, ed25519 = _cryptography()
    found = _loaded(key, "private", lambda data: serialization.load_pem_private_key(data, None))
    if not isinstance(found, ed25519.Ed25519PrivateKey):
        raise SigningKeyError(f"the private key is not an Ed25519 key: make one with {_HOW}")
    return found  # type: ignore[no-any-return]


def public_key(key: Key) -> "Ed25519PublicKey":
    """The key to verify with. Raises :class:`SigningKeyError`."""
    serialization, ed25519 = _cryptography()
    found = _loaded(key, "public", serialization.load_pem_public_key)
    if not isinstance(found, ed25519.Ed25519PublicKey):
        raise SigningKeyError(f"the public key is not an Ed25519 key: make one with {_HOW}")
    return found  # type: ignore[no-any-return]


def sign(path: str | os.PathLike[str], key: Key) -> None:
    """Sign the artifact at ``path``, which must be whole, in place of an earlier signature.

    Raises:
        SigningKeyError: ``key`` is not an Ed25519 private key in PEM, without a passphrase.
        ArtifactError: the artifact is missing or damaged, or the signature cannot be written.
    """
    signer, folder = private_key(key), Path(path)
    data = manifest_bytes(folder)
    check_files(folder, parse_manifest(folder, data))
    temporary = folder / f".{SIGNATURE}.{os.getpid()}.tmp"
    try:
        temporary.write_bytes(signer.sign(data))
        temporary.replace(folder / SIGNATURE)
    except OSError as error:
        raise ArtifactError(f"cannot write {folder / SIGNATURE}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def verified_manifest(folder: Path, key: Key) -> Manifest:
    """The manifest of ``folder``, read once its signature was found to be the key's. Files are not opened.

    Raises:
        SigningKeyError: ``key`` is not an Ed25519 public key in PEM.
        SignatureError: there is no signature, or it is not of this manifest by this key.
        ArtifactError: as for :func:`t3c_compile.manifest.read_manifest`.
    """
    verifier = public_key(key)
    from cryptography.exceptions import InvalidSignature

    data = manifest_bytes(folder)
    try:
        signature = (folder / SIGNATURE).read_bytes()
    except OSError as error:
        raise SignatureError(f"{folder} is not signed: it has no {SIGNATURE} (t3c-compile sign)") from error
    try:
        verifier.verify(signature, data)
    except InvalidSignature as error:
        raise SignatureError(
            f"{folder} is not as the owner of this key signed it: it was changed since, or signed with another key"
        ) from error
    return parse_manifest(folder, data)


def _loaded(key: Key, kind: str, load: Any) -> Any:
    try:
        data = key if isinstance(key, bytes) else Path(key).read_bytes()
        return load(data)
    except (OSError, ValueError, TypeError) as error:
        where = "the key" if isinstance(key, bytes) else str(key)
        raise SigningKeyError(
            f"{where} is not an Ed25519 {kind} key in PEM without a passphrase ({error}): make one with {_HOW}"
        ) from error
    except Exception as error:  # cryptography's own errors, which are none of Python's
        raise SigningKeyError(f"{key!r} holds a key that is not supported: {error}") from error


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise T3CError("signatures need the package cryptography: pip install t3c-compile[sign]") from error
    return serialization, ed25519
