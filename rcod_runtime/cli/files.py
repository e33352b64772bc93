"""Which images a command line means, and where each result goes."""

from __future__ import annotations

import glob
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rcod_runtime.errors import ImageError, OutputError, UsageError

log = logging.getLogger(__name__)

STREAM = "-"  # stdin as an input, stdout as the output
TABLES = (".parquet", ".tar")  # files of many images, which --ray takes
CASELESS = ("darwin", "win32")  # names that differ in case alone are one file there
_SEPARATORS = f"{os.sep}{os.altsep or ''}"
SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp", "tiff": ".tif", "bmp": ".bmp"}


@dataclass(frozen=True)
class Task:
    """One image to upscale. ``source`` None is stdin, ``target`` None is stdout."""

    source: Path | None
    target: Path | None
    format_name: str

    def __str__(self) -> str:
        return STREAM if self.source is None else str(self.source)


def is_table(text: str) -> bool:
    """Whether an input is a Parquet file or a tar shard (webdataset); it may be a URI."""
    return text.lower().endswith(TABLES)


def plan_tasks(
    inputs: Sequence[str], out: str, format_choice: str | None = None, recursive: bool = False
) -> list[Task]:
    """Every image of ``inputs`` with its output. Makes no folder and writes nothing.

    Args:
        inputs: files, folders, patterns (``*``, ``?``, ``[a-z]``, ``**``) or ``-``, stdin. What is
            named twice is one image.
        out: a file for one image, a folder, or ``-``, stdout. What a pattern finds goes to a folder
            unless ``out`` is an image's name.
        format_choice: a key of SUFFIXES for results in a folder or on stdout; None keeps each
            input's format, but for GIF and other kinds that are not written: those become PNG.
        recursive: folders with their subfolders, whose structure the results keep.

    Raises:
        ImageError: an input is missing, or a folder or a pattern holds no image.
        OutputError: the output's format is unknown, its folder is missing, or two inputs would
            write the same file.
        UsageError: stdin or stdout where several images are meant, or an output that would replace
            an input.
    """
    from rcod_runtime.image_io import FORMATS, READ_SUFFIXES, format_of

    if STREAM in inputs:
        if len(inputs) > 1:
            raise UsageError("- (stdin): expected no other input beside it.")
        sources: list[tuple[Path | None, Path]] = [(None, Path("stdin"))]
    else:
        sources = _once(_sources(inputs, Path(out), recursive))
    chosen = None if format_choice is None else SUFFIXES[format_choice]
    if out == STREAM:
        if len(sources) != 1:
            raise UsageError(f"-o - (stdout): expected one image, found {len(sources)}.")
        return [Task(sources[0][0], None, FORMATS[chosen or ".png"])]
    folder = Path(out)
    # os.path, as everywhere here: before Python 3.14 pathlib raises where it may not look.
    is_pattern = glob.has_magic(inputs[0]) and not os.path.exists(inputs[0])
    to_folder = os.path.isdir(inputs[0]) or (is_pattern and not is_image_name(folder))
    single = len(sources) == 1 and not to_folder
    is_name = not os.path.isdir(folder) and folder.suffix != "" and out[-1] not in _SEPARATORS
    if not single and is_image_name(folder):
        raise UsageError(f"{out}: expected a folder for several images, found an image's name.")
    if is_name and single:
        tasks = [Task(sources[0][0], folder, _file_format(folder, format_choice))]
    elif sources[0][0] is None:
        raise UsageError(f"{out}: expected the name of an image for what comes from stdin, or -.")
    else:
        tasks = []
        for source, relative in sources:
            own = relative.suffix if relative.suffix.lower() in FORMATS else ".png"
            if relative.suffix.lower() in READ_SUFFIXES:  # IMG.2024 is not another IMG
                relative = relative.with_suffix("")
            target = folder / relative.parent / (relative.name + (chosen or own))
            tasks.append(Task(source, target, format_of(target)))
    _check_targets(tasks)
    return tasks


def make_folders(tasks: Sequence[Task]) -> None:
    """The folders of all outputs, so that one that can't be made shows before the work.

    Raises:
        OutputError: one can't be made.
    """
    for folder in dict.fromkeys(task.target.parent for task in tasks if task.target is not None):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as exc:
            raise OutputError(
                f"{folder}: expected a folder, or room for one, found a file. Choose another -o."
            ) from exc
        except OSError as exc:
            raise OutputError(f"{folder}: can't be made ({exc.strerror or exc}).") from exc


def check_folders(tasks: Iterable[Task]) -> None:
    """Whether files can be put into the folders of all outputs, which are made.

    Raises:
        OutputError: into one they can't.
    """
    for folder in dict.fromkeys(task.target.parent for task in tasks if task.target is not None):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OutputError(
                f"{folder}: expected a folder that you may write into, found one that you may not. "
                "Change its permissions, or choose another -o."
            )


