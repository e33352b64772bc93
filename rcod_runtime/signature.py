"""An Ed25519 signature over a bundle's manifest, and so over every file whose hash it holds.

``manifest.sig`` is 64 bytes over the bytes of manifest.json, as ``openssl pkeyutl -sign -rawin``
makes them. Keys are PEM files: ``openssl genpkey -algorithm ed25519``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rcod_runtime.errors import SignatureError, UsageError
from rcod_runtime.files import read_bounded, write_whole
from rcod_runtime.manifest import MANIFEST_FILE

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

SIGNATURE_FILE = "manifest.sig"
SIGNATURE_BYTES = 64
MAX_KEY_BYTES = 2**16
INSTALL_LINE = 'pip install "rcod[signature]"'


def verify_manifest(manifest: bytes, folder: Path, public_key: Path) -> None:
    """Check the signature beside the manifest whose bytes are given.

    Args:
        manifest: the bytes of manifest.json, which the caller goes on to parse.
        folder: the bundle's.
        public_key: PEM file.

    Raises:
        SignatureError: no signature, one by another key or over another manifest, or the package
            cryptography is not installed.
        UsageError: the file is not the PEM of an Ed25519 public key.
    """
    path = folder / SIGNATURE_FILE
    key = _public_key(public_key)
    try:
        if path.is_symlink():
            raise SignatureError(f"{path}: expected a file of its own, found a link.")
        signature = read_bounded(path, SIGNATURE_BYTES)
    except FileNotFoundError as exc:
        raise SignatureError(
            f"{path}: not there, but a signature is required. Sign the bundle: "
            "rcod-export sign BUNDLE --key PRIVATE.pem"
        ) from exc
    except OSError as exc:
        raise SignatureError(f"{path}: expected {SIGNATURE_BYTES} bytes, found {exc}.") from exc
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, manifest)
    except InvalidSignature as exc:
        raise SignatureError(
            f"{path}: not a signature of the key {public_key} over {folder / MANIFEST_FILE}: the "
            "manifest was changed after it was signed, or another key signed it. Don't use the "
            "bundle; get it again from where it comes."
        ) from exc


def sign_manifest(manifest: bytes, folder: Path, private_key: Path) -> Path:
    """Write the signature beside the manifest whose bytes are given; returns its path.

    Raises:
        SignatureError: the package cryptography is not installed.
        UsageError: the file is not the PEM of an Ed25519 private key without a password.
        OutputError: the signature can't be written.
    """
    signature = _private_key(private_key).sign(manifest)
    path = folder / SIGNATURE_FILE
    write_whole(path, signature)
    return path


def _public_key(path: Path) -> Ed25519PublicKey:
    data = _key_file(path, "a public key")
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError as exc:
        raise _not_installed(exc) from exc
    if b"PRIVATE KEY" in data:
        raise UsageError(
            f"{path}: expected a public key, found a private one. "
            f"openssl pkey -in {path} -pubout -out public.pem"
        )
    try:
        key = load_pem_public_key(data)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise UsageError(f"{path}: expected an Ed25519 public key in PEM ({exc}).") from exc
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(f"{path}: expected an Ed25519 public key, found {type(key).__name__}.")
    return key


def _private_key(path: Path) -> Ed25519PrivateKey:
    data = _key_file(path, "a private key")
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError as exc:
        raise _not_installed(exc) from exc
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:  # TypeError: it has a password
        raise UsageError(
            f"{path}: expected an Ed25519 private key in PEM, without a password ({exc}). "
            "openssl genpkey -algorithm ed25519 -out private.pem"
        ) from exc
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"{path}: expected an Ed25519 private key, found {type(key).__name__}.")
    return key


def _key_file(path: Path, what: str) -> bytes:
    try:
        return read_bounded(path, MAX_KEY_BYTES)
    except (OSError, ValueError) as exc:  # ValueError: a name with NUL
        raise UsageError(f"{path}: expected the PEM file of {what}, found {exc}.") from exc


def _not_installed(exc: ImportError) -> SignatureError:
    return SignatureError(f"signatures need the package cryptography ({exc}). {INSTALL_LINE}")
