"""stdin, stdout and stderr that are closed or end, as those of daemons and pipes."""

from __future__ import annotations

import contextlib
import os
import sys

from rcod_runtime.errors import OutputError

NAMES = ("stdin", "stdout", "stderr")


def open_closed_streams() -> frozenset[str]:
    """The names of those that are closed. What is written to them is lost from here on, and no
    file gets their numbers, which C libraries write to."""
    closed = frozenset(name for name in NAMES if getattr(sys, name) is None)
    for number in range(len(NAMES)):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number
    for name in closed - {"stdin"}:  # None where it is closed, which neither print nor tqdm knows
        setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    return closed


def tell(text: str) -> None:
    """A line on stderr, where that takes one: an exit code says as much."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def print_line(text: str) -> None:
    """A line on stdout.

    Raises:
        OutputError: it can't be written.
    """
    try:
        print(text, flush=True)
    except OSError as exc:
        raise OutputError(f"stdout: can't be written ({exc.strerror or exc}).") from exc


def leave_streams() -> None:
    """At the end of a command: what a stream could not take is not tried again by Python, which
    would end with a code of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError):
                number, null = stream.fileno(), os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, number)
                os.close(null)
