"""Images through an Upscaler, several in work at once; one that fails leaves the others alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING

from rcod_runtime.cli.files import Task
from rcod_runtime.cli.image import Options, upscale_image
from rcod_runtime.cli.report import Report
from rcod_runtime.cli.results import Results, progress, say

if TYPE_CHECKING:
    from rcod_runtime.upscaler import Upscaler


def run_task(upscaler: Upscaler, task: Task, options: Options, report: Report) -> None:
    """Upscale the only image; the bar counts its tiles.

    Raises:
        RcodError: why it failed.
    """
    with progress(None, " tiles", leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        # In this thread, where Ctrl-C ends even the wait for stdin.
        record, error = upscale_image(upscaler, task, options, show)
        report.add(record)
        if error is not None:
            raise error
        if task.target is not None:
            say(record.output, sys.stdout)


def run_tasks(
    upscaler: Upscaler, tasks: Sequence[Task], options: Options, report: Report, jobs: int
) -> None:
    """Upscale several images, ``jobs`` of them in work at once and no more in memory.

    Reading and writing one image overlaps with computing another. An exception from outside
    (Ctrl-C) ends the run after the tiles and files that are being worked on.

    Raises:
        PartialFailure: some images failed; each was reported.
        UsageError: an option that can't be used: wrong for one image, wrong for all.
        OutputError: nothing can be told any more: stdout or the report can't be written.
    """
    with progress(len(tasks)) as bar, ThreadPoolExecutor(jobs) as pool:
        run = _Run(upscaler, options, Results(report, bar))
        try:
            futures = [pool.submit(run.do, task) for task in tasks]
            for future in as_completed(futures):
                future.result()
        except BaseException:
            run.stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    run.results.check()


class _Stopped(Exception):
    """The run ends before this image is done."""


class _Run:
    """What the threads of a run share."""

    def __init__(self, upscaler: Upscaler, options: Options, results: Results) -> None:
        self.upscaler, self.options, self.results = upscaler, options, results
        self.stopped = threading.Event()
        self._lock = threading.Lock()  # images are told of one at a time

    def do(self, task: Task) -> None:
        """One image, from file to file; its error is reported."""
        try:
            self._check_stopped(0, 0)
            record, _ = upscale_image(self.upscaler, task, self.options, self._check_stopped)
        except _Stopped:
            return
        with self._lock:
            self.results.add(record)

    def _check_stopped(self, done: int, total: int) -> None:
        if self.stopped.is_set():
            raise _Stopped
