"""Images in Parquet files and in tar shards (webdataset), read a few at a time."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from rcod_runtime.cli.files import is_table
from rcod_runtime.errors import ImageError, UsageError
from rcod_runtime.image_io import FORMATS, MAX_INPUT_BYTES, READ_SUFFIXES

IMAGE_COLUMNS = ("image", "bytes", "data", "content", *(s[1:] for s in sorted(READ_SUFFIXES)))
NAME_COLUMNS = ("name", "path", "file_name", "filename", "key", "__key__", "id")
ROWS = 16  # of a Parquet file, in memory at once


def units_of(inputs: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What is read in one go: a row group of a Parquet file, a tar shard. Each has "path" and
    "part".

    Args:
        inputs: paths, or URIs that pyarrow knows.

    Raises:
        ImageError: one is missing, or not what its name says.
        UsageError: an input that is neither.
    """
    import pyarrow.parquet

    for text in inputs:
        if not is_table(text):
            raise UsageError(
                f"{text}: expected only Parquet files and .tar shards, or only images."
            )
        path = text if "://" in text else os.path.abspath(text)
        with _opened(path) as file:
            parts = 1
            if not path.lower().endswith(".tar"):
                parts = pyarrow.parquet.ParquetFile(file).num_row_groups
        yield from ({"path": path, "part": part} for part in range(parts))


def images_of(unit: dict[str, Any]) -> Iterator[tuple[str, bytes | ImageError]]:
    """Name and content of each image of a unit; an error where a row has none, or one too large.

    Raises:
        ImageError: the file can't be read, from here on.
    """
    yield from _members(unit) if unit["path"].lower().endswith(".tar") else _rows(unit)


class _Member(tarfile.TarInfo):
    """A header that is damaged or cut off is an error; tarfile takes it for the end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as exc:
            raise tarfile.ReadError(f"after the image before: {exc}") from exc


def _members(unit: dict[str, Any]) -> Iterator[tuple[str, bytes | ImageError]]:
    with (
        _opened(unit["path"]) as file,
        tarfile.open(fileobj=file, mode="r|", tarinfo=_Member) as tar,
    ):
        for member in tar:
            if PurePosixPath(member.name).suffix.lower() not in READ_SUFFIXES:
                continue
            if member.islnk() or member.issym():
                yield (
                    member.name,
                    ImageError(
                        f"{member.name}: expected an image, found a link to {member.linkname} in "
                        "the archive. Pack it with tar --dereference --hard-dereference."
                    ),
                )
            if not member.isfile():
                continue
            if member.size > MAX_INPUT_BYTES:
                yield (
                    member.name,
                    ImageError(f"{member.name}: over the limit of {MAX_INPUT_BYTES} bytes."),
                )
                continue
            content = tar.extractfile(member)
            assert content is not None
            yield member.name, content.read()


def _rows(unit: dict[str, Any]) -> Iterator[tuple[str, bytes | ImageError]]:
    import pyarrow.parquet

    with _opened(unit["path"]) as file:
        table = pyarrow.parquet.ParquetFile(file)
        wanted = [c for c in table.schema_arrow.names if c in (*IMAGE_COLUMNS, *NAME_COLUMNS)]
        for batch in table.iter_batches(ROWS, row_groups=[unit["part"]], columns=wanted):
            for row in batch.to_pylist():
                yield _image_of(row, table.schema_arrow.names)


def _image_of(row: dict[str, Any], columns: list[str]) -> tuple[str, bytes | ImageError]:
    """Bytes in one of IMAGE_COLUMNS, or a mapping with "bytes" and "path", as datasets of images
    have it; the name in one of NAME_COLUMNS, or a hash where there is none."""
    given = (row[column] for column in NAME_COLUMNS if row.get(column) not in (None, "", b""))
    name = next((os.fsdecode(n) if isinstance(n, bytes) else str(n) for n in given), "")
    for column in IMAGE_COLUMNS:
        value = row.get(column)
        data = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(data, bytes):
            named = value.get("path") if isinstance(value, dict) else None
            return str(named or name or hashlib.sha256(data).hexdigest()[:16]), data
    name = name or "a row without a name"
    return name, ImageError(
        f"{name}: expected an image's bytes in one of the columns {', '.join(IMAGE_COLUMNS)}; "
        f"found none. The columns are {', '.join(columns)}."
    )


def target_of(name: str, out: Path, suffix: str | None) -> Path:
    """Where the result of the image of this name goes; its folder is made.

    Raises:
        ImageError: the name leads out of ``out``, or its folder can't be made.
    """
    relative, strict = PurePosixPath(name), PureWindowsPath(name)  # which knows \\ and C: as well
    own = relative.suffix.lower() if relative.suffix.lower() in FORMATS else ".png"
    known = relative.suffix.lower() in READ_SUFFIXES
    stem = relative.name[: -len(relative.suffix)] if known else relative.name
    if strict.anchor or ".." in strict.parts or not stem.strip(".") or "\0" in name:
        raise ImageError(f"{name}: expected a name inside the output's folder.")
    target = out / relative.parent / (stem + (suffix or own))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        reason = f"{target.parent} can't be made ({exc.strerror or exc})."
        raise ImageError(f"{name}: {reason}") from exc
    return target


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """A file or what a URI names; whatever goes wrong with it in the block is an ImageError."""
    import pyarrow
    from pyarrow.fs import FileSystem, LocalFileSystem

    try:
        system, name = FileSystem.from_uri(path) if "://" in path else (LocalFileSystem(), path)
        with system.open_input_file(name) as file:
            yield file
    except (OSError, tarfile.TarError, pyarrow.ArrowException) as exc:
        message = str(exc).splitlines()[0]
        raise ImageError(f"{path}: can't be read as what its name says ({message}).") from exc
