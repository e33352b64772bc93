"""PNG files (ISO/IEC 15948), encoded on several processors.

Pillow's encoder runs on one, and at its settings takes longer than everything else around the
graphs. Here strips of rows are filtered and deflated at once. One filter (Paeth's, the best one for
photos) and Huffman codes alone make files of photos that are smaller than those of zlib's full
search; strips that are mostly flat, as in drawings, get that search. The bytes don't depend on the
number of processors.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt
from zlib_ng import zlib_ng as zlib

from rcod_runtime.parallel import in_parallel

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
Bytes = npt.NDArray[np.uint8]

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # by channels: grey, grey and alpha, RGB, RGBA
PAETH = 4
STRIP_BYTES = 2**17
ADLER_BASE = 65521


def encode_png(pixels: Pixels, icc: bytes | None = None) -> bytes:
    """A PNG file of (H, W) or (H, W, 1..4) uint8 or uint16; ``icc`` is a colour profile to keep."""
    height, width = pixels.shape[:2]
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    depth = 8 * pixels.dtype.itemsize
    header = struct.pack(">IIBBBBB", width, height, depth, COLOUR_TYPES[channels], 0, 0, 0)
    file = [SIGNATURE, _chunk(b"IHDR", header)]
    if icc:
        file.append(_chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(icc)))
    row_bytes = width * channels * depth // 8
    step = max(1, STRIP_BYTES // row_bytes)

    def strip(top: int) -> tuple[bytes, int, int]:
        """Its IDAT chunk, and the checksum and the number of the bytes before deflating."""
        first = max(0, top - 1)  # the row above takes part in the filter
        rows = _row_bytes(pixels[first : top + step])
        above = rows[0] if top else np.zeros_like(rows[0])
        differences = _paeth(rows[top - first :], above, channels * depth // 8)
        is_flat = 4 * np.count_nonzero(differences) < differences.size
        level, strategy = (4, zlib.Z_FILTERED) if is_flat else (1, zlib.Z_HUFFMAN_ONLY)
        filtered = differences.tobytes()
        deflate = zlib.compressobj(level, zlib.DEFLATED, -15, 9, strategy)
        last = top + step >= height
        data = deflate.compress(filtered)
        data += deflate.flush(zlib.Z_FINISH if last else zlib.Z_SYNC_FLUSH)
        return _chunk(b"IDAT", data), zlib.adler32(filtered), len(filtered)

    file.append(_chunk(b"IDAT", b"\x78\x01"))  # the zlib stream's header: deflate, 32 KiB window
    checksum = 1
    for data, adler, length in in_parallel(strip, range(0, height, step)):
        file.append(data)
        checksum = _combined(checksum, adler, length)
    file += [_chunk(b"IDAT", struct.pack(">I", checksum)), _chunk(b"IEND", b"")]
    return b"".join(file)


def _chunk(kind: bytes, data: bytes) -> bytes:
    crc = zlib.crc32(data, zlib.crc32(kind))
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def _row_bytes(rows: Pixels) -> Bytes:
    """(n, W, ...) -> (n, bytes of a row), the high byte of a sample first."""
    if rows.dtype == np.uint16:
        rows = rows.astype(">u2")
    return np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1)


def _paeth(rows: Bytes, above: Bytes, pixel_bytes: int) -> Bytes:
    """Rows (n, w) less what their neighbours predict, (n, 1 + w): the filter's number first.

    All in 8 bits, where a processor's vectors hold most: a distance is the larger value less the
    smaller, and that of left + up - corner to the corner is the difference of the other two where
    they pull in opposite directions; where they don't, it is not the least.
    """
    n, width = rows.shape
    padded = np.zeros((n + 1, width + pixel_bytes), np.uint8)
    padded[0, pixel_bytes:] = above
    padded[1:, pixel_bytes:] = rows
    left, up = padded[1:, :-pixel_bytes], padded[:-1, pixel_bytes:]
    corner = padded[:-1, :-pixel_bytes]
    to_left, to_up = _distance(up, corner), _distance(left, corner)
    to_corner = _distance(to_left, to_up)
    to_corner |= _mask((left < corner) == (up < corner))
    filtered = np.empty((n, 1 + width), np.uint8)
    filtered[:, 0] = PAETH
    predicted = filtered[:, 1:]
    np.bitwise_xor(up, corner, out=predicted)
    predicted &= _mask(to_up <= to_corner)
    predicted ^= corner
    nearest = to_left <= to_up
    nearest &= to_left <= to_corner
    predicted ^= (predicted ^ left) & _mask(nearest)
    np.subtract(rows, predicted, out=predicted)
    return filtered


def _distance(a: Bytes, b: Bytes) -> Bytes:
    larger = np.maximum(a, b)
    larger -= np.minimum(a, b)
    return larger


def _mask(chosen: npt.NDArray[np.bool_]) -> Bytes:
    """All bits of a byte where it is chosen, none elsewhere."""
    return np.negative(chosen.view(np.uint8))


def _combined(before: int, after: int, length: int) -> int:
    """Adler-32 of two runs of bytes, from that of each and the length of the second."""
    low = (before & 0xFFFF) + (after & 0xFFFF) - 1
    high = (before >> 16) + (after >> 16) + length * ((before & 0xFFFF) - 1)
    return (high % ADLER_BASE) << 16 | low % ADLER_BASE
