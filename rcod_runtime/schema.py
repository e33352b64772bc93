"""JSON to frozen dataclasses and back, every value checked against the field's type.

Types understood: bool, int, float, str, Literal, str enums, unions, tuple[X, ...], dict[str, X] and
dataclasses that derive from ``Record``. Nothing is coerced: "1" is not 1, true is not 1.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
from collections.abc import Callable
from enum import Enum
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from rcod_runtime.errors import ManifestError

MAX_NUMBER = 2**53  # the largest integer that JSON carries safely


@dataclasses.dataclass(frozen=True)
class Record:
    """Base of a checked dataclass: types are checked first, then ``check`` for the values."""

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            _conform(getattr(self, name), hint, name)
        self.check()

    def check(self) -> None:
        """Override to check values; use ``self.require``."""

    def require(self, field: str, good: bool, expected: str) -> None:
        """Raise a ManifestError about ``field`` unless ``good``."""
        if not good:
            raise ManifestError(field, expected, getattr(self, field.split("[")[0].split(".")[0]))


def record_from_json(cls: type[Record], value: object) -> Record:
    """Build ``cls`` from parsed JSON.

    Raises:
        ManifestError: an unknown or missing field, a wrong type, a refused value; it has the path.
    """
    hints = _hints(cls)
    if not isinstance(value, dict):
        raise ManifestError("", f"an object with the fields {', '.join(hints)}", value)
    for name in value:
        if name not in hints:
            raise ManifestError(
                name, f"one of the fields {', '.join(hints)}", "an unknown field",
                remedy="Upgrade rcod if the bundle is newer; otherwise re-export it.",
            )  # fmt: skip
    for name in hints:
        if name not in value:
            raise ManifestError(name, "a value", "no such field")
    return cls(**{name: _convert(value[name], hint, name) for name, hint in hints.items()})


def record_to_json(record: Record) -> str:
    """Fields in the order of the class, newline at the end."""
    return json.dumps(dataclasses.asdict(record), indent=2, ensure_ascii=False) + "\n"


def parse_json(text: str) -> object:
    """JSON to Python objects; NaN, Infinity and repeated keys are refused with a ValueError."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key appears twice")
        return found

    try:
        parsed: object = json.loads(text, parse_constant=refuse, object_pairs_hook=unique)
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc
    return parsed


def _hints(cls: type[Record]) -> dict[str, Any]:
    return _resolved(cast(Any, cls))  # mypy doesn't see that a class can be hashed


@functools.cache
def _resolved(cls: Any) -> dict[str, Any]:
    """Looked up once for a class: a large manifest has many thousand objects."""
    return get_type_hints(cls)


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _convert(value: Any, hint: Any, path: str) -> Any:
    """JSON's lists, objects and strings to tuples, records and enums; the rest as it is."""
    if _is_union(hint):
        kinds = [kind for kind in get_args(hint) if isinstance(kind, type)]
        records = [kind for kind in kinds if issubclass(kind, Record)]
        return value if value is None or not records else _convert(value, records[0], path)
    if get_origin(hint) is tuple and isinstance(value, list):
        item = get_args(hint)[0]
        return tuple(_convert(x, item, f"{path}[{i}]") for i, x in enumerate(value))
    if get_origin(hint) is dict and isinstance(value, dict):
        item = get_args(hint)[1]
        return {key: _convert(x, item, f"{path}.{key}") for key, x in value.items()}
    if isinstance(hint, type) and issubclass(hint, Record):
        return _within(path, lambda: record_from_json(hint, value))
    if isinstance(hint, type) and issubclass(hint, Enum) and isinstance(value, str):
        return next((member for member in hint if member.value == value), value)
    return value


def _within(path: str, build: Callable[[], Record]) -> Record:
    try:
        return build()
    except ManifestError as error:
        raise error.inside(path) from error.__cause__


def _conform(value: object, hint: Any, path: str) -> None:
    if get_origin(hint) is tuple and isinstance(value, tuple):
        for index, item in enumerate(value):
            _conform(item, get_args(hint)[0], f"{path}[{index}]")
    elif get_origin(hint) is dict and isinstance(value, dict):
        for key, item in value.items():
            _conform(key, str, path)
            _conform(item, get_args(hint)[1], f"{path}.{key}")
    elif not _is_a(value, hint):
        raise ManifestError(path, _expected(hint), value)


def _is_a(value: object, hint: Any) -> bool:
    if _is_union(hint):
        return any(_is_a(value, kind) for kind in get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if hint is type(None):
        return value is None
    if hint is float:  # also keeps NaN and Infinity out
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and abs(cast(float, value)) <= MAX_NUMBER
    if hint is int:
        return type(value) is int and abs(value) <= MAX_NUMBER
    if hint is str:  # keeps terminal escapes and lone surrogates out
        return type(value) is str and value.isprintable()
    return isinstance(hint, type) and isinstance(value, hint)


def _expected(hint: Any) -> str:
    if _is_union(hint):
        return " or ".join(_expected(kind) for kind in get_args(hint))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(member.value for member in hint)
    plain = {
        int: "an integer",
        float: "a finite number",
        str: "one line of text",
        bool: "true or false",
        type(None): "null",
        tuple: "a list",
        dict: "an object",
    }
    kind = get_origin(hint) or hint
    return plain.get(kind, f"an object ({getattr(kind, '__name__', kind)})")
