"""Seeded damage: to the bytes of a file, to an image's fields, to a JSON document."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Rng = np.random.Generator

EDGES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
HEADER_BYTES = 96  # of the formats here, sizes and depths lie in these


def mutate_bytes(rng: Rng, data: bytes, others: Sequence[bytes]) -> bytes:
    """One to four changes; ``others`` give foreign pieces."""
    changed = bytearray(data)
    for _ in range(int(rng.choice((1, 1, 1, 2, 3, 4)))):
        change = _CHANGES[int(rng.integers(len(_CHANGES)))]
        changed = change(rng, changed, others)
    return bytes(changed)


def _flip(rng: Rng, data: bytearray, _: Sequence[bytes]) -> bytearray:
    for at in rng.integers(0, max(1, len(data)), int(rng.integers(1, 17))):
        if at < len(data):
            data[at] ^= 1 << int(rng.integers(8))
    return data


def _truncate(rng: Rng, data: bytearray, _: Sequence[bytes]) -> bytearray:
    return data[: int(rng.integers(0, len(data) + 1))]


def _cut(rng: Rng, data: bytearray, _: Sequence[bytes]) -> bytearray:
    first, last = sorted(rng.integers(0, len(data) + 1, 2).tolist())
    return data[:first] + data[last:]


def _repeat(rng: Rng, data: bytearray, _: Sequence[bytes]) -> bytearray:
    first = int(rng.integers(0, len(data) + 1))
    piece = data[first : first + int(rng.integers(1, 65))]
    return data[:first] + piece * int(rng.integers(1, 5)) + data[first:]


def _splice(rng: Rng, data: bytearray, others: Sequence[bytes]) -> bytearray:
    other = others[int(rng.integers(len(others)))]
    first, last = sorted(rng.integers(0, len(other) + 1, 2).tolist())
    at = int(rng.integers(0, len(data) + 1))
    return data[:at] + other[first:last] + data[at:]


def _header_field(rng: Rng, data: bytearray, _: Sequence[bytes]) -> bytearray:
    """A number of 1, 2 or 4 bytes becomes another: an edge, or close to what it was."""
    size = int(rng.choice((1, 2, 4)))
    reach = min(len(data), HEADER_BYTES if rng.random() < 0.7 else len(data)) - size
    if reach < 0:
        return data
    at = int(rng.integers(0, reach + 1))
    order: Any = "little" if rng.random() < 0.5 else "big"
    limit = 1 << (8 * size)
    if rng.random() < 0.5:
        value = EDGES[int(rng.integers(len(EDGES)))] % limit
    else:
        before = int.from_bytes(data[at : at + size], order)
        value = (before + int(rng.integers(-16, 17))) % limit
    data[at : at + size] = value.to_bytes(size, order)
    return data


_CHANGES = (
    _flip, _flip, _truncate, _cut, _repeat, _splice, _header_field, _header_field, _header_field,
    _header_field,
)  # fmt: skip


def with_valid_png_sums(data: bytes) -> bytes:
    """A PNG's checksums made right again, so that damage gets past them."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    fixed = bytearray(data)
    at = 8
    while at + 12 <= len(fixed):
        (size,) = struct.unpack_from(">I", fixed, at)
        end = at + 8 + size
        if end + 4 > len(fixed):
            break
        struct.pack_into(">I", fixed, end, zlib.crc32(fixed[at + 4 : end]))
        at = end + 4
    return bytes(fixed)


VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 255, 4096, 2**20, 2**31, 2**53, 2**63, -(2**63), 10**400,
    0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), "", "a", "..", "/", "../x", "\x00",
    "\x1b[2J", "\ud800", "batch", "height/0", "height/8", "fp16", "onnx/../onnx/vpim.onnx",
    "a" * 100_000, [], [[]], [0] * 1000, {}, {"": {}}, {"a": None},
)  # fmt: skip


def mutate_json(rng: Rng, document: Any) -> Any:
    """One to four changes of structure or values, in place where that can be; returns it."""
    for _ in range(int(rng.integers(1, 5))):
        places = list(_places(document))
        if not places:
            return VALUES[int(rng.integers(len(VALUES)))]
        holder, key = places[int(rng.integers(len(places)))]
        _STRUCTURAL[int(rng.integers(len(_STRUCTURAL)))](rng, holder, key, places)
    return document


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside, outer ones first."""
    keys: Any = ()
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = range(len(value))
    return [place for key in keys for place in ((value, key), *_places(value[key]))]


def _replace(rng: Rng, holder: Any, key: Any, _: Any) -> None:
    holder[key] = VALUES[int(rng.integers(len(VALUES)))]


def _nudge(rng: Rng, holder: Any, key: Any, _: Any) -> None:
    value = holder[key]
    if isinstance(value, str):
        at = int(rng.integers(0, len(value) + 1))
        holder[key] = value[:at] + chr(int(rng.integers(1, 300))) + value[at + 1 :]
    elif isinstance(value, (int, float)):
        holder[key] = value * 2 if rng.random() < 0.5 else value + int(rng.integers(-2, 3))


def _remove(rng: Rng, holder: Any, key: Any, _: Any) -> None:
    if isinstance(holder, dict) or rng.random() < 0.5:
        del holder[key]
    else:
        holder.append(holder[key])


def _rename(rng: Rng, holder: Any, key: Any, _: Any) -> None:
    if isinstance(holder, dict):
        holder[f"{key}{VALUES[int(rng.integers(len(VALUES)))]!s:.200}"] = holder.pop(key)


def _copy_from(rng: Rng, holder: Any, key: Any, places: list[tuple[Any, Any]]) -> None:
    """The value of another place, as text and back, so that nothing holds itself."""
    import copy

    other, other_key = places[int(rng.integers(len(places)))]
    holder[key] = copy.deepcopy(other[other_key])


_STRUCTURAL: tuple[Callable[[Rng, Any, Any, list[tuple[Any, Any]]], None], ...] = (
    _replace, _replace, _nudge, _nudge, _remove, _rename, _copy_from,
)  # fmt: skip
