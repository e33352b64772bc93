"""Photos in folders, tar shards and pairs: found, read at random, and what is wrong with them."""

from __future__ import annotations

import dataclasses
import io
import logging
import multiprocessing
import os
import shutil
import signal
import struct
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from rcod_train.config import LoopConfig, TrainConfig, degradation_shares
from rcod_train.data import Batch, PhotoBatches, batches, worker_deaths
from rcod_train.errors import ConfigError, DataError, TrainError
from rcod_train.main import main
from rcod_train.photos import Photo, find_pairs, find_photos, readable_spread
from rcod_train.run import Run

CONFIG = LoopConfig(photos_per_batch=4, crops_per_photo=2, crop_px=64, context_px=96)
SHARES = degradation_shares(0.5)


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


def made(
    photos: list, presets: dict[str, float] | None = SHARES, share: float = 0.5, i: int = 0
) -> Batch:
    return PhotoBatches(photos, CONFIG, 0, 32, presets, share)[i]


# -- depths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), [("a.png", "<u2"), ("a.tif", "<u2"), ("a.tif", ">u2")])
def test_16_bit_grey_keeps_its_tones(tmp_path: Path, name: str, dtype: str) -> None:
    """Pillow's own conversion makes white of all above 255, which are 99.6 % of a ramp."""
    ramp = np.arange(2**16, dtype=dtype).reshape(256, 256)
    Image.fromarray(ramp).save(tmp_path / name)
    (photo,) = find_photos((str(tmp_path),), 96)
    expected = np.round(ramp / 257).astype(np.uint8)
    assert np.array_equal(photo.read(), np.dstack([expected] * 3))
    assert np.array_equal(Photo(Path(), "", lq=tmp_path / name).read_lq(), photo.read())


def test_12_bit_grey_is_white_at_4095(tmp_path: Path) -> None:
    """0x888 of 0xfff; bytes of 0x88 are that in 12 bits, and what the file is written from."""
    file = tmp_path / "a.tif"
    Image.fromarray(np.full((96, 96), 0x8888, np.uint16)).save(file)
    bits = [struct.pack("<HHIHH", 258, 3, 1, n, 0) for n in (16, 12)]  # TIFF's BitsPerSample
    assert file.read_bytes().count(bits[0]) == 1
    file.write_bytes(file.read_bytes().replace(*bits))
    with Image.open(file) as image:
        assert np.asarray(image).max() == 0x888
    (photo,) = find_photos((str(tmp_path),), 96)
    assert np.unique(photo.read()).tolist() == [0x88]


@pytest.mark.parametrize(("dtype", "mode"), [(np.float32, "F"), (np.int32, "I")])
def test_a_photo_whose_white_cannot_be_known_is_refused_by_name(
    photos: Path, tmp_path: Path, dtype: type, mode: str
) -> None:
    words = rf"a\.tif: expected 8 or 16 bits a channel, found Pillow's mode {mode} "
    deep = Image.fromarray(np.zeros((32, 40), dtype))
    deep.save(tmp_path / "a.tif")
    assert len(find_photos((str(photos), str(tmp_path)), 96)) == 4  # skipped anyway: it is small
    with pytest.raises(DataError, match=words):
        find_photos((str(tmp_path),), 32)
    folder = pairs(tmp_path / "pairs", photos)
    (folder / "LR" / "2.png").unlink()
    deep.save(folder / "LR" / "2.tif")
    with pytest.raises(DataError, match=words.replace("a", "2", 1)):
        find_pairs(str(folder), 96)


