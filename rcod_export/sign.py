"""A bundle's signature: made over files that were checked, dropped when the manifest changes."""

from __future__ import annotations

import logging
from pathlib import Path

from rcod_export.inspect import check_engines
from rcod_runtime.bundle import check_hash, open_bundle
from rcod_runtime.errors import OutputError
from rcod_runtime.manifest import MANIFEST_FILE, read_manifest_bytes
from rcod_runtime.signature import SIGNATURE_FILE, sign_manifest

log = logging.getLogger(__name__)


def sign_bundle(folder: Path, private_key: Path) -> Path:
    """Check all files that the manifest names, then sign it; returns the signature's path.

    Raises:
        BundleError: the bundle is not whole.
        SignatureError: the package cryptography is not installed.
        UsageError: the key can't be used.
        OutputError: the signature can't be written.
    """
    data = read_manifest_bytes(folder / MANIFEST_FILE)
    bundle = open_bundle(folder)
    check_engines(bundle, bundle.manifest.engines)
    sample = bundle.manifest.sample
    if sample is not None:
        check_hash(bundle.path(sample.lq), sample.lq_sha256)
        check_hash(bundle.path(sample.sr), sample.sr_sha256)
    return sign_manifest(data, folder, private_key)


def drop_signature(folder: Path) -> None:
    """After a manifest was written: the signature of the old one would look like an attack.

    Raises:
        OutputError: it can't be removed.
    """
    path = folder / SIGNATURE_FILE
    try:
        path.unlink()
    except FileNotFoundError:
        return
    except OSError as exc:
        raise OutputError(f"{path}: can't be removed ({exc.strerror or exc}).") from exc
    log.warning(
        "%s: removed, the manifest has changed. Sign again: rcod-export sign %s --key PRIVATE.pem",
        path,
        folder,
    )
