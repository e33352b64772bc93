"""Image files: what is read, what is kept, what is refused."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from rcod_runtime.errors import ImageError, OutputError
from rcod_runtime.image_io import MAX_SIDE_PX, decode_image, read_image, write_image
from tests.faults import full_disk

Photo = Callable[..., np.ndarray]


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + crc


def raw_png(rows: bytes, width: int, height: int, depth: int, colour: int) -> bytes:
    """A PNG by hand, of rows that each begin with a filter's number."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def deep_png(pixels: np.ndarray, size: tuple[int, int] | None = None) -> bytes:
    """A 16-bit RGB PNG: Pillow can't write one. ``size`` is what its header claims."""
    height, width = size or pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return raw_png(rows, width, height, 16, 2)


def with_chunk(png: bytes, kind: bytes, data: bytes) -> bytes:
    return png[:33] + chunk(kind, data) + png[33:]  # after IHDR


def deep_tiff(pixels: np.ndarray, orientation: int = 1, extra: int | None = None) -> bytes:
    """A TIFF of RGB and perhaps a fourth channel, by hand: Pillow can't write 16 bits. ``extra``
    is what its ExtraSamples say that the channel is."""
    height, width, channels = pixels.shape
    bits, data = 8 * pixels.itemsize, pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    strip = 8 + 2 * channels
    fields = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, channels, 8), (259, 3, 1, 1),
        (262, 3, 1, 2), (273, 4, 1, strip), (274, 3, 1, orientation), (277, 3, 1, channels),
        (278, 4, 1, height), (279, 4, 1, len(data)), (284, 3, 1, 1),
    ]  # fmt: skip
    if extra is not None:
        fields.append((338, 3, 1, extra))
    file = struct.pack("<2sHI", b"II", 42, strip + len(data))
    file += struct.pack(f"<{channels}H", *[bits] * channels) + data
    file += struct.pack("<H", len(fields))
    return file + b"".join(struct.pack("<HHII", *field) for field in fields) + bytes(4)


def test_deep_colours_in_separate_planes_are_refused(photo: Photo) -> None:
    """They came as the first plane, read as pixels."""
    whole = deep_tiff(photo().astype(np.uint16) * 256)
    planar = whole.replace(struct.pack("<HHII", 284, 3, 1, 1), struct.pack("<HHII", 284, 3, 1, 2))
    assert planar != whole and decode_image(whole, "a").pixels.shape == photo().shape
    with pytest.raises(ImageError, match="a.tif: .* found them in separate planes. Save it as PNG"):
        decode_image(planar, "a.tif")


def test_a_tiff_in_luma_and_chroma_keeps_its_profile(photo: Photo) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    file = io.BytesIO()
    Image.fromarray(photo()).convert("YCbCr").save(file, "TIFF", icc_profile=profile)
    found = decode_image(file.getvalue(), "a")
    assert found.icc == profile and found.pixels.shape == photo().shape


def test_what_is_wrong_with_a_cmyk_profile_names_the_file(
    photo: Photo, caplog: pytest.LogCaptureFixture
) -> None:
    file = io.BytesIO()
    Image.fromarray(photo()).convert("CMYK").save(file, "JPEG", icc_profile=b"none")
    assert decode_image(file.getvalue(), "c.jpg").pixels.shape == photo().shape
    assert "c.jpg: its CMYK profile can't be used" in caplog.text


def test_modes_come_as_arrays_that_keep_what_they_hold(photo: Photo) -> None:
    rgb = Image.fromarray(photo())
    alpha = Image.fromarray(photo(channels=1)[:, :, 0])
    rgba = rgb.copy()
    rgba.putalpha(alpha)
    cases = {
        "grey": (rgb.convert("L"), (24, 40)),
        "grey and alpha": (rgba.convert("LA"), (24, 40, 2)),
        "colour": (rgb, (24, 40, 3)),
        "alpha": (rgba, (24, 40, 4)),
        "palette": (rgb.quantize(32), (24, 40, 3)),
        "bilevel": (rgb.convert("1"), (24, 40)),
    }
    for name, (image, shape) in cases.items():
        pixels = decode_image(encoded(image, "PNG"), name).pixels
        assert pixels.shape == shape and pixels.dtype == np.uint8, name
    np.testing.assert_array_equal(decode_image(encoded(rgba, "PNG"), "a").pixels[:, :, 3], alpha)


def test_a_palette_with_transparency_becomes_rgba(photo: Photo) -> None:
    palette = Image.fromarray(photo()).quantize(16)
    pixels = decode_image(encoded(palette, "PNG", transparency=3), "p").pixels
    assert pixels.shape == (24, 40, 4) and set(np.unique(pixels[:, :, 3])) == {0, 255}


