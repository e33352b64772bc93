"""Photos in work: a bounded number of them, each given up when nobody waits for it any more."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from rcod_runtime import Upscaler
from rcod_runtime.colour import ColourMatch
from rcod_runtime.image_io import FORMATS, check_format, decode_image, encode_image
from rcod_runtime.serve.limits import Limits, Refused

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
assert {kind.upper() for kind in MEDIA_TYPES} <= set(FORMATS.values())


@dataclass(frozen=True)
class Choice:
    """What a request asks for; see ``Upscaler.__call__``."""

    realism: str | float
    scale: float | None
    colour_match: ColourMatch
    format: str


@dataclass
class Job:
    """One photo. ``done`` and ``total`` count tiles; ``seconds`` is what each stage took."""

    choice: Choice
    data: bytes = b""
    done: int = 0
    total: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    pixels: int = 0
    abandoned: threading.Event = field(default_factory=threading.Event)
    turn: asyncio.Task[bytes] | None = None  # while it waits for its own

    def abandon(self) -> None:
        """Nobody waits for it any more. Where it still waits itself its place is free at once,
        where it is in work after the tiles that it is at."""
        self.abandoned.set()
        turn, self.turn = self.turn, None
        if turn is not None:
            turn.cancel()


class Abandoned(Exception):
    """Nobody waits for the job any more."""


class Jobs:
    """Upscaling by ``limits.jobs`` threads. Its methods are called in the event loop."""

    def __init__(self, upscaler: Upscaler, limits: Limits) -> None:
        self.upscaler, self.limits = upscaler, limits
        self.pool = ThreadPoolExecutor(limits.jobs, thread_name_prefix="rcod-job")
        self.threads = asyncio.Semaphore(limits.jobs)
        self.arriving = 0
        self.started = 0
        self.running = 0

    @property
    def accepted(self) -> int:
        return self.arriving + self.started

    @property
    def waiting(self) -> int:
        return self.started - self.running

    @contextlib.contextmanager
    def arrival(self) -> Iterator[None]:
        """A place in the queue while the body of a photo is read: it takes memory from then on.

        Raises:
            Refused: the queue is full.
        """
        if self.accepted >= self.limits.queue:
            message = f"the queue is full ({self.accepted} photos): try again soon."
            raise Refused(503, "Overloaded", message, retry_s=1)
        self.arriving += 1
        try:
            yield
        finally:
            self.arriving -= 1

    def start(self, job: Job) -> asyncio.Task[bytes]:
        """The encoded result, later. The place in the queue is taken until the thread is done with
        the job, or until it is abandoned before a thread came to it.

        To be called when ``arrival`` has ended, with no await between: the place is still free.
        """
        job.turn = asyncio.create_task(self._work(job))
        self.started += 1
        job.turn.add_done_callback(self._left)
        return job.turn

    def _left(self, task: asyncio.Task[bytes]) -> None:
        self.started -= 1
        if not task.cancelled():
            task.exception()  # taken note of, also where nobody waits

    def close(self) -> None:
        """Wait for what is in work."""
        self.pool.shutdown(wait=True)

    async def _work(self, job: Job) -> bytes:
        queued = time.perf_counter()
        try:
            await self.threads.acquire()
        finally:
            job.turn = None  # and no cycle: an error holds the frame that holds the job
        self.running += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self.pool, self._result, job, queued)
        finally:
            self.running -= 1
            self.threads.release()

    def _result(self, job: Job, queued: float) -> bytes:
        def lap(stage: str, since: float) -> float:
            now = time.perf_counter()
            job.seconds[stage] = now - since
            return now

        def progress(done: int, total: int) -> None:
            job.done, job.total = done, total
            if job.abandoned.is_set():
                raise Abandoned

        now = lap("queue", queued)
        progress(0, 0)
        photo = decode_image(job.data, "the image", self.limits.pixels)
        job.data = b""
        job.pixels = photo.pixels.shape[0] * photo.pixels.shape[1]
        now = lap("decode", now)
        choice, format_name = job.choice, job.choice.format.upper()
        shape = self.upscaler.output_shape(photo.pixels.shape, choice.scale)
        check_format(shape, photo.pixels.dtype, format_name, "the result")
        sr = self.upscaler(
            photo.pixels,
            choice.realism,
            choice.scale,
            colour_match=choice.colour_match,
            progress=progress,
        )
        now = lap("upscale", now)
        result = encode_image(sr, format_name, "the result", photo.icc)
        lap("encode", now)
        return result
