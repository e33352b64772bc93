"""The colour profile of a TIFF file that OpenCV has written, which takes none."""

from __future__ import annotations

import struct

ICC_PROFILE, UNDEFINED = 34675, 7  # a tag, and the type of its bytes


def with_profile(tiff: bytes, icc: bytes) -> bytes:
    """The TIFF (6.0) of one image with a colour profile: behind what is there come the profile
    and a directory that has one entry more. (What has 4 bytes or fewer would stand in the entry
    itself; a profile's header alone has 128.)"""
    order = "<" if tiff[:2] == b"II" else ">"
    (first,) = struct.unpack_from(f"{order}I", tiff, 4)
    (count,) = struct.unpack_from(f"{order}H", tiff, first)
    entries = [tiff[at : at + 12] for at in range(first + 2, first + 2 + 12 * count, 12)]
    body = tiff + bytes(len(tiff) % 2)  # offsets are even
    entries.append(struct.pack(f"{order}HHII", ICC_PROFILE, UNDEFINED, len(icc), len(body)))
    entries.sort(key=lambda entry: struct.unpack_from(f"{order}H", entry))  # by tag
    body += icc + bytes(len(icc) % 2)
    directory = struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4)
    return body[:4] + struct.pack(f"{order}I", len(body)) + body[8:] + directory
