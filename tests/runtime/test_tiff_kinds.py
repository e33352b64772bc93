"""TIFFs: grey of every depth, kinds that can't be read, files made to fill a decoder's memory."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from rcod_runtime.errors import ImageError
from rcod_runtime.image_io import decode_image
from rcod_runtime.tiff_kind import unreadable
from tests.runtime.test_images import Photo, encoded

TYPES = {"B": 1, "H": 3, "I": 4, "Q": 16, "q": 17}

Field = tuple[int, str, int]


def tiff(fields: list[Field], data: bytes, order: str = "<", big: bool = False) -> bytes:
    """One by hand: of each field the tag, the kind of its one number and the number; of 273 and 324
    (offsets) the number is set here."""
    body = struct.pack(f"{order}2sH", b"II" if order == "<" else b"MM", 43 if big else 42)
    body += struct.pack(f"{order}HHQ", 8, 0, 0) if big else bytes(4)
    at, room = len(body), 8 if big else 4
    body += data + bytes(len(data) % 2)
    entries = b""
    for tag, kind, number in fields:
        value = struct.pack(f"{order}{kind}", at if tag in (273, 324) else number)
        if len(value) > room:
            value, body = struct.pack(f"{order}I", len(body)), body + value
        entries += struct.pack(f"{order}HHQ" if big else f"{order}HHI", tag, TYPES[kind], 1)
        entries += value.ljust(room, b"\0")
    directory = (
        struct.pack(f"{order}Q" if big else f"{order}H", len(fields)) + entries + bytes(room)
    )
    first = struct.pack(f"{order}Q" if big else f"{order}I", len(body))
    return body[: 8 if big else 4] + first + body[16 if big else 8 :] + directory


def grey(values: np.ndarray, bits: int, photometric: int | None, order: str, packed: bool) -> bytes:
    rows = ["".join(f"{value:0{bits}b}" for value in row) for row in values]
    rows = [row.ljust(-(-len(row) // 8) * 8, "0") for row in rows]
    data = b"".join(int(row, 2).to_bytes(len(row) // 8, "big") for row in rows)
    if bits == 16:
        data = values.astype(f"{order}u2").tobytes()
    data = zlib.compress(data) if packed else data
    height, width = values.shape
    fields = [
        (256, "I", width),
        (257, "I", height),
        (258, "H", bits),
        (259, "H", 8 if packed else 1),
    ]
    if photometric is not None:
        fields.append((262, "H", photometric))
    fields += [(273, "I", 0), (277, "H", 1), (278, "I", height), (279, "I", len(data))]
    return tiff(fields, data, order)


# -- grey ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "deflate"])
@pytest.mark.parametrize(
    ("bits", "photometric", "order"),
    [
        (4, 0, "<"), (4, 1, "<"), (8, 0, "<"), (8, 1, ">"),
        (12, 1, "<"), (16, 0, "<"), (16, 1, "<"), (16, 1, ">"),
    ],
)  # fmt: skip
def test_white_is_white_and_black_is_black(
    bits: int, photometric: int, order: str, packed: bool
) -> None:
    """16 bits came as a negative where white is 0, and white of 12 bits as 4095 of 65535."""
    top = 2**bits - 1
    values = np.array([[0, top // 3, top], [1, top - 1, top // 2]])
    pixels = decode_image(grey(values, bits, photometric, order, packed), "g.tif").pixels
    full = 255 if bits <= 8 else 65535
    assert pixels.dtype == (np.uint8 if bits <= 8 else np.uint16) and pixels.dtype.isnative
    black_is_0 = values if photometric == 1 else top - values
    np.testing.assert_array_equal(pixels, np.rint(black_is_0 * (full / top)))


def test_pillows_own_16_bit_grey_is_turned_where_its_tag_is() -> None:
    values = np.arange(0, 65536, 16, np.uint16).reshape(64, 64)
    data = encoded(Image.fromarray(values), "TIFF")
    np.testing.assert_array_equal(decode_image(data, "g.tif").pixels, values)
    field = struct.pack("<HHII", 262, 3, 1, 1)
    assert data.count(field) == 1
    turned = data.replace(field, struct.pack("<HHII", 262, 3, 1, 0))
    np.testing.assert_array_equal(decode_image(turned, "g.tif").pixels, 65535 - values)


def test_12_bit_grey_of_many_rows_is_stretched_in_all_of_them() -> None:
    values = np.arange(4096).reshape(1024, 4)
    pixels = decode_image(grey(values, 12, 1, "<", True), "g.tif").pixels
    np.testing.assert_array_equal(pixels, np.rint(values * (65535 / 4095)))


# -- kinds that can't be read ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "photometric", "order"), [(10, 1, "<"), (12, 0, "<"), (16, 0, ">"), (12, 1, ">")]
)
def test_a_tiff_that_cannot_be_read_is_not_called_another_kind_of_file(
    bits: int, photometric: int, order: str
) -> None:
    data = grey(np.zeros((3, 4), int), bits, photometric, order, False)
    said = f"BitsPerSample {bits}, SamplesPerPixel 1, PhotometricInterpretation {photometric}, "
    message = rf"g.tif: .* found a kind of TIFF that can't be read \({said}Comp.*Save it as PNG"
    with pytest.raises(ImageError, match=message):
        decode_image(data, "g.tif")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # Pillow takes MM for the classic kind
def test_a_bigtiff_of_such_a_kind_is_named_too() -> None:
    fields = [(256, "Q", 4), (257, "Q", 4), (258, "H", 8), (259, "H", 50002), (273, "Q", 0)]
    for order in "<>":
        data = tiff(fields, bytes(16), order, big=True)
        message = str(unreadable(data, "g.tif"))
        assert "kind of TIFF that can't be read (BitsPerSample 8, Compression 50002)" in message
        with pytest.raises(ImageError, match=r"g.tif: .*(kind of TIFF|Invalid dimensions)"):
            decode_image(data, "g.tif")  # Pillow 11 tries the one of MM


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_tiff_without_a_directory_is_damaged() -> None:
    data = grey(np.zeros((3, 4), int), 8, 1, "<", False)
    for cut in (data[:9], data[:5], data[:4] + b"\xff" * 4, data[:8] + b"\0\0\0\0"):
        with pytest.raises(ImageError, match="g.tif: the image is damaged or cut short"):
            decode_image(cut, "g.tif")


def repeated(entry: bytes, count: int) -> bytes:
    """A BigTIFF of 4 px in width whose directory has this entry count times, with 8 numbers."""
    numbers = struct.pack("<8Q", *range(2**63, 2**63 + 8))
    directory = struct.pack("<Q", 1 + count) + struct.pack("<HHQQ", 256, 4, 1, 4) + entry * count
    head = struct.pack("<2sHHHQ", b"II", 43, 8, 0, 16 + len(numbers))
    return head + numbers + directory + bytes(8)


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (4000, r"can't be read \(BitsPerSample( \d{19}){8}\)"),
        (10**5, "directory of 100001 entries"),
    ],
)
def test_a_tag_that_stands_there_thousands_of_times_takes_no_room(count: int, said: str) -> None:
    """2 MB took 170: of each entry eight numbers of their own, and a message of them all."""
    data = repeated(struct.pack("<HHQQ", 258, 16, 8, 16), count)
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match=said):
            raise unreadable(data, "g.tif")
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


def test_a_tag_of_more_values_than_a_pixel_can_have_samples_is_damage() -> None:
    data = repeated(struct.pack("<HHQQ", 258, 3, 2**40, 16), 1)
    with pytest.raises(ImageError, match=f"damaged .*{2**40} values of tag 258, expected at most"):
        raise unreadable(data, "g.tif")


# -- tiles -----------------------------------------------------------------------------------------


def tiled(sides: list[Field], size: int = 16, big: bool = False) -> bytes:
    data = zlib.compress(bytes(2**16))
    fields = [(256, "I", size), (257, "I", size), (258, "H", 8), (259, "H", 8), (262, "H", 1)]
    fields += [(277, "H", 1), *sides, (324, "I", 0), (325, "I", len(data))]
    return tiff(fields, data, big=big)


def test_small_images_come_in_tiles_as_they_are_made() -> None:
    data = tiled([(322, "H", 256), (323, "H", 256)])
    np.testing.assert_array_equal(
        decode_image(data, "t.tif", max_pixels=1000).pixels, np.zeros((16, 16), np.uint8)
    )


@pytest.mark.parametrize("big", [False, True], ids=["classic", "bigtiff"])
@pytest.mark.parametrize(
    "sides",
    [
        [(322, "H", 46000), (323, "H", 46000)],
        [(322, "I", 2**31 - 16), (323, "I", 16)],
        [(322, "Q", 46000), (323, "Q", 46000)],
        [(322, "q", 46000), (323, "q", 46000)],  # a type that libtiff takes and Pillow passes over
        [(322, "q", 46000), (322, "I", 16), (323, "q", 46000), (323, "I", 16)],
        [(322, "I", 46000), (322, "I", 16), (323, "I", 46000), (323, "I", 16)],
        [(322, "I", 16), (322, "I", 46000), (323, "I", 16), (323, "I", 46000)],
    ],
)
def test_tiles_of_gigabytes_are_refused_before_they_are_decoded(
    sides: list[Field], big: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libtiff makes room for a whole tile and fills it: 2 GB for an image of 16 x 16 px."""
    monkeypatch.setattr("rcod_runtime.image_io._converted", lambda *_: pytest.fail("decoded"))
    message = r"t.tif: expected tiles of at most 50 million .* found 1 x 1 of .* Save it without"
    with pytest.raises(ImageError, match=message):
        decode_image(tiled(sides, big=big), "t.tif")