@pytest.mark.parametrize(
    ("depth", "row", "key", "expected"),
    [
        (1, [0b1010_0000], 1, [[255, 0], [0, 255], [255, 0], [0, 255]]),
        (2, [0b00_01_10_11], 2, [[0, 255], [85, 255], [170, 0], [255, 255]]),
        (4, [0x12, 0x34], 3, [[17, 255], [34, 255], [51, 0], [68, 255]]),
        (8, [1, 2, 3, 4], 3, [[1, 255], [2, 255], [3, 0], [4, 255]]),
        (16, [0, 1, 1, 44, 2, 0, 1, 45], 300, [[1, 65535], [300, 0], [512, 65535], [301, 65535]]),
    ],
)
def test_the_transparent_grey_of_a_png_becomes_alpha(
    depth: int, row: list[int], key: int, expected: list[list[int]]
) -> None:
    png = raw_png(bytes([0, *row]), 4, 1, depth, 0)
    pixels = decode_image(with_chunk(png, b"tRNS", struct.pack(">H", key)), "t").pixels
    assert pixels[0].tolist() == expected


@pytest.mark.parametrize("opencv", [True, False])
def test_the_transparent_colour_of_a_16_bit_png_becomes_alpha(
    monkeypatch: pytest.MonkeyPatch, opencv: bool
) -> None:
    if opencv:
        pytest.importorskip("cv2")
    else:
        monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    values = np.array([[[0x1234, 0x5678, 0x9ABC], [1, 2, 3]]], np.uint16)
    png = with_chunk(deep_png(values), b"tRNS", struct.pack(">HHH", *values[0, 0]))
    pixels = decode_image(png, "t").pixels
    np.testing.assert_array_equal(pixels[:, :, :3], values if opencv else values >> 8)
    assert pixels[0, :, 3].tolist() == [0, np.iinfo(pixels.dtype).max]


def test_cmyk_comes_as_rgb(photo: Photo) -> None:
    rgb = np.full((16, 16, 3), (200, 40, 90), np.uint8)
    data = encoded(Image.fromarray(rgb).convert("CMYK"), "JPEG", quality=100)
    pixels = decode_image(data, "c.jpg").pixels
    assert pixels.shape == (16, 16, 3)
    assert np.abs(pixels.astype(int) - rgb).max() <= 4


