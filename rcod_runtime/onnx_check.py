"""What an ONNX file refers to and promises, read before a library loads it.

An ONNX file can name other files as the place of its weights, and libraries open them; it can call
operators that load code of their own. Only the protobuf fields that matter for this are walked
(numbers as in onnx.proto); values are skipped, so the time goes with the nodes and not the bytes.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

from rcod_runtime.errors import BundleError
from rcod_runtime.files import open_regular
from rcod_runtime.manifest import Graph, Tensor
from rcod_runtime.onnx_ops import required_inputs

MAX_FIELDS = 1_000_000  # walked in about a second; the largest graph here has a tenth of them
MAX_DEPTH = 64
MAX_DIMS = 64  # of a tensor; libraries take fewer
FLOAT = 1  # TensorProto.DataType
# Of those that exports write: type -> bytes of a value.
ITEM_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
STANDARD_DOMAINS = ("", "ai.onnx")
_TRUSTED = "Use the bundle only if you trust where it comes from, or export it again."

# Messages: field number -> what the field holds. What is not named here is skipped.
_SCHEMA: dict[str, dict[int, str]] = {
    "model": {7: "graph", 8: "opset", 20: "training", 25: "function"},
    "opset": {1: "domain", 2: "version"},
    "graph": {1: "node", 5: "tensor", 11: "input", 12: "output", 15: "sparse"},
    "node": {5: "attribute", 7: "domain"},
    "attribute": {
        3: "integer",
        8: "integer",
        5: "tensor",
        6: "graph",
        10: "tensor",
        11: "graph",
        22: "sparse",
        23: "sparse",
    },
}
_DIMS, _DATA_TYPE, _RAW, _EXTERNAL = 1, 2, 9, 13  # TensorProto
_INPUT, _OPERATOR = 1, 4  # NodeProto
_TENSOR = 5  # AttributeProto
_KEY, _VALUE = 1, 2  # StringStringEntryProto
_NAME, _TYPE = 1, 2  # ValueInfoProto
_ELEMENT, _SHAPE = 1, 2  # TypeProto.Tensor


class _NotOnnx(Exception):
    """The bytes are not a well-formed ONNX model."""


def check_onnx(path: Path, graph: Graph, sizes: dict[str, int]) -> None:
    """Refuse a file that reaches for what the manifest does not list, or is another graph.

    Args:
        path: the ONNX file.
        sizes: bytes of each of the graph's ``data_files``.

    Raises:
        BundleError: not an ONNX model; weights in a file that is not among ``data_files``, or
            beyond its end; operators, functions or training steps outside of standard ONNX; other
            inputs and outputs than the manifest's.
    """
    walk = _Walk(graph.file.rpartition("/")[0], sizes)
    try:
        with open_regular(path) as file:
            # Not closed by hand: an error below still holds views of it.
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        walk.message("model", memoryview(content), 0)
    except (OSError, ValueError) as exc:  # ValueError: an empty file
        raise BundleError(f"{path}: can't be read ({exc}).") from exc
    except _NotOnnx as exc:
        raise BundleError(f"{path}: expected an ONNX model, found {exc}. {_TRUSTED}") from exc
    except _Refused as exc:
        raise BundleError(f"{path}: {exc}. Nothing was loaded. {_TRUSTED}") from exc
    if walk.versions != [graph.opset]:
        found = ", ".join(str(version) for version in walk.versions) or "none"
        raise BundleError(
            f"{path}: expected opset {graph.opset} of the manifest, found {found}. {_TRUSTED}"
        )
    _compare(path, "inputs", graph.inputs, walk.values["input"])
    _compare(path, "outputs", graph.outputs, walk.values["output"])


class _Refused(Exception):
    """The model asks for something that a bundle may not."""


Value = tuple[int, tuple[int | None, ...] | None]  # element type, shape; None: not fixed


class _Walk:
    """One pass over a model."""

    def __init__(self, parent: str, sizes: dict[str, int]) -> None:
        self.parent, self.sizes = parent, sizes
        self.values: dict[str, dict[str, Value]] = {"input": {}, "output": {}}
        self.versions: list[int | memoryview] = []  # of the operator sets
        self.fields_left = MAX_FIELDS

    def message(self, kind: str, data: memoryview, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise _NotOnnx(f"messages nested more than {MAX_DEPTH} deep")
        inner = _SCHEMA[kind]
        inputs, operator, tensors = [], "", 0
        for number, value in self.fields(data):
            if kind == "node" and number == _INPUT:
                inputs.append(_text(value))
            elif kind == "node" and number == _OPERATOR:
                operator = _text(value)
            part = inner.get(number)
            if part is None:
                continue
            if part == "version":
                self.versions.append(value)
                continue
            if part == "integer":
                self.integers([value] if isinstance(value, int) else self.varints(value))
                continue
            if not isinstance(value, memoryview):
                raise _NotOnnx(f"a number in the place of a {part}")
            if part in _SCHEMA:
                self.message(part, value, depth + 1)
            elif part == "domain":
                domain = _text(value)
                if domain not in STANDARD_DOMAINS:
                    raise _Refused(
                        f"operators of the domain {domain[:60]!r}, expected standard ONNX only"
                    )
            elif part == "tensor":
                tensors += kind == "attribute" and number == _TENSOR
                if tensors > 1:  # a library joins their shapes and takes the last one's bytes
                    raise _Refused("an attribute with several tensors in the place of one")
                self.tensor(value)
            elif part in self.values:
                if depth == 1:  # those of the model's graph, not of one inside a node
                    name, described = self.described(value)
                    self.values[part][name] = described
            else:
                raise _Refused(f"it holds a {part}, which a bundle's graphs don't")
        needed = required_inputs(operator) if kind == "node" else 0
        if not all(inputs[:needed]) or len(inputs) < needed:
            raise _Refused(f"an operator {operator[:60]!r} without the {needed} inputs it needs")

    def integers(self, values: Sequence[int]) -> None:
        """Attributes beyond 32 bits: OpenVINO cuts them off, and divides by what is left."""
        for value in values:
            if not (value < 2**31 or value >= 2**64 - 2**31):
                raise _Refused(f"an attribute {value - (value >> 63 << 64)}, expected 32 bits")

    def tensor(self, data: memoryview) -> None:
        """Weights must be as many as their shape says: a library may read on beyond fewer."""
        dims: list[int] = []
        kind, raw, location = 0, 0, dict[str, str]()
        for number, value in self.fields(data):
            if number == _DIMS:
                dims += [value] if isinstance(value, int) else self.varints(value)
            elif number == _DATA_TYPE and isinstance(value, int):
                kind = value
            elif number == _RAW:
                raw = len(_bytes(value))
            elif number == _EXTERNAL:
                entry = dict(self.fields(_bytes(value)))
                name = _text(entry.get(_KEY))
                if name in location:
                    raise _Refused(f"weights with two entries {name[:60]!r}")
                location[name] = _text(entry.get(_VALUE))
        if kind not in ITEM_BYTES:
            raise _Refused(f"weights of the type {kind}, expected numbers")
        if len(dims) > MAX_DIMS:  # the product of a million takes an hour
            raise _Refused(f"weights of {len(dims)} dimensions, expected at most {MAX_DIMS}")
        expected = prod(dims) * ITEM_BYTES[kind]
        found = self.external_bytes(location, expected) if location else raw
        if found != expected:
            raise _Refused(f"weights of {found} bytes, where the shape {dims[:8]} needs {expected}")

    def external_bytes(self, entries: dict[str, str], expected: int) -> int:
        """How many bytes a tensor takes from a file beside; ``expected`` where it doesn't say."""
        where = entries.get("location", "")
        name = f"{self.parent}/{where}" if self.parent else where
        if name not in self.sizes:
            raise _Refused(
                f"weights in {where[:80]!r}, a file that the manifest does not list in data_files"
            )
        numbers = [entries.get("offset", "0"), entries.get("length", str(expected))]
        if not all(text.isascii() and text.isdigit() and len(text) < 20 for text in numbers):
            raise _Refused(f"weights at {numbers} of {where}, expected numbers")
        offset, length = map(int, numbers)
        if offset + length > self.sizes[name]:
            raise _Refused(
                f"weights up to byte {offset + length} of {where}, which has {self.sizes[name]}"
            )
        return length

    def described(self, data: memoryview) -> tuple[str, Value]:
        """Name, element type and shape of a graph's input or output (ValueInfoProto)."""
        fields = dict(self.fields(data))
        kind = dict(self.fields(_bytes(fields.get(_TYPE))))
        tensor = dict(self.fields(_bytes(kind.get(1))))
        element = tensor.get(_ELEMENT, 0)
        shape = None
        if _SHAPE in tensor:
            sides = []
            for number, axis in self.fields(_bytes(tensor[_SHAPE])):
                if number == 1:
                    side = dict(self.fields(_bytes(axis))).get(1)
                    sides.append(side if isinstance(side, int) else None)
            shape = tuple(sides)
        return _text(fields.get(_NAME)), (element if isinstance(element, int) else 0, shape)

    def varints(self, data: memoryview) -> list[int]:
        """Packed numbers."""
        self.fields_left -= len(data)
        if self.fields_left < 0:
            raise _NotOnnx(f"more than {MAX_FIELDS} fields")
        values, at = [], 0
        while at < len(data):
            value, at = _varint(data, at)
            values.append(value)
        return values

    def fields(self, data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
        """(field number, integer or bytes) of one message; fixed-width numbers are skipped."""
        at, end = 0, len(data)
        while at < end:
            self.fields_left -= 1
            if self.fields_left < 0:
                raise _NotOnnx(f"more than {MAX_FIELDS} fields")
            key, at = _varint(data, at)
            number, wire = key >> 3, key & 7
            if not 1 <= number < 2**29:  # libraries would cut it off and see another field
                raise _NotOnnx(f"the field number {number}")
            if wire == 0:
                value, at = _varint(data, at)
                yield number, value
            elif wire == 2:
                size, at = _varint(data, at)
                if size > end - at:
                    raise _NotOnnx("a field that ends outside of its message")
                yield number, data[at : at + size]
                at += size
            elif wire in (1, 5):
                at += 8 if wire == 1 else 4
                if at > end:
                    raise _NotOnnx("a field that ends outside of its message")
            else:
                raise _NotOnnx(f"the unknown wire type {wire}")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise _NotOnnx("a number that doesn't end")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >= 2**64:  # a reader would keep the lower bits, and see another number
                raise _NotOnnx("a number of more than 64 bits")
            return value, at
        shift += 7


def _bytes(value: int | memoryview | None) -> memoryview:
    return value if isinstance(value, memoryview) else memoryview(b"")


def _text(value: int | memoryview | None) -> str:
    return bytes(_bytes(value)).decode("utf-8", errors="replace")


def _compare(path: Path, what: str, tensors: tuple[Tensor, ...], found: dict[str, Value]) -> None:
    wanted = {tensor.name for tensor in tensors}
    if found.keys() != wanted:
        raise BundleError(
            f"{path}: expected the {what} {', '.join(sorted(wanted))} of the manifest, found "
            f"{', '.join(sorted(found))[:200] or 'none'}. {_TRUSTED}"
        )
    for tensor in tensors:
        element, shape = found[tensor.name]
        if element != FLOAT or not _fits(tensor, shape):
            kind = "float32" if element == FLOAT else f"type {element}"
            raise BundleError(
                f"{path}: {tensor.name}: expected float32 {tensor.shape} of the manifest, found "
                f"{kind} {shape}. {_TRUSTED}"
            )


def _fits(tensor: Tensor, shape: tuple[int | None, ...] | None) -> bool:
    """Whether a shape in the file can be the manifest's; what it leaves open is seen at the run."""
    if shape is None:
        return True
    return len(shape) == len(tensor.shape) and all(
        side is None or side == axis for side, axis in zip(shape, tensor.shape, strict=True)
    )
