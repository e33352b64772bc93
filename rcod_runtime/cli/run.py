"""Images through an Upscaler, several in work at once; one that fails leaves the others alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from rcod_runtime.cli.files import Task
from rcod_runtime.cli.image import Options, upscale_image
from rcod_runtime.cli.report import Report
from rcod_runtime.errors import OutputError, PartialFailure, UsageError

if TYPE_CHECKING:
    from rcod_runtime.upscaler import Upscaler

# tqdm's own, but for the rate: images a second also where one takes longer than that.
IMAGES_BAR = (
    "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
)


def run_tasks(
    upscaler: Upscaler,
    tasks: Sequence[Task],
    options: Options,
    report: Report,
    jobs: int,
    several: bool,
) -> None:
    """Upscale all images, ``jobs`` of them in work at once and no more in memory.

    Reading and writing one image overlaps with computing another. An exception from outside
    (Ctrl-C) ends the run after the tiles and files that are being worked on.

    Args:
        several: whether one that fails is reported and the rest goes on; otherwise it is raised.

    Raises:
        PartialFailure: some of several images failed; each was reported.
        RcodError: why the only image failed, or what is wrong for all of them.
    """
    unit, form = (" images", IMAGES_BAR) if several else (" tiles", None)
    with (
        logging_redirect_tqdm(),
        tqdm(total=len(tasks), unit=unit, bar_format=form, disable=None, leave=several) as bar,
    ):
        run = _Run(upscaler, options, report, bar, several)
        if not several:
            run.do(tasks[0])  # in this thread, where Ctrl-C ends even the wait for stdin
            return
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(run.do, task) for task in tasks]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                run.stopped.set()
                pool.shutdown(cancel_futures=True)
                raise
    if run.failed:
        raise PartialFailure(f"{run.failed} of {len(tasks)} images failed; the others are written.")


class _Stopped(Exception):
    """The run ends before this image is done."""


class _Run:
    """What the threads of a run share."""

    def __init__(
        self, upscaler: Upscaler, options: Options, report: Report, bar: Any, several: bool
    ) -> None:
        self.upscaler, self.options, self.report = upscaler, options, report
        self.bar, self.several = bar, several  # the bar counts images, or the only one's tiles
        self.stopped = threading.Event()
        self.failed = 0
        self._lock = threading.Lock()  # images are told of one at a time

    def do(self, task: Task) -> None:
        """One image, from file to file. The error of one of several is reported, not raised.

        Raises:
            UsageError: an option that can't be used: wrong for one image, wrong for all.
            OutputError: nothing can be told any more: stdout or the report can't be written.
            RcodError: why the only image failed.
        """
        if self.stopped.is_set():
            return
        try:
            record, error = upscale_image(self.upscaler, task, self.options, self._progress)
        except _Stopped:
            return
        with self._lock:
            self.report.add(record)
            if error is None and task.target is not None:
                say(record.output, sys.stdout)
            if self.several:
                self.bar.update()
                if error is not None and not isinstance(error, UsageError):
                    self.failed += 1
                    say(f"{record.error}: {record.message}", sys.stderr)
        if isinstance(error, UsageError) or (error is not None and not self.several):
            raise error

    def _progress(self, done: int, total: int) -> None:
        if self.stopped.is_set():
            raise _Stopped
        if not self.several:
            self.bar.total = total
            self.bar.update(done - self.bar.n)


def say(text: str, stream: TextIO) -> None:
    """A line to a stream, with no bar in its way.

    Raises:
        OutputError: the stream can't be written.
    """
    try:
        tqdm.write(text, file=stream)
        stream.flush()
    except OSError as exc:
        name = "stdout" if stream is sys.stdout else "stderr"
        raise OutputError(f"{name}: can't be written ({exc.strerror or exc}).") from exc
