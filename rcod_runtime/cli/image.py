"""One image from where it lies to where its result goes, and what became of it."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rcod_runtime.cli.files import STREAM, Task, check_target
from rcod_runtime.cli.report import Record
from rcod_runtime.errors import ImageError, OutputError, RcodError
from rcod_runtime.files import read_stream
from rcod_runtime.image_io import (
    MAX_INPUT_BYTES,
    check_format,
    decode_image,
    encode_image,
    read_image,
    write_image,
)

if TYPE_CHECKING:
    from rcod_runtime.upscaler import Progress, Upscaler


@dataclass(frozen=True)
class Options:
    """What a run does to each image: arguments of Upscaler's call."""

    realism: str | float | None
    scale: float | None
    colour_match: Any
    tile_px: int | None
    overlap_px: int | None
    batch: int | None


def upscale_image(
    upscaler: Upscaler,
    task: Task,
    options: Options,
    progress: Progress | None = None,
    data: bytes | None = None,
) -> tuple[Record, RcodError | None]:
    """Upscale one image; an error is returned, with the record of it, and not raised.

    Args:
        progress: as Upscaler's; what it raises is raised here.
        data: the content of the image's file where that is not at ``task.source``.
    """
    sizes: dict[str, int] = {}
    error: RcodError | None = None
    begin = time.perf_counter()
    try:
        _upscale(upscaler, task, options, progress, data, sizes)
    except MemoryError:
        error = ImageError(
            f"{task}: there is not enough memory for it. Choose a smaller --scale or fewer "
            "--jobs, or cut the image into parts."
        )
    except RcodError as exc:
        error = exc
    record = Record(
        str(task),
        STREAM if task.target is None else str(task.target),
        "written" if error is None else "failed",
        **sizes,
        seconds=round(time.perf_counter() - begin, 3),
        error=None if error is None else type(error).__name__,
        message=None if error is None else str(error),
    )
    return record, error


def _upscale(
    upscaler: Upscaler,
    task: Task,
    options: Options,
    progress: Progress | None,
    data: bytes | None,
    sizes: dict[str, int],
) -> None:
    if data is not None:
        photo = decode_image(data, str(task))
    elif task.source is None:
        photo = decode_image(_stdin(), "stdin")
    else:
        photo = read_image(task.source)
    sizes["input_height_px"], sizes["input_width_px"] = photo.pixels.shape[:2]
    # Before the work: what can't be written is not computed.
    check_target(task)
    shape = upscaler.output_shape(photo.pixels.shape, options.scale)
    target = "stdout" if task.target is None else str(task.target)
    check_format(shape, photo.pixels.dtype, task.format_name, target)
    sr = upscaler(
        photo.pixels,
        options.realism,
        options.scale,
        colour_match=options.colour_match,
        tile_px=options.tile_px,
        overlap_px=options.overlap_px,
        batch=options.batch,
        progress=progress,
    )
    if task.target is not None:
        write_image(task.target, sr, photo.icc)
    else:
        content = encode_image(sr, task.format_name, target, photo.icc)
        try:
            sys.stdout.buffer.write(content)
            sys.stdout.buffer.flush()
        except OSError as exc:
            raise OutputError(f"stdout: can't be written ({exc.strerror or exc}).") from exc
    sizes["output_height_px"], sizes["output_width_px"] = sr.shape[:2]


def _stdin() -> bytes:
    if sys.stdin is None:
        raise ImageError("stdin: closed. Give a file in the place of -.")
    try:
        return read_stream(sys.stdin.buffer, MAX_INPUT_BYTES)
    except OSError as exc:
        raise ImageError(f"stdin: can't be read ({exc.strerror or exc}).") from exc
