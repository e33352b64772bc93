"""Photos in folders, tar shards and pairs: found, read at random, and what is wrong with them."""

from __future__ import annotations

import io
import logging
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rcod_train.config import LoopConfig
from rcod_train.data import Batch, PhotoBatches, batches
from rcod_train.errors import DataError, TrainError
from rcod_train.main import main
from rcod_train.photos import find_pairs, find_photos

CONFIG = LoopConfig(photos_per_batch=4, crops_per_photo=2, crop_px=64, context_px=96)


def shard(path: Path, photos: Path, names: str = "0123") -> Path:
    """As webdataset writes them: photos and their captions."""
    with tarfile.open(path, "w") as tar:
        for name in names:
            tar.add(photos / f"{name}.png", f"{name}.png")
            caption = tarfile.TarInfo(f"{name}.txt")
            caption.size = 3
            tar.addfile(caption, io.BytesIO(b"cat"))
    return path


def pairs(folder: Path, photos: Path, scale: int = 4) -> Path:
    """HR, and as LR every fourth pixel of it: what is aligned can be told exactly."""
    for part in ("LR", "HR"):
        (folder / part).mkdir(parents=True)
    for path in photos.iterdir():
        pixels = np.asarray(Image.open(path))
        Image.fromarray(pixels).save(folder / "HR" / path.name)
        Image.fromarray(pixels[::scale, ::scale].copy()).save(folder / "LR" / path.name)
    return folder


def made(photos: list, heavy: float | None = 0.5, share: float = 0.5, i: int = 0) -> Batch:
    return PhotoBatches(photos, CONFIG, 0, 32, heavy, share)[i]


# -- shards ----------------------------------------------------------------------------------------


def test_a_shard_gives_the_batches_of_a_folder_with_the_same_photos(
    photos: Path, tmp_path: Path
) -> None:
    found = find_photos((str(shard(tmp_path / "a.tar", photos)),), 96)
    assert [p.name for p in found] == ["0.png", "1.png", "2.png", "3.png"]
    here, there = made(find_photos((str(photos),), 96)), made(found)
    assert torch.equal(here.lq, there.lq) and torch.equal(here.hq, there.hq)


def test_shards_lie_beside_photos_and_in_folders(photos: Path, tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", photos, "01")
    Image.open(photos / "2.png").save(tmp_path / "2.png")
    found = find_photos((str(tmp_path),), 96)
    assert [p.name for p in found] == ["2.png", "0.png", "1.png"]
    assert [len(p.read()) for p in found] == [128, 128, 128]


def test_a_cut_off_or_compressed_shard_is_named(photos: Path, tmp_path: Path) -> None:
    whole = shard(tmp_path / "a.tar", photos).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) // 2 + 300])
    with pytest.raises(DataError, match=r"a\.tar: not a whole tar file without compression"):
        find_photos((str(tmp_path / "a.tar"),), 96)
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.add(photos / "0.png")
    with pytest.raises(DataError, match=r"a\.tar: not a whole tar file without compression"):
        find_photos((str(tmp_path / "a.tar"),), 96)


# -- pairs -----------------------------------------------------------------------------------------


def test_crops_of_a_pair_are_of_one_place_and_turned_alike(photos: Path, tmp_path: Path) -> None:
    found = find_pairs(str(pairs(tmp_path, photos)), 96)
    moved = 0
    for i in range(6):
        batch = made(found, i=i)
        assert batch.lq_native is not None and batch.lq_native.shape == (8, 3, 16, 16)
        for hq, native in zip(batch.hq, batch.lq_native, strict=True):
            # Mirrored or turned, the pixel taken of each 4 x 4 block is another corner's.
            corners = [hq[:, y::4, x::4] for y in (0, 3) for x in (0, 3)]
            assert any(torch.equal(corner, native) for corner in corners)
            moved += not torch.equal(corners[0], native)
    assert moved


def test_pairs_are_their_share_of_the_samples(photos: Path, tmp_path: Path) -> None:
    both = find_photos((str(photos),), 96) + find_pairs(str(pairs(tmp_path, photos)), 96)
    for share in (0.0, 0.25, 1.0):
        chosen = torch.cat([made(both, share=share, i=i).photo[::2] for i in range(40)])
        assert (chosen >= 4).float().mean().item() == pytest.approx(share, abs=0.1)
    clean = made(both, heavy=None)  # stages without degradation take the HR image alone
    assert clean.lq_native is None and torch.equal(clean.hq, clean.lq)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda d: (d / "LR" / "2.png").unlink(), r"HR/2\.png: no image of this name in the other"),
        (lambda d: (d / "HR" / "2.png").unlink(), r"LR/2\.png: no image of this name in the other"),
        (lambda d: (d / "LR" / "2.png").write_bytes(b"x"), r"LR/2\.png: not a readable image"),
        (lambda d: Image.new("RGB", (9, 9)).save(d / "LR" / "2.png"), "4 times the sides of its"),
        (lambda d: (d / "LR").rename(d / "lr"), "LR: expected a folder of images, found none"),
    ],
)
def test_what_is_wrong_with_pairs_is_named(
    break_it: object, words: str, photos: Path, tmp_path: Path
) -> None:
    folder = pairs(tmp_path, photos)
    break_it(folder)  # type: ignore[operator]
    with pytest.raises(DataError, match=words):
        find_pairs(str(folder), 96)


def test_small_pairs_are_skipped_and_named(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = pairs(tmp_path, photos)
    for part, side in (("HR", 64), ("LR", 16)):
        Image.new("RGB", (side, side)).save(folder / part / "small.png")
    with caplog.at_level(logging.WARNING):
        assert len(find_pairs(str(folder), 96)) == 4
    assert "1 of 5 pairs skipped" in caplog.text and "small.png" in caplog.text
    with pytest.raises(DataError, match="found 5 pairs and none large enough"):
        find_pairs(str(folder), 999)


def test_a_run_without_any_photos_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["nano", "--out", str(tmp_path / "out")]) == 2
    assert "no photos: give --data or --pairs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- while training --------------------------------------------------------------------------------


def test_a_photo_that_cannot_be_decoded_is_named_once_and_the_next_one_taken(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its header is whole, so the search for photos takes it."""
    for path in photos.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    cut = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(cut[: len(cut) // 2])
    data = PhotoBatches(find_photos((str(tmp_path),), 96), CONFIG, 0, 32, 0.5)
    with caplog.at_level(logging.WARNING):
        made = [data[i] for i in range(6)]
    assert caplog.text.count("1.png: can't be decoded") == 1
    shown = torch.cat([batch.photo for batch in made])
    assert 1 not in shown and 2 in shown
    again = PhotoBatches(data.photos, CONFIG, 0, 32, 0.5)[4]
    assert torch.equal(again.lq, made[4].lq)


def test_photos_that_are_all_gone_end_the_run(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes((photos / "0.png").read_bytes())
    data = PhotoBatches(find_photos((str(tmp_path),), 96), CONFIG, 0, 32, 0.5)
    (tmp_path / "0.png").unlink()
    with pytest.raises(DataError, match=r"0\.png and 0 others: none can be decoded"):
        data[0]


class Dying(PhotoBatches):
    def __getitem__(self, i: int) -> Batch:
        os.kill(os.getpid(), 9)
        raise AssertionError


def test_a_worker_that_dies_ends_the_run_and_says_what_to_do(photos: Path) -> None:
    data = Dying(find_photos((str(photos),), 96), CONFIG, 0, 32, 0.5)
    with pytest.raises(TrainError, match="a data worker died .* --resume, and fewer --workers"):
        list(batches(data, range(2), workers=1))