def test_exif_orientation_is_applied(photo: Photo) -> None:
    image = photo(8, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees clockwise
    data = encoded(Image.fromarray(image), "PNG", exif=exif)
    np.testing.assert_array_equal(decode_image(data, "r").pixels, np.rot90(image, -1))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_exif_that_cannot_be_read_costs_no_image(photo: Photo, kind: str) -> None:
    """PNG and WebP were refused as damaged; of a JPEG Pillow itself leaves it out."""
    plain, damaged = (
        encoded(Image.fromarray(photo()), kind, exif=exif) for exif in (b"", b"Exif\0\0garbage")
    )
    expected = decode_image(plain, "e").pixels
    np.testing.assert_array_equal(decode_image(damaged, "d").pixels, expected)


def test_16_bit_grey_keeps_its_depth(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (9, 7)).astype(np.uint16)
    write_image(tmp_path / "g.png", values)
    np.testing.assert_array_equal(read_image(tmp_path / "g.png").pixels, values)


def test_16_bit_colour_keeps_its_depth_with_opencv(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    values = np.random.default_rng(0).integers(0, 65536, (9, 7, 3)).astype(np.uint16)
    np.testing.assert_array_equal(decode_image(deep_png(values), "d").pixels, values)
    for name in ("d.png", "d.tif"):
        write_image(tmp_path / name, values)
        np.testing.assert_array_equal(read_image(tmp_path / name).pixels, values)


def test_16_bit_colour_without_opencv_is_read_at_8_bits_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    values = np.full((4, 4, 3), 0x8080, np.uint16)
    assert (decode_image(deep_png(values), "d.png").pixels == 0x80).all()
    assert 'pip install "rcod[opencv]"' in caplog.text


@pytest.mark.parametrize("name", ["o.png", "o.jpg", "o.webp", "o.tif"])
def test_a_colour_profile_survives(tmp_path: Path, photo: Photo, name: str) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photo_in = decode_image(encoded(Image.fromarray(photo()), "PNG", icc_profile=profile), "i")
    assert photo_in.icc == profile
    write_image(tmp_path / name, photo_in.pixels, photo_in.icc)
    assert read_image(tmp_path / name).icc == profile


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("name", ["o.png", "o.tif"])
def test_a_colour_profile_survives_at_16_bits(
    tmp_path: Path, photo: Photo, name: str, channels: int
) -> None:
    pytest.importorskip("cv2")
    values = np.squeeze(photo(channels=channels).astype(np.uint16) * 257)
    for profile in (b"even" * 50, b"odd" * 51):  # a TIFF's parts begin at even places
        write_image(tmp_path / name, values, profile)
        written = read_image(tmp_path / name)
        assert written.icc == profile
        np.testing.assert_array_equal(written.pixels, values)


def test_of_an_animation_the_first_frame_is_taken_and_said(
    photo: Photo, caplog: pytest.LogCaptureFixture
) -> None:
    frames = [Image.fromarray(photo(seed=s)) for s in range(3)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data, "a.gif").pixels.shape == (24, 40, 3)
    assert "only the first" in caplog.text


def test_missing_folder_empty_and_foreign_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello, I am a picture")
    (tmp_path / "folder.png").mkdir()
    for name, message in {
        "none.png": "not found",
        "folder.png": "found a folder",
        "empty.png": "found an empty file",
        "text.png": "found another kind of file",
    }.items():
        with pytest.raises(ImageError, match=f"{name}: .*{message}"):
            read_image(tmp_path / name)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_files_are_image_errors(photo: Photo, kind: str, share: float) -> None:
    data = encoded(Image.fromarray(photo(64, 64)), kind)
    try:
        pixels = decode_image(data[: int(len(data) * share)], "cut").pixels
    except ImageError as error:
        assert str(error).startswith("cut: ")
    else:  # some decoders make the best of what is there
        assert pixels.shape[:2] == (64, 64)


def test_too_many_pixels_are_refused_before_decoding(photo: Photo) -> None:
    data = encoded(Image.fromarray(photo(40, 50)), "PNG")
    with pytest.raises(ImageError, match="50 x 40 px; the limit is .* Cut the image into parts.$"):
        decode_image(data, "big", max_pixels=1999)
    for side in (8_000, 60_000):  # over our limit; over Pillow's own
        bomb = deep_png(np.zeros((1, 1, 3), np.uint16), (side, side))
        with pytest.raises(ImageError, match="million pixels"):
            decode_image(bomb, "bomb")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_colour_is_turned_upright_as_8_bits_are(
    photo: Photo, kind: str, orientation: int
) -> None:
    """OpenCV turns a TIFF by itself, and it was turned twice."""
    pytest.importorskip("cv2")
    values = photo(6, 9).astype(np.uint16) * 257
    exif = Image.Exif()
    exif[0x0112] = orientation
    eight = encoded(Image.fromarray(photo(6, 9)), kind, exif=exif)
    deep = with_chunk(deep_png(values), b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    if kind == "TIFF":
        deep = deep_tiff(values, orientation=orientation)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(eight))))
    assert expected.shape == ((6, 9, 3) if orientation < 5 else (9, 6, 3))
    np.testing.assert_array_equal(decode_image(eight, "e").pixels, expected)
    np.testing.assert_array_equal(decode_image(deep, "d").pixels, expected * np.uint16(257))


@pytest.mark.parametrize(
    ("extra", "channels"), [(0, 3), (1, 4), (2, 4)], ids=["unspecified", "associated", "straight"]
)
def test_a_fourth_channel_at_16_bits_is_what_it_is_at_8(extra: int, channels: int) -> None:
    pytest.importorskip("cv2")
    values = np.random.default_rng(0).integers(0, 256, (9, 7, 4)).astype(np.uint16) * 257
    values[0, :, 3], values[1, :, 3] = 0, 65535
    values[2:, :, :3] = np.minimum(values[2:, :, :3], values[2:, :, 3:])
    deep = decode_image(deep_tiff(values, extra=extra), "d").pixels
    eight = decode_image(deep_tiff((values >> 8).astype(np.uint8), extra=extra), "e").pixels
    assert deep.dtype == np.uint16 and eight.dtype == np.uint8
    assert deep.shape == eight.shape == (9, 7, channels)
    assert np.abs(deep / 257 - eight).max() < 1  # Pillow rounds down


def test_formats_that_run_programs_are_not_opened(photo: Photo) -> None:
    """Pillow reads EPS through Ghostscript."""
    data = encoded(Image.fromarray(photo()), "EPS")
    with pytest.raises(ImageError, match="found another kind of file"):
        decode_image(data, "a.png")


