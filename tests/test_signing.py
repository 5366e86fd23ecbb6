"""Signatures: made and checked by command, in Python and by OpenSSL; whatever was changed since does not verify."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from certified import Small, samples
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import t3c_compile
from t3c_compile import SignatureError, certify, runtime
from t3c_compile.cli import main
from t3c_compile.manifest import MANIFEST, SIGNATURE, STORE, read_manifest, write_manifest
from t3c_compile.passes.errors import T3CError
from t3c_compile.signing import SigningKeyError


def _write_keys(key: Any, folder: Path, name: str, passphrase: bytes | None = None) -> None:
    hidden = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / f"{name}.pem").write_bytes(key.private_bytes(pem, form, hidden))
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pub.pem").write_bytes(public)


@pytest.fixture
def signed(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A signed artifact, ``mine`` beside it the key and ``other`` another one."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "other"):
        _write_keys(Ed25519PrivateKey.generate(), tmp_path, name)
    path = small.copy(tmp_path)
    t3c_compile.sign(path, "mine.pem")
    return path


def test_a_signed_artifact_loads_and_openssl_agrees(signed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = t3c_compile.load(signed, verify="mine.pub.pem")
    assert session.run(samples(2, 1)).shape == (2, 10)
    t3c_compile.load(signed, verify=Path("mine.pub.pem").read_bytes())
    t3c_compile.load(signed)
    assert main(["verify", str(signed), "--key", "mine.pub.pem"]) == 0
    assert main(["run", str(signed), "--verify", "mine.pub.pem", "--json"]) == 0
    assert main(["sign", str(signed), "--key", "other.pem", "--json"]) == 0
    assert main(["verify", str(signed), "--key", "other.pub.pem"]) == 0
    check = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", "other.pub.pem", "-rawin", "-in"]
    if shutil.which("openssl"):
        command = [*check, f"{signed}/{MANIFEST}", "-sigfile", f"{signed}/{SIGNATURE}"]
        subprocess.run(command, check=True, capture_output=True)


def test_what_was_changed_since_does_not_verify(signed: Path, small: Small, tmp_path: Path) -> None:
    """Nothing of it is loaded: not even a manifest whose hashes are right."""

    def edited(path: Path) -> None:
        signature = (path / SIGNATURE).read_bytes()
        manifest = read_manifest(path)
        manifest["profiles"][0]["quality"]["kl"] = 0.0
        write_manifest(path, manifest)
        assert not (path / SIGNATURE).exists()
        (path / SIGNATURE).write_bytes(signature)

    def of_another(path: Path) -> None:
        other = small.copy(tmp_path / "other", full=False)
        t3c_compile.sign(other, "mine.pem")
        shutil.copy(other / SIGNATURE, path / SIGNATURE)

    def flipped(path: Path) -> None:
        signature = bytearray((path / SIGNATURE).read_bytes())
        signature[5] ^= 1
        (path / SIGNATURE).write_bytes(signature)

    for number, (change, message) in enumerate(
        (
            (lambda p: (p / SIGNATURE).unlink(), "is not signed"),
            (lambda p: (p / SIGNATURE).write_bytes(b""), "is not as the owner of this key signed it"),
            (flipped, "is not as the owner of this key signed it"),
            (edited, "is not as the owner of this key signed it"),
            (of_another, "is not as the owner of this key signed it"),
            (lambda p: t3c_compile.sign(p, "other.pem"), "signed with another key"),
        )
    ):
        path = Path(shutil.copytree(signed, tmp_path / f"{number}.t3c"))
        change(path)
        with pytest.raises(SignatureError, match=message):
            t3c_compile.load(path, verify="mine.pub.pem")
        assert main(["verify", str(path), "--key", "mine.pub.pem"]) == 4
        assert main(["run", str(path), "--verify", "mine.pub.pem"]) == 4
    # The signature covers the hashes, they cover the files.
    (signed / STORE).write_bytes(bytes((signed / STORE).stat().st_size))
    assert main(["verify", str(signed), "--key", "mine.pub.pem"]) == 4
    with pytest.raises(T3CError, match="its SHA-256 is not the manifest's"):
        t3c_compile.sign(signed, "mine.pem")


def test_what_certify_writes_is_signed_anew_or_not_at_all(
    signed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    x = samples(200, seed=2)
    certify(signed, [x], key="mine.pem")
    t3c_compile.load(signed, verify="mine.pub.pem")
    certify(signed, [x])
    with pytest.raises(SignatureError, match="is not signed"):
        t3c_compile.load(signed, verify="mine.pub.pem")
    monkeypatch.setattr(runtime, "VirtualMachine", lambda _: pytest.fail("long work"))
    with pytest.raises(SigningKeyError):
        certify(signed, [x], key="mine.pub.pem")


def test_keys_that_are_none(signed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write_keys(ec.generate_private_key(ec.SECP256R1()), tmp_path, "curve")
    _write_keys(Ed25519PrivateKey.generate(), tmp_path, "hidden", passphrase=b"secret")
    (tmp_path / "text.pem").write_text("hello")
    for private in ("gone.pem", "text.pem", "mine.pub.pem", "curve.pem", "hidden.pem"):
        with pytest.raises(SigningKeyError, match="openssl genpkey -algorithm ed25519"):
            t3c_compile.sign(signed, private)
        assert main(["sign", str(signed), "--key", private]) == 1
    for public in ("gone.pem", "text.pem", "mine.pem", "curve.pub.pem"):
        with pytest.raises(SigningKeyError, match="openssl genpkey -algorithm ed25519"):
            t3c_compile.load(signed, verify=public)
    # Before any model is looked for.
    assert main(["lower", "no:where", "--target", "x86_64", "--sign", "text.pem", "-o", "m.t3c"]) == 1
    assert "text.pem is not an Ed25519 private key" in capsys.readouterr().err
    t3c_compile.load(signed, verify="mine.pub.pem")


def test_without_cryptography_only_signatures_are_missing(signed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    t3c_compile.load(signed)
    with pytest.raises(T3CError, match=r"pip install t3c-compile\[sign\]"):
        t3c_compile.load(signed, verify="mine.pub.pem")