def test_all_tiles_together_are_bounded_too() -> None:
    """Each is within bounds, of each one column is in the image, and all have the same data."""
    data = tiled([(322, "I", 16), (323, "I", 2**20)], size=2000)
    with pytest.raises(ImageError, match=r"67.1 million in all, found 125 x 1 of 16 x 1048576 px"):
        decode_image(data, "t.tif", max_pixels=4_000_000)


def test_a_strip_that_claims_more_rows_than_the_image_has_is_read(photo: Photo) -> None:
    image = Image.fromarray(photo())
    data = encoded(image, "TIFF", compression="tiff_deflate", tiffinfo={278: 24})
    rows = data.index(struct.pack("<HHI", 278, 3, 1))
    data = data[:rows] + struct.pack("<HHII", 278, 4, 1, 2**32 - 1) + data[rows + 12 :]
    assert Image.open(io.BytesIO(data)).tag_v2[278] == 2**32 - 1  # type: ignore[attr-defined]
    np.testing.assert_array_equal(decode_image(data, "s.tif").pixels, image)


# -- sizes on which decoders don't agree -----------------------------------------------------------


def test_an_image_that_is_large_for_one_decoder_alone_is_over_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pillow passes over the type of the sides that libtiff takes, and OpenCV decoded 25 million
    pixels where 4000 were allowed."""
    cv2 = pytest.importorskip("cv2")
    good, encoded_deep = cv2.imencode(".tiff", np.full((24, 32, 3), 7, np.uint16))
    assert good
    data = encoded_deep.tobytes()
    assert decode_image(data, "d.tif", max_pixels=4000).pixels.shape == (24, 32, 3)
    (first,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, first)
    side = len(data) + len(data) % 2
    sides = b"".join(struct.pack("<HHII", tag, TYPES["q"], 1, side) for tag in (256, 257))
    entries = data[first + 2 : first + 2 + 12 * count + 4]
    data = data.ljust(side, b"\0") + struct.pack("<qH", 5000, count + 2) + sides + entries
    data = data[:4] + struct.pack("<I", side + 8) + data[8:]
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (32, 24)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    message = r"d.tif: expected at most 0.004 million pixels, found an ImageWidth of 5000 and an"
    with pytest.raises(ImageError, match=message):
        decode_image(data, "d.tif", max_pixels=4000)