def test_cameras_jpegs_of_several_frames_are_read(photo: Photo) -> None:
    frames = [Image.fromarray(photo(seed=s)) for s in range(2)]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert decode_image(data, "a.jpg").pixels.shape == (24, 40, 3)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_in_a_folder_of_photos_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ImageError, match="a pipe, a socket or a device"):
        read_image(tmp_path / "a.png")


def test_a_file_beyond_any_size_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(2**30 + 1)  # sparse
    with pytest.raises(ImageError, match="over the limit of 1073741824 bytes"):
        read_image(tmp_path / "a.png")


def test_a_small_file_takes_no_room_for_the_largest(tmp_path: Path, photo: Photo) -> None:
    write_image(tmp_path / "a.png", photo())
    tracemalloc.start()
    try:
        read_image(tmp_path / "a.png")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_an_image_that_memory_is_short_of_is_not_said_to_be_damaged(
    photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("rcod_runtime.image_io._converted", short)
    with pytest.raises(ImageError, match="a.png: there is not enough memory to decode it"):
        decode_image(encoded(Image.fromarray(photo()), "PNG"), "a.png")


def test_32_bit_and_float_images_are_refused() -> None:
    deep = Image.fromarray(np.full((4, 4), 70000, np.int32))
    with pytest.raises(ImageError, match="32-bit integers"):
        decode_image(encoded(deep, "TIFF"), "i")
    floats = Image.fromarray(np.zeros((4, 4), np.float32))
    with pytest.raises(ImageError, match="floating point"):
        decode_image(encoded(floats, "TIFF"), "f")


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "message"),
    [
        ("a.xyz", (4, 4, 3), np.uint8, "expected a name that ends in"),
        ("a", (4, 4, 3), np.uint8, "no suffix"),
        ("a.jpg", (4, 4, 4), np.uint8, "can't hold transparency"),
        ("a.jpg", (4, 4), np.uint16, "can't hold 16 bits"),
        ("a.tif", (4, 4, 2), np.uint16, "can't hold 16-bit grey with alpha"),
        ("a.webp", (4, 16384, 3), np.uint8, "16384 x 4 px; WEBP holds at most 16383"),
        ("none/a.png", (4, 4, 3), np.uint8, "can't be written"),
    ],
)
def test_results_that_cannot_be_written_leave_nothing(
    tmp_path: Path, name: str, shape: tuple[int, ...], dtype: type, message: str
) -> None:
    with pytest.raises(OutputError, match=message):
        write_image(tmp_path / name, np.zeros(shape, dtype))
    assert list(tmp_path.iterdir()) == []


def test_the_largest_side_of_a_format_is_written(tmp_path: Path) -> None:
    for kind, limit in MAX_SIDE_PX.items():
        pixels = np.zeros((2, limit, 3), np.uint8)
        write_image(tmp_path / f"o.{kind.lower()}", pixels)
        with pytest.raises(OutputError, match=f"{limit} px a side. Write PNG"):
            write_image(tmp_path / f"o.{kind.lower()}", np.zeros((2, limit + 1, 3), np.uint8))


def test_a_disk_that_runs_full_in_a_write_leaves_the_old_file_and_the_next_write_works(
    tmp_path: Path, photo: Photo
) -> None:
    pytest.importorskip("resource")
    target = tmp_path / "a.png"
    write_image(target, photo(seed=0))
    before = target.read_bytes()
    with pytest.raises(OutputError, match="a.png: can't be written"), full_disk(tmp_path, 1):
        write_image(target, photo(seed=1))
    assert target.read_bytes() == before and list(tmp_path.iterdir()) == [target]
    write_image(target, photo(seed=1))
    np.testing.assert_array_equal(read_image(target).pixels, photo(seed=1))


def test_a_failing_disk_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a.png"
    write_image(target, np.zeros((4, 4, 3), np.uint8))
    before = target.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        write_image(target, np.ones((4, 4, 3), np.uint8))
    assert target.read_bytes() == before and list(tmp_path.iterdir()) == [target]


def test_a_file_has_the_rights_that_the_umask_leaves_and_neither_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some disks refuse to set rights; and while the mask was asked for, other threads' files had
    another one."""

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patched:
            patched.setattr("os.umask", refuse)
            patched.setattr("os.chmod", refuse)
            write_image(tmp_path / "a.bmp", np.zeros((2, 2, 3), np.uint8))
    finally:
        os.umask(before)
    assert (tmp_path / "a.bmp").stat().st_mode & 0o777 == 0o640


def test_a_name_as_long_as_the_file_system_takes_is_written(tmp_path: Path) -> None:
    target = tmp_path / ("n" * 251 + ".png")
    write_image(target, np.zeros((2, 2, 3), np.uint8))
    assert list(tmp_path.iterdir()) == [target]
