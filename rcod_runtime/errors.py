"""What can go wrong between a bundle, an image and a machine.

RcodError                     exit code
├── UsageError                 2   an argument: unknown level, realism outside [0, 1], wrong tile
├── ImageError                 3   an input image or array
├── BundleError                4   a bundle: missing, not whole, outside its folder
│   ├── ManifestError          4   a field of manifest.json
│   ├── HashMismatch           4   a file that is not the one the manifest speaks of
│   └── SignatureError         4   a required signature is missing, wrong, or can't be checked
├── BackendError               5   the library or device that runs the graphs
│   └── NonFiniteOutput        5   NaN or Inf came out of a graph
├── OutputError                6   the output can't be written, or can't keep what is in the image
├── EngineMismatch             7   an engine built for another machine
├── ExportError                8   a checkpoint can't become a bundle
│   └── ParityError            8   a graph does not compute what the checkpoint does
└── PartialFailure            10   of several images some failed; each was reported
"""

from __future__ import annotations

import json

MAX_MESSAGE = 8000


class RcodError(Exception):
    """Base of all errors that a user, a file or a machine can cause."""

    exit_code = 1

    def __str__(self) -> str:
        return _printable(super().__str__())


class UsageError(RcodError):
    """An argument has a value that can't be used."""

    exit_code = 2


class ImageError(RcodError):
    """An input image can't be read, or an array is not an image."""

    exit_code = 3


class BundleError(RcodError):
    """A bundle is missing, is not whole, or reaches outside its folder."""

    exit_code = 4


class ManifestError(BundleError):
    """A field of a manifest is wrong. ``field`` is its path: ``levels[1].timestep``."""

    def __init__(
        self,
        field: str,
        expected: str,
        found: object,
        source: str = "manifest",
        remedy: str = "Re-export the bundle.",
    ) -> None:
        super().__init__(field, expected, found, source, remedy)
        self.field, self.expected, self.found = field, expected, found
        self.source, self.remedy = source, remedy

    def inside(self, outer: str) -> ManifestError:
        """The same error, seen from the object that holds this one in its field ``outer``."""
        field = outer if not self.field else f"{outer}.{self.field}"
        return ManifestError(field, self.expected, self.found, self.source, self.remedy)

    def in_file(self, source: str) -> ManifestError:
        """The same error, naming the file it was read from."""
        return ManifestError(self.field, self.expected, self.found, source, self.remedy)

    def __str__(self) -> str:
        field = _cut(self.field, 200)  # keys of a hostile file
        where = f'{self.source}: "{field}"' if field else self.source
        text = f"{where}: expected {self.expected}, found {_shown(self.found)}. {self.remedy}"
        return _printable(text)


class HashMismatch(BundleError):
    """A file's bytes are not those the manifest speaks of."""


class SignatureError(BundleError):
    """A signature is required, and there is none that the key made for this manifest."""


class BackendError(RcodError):
    """A library or device that runs graphs is missing, or refused to work."""

    exit_code = 5


class NonFiniteOutput(BackendError):
    """NaN or Inf came out of a graph; there is no result."""


class OutputError(RcodError):
    """An output can't be written."""

    exit_code = 6


class EngineMismatch(RcodError):
    """An engine was built for another machine or library version."""

    exit_code = 7


class ExportError(RcodError):
    """A checkpoint can't be exported."""

    exit_code = 8


class ParityError(ExportError):
    """An exported graph does not compute what the checkpoint does."""


class PartialFailure(RcodError):
    """Some of several images failed; the others are done."""

    exit_code = 10


def _printable(text: str) -> str:
    """Names in messages come from files: what would steer a terminal is shown and not sent."""
    text = _cut(text, MAX_MESSAGE)
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _shown(value: object, limit: int = 80) -> str:
    """A value from a hostile file, on one line and not too long."""
    try:
        text = json.dumps(value, default=repr)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return _cut(text, limit)
