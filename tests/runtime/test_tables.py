"""Images of tar shards and Parquet files, without a cluster."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from rcod_runtime.cli.tables import images_of
from rcod_runtime.errors import ImageError

pyarrow = pytest.importorskip("pyarrow", reason='needs pip install "rcod[ray]"')
parquet = pytest.importorskip("pyarrow.parquet")


def shard(path: Path, *names: str, links: dict[str, str] | None = None) -> bytes:
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 600
            tar.addfile(info, io.BytesIO(name.encode().ljust(600)))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.LNKTYPE, target
            tar.addfile(info)
    return path.read_bytes()


def read(path: Path) -> tuple[list[str], str]:
    """The names of the images, and the error at which reading ends."""
    names: list[str] = []
    try:
        for name, content in images_of({"path": str(path), "part": 0}):
            names.append(name if isinstance(content, bytes) else f"{name}: {content}")
    except ImageError as exc:
        return names, str(exc)
    return names, ""


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("header cut", "truncated header"),
        ("header damaged", "bad checksum"),
        ("between members", "empty header"),
        ("content cut", "unexpected end of data"),
    ],
)
def test_a_shard_that_is_cut_or_damaged_says_so(tmp_path: Path, where: str, words: str) -> None:
    """tarfile takes a header that it can't read for the end, and the images behind it were lost."""
    path = tmp_path / "s.tar"
    whole = shard(path, "a.png", "b.png", "c.png")
    assert read(path) == (["a.png", "b.png", "c.png"], "")
    at = whole.index(b"c.png\0")
    damaged = bytearray(whole)
    damaged[at] ^= 1
    path.write_bytes(
        {
            "header cut": whole[: at + 200],
            "header damaged": bytes(damaged),
            "between members": whole[:at],
            "content cut": whole[: at + 512 + 300],
        }[where]
    )
    names, error = read(path)
    assert names == ["a.png", "b.png"] and words in error and "s.tar: can't be read" in error


def test_links_of_a_shard_are_named(tmp_path: Path) -> None:
    """GNU tar makes them of files that are one file."""
    shard(tmp_path / "s.tar", "a.png", links={"b.png": "a.png", "b.txt": "a.txt"})
    names, error = read(tmp_path / "s.tar")
    assert names[0] == "a.png" and not error
    assert len(names) == 2 and "b.png: expected an image, found a link to a.png" in names[1]


def test_a_row_is_named_by_whatever_its_column_holds(tmp_path: Path) -> None:
    table = pyarrow.table({"id": [0, 1, None], "image": [b"x", b"y", b"z"]})
    parquet.write_table(table, tmp_path / "ids.parquet")
    names, _ = read(tmp_path / "ids.parquet")
    assert names[:2] == ["0", "1"] and len(names[2]) == 16
    table = pyarrow.table({"__key__": [b"k0", b""], "image": [b"x", b"y"]})
    parquet.write_table(table, tmp_path / "keys.parquet")
    names, _ = read(tmp_path / "keys.parquet")
    assert names[0] == "k0" and len(names[1]) == 16
