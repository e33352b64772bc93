"""Images through an Upscaler, several in work at once; one that fails leaves the others alone."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from rcod_runtime.cli.files import STREAM, Task
from rcod_runtime.cli.report import Record, Report
from rcod_runtime.errors import ImageError, OutputError, PartialFailure, RcodError, UsageError
from rcod_runtime.image_io import decode_image, encode_image, read_image, write_image

if TYPE_CHECKING:
    from rcod_runtime.upscaler import Upscaler

# tqdm's own, but for the rate: images a second also where one takes longer than that.
IMAGES_BAR = (
    "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
)


@dataclass(frozen=True)
class Options:
    """What a run does to each image: arguments of Upscaler's call."""

    realism: str | float
    scale: float | None
    colour_match: Any
    tile_px: int | None
    overlap_px: int | None
    batch: int | None


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
        sizes: dict[str, int] = {}
        begin = time.perf_counter()
        try:
            try:
                self._upscale(task, sizes)
            except MemoryError as exc:
                raise ImageError(
                    f"{task}: there is not enough memory for it. Choose a smaller --scale or fewer "
                    "--jobs, or cut the image into parts."
                ) from exc
        except _Stopped:
            return
        except RcodError as error:
            self._tell(task, sizes, time.perf_counter() - begin, error)
            if isinstance(error, UsageError) or not self.several:
                raise
        else:
            self._tell(task, sizes, time.perf_counter() - begin, None)

    def _upscale(self, task: Task, sizes: dict[str, int]) -> None:
        if self.stopped.is_set():
            raise _Stopped
        if task.source is None:
            photo = decode_image(sys.stdin.buffer.read(), "stdin")
        else:
            photo = read_image(task.source)
        sizes["input_height_px"], sizes["input_width_px"] = photo.pixels.shape[:2]
        options = self.options
        sr = self.upscaler(
            photo.pixels,
            options.realism,
            options.scale,
            colour_match=options.colour_match,
            tile_px=options.tile_px,
            overlap_px=options.overlap_px,
            batch=options.batch,
            progress=self._progress,
        )
        if task.target is not None:
            write_image(task.target, sr, photo.icc)
        else:
            data = encode_image(sr, task.format_name, "stdout", photo.icc)
            try:
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
            except OSError as exc:
                raise _lost("stdout", exc) from exc
        sizes["output_height_px"], sizes["output_width_px"] = sr.shape[:2]

    def _progress(self, done: int, total: int) -> None:
        if self.stopped.is_set():
            raise _Stopped
        if not self.several:
            self.bar.total = total
            self.bar.update(done - self.bar.n)

    def _tell(
        self, task: Task, sizes: dict[str, int], seconds: float, error: RcodError | None
    ) -> None:
        record = Record(
            str(task),
            STREAM if task.target is None else str(task.target),
            "written" if error is None else "failed",
            **sizes,
            seconds=round(seconds, 3),
            error=None if error is None else type(error).__name__,
            message=None if error is None else str(error),
        )
        with self._lock:
            self.report.add(record)
            if error is None and task.target is not None:
                say(record.output, sys.stdout)
            if self.several:
                self.bar.update()
                if error is not None and not isinstance(error, UsageError):
                    self.failed += 1
                    say(f"{type(error).__name__}: {error}", sys.stderr)


def say(text: str, stream: TextIO) -> None:
    """A line to a stream, with no bar in its way.

    Raises:
        OutputError: the stream can't be written.
    """
    try:
        tqdm.write(text, file=stream)
        stream.flush()
    except OSError as exc:
        raise _lost("stdout" if stream is sys.stdout else "stderr", exc) from exc


def _lost(name: str, exc: OSError) -> OutputError:
    return OutputError(f"{name}: can't be written ({exc.strerror or exc}).")
