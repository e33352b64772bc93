"""A bundle on disk: its manifest, and its files after they were checked against it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from rcod_runtime.errors import BundleError, HashMismatch, UsageError
from rcod_runtime.manifest import (
    MANIFEST_FILE,
    Graph,
    Manifest,
    parse_manifest,
    read_manifest_bytes,
    sha256_file,
)
from rcod_runtime.onnx_check import check_onnx

MAX_DATA_BYTES = 2**34  # of one file with weights: Stable Diffusion's have 2.5 GB in all


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. ``folder`` is resolved, so links in the way to it don't matter."""

    folder: Path
    manifest: Manifest

    def graph_path(self, name: str) -> Path:
        """The ONNX file of a graph, checked to be inside the bundle."""
        return self.path(self.manifest.graphs[name].file)

    def graph_bytes(self, name: str) -> int:
        """Size of a graph's files."""
        graph = self.manifest.graphs[name]
        return sum(self.path(file).stat().st_size for file in (graph.file, *graph.data_files))

    def path(self, relative: str) -> Path:
        """A file of the bundle.

        Raises:
            BundleError: it is not there, is no regular file, or a link leads out of the bundle.
        """
        path = _inside(self.folder, relative)
        if not os.path.isfile(path):
            raise BundleError(
                f"{path}: the manifest names it, but it is not there, or no regular file. "
                "Copy the whole bundle, or export it again."
            )
        return path


def default_bundle_path() -> Path:
    """The embedded model."""
    return Path(__file__).parent / "models" / "nano"


def open_bundle(
    folder: Path | str | None = None, require_signature: Path | str | None = None
) -> Bundle:
    """Open a bundle and check every graph: size, hash, and what its file refers to.

    Args:
        folder: None is the embedded model.
        require_signature: PEM file of the Ed25519 public key that must have signed the manifest,
            and with it the hash of every file it names. None: no signature is looked for.

    Raises:
        BundleError: no bundle there, one of its files is missing, or a graph reaches for what the
            manifest does not list.
        HashMismatch: a file is not the one that was exported.
        ManifestError: the manifest is not valid.
        SignatureError: no signature by that key over this manifest.
        UsageError: the key can't be used, or one of the two is no path.
    """
    for name, value in (("bundle", folder), ("require_signature", require_signature)):
        if value is not None and not isinstance(value, (str, os.PathLike)):
            raise UsageError(f"{name} {value!r}: expected a path.")
    folder = default_bundle_path() if folder is None else Path(folder)
    try:
        resolved = folder.resolve()
        is_file = resolved.exists() and not resolved.is_dir()
    except (OSError, ValueError, RuntimeError) as exc:  # a circle of links, a name with NUL
        raise BundleError(f"{folder}: can't be opened ({exc}).") from exc
    if is_file:
        raise BundleError(f"{folder}: expected the folder of a bundle, found a file.")
    data = read_manifest_bytes(_inside(resolved, MANIFEST_FILE))
    if require_signature is not None:
        from rcod_runtime.signature import verify_manifest

        verify_manifest(data, resolved, Path(require_signature))
    # What was verified is what is parsed: the file is not read a second time.
    bundle = Bundle(resolved, parse_manifest(data, str(folder / MANIFEST_FILE)))
    for graph in bundle.manifest.graphs.values():
        try:
            _check_graph(bundle, graph)
        except OSError as exc:
            raise BundleError(f"{resolved}: {graph.file} can't be read ({exc}).") from exc
    return bundle


def _inside(folder: Path, relative: str) -> Path:
    try:
        path = (folder / relative).resolve()
    except (OSError, RuntimeError) as exc:  # RuntimeError: a circle of links, before Python 3.13
        raise BundleError(f"{folder / relative}: can't be followed ({exc}).") from exc
    if not path.is_relative_to(folder):
        raise BundleError(f"{folder / relative}: leads out of the bundle, to {path}.")
    if path != folder / relative:  # then files named relative to it would not be those checked
        raise BundleError(
            f"{folder / relative}: expected a file of its own, found a link to {path}."
        )
    return path


def _check_graph(bundle: Bundle, graph: Graph) -> None:
    path = bundle.path(graph.file)
    if path.stat().st_size != graph.bytes:
        raise HashMismatch(
            f"{path}: expected {graph.bytes} bytes, found {path.stat().st_size}. "
            "Copy the bundle again, or export it again."
        )
    sizes = {file: bundle.path(file).stat().st_size for file in graph.data_files}
    for file, size in sizes.items():
        if size > MAX_DATA_BYTES:
            raise BundleError(
                f"{bundle.folder / file}: expected at most {MAX_DATA_BYTES} bytes, found {size}."
            )
    for file, digest in {graph.file: graph.sha256, **graph.data_files}.items():
        check_hash(bundle.path(file), digest)
    check_onnx(path, graph, sizes)


def check_hash(path: Path, expected: str) -> None:
    """Hold a file to its SHA-256.

    Raises:
        HashMismatch: it has another.
        BundleError: it can't be read.
    """
    try:
        found = sha256_file(path)
    except OSError as exc:
        raise BundleError(f"{path}: can't be read ({exc.strerror or exc}).") from exc
    if found != expected:
        raise HashMismatch(
            f"{path}: expected SHA-256 {expected[:12]}..., found {found[:12]}... "
            "The file was changed after the export. Copy the bundle again, or export it again."
        )
