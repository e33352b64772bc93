"""What a run of several images says while it goes on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from rcod_runtime.cli.files import STREAM
from rcod_runtime.cli.report import Record, Report
from rcod_runtime.errors import OutputError, PartialFailure, UsageError

# tqdm's own, but for the rate: images a second also where one takes longer than that.
IMAGES_BAR = (
    "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
)


class Results:
    """Takes the record of each image: into the report, a line on stdout or stderr, the bar."""

    def __init__(self, report: Report, bar: Any) -> None:
        self.report, self.bar = report, bar
        self.stdout = sys.stdout
        self.count = self.failed = 0

    def add(self, record: Record) -> None:
        """
        Raises:
            UsageError: an option can't be used: wrong for one image, wrong for all.
            OutputError: nothing can be told: the report, stdout or stderr can't be written.
        """
        self.report.add(record)
        if record.error == UsageError.__name__:
            raise UsageError(record.message)
        self.count += 1
        if record.status == "written" and record.output != STREAM:
            say(record.output, self.stdout)
        self.bar.update()
        if record.status == "failed":
            self.failed += 1
            say(f"{record.error}: {record.message}", sys.stderr)

    def check(self) -> None:
        """Raises PartialFailure: some images failed."""
        if self.failed:
            others = (
                "; the others are written." if self.failed < self.count else ". None is written."
            )
            raise PartialFailure(f"{self.failed} of {self.count} images failed{others}")


@contextmanager
def progress(total: int | None, unit: str = " images", *, leave: bool = True) -> Iterator[Any]:
    """A bar on stderr, if that is a terminal, that log messages don't tear."""
    form = IMAGES_BAR if total is not None and unit == " images" else None
    with (
        logging_redirect_tqdm(),
        tqdm(total=total, unit=unit, bar_format=form, disable=None, leave=leave) as bar,
    ):
        yield bar


def say(text: str, stream: TextIO) -> None:
    """A line to a stream, with no bar in its way.

    Raises:
        OutputError: the stream can't be written.
    """
    try:
        tqdm.write(text, file=stream)
        stream.flush()
    except OSError as exc:
        name = "stderr" if stream is sys.stderr else "stdout"
        raise OutputError(f"{name}: can't be written ({exc.strerror or exc}).") from exc
