"""A bundle on disk: its manifest, and its files after they were checked against it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rcod_runtime.errors import BundleError, HashMismatch
from rcod_runtime.manifest import MANIFEST_FILE, Manifest, read_manifest, sha256_file


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
            BundleError: it is not there, or a link leads out of the bundle.
        """
        path = (self.folder / relative).resolve()
        if not path.is_relative_to(self.folder):
            raise BundleError(f"{self.folder / relative}: leads out of the bundle, to {path}.")
        if not path.is_file():
            raise BundleError(
                f"{path}: the manifest names it, but it is not there. "
                "Copy the whole bundle, or export it again."
            )
        return path


def default_bundle_path() -> Path:
    """The embedded model."""
    return Path(__file__).parent / "models" / "nano"


def open_bundle(folder: Path | str | None = None) -> Bundle:
    """Open a bundle and check every graph's size and hash; None is the embedded model.

    Raises:
        BundleError: no bundle there, or one of its files is missing.
        HashMismatch: a file is not the one that was exported.
        ManifestError: the manifest is not valid.
    """
    folder = default_bundle_path() if folder is None else Path(folder)
    if folder.exists() and not folder.is_dir():
        raise BundleError(f"{folder}: expected the folder of a bundle, found a file.")
    bundle = Bundle(folder.resolve(), read_manifest(folder / MANIFEST_FILE))
    for graph in bundle.manifest.graphs.values():
        path = bundle.path(graph.file)
        if path.stat().st_size != graph.bytes:
            raise HashMismatch(
                f"{path}: expected {graph.bytes} bytes, found {path.stat().st_size}. "
                "Copy the bundle again, or export it again."
            )
        for file, digest in {graph.file: graph.sha256, **graph.data_files}.items():
            _check_hash(bundle.path(file), digest)
    return bundle


def _check_hash(path: Path, expected: str) -> None:
    found = sha256_file(path)
    if found != expected:
        raise HashMismatch(
            f"{path}: expected SHA-256 {expected[:12]}..., found {found[:12]}... "
            "The file was changed after the export. Copy the bundle again, or export it again."
        )