# -- what a camera notes ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif"])
def test_a_photo_is_upright(tmp_path: Path, name: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (100, 132, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / name, exif=turned_right(), lossless=True)
    (photo,) = find_photos((str(tmp_path),), 96)
    assert np.array_equal(photo.read(), np.rot90(pixels, -1))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_pairs_fit_as_they_are_seen(tmp_path: Path, name: str) -> None:
    """The HR image as a camera writes it, the LR image as a program does."""
    upright = np.random.default_rng(0).integers(0, 256, (132, 100, 3), dtype=np.uint8)
    for part in ("LR", "HR"):
        (tmp_path / part).mkdir()
    Image.fromarray(np.rot90(upright)).save(tmp_path / "HR" / name, exif=turned_right())
    Image.fromarray(upright[::4, ::4]).save(tmp_path / "LR" / "a.png")
    (pair,) = find_pairs(str(tmp_path), 96)
    assert pair.read().shape == upright.shape and pair.read_lq().shape == (33, 25, 3)
    assert name == "a.jpg" or np.array_equal(pair.read(), upright)


def turned_right() -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be shown turned by 90 degrees to the right
    return exif


# -- one file, found twice -------------------------------------------------------------------------


def test_a_file_below_two_folders_or_linked_counts_once(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(photos, tmp_path / "a")
    (tmp_path / "link.png").symlink_to(tmp_path / "a" / "0.png")
    tar = shard(tmp_path / "a" / "b.tar", photos)
    with caplog.at_level(logging.WARNING):
        found = find_photos((str(tmp_path), str(tmp_path / "a"), str(tar)), 96)
    names = {photo.name for photo in found}
    assert names == {f"{folder}{n}.png" for folder in ("", "a/") for n in range(4)}
    assert len(found) == 8
    assert [str(p) for p in found] == sorted(str(p) for p in found)
    assert "13 files were found more than once" in caplog.text


def test_no_file_is_both_held_out_and_trained_on(photos: Path, tmp_path: Path) -> None:
    """Neither by a folder inside another one, nor as a photo that is a pair's HR image too."""
    shutil.copytree(photos, tmp_path / "two" / "a")
    folder = pairs(tmp_path / "pairs", photos)
    for data, paired in (
        ((tmp_path / "two", tmp_path / "two" / "a"), ()),
        ((folder / "HR",), (folder,)),
    ):
        config = TrainConfig(
            tuple(map(str, data)), "", tuple(map(str, paired)), validation_share=0.4
        )
        run = Run(config, (CONFIG,), resume=False)
        held_out = {photo.file for photo in run.held_out}
        assert held_out and run.photos and not held_out & {photo.file for photo in run.photos}
    with pytest.raises(ConfigError, match="validation_share: expected a share of 8 photos that"):
        Run(dataclasses.replace(config, validation_share=0.9), (CONFIG,), resume=False)


def test_the_lr_image_of_a_pair_is_no_photo_to_learn_to_make(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = pairs(tmp_path / "pairs", photos)
    shutil.copy(photos / "0.png", tmp_path / "alone.png")
    config = TrainConfig((str(tmp_path),), "", (str(folder),))
    with caplog.at_level(logging.INFO, "rcod_train"):
        run = Run(config, (dataclasses.replace(CONFIG, context_px=32, crop_px=32),), resume=False)
    assert [(p.name, p.lq is not None) for p in run.photos] == [
        ("alone.png", False), *((f"pairs/HR/{n}.png", False) for n in range(4)),
        *((f"{n}.png", True) for n in range(4)),
    ]  # fmt: skip
    assert "4 LR images of --pairs lie below --data" in caplog.text


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


def test_a_search_reads_no_more_of_a_shard_than_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "0.png")
    assert (tmp_path / "0.png").stat().st_size > 700_000
    tar = shard(tmp_path / "a.tar", tmp_path, "0")
    opened, taken = Path.open, []

    def counting(path: Path, *arguments: Any, **options: Any) -> Any:
        file = opened(path, *arguments, **options)
        plain = file.read

        def read(count: int = -1) -> bytes:
            data: bytes = plain(count)
            taken.append(len(data))
            return data

        file.read = read
        return file

    monkeypatch.setattr(Path, "open", counting)
    (photo,) = find_photos((str(tar),), 96)
    assert 0 < sum(taken) < 100_000
    assert np.array_equal(photo.read(), noise)


def test_compressed_tiffs_are_read_from_their_place_in_a_shard(
    photos: Path, tmp_path: Path
) -> None:
    """libtiff, given a file, reads it from its beginning."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(2):
            Image.open(photos / f"{i}.png").save(tmp_path / "a.tif", compression="tiff_lzw")
            tar.add(tmp_path / "a.tif", f"{i}.tif")
    found = find_photos((str(tmp_path / "a.tar"),), 96)
    for i, photo in enumerate(found):
        with Image.open(photos / f"{i}.png") as expected:
            assert np.array_equal(photo.read(), np.asarray(expected))
    assert len(found) == 2


def test_a_cut_off_or_compressed_shard_is_named(photos: Path, tmp_path: Path) -> None:
    whole = shard(tmp_path / "a.tar", photos).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) // 2 + 300])
    with pytest.raises(DataError, match=r"a\.tar: not a whole tar file without compression"):
        find_photos((str(tmp_path / "a.tar"),), 96)
    at = whole.index(b"1.txt\0")  # a header
    for cut in (whole[:at], whole[: at + 100], whole[:at] + b"x" + whole[at + 1 :]):
        (tmp_path / "a.tar").write_bytes(cut)
        with pytest.raises(DataError, match=rf"a damaged header, or cut off, at byte {at}"):
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
    clean = made(both, presets=None)  # stages without degradation take the HR image alone
    assert clean.lq_native is None and torch.equal(clean.hq, clean.lq)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda d: (d / "LR" / "2.png").unlink(), r"HR/2\.png: no image of this name in the other"),
        (lambda d: (d / "HR" / "2.png").unlink(), r"LR/2\.png: no image of this name in the other"),
        (lambda d: (d / "LR" / "2.png").write_bytes(b"x"), r"LR/2\.png: not a readable image"),
        (lambda d: Image.new("RGB", (9, 9)).save(d / "LR" / "2.png"), "4 times the sides of its"),
        (lambda d: (d / "LR").rename(d / "lr"), "LR: expected a folder of images, found none"),
        (lambda d: (d / "HR" / "2.bmp").write_bytes(b"x"), r"HR: 2\.bmp and 2\.png have the same"),
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


def test_a_wrong_folder_to_validate_on_is_named_with_its_option(
    photos: Path, tmp_path: Path
) -> None:
    config = TrainConfig((str(photos),), "", validation=str(tmp_path / "none"))
    with pytest.raises(DataError, match="none: expected a folder of .* Check --validation"):
        Run(config, (CONFIG,), resume=False)


def test_a_run_without_any_photos_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["nano", "--out", str(tmp_path / "out")]) == 2
    assert "no photos: give --data or --pairs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- while training --------------------------------------------------------------------------------


@pytest.fixture
def cut(photos: Path, tmp_path: Path) -> Path:
    """The photos, 1.png cut off: its header is whole, so the search for photos takes it."""
    for path in photos.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_photo_that_cannot_be_decoded_is_named_once_and_the_next_one_taken(
    cut: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    data = PhotoBatches(find_photos((str(cut),), 96), CONFIG, 0, 32, SHARES)
    named: set[str] = set()
    with caplog.at_level(logging.WARNING):
        made = list(batches(data, range(4), workers, named))
        list(batches(data, range(4, 6), workers, named))  # the next stage of the run
    assert caplog.text.count("1.png: can't be decoded") == 1 and "1 so far" in caplog.text
    assert named == {str(cut / "1.png")}
    shown = torch.cat([batch.photo for batch in made])
    assert 1 not in shown and 2 in shown
    again = PhotoBatches(data.photos, CONFIG, 0, 32, SHARES)[3]
    assert torch.equal(again.lq, made[3].lq)


def test_photos_that_are_all_gone_end_the_run(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes((photos / "0.png").read_bytes())
    data = PhotoBatches(find_photos((str(tmp_path),), 96), CONFIG, 0, 32, SHARES)
    (tmp_path / "0.png").unlink()
    with pytest.raises(DataError, match=r"^\S*0\.png and 0 others: none can be decoded") as caught:
        list(batches(data, range(2), workers=1))
    assert "Traceback" not in str(caught.value)


def test_a_photo_to_validate_on_that_cannot_be_decoded_is_passed_over(
    cut: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = find_photos((str(cut),), 96)
    assert [p.name for p in readable_spread(found, 3)] == ["0.png", "2.png", "3.png"]
    assert "1.png: can't be decoded" in caplog.text and "not validated on" in caplog.text
    with pytest.raises(DataError, match=r"1\.png: of 1 photos to validate on none can be decoded"):
        readable_spread(found[1:2], 2)


def test_the_photos_to_validate_on_are_spread_over_all_that_are_held_out(
    photos: Path, tmp_path: Path
) -> None:
    """The first ones by their path may be of one folder alone."""
    for folder in ("a", "b", "c", "d"):
        shutil.copytree(photos, tmp_path / folder)
    for held_out in ({"validation": str(tmp_path)}, {"validation_share": 0.5}):
        data = photos if "validation" in held_out else tmp_path
        config = TrainConfig((str(data),), "", validation_photos=4, **held_out)  # type: ignore[arg-type]
        run = Run(config, (CONFIG,), resume=False)
        assert [p.name for p in run.held_out] == ["a/0.png", "b/0.png", "c/0.png", "d/0.png"]
    assert len(run.photos) == 8  # the split does not depend on how many are looked at


class Dying(PhotoBatches):
    def __getitem__(self, i: int) -> Batch:
        os.kill(os.getpid(), 9)
        raise AssertionError


DEATH = r"a data worker died .* --resume, and fewer --workers"


def test_a_worker_that_dies_ends_the_run_and_says_what_to_do(photos: Path) -> None:
    data = Dying(find_photos((str(photos),), 96), CONFIG, 0, 32, SHARES)
    with pytest.raises(TrainError, match=DEATH):
        list(batches(data, range(2), workers=1))


def test_a_worker_that_dies_while_a_step_is_computed_is_no_less_typed(photos: Path) -> None:
    """PyTorch raises from the handler of SIGCHLD, wherever the process is."""
    stream = batches(
        PhotoBatches(find_photos((str(photos),), 96), CONFIG, 0, 32, SHARES), range(99), 1
    )
    with pytest.raises(TrainError, match=DEATH), worker_deaths():
        next(stream)
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid or 0, signal.SIGKILL)
        time.sleep(20)
        raise AssertionError("nothing was raised")


def test_an_error_of_ours_in_the_run_is_no_workers_death() -> None:
    with pytest.raises(RuntimeError, match="shape"), worker_deaths():
        raise RuntimeError("shape mismatch")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_leaves_the_workers_at_work(
    photos: Path, number: signal.Signals
) -> None:
    """Ctrl-C and schedulers signal the whole group: the first process ends the others, after the
    step that it is in, which may need batches still."""
    data = PhotoBatches(find_photos((str(photos),), 96), CONFIG, 0, 32, SHARES)
    stream = batches(data, range(12), workers=1)
    first = next(stream)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid or 0, number)
    rest = list(stream)
    assert len(rest) == 11 and torch.equal(first.lq, data[0].lq)
