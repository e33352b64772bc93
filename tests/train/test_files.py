"""Folders are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import SafetensorError

from rcod_train.errors import TrainError
from rcod_train.files import disk_errors, reason_of, written_whole


def write(target: Path, text: str) -> None:
    with written_whole(target) as folder:
        (folder / "a.txt").write_text(text)


def test_a_folder_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    write(target, "first")
    write(target, "second")
    assert (target / "a.txt").read_text() == "second"
    assert [p.name for p in target.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_the_earlier_one(tmp_path: Path, error: type[BaseException]) -> None:
    write(tmp_path / "target", "first")
    with pytest.raises(error), written_whole(tmp_path / "target") as folder:
        (folder / "a.txt").write_text("half")
        raise error
    assert (tmp_path / "target" / "a.txt").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [False, True])
def test_an_error_while_folders_are_renamed_brings_the_earlier_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, after: bool
) -> None:
    """``after``: when the earlier one has been put aside; else in the place of the new one's."""
    write(tmp_path / "target", "first")
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if target.name == "target" and not self.name.endswith("-old") and not after:
            raise error
        renamed = real(self, target)
        if self.name == "target" and after:
            raise error
        return renamed

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(type(error)) as caught:
        write(tmp_path / "target", "second")
    assert caught.value is error
    assert (tmp_path / "target" / "a.txt").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_what_keeps_a_file_from_being_written_is_named_in_the_systems_words(
    tmp_path: Path,
) -> None:
    def refused() -> None:
        raise OSError(28, "No space left on device")

    def replaced() -> None:
        try:
            refused()
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")  # as torch's writer does

    with (
        pytest.raises(TrainError, match=r"a: could not be written \(No space .*\).*--resume"),
        disk_errors(tmp_path / "a"),
    ):
        refused()
    with (
        pytest.raises(TrainError, match=r"a: could not be written \(I/O error\)"),
        disk_errors(tmp_path / "a"),
    ):
        raise SafetensorError("I/O error")
    with pytest.raises(RuntimeError) as caught:
        replaced()
    assert reason_of(caught.value) == "No space left on device"
