"""Pages of mapped files leave memory and nothing is lost."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from rcod_runtime.backends import pages
from rcod_runtime.backends.pages import forget_pages

SMAPS = Path("/proc/self/smaps")
BYTES, PAGE = 2**20, mmap.PAGESIZE

pytestmark = pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux's /proc")


def resident(path: Path) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    total, ours = 0, False
    for line in SMAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            ours = line.endswith(f" {path}")
        elif ours and words[0] == "Rss:":
            total += int(words[1]) * 1024
    return total


def at(array: np.ndarray) -> int:
    return int(array.ctypes.data)


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, BYTES, dtype=np.uint8)


@pytest.mark.parametrize("name", ["weights.onnx", "weights.onnx.data", "with space.onnx"])
def test_they_are_forgotten_and_read_again(tmp_path: Path, values: np.ndarray, name: str) -> None:
    path, other = tmp_path / name, tmp_path / "other.onnx"
    for file in (path, other):
        values.tofile(file)
    mapped, untouched = (np.memmap(file, mode="r") for file in (path, other))
    assert mapped.sum() == untouched.sum()
    assert resident(path) == resident(other) == BYTES
    forget_pages(Path(str(path).removesuffix(".data")), [at(untouched), at(mapped)])
    assert resident(path) == 0
    assert resident(other) == BYTES
    assert np.array_equal(mapped, values)


def test_what_was_written_stays(tmp_path: Path, values: np.ndarray) -> None:
    """A copy on write is nowhere else."""
    path = tmp_path / "weights.onnx"
    values.tofile(path)
    mapped = np.memmap(path, mode="c")
    mapped[:] = 7
    forget_pages(path, [at(mapped)])
    assert (mapped == 7).all()


def test_a_mapping_that_nobody_holds_is_left_alone(tmp_path: Path, values: np.ndarray) -> None:
    """Its owner may take it down while the list of mappings is read."""
    path = tmp_path / "weights.onnx"
    values.tofile(path)
    ours, another = (np.memmap(path, mode="r") for _ in range(2))
    assert ours.sum() == another.sum()
    assert resident(path) == 2 * BYTES
    forget_pages(path, [at(ours) + BYTES - 1])
    assert resident(path) == BYTES


def test_mappings_that_went_meanwhile_are_not_touched(
    tmp_path: Path, values: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the list says is of before: an array lies where another thread's mapping was."""
    path = tmp_path / "weights.onnx"
    values.tofile(path)
    ours, array = np.memmap(path, mode="r"), np.full(BYTES, 7, np.uint8)
    begin = -(-at(array) // PAGE) * PAGE
    lines = SMAPS.with_name("maps").read_text(encoding="utf-8", errors="replace")
    stale = f"{begin:x}-{begin + BYTES - PAGE:x} r--s 00000000 fe:00 1 {path}\n"
    (tmp_path / "maps").write_text(stale + lines, encoding="utf-8")
    monkeypatch.setattr(pages, "MAPS", tmp_path / "maps")
    forget_pages(path, [at(ours)])
    assert (array == 7).all()


@pytest.mark.parametrize("there", [False, True])
def test_where_nothing_tells_the_mappings_nothing_happens(
    tmp_path: Path, values: np.ndarray, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """There is no such file, or nothing in it."""
    path = tmp_path / "weights.onnx"
    values.tofile(path)
    mapped = np.memmap(path, mode="r")
    assert mapped.sum()
    if there:
        (tmp_path / "maps").touch()
    monkeypatch.setattr(pages, "MAPS", tmp_path / "maps")
    forget_pages(path, [at(mapped)])
    assert resident(path) == BYTES
