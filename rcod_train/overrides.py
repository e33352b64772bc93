"""``--set``: a configuration with some of its fields replaced, by their names."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from rcod_train.config import RunConfig
from rcod_train.errors import ConfigError

Config = TypeVar("Config", bound=RunConfig)

# Fields whose options set others too: the guidance, the levels.
OPTIONS = {"text": "--text", "start": "--from"}


def with_overrides(config: Config, assignments: list[str]) -> Config:
    """Apply ``stage.field=value`` assignments; the field's type decides how a value is read.

    Raises:
        ConfigError: unknown field, a list, one that is an option's, or a value that is not of the
            field's type or beyond its limits.
    """
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator:
            raise ConfigError(f'--set {assignment!r}: expected FIELD=VALUE, e.g. "rcod.steps=500".')
        config = _replaced(config, path.split("."), text, assignment)
    return config


def _replaced(node: Any, path: list[str], text: str, assignment: str) -> Any:
    names = {f.name for f in dataclasses.fields(node)}
    if path[0] not in names:
        raise ConfigError(
            f"--set {assignment!r}: unknown field {path[0]!r}; expected one of {sorted(names)}."
        )
    current = getattr(node, path[0])
    if dataclasses.is_dataclass(current):
        if len(path) < 2:
            raise ConfigError(f"--set {assignment!r}: {path[0]!r} is a group; name a field in it.")
        return dataclasses.replace(
            node, **{path[0]: _replaced(current, path[1:], text, assignment)}
        )
    if len(path) > 1:
        raise ConfigError(f"--set {assignment!r}: {path[0]!r} has no field {path[1]!r}.")
    if isinstance(current, tuple):
        raise ConfigError(
            f"--set {assignment!r}: {path[0]!r} is a list, which --set can't give; expected "
            f"--{path[0]} with its parts one after another."
        )
    if path[0] in OPTIONS:
        raise ConfigError(
            f"--set {assignment!r}: {path[0]!r} is the option {OPTIONS[path[0]]}'s, which sets "
            f"other fields too; expected {OPTIONS[path[0]]} {text}."
        )
    value = _parsed(current, text, assignment)
    try:
        return dataclasses.replace(node, **{path[0]: value})
    except ConfigError as exc:
        raise ConfigError(f"--set {assignment!r}: {exc}") from exc


def _parsed(current: Any, text: str, assignment: str) -> Any:
    try:
        if isinstance(current, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(current, (int, float)):
            return type(current)(text)
    except (KeyError, ValueError) as exc:
        kind = type(current).__name__
        raise ConfigError(f"--set {assignment!r}: expected a value of type {kind}.") from exc
    return text
