"""What can go wrong in a benchmark, beside what the product itself raises.

RcodError                     (rcod_runtime.errors)
└── BenchmarkError            11   a benchmark can't be run
    ├── DatasetError          11   images that don't pair up, or can't be compared
    ├── MissingPackage        11   a package of an extra is not installed
    └── CommandFailed         11   a command that was to be timed did not do its work

rcod_train's errors (the metrics' among them, rcod_train.errors) end a benchmark with 11 too.
"""

from __future__ import annotations

from rcod_runtime.errors import RcodError


class BenchmarkError(RcodError):
    """A benchmark can't be run."""

    exit_code = 11


class DatasetError(BenchmarkError):
    """Images that don't pair up by name, or whose sizes don't allow a comparison."""


class MissingPackage(BenchmarkError):
    """A package is not installed; the message has the exact pip line."""


class CommandFailed(BenchmarkError):
    """A command that was to be timed ended with an error, or without its result."""