def check_target(task: Task) -> None:
    """Whether an image can be put where it goes.

    Raises:
        OutputError: it can't.
    """
    check_folders([task])
    if task.target is not None and os.path.isdir(task.target):
        raise OutputError(f"{task.target}: expected room for a file, found a folder of that name.")


def identity(path: Path) -> object:
    """What all names of a file have in common: two that differ in case are one on some disks."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return os.path.realpath(path)  # no file yet
    return status.st_dev, status.st_ino


def is_image_name(out: Path) -> bool:
    """Whether it would be the name of one image, of a kind that is written or not, and is no
    folder."""
    from rcod_runtime.image_io import READ_SUFFIXES

    return not os.path.isdir(out) and out.suffix.lower() in READ_SUFFIXES


def _file_format(target: Path, format_choice: str | None) -> str:
    from rcod_runtime.image_io import FORMATS, format_of

    try:
        format_name = format_of(target)
    except OutputError as exc:
        raise OutputError(f"{exc} For a folder end -o with {os.sep}") from exc
    if format_choice is not None and format_name != FORMATS[SUFFIXES[format_choice]]:
        raise UsageError(f"{target}: its name says {format_name}, --format {format_choice}.")
    if not os.path.isdir(target.parent):
        raise OutputError(f"{target}: the folder {target.parent} does not exist. Make it first.")
    return format_name


def _sources(inputs: Sequence[str], out: Path, recursive: bool) -> Iterator[tuple[Path, Path]]:
    """(file, its path below the input folder, or its name) of every image."""
    for text in inputs:
        path = Path(text)
        if os.path.isdir(path):
            try:
                found = list(_walk(path, out) if recursive else _images(path, os.listdir(path)))
            except OSError as exc:
                where = exc.filename or path
                raise ImageError(f"{where}: can't be listed ({exc.strerror or exc}).") from exc
            if not found:
                raise ImageError(f"{path}: a folder without images ({_known()}).")
            yield from ((image, image.relative_to(path)) for image in found)
        elif os.path.exists(path):
            yield path, Path(path.name)
        elif glob.has_magic(text):
            matches = sorted(glob.glob(text, recursive=True))
            images = [Path(match) for match in matches if _is_image(match)]
            if not images:
                raise ImageError(f"{text}: no image matches this pattern ({_known()}).")
            yield from ((image, Path(image.name)) for image in images)
        else:
            raise ImageError(f"{path}: not found, or can't be reached.")


def _once(sources: Iterable[tuple[Path, Path]]) -> list[tuple[Path | None, Path]]:
    """Without what is there before under the same name, as where two patterns overlap."""
    kept: dict[object, tuple[Path | None, Path]] = {}
    for source, relative in sources:
        kept.setdefault((identity(source), relative), (source, relative))
    return list(kept.values())


def _walk(top: Path, out: Path) -> Iterator[Path]:
    """Images in ``top`` and its subfolders; not in hidden ones, nor in the output's own."""

    def unreadable(error: OSError) -> None:
        raise error

    for folder, subfolders, names in os.walk(top, onerror=unreadable):
        here = Path(folder)
        subfolders[:] = sorted(
            name
            for name in subfolders
            if not name.startswith(".")
            and not (os.path.isdir(out) and os.path.samefile(here / name, out))
        )
        for name in subfolders:
            if os.path.islink(here / name):  # it may lead back to where it is
                log.warning("%s: a linked folder, left out", here / name)
        yield from _images(here, names)


def _images(folder: Path, names: list[str]) -> Iterator[Path]:
    for name in sorted(names):
        if _is_image(str(folder / name)):
            yield folder / name


def _is_image(path: str) -> bool:
    from rcod_runtime.image_io import READ_SUFFIXES

    name = os.path.basename(path)
    suffix = os.path.splitext(name)[1].lower()
    return not name.startswith(".") and suffix in READ_SUFFIXES and os.path.isfile(path)


def _known() -> str:
    from rcod_runtime.image_io import READ_SUFFIXES

    return ", ".join(sorted(READ_SUFFIXES))


def _check_targets(tasks: Sequence[Task]) -> None:
    sources = {identity(task.source) for task in tasks if task.source is not None}
    writers: dict[str, Task] = {}
    for task in tasks:
        assert task.target is not None
        if identity(task.target) in sources:
            raise UsageError(f"{task.target}: would replace an input. Choose another -o.")
        name = str(task.target)
        name = name.casefold() if sys.platform in CASELESS else name
        if name in writers:
            raise OutputError(
                f"{task.target}: both {writers[name]} and {task} would write it. Give them in two "
                "runs with an -o of their own, keep subfolders (--recursive), or rename one."
            )
        writers[name] = task
