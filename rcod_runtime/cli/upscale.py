"""Upscale photos with a realism control.

  rcod-upscale photo.jpg -o sharp.png                 the embedded model, on the CPU
  rcod-upscale photos/ -o sharp/ --realism realism    a folder; --recursive: its subfolders too
  rcod-upscale "in/*.png" -o sharp/ --realism 0.3     between fidelity (0) and realism (1)
  rcod-upscale photos/ -o sharp/ --skip-existing      what an earlier run has not written yet
  rcod-upscale - -o - < photo.jpg > sharp.png         stdin to stdout
  rcod-upscale *.parquet -o sharp/ --ray auto         on a Ray cluster

The paths of the written images go to stdout, one a line; progress and messages to stderr.
Exit codes: 0 all written, 2 wrong arguments, 3 an input image, 4 the bundle, 5 the backend,
6 an output, 7 engines built for another machine, 10 some of several images failed and the others
are written, 130 stopped by Ctrl-C, 143 by SIGTERM; what is written by then is whole.
"""

from __future__ import annotations

import argparse
import io
import logging
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rcod_runtime.cli.files import (
    STREAM,
    SUFFIXES,
    Task,
    check_folders,
    identity,
    is_image_name,
    is_table,
    make_folders,
    plan_tasks,
)
from rcod_runtime.cli.opening import a_path, add_opening_options, opening
from rcod_runtime.cli.report import Record, Report
from rcod_runtime.cli.stopping import Terminated, exit_code, sigterm_raises
from rcod_runtime.cli.streams import leave_streams, open_closed_streams, tell
from rcod_runtime.errors import RcodError, UsageError
from rcod_runtime.files import remove_partials

if TYPE_CHECKING:
    from rcod_runtime.cli.cluster import Cluster
    from rcod_runtime.cli.image import Options


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rcod-upscale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "inputs",
        nargs="+",
        metavar="IN",
        help="images, folders of images, quoted patterns, or - for stdin",
    )
    add(
        "-o",
        "--out",
        required=True,
        metavar="OUT",
        help="a file for one image, otherwise a folder (made if it is missing), or - for stdout",
    )
    add(
        "--realism",
        metavar="LEVEL",
        help="fidelity, neutral, realism, adaptive, or a number in 0..1 (default: neutral, or the "
        "middle level of a bundle without it)",
    )
    add("--scale", type=float, metavar="S", help="1 to 4 (default: the bundle's, 4)")
    add("--recursive", action="store_true", help="folders with their subfolders, kept in OUT")
    add("--skip-existing", action="store_true", help="leave out images whose output is there")
    add(
        "--format",
        choices=tuple(SUFFIXES),
        help="of results in a folder (default: the input's, PNG for GIF) or on stdout (default: "
        "png)",
    )
    add("--report", type=a_path, metavar="FILE", help="what became of each image, as JSON Lines")
    add("--tile", type=int, metavar="PX", help="side of a tile in the result (default: bundle's)")
    add("--overlap", type=int, metavar="PX", help="overlap of tiles (default: bundle's)")
    add("--batch", type=int, metavar="N", help="tiles run together (default: backend's choice)")
    add(
        "--colour-match",
        choices=("none", "adain", "wavelet", "consistent"),
        default="consistent",
        help="wavelet: the broad colours are the input's; consistent: and what is not noise of the "
        "finer detail that was lost (default: %(default)s)",
    )
    add(
        "--jobs",
        type=int,
        metavar="N",
        help="images in work at once: reading and writing overlap with computing (default: 1; with "
        "--ray: as many as there is room for)",
    )
    add(
        "--ray",
        metavar="ADDRESS",
        help="on a Ray cluster: local, auto, or HOST:PORT. IN may then be Parquet files or .tar "
        "shards (webdataset), too; images whose output is there are left out",
    )
    add(
        "--ray-gpus",
        type=float,
        default=0.0,
        metavar="G",
        help="GPUs for each image in work on Ray: 1, or 0.5 to share one (default: none)",
    )
    add_opening_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``rcod-upscale``; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    closed = open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As file names are, which it prints: a redirected one may have another encoding.
        sys.stdout.reconfigure(
            encoding=sys.getfilesystemencoding(), errors=sys.getfilesystemencodeerrors()
        )
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        if "stdout" in closed and arguments.out == STREAM:
            raise UsageError("-o -: expected a file or a pipe as stdout, found it closed.")
        with sigterm_raises():
            _run(arguments)
    except RcodError as error:
        tell(f"{type(error).__name__}: {error}")
        return error.exit_code
    except (KeyboardInterrupt, Terminated) as stop:
        tell("stopped; the images listed are whole")
        return exit_code(stop)
    finally:
        leave_streams()
    return 0


def _run(arguments: argparse.Namespace) -> None:
    if "" in (*arguments.inputs, arguments.out):  # as of a variable that is not set
        raise UsageError("IN and -o: expected names, found an empty one. This folder is .")
    if arguments.jobs is not None and arguments.jobs < 1:
        raise UsageError(f"--jobs {arguments.jobs}: expected at least 1.")
    gpus, ray = arguments.ray_gpus, arguments.ray
    if not 0 <= gpus < math.inf or (gpus and ray is None):
        raise UsageError("--ray-gpus: expected --ray beside it, and a number of at least 0.")
    if arguments.threads < 0:
        raise UsageError(f"--threads {arguments.threads}: expected at least 0.")
    tables = [text for text in arguments.inputs if is_table(text)]
    if tables:
        if arguments.ray is None:
            raise UsageError(f"{tables[0]}: files of many images need --ray local.")
        if arguments.out == STREAM or is_image_name(Path(arguments.out)):
            raise UsageError(f"-o {arguments.out}: expected a folder for several images.")
        _check_report(arguments.report, map(Path, tables))
        _upscale_tables(arguments)
        return
    if arguments.out == "-" and sys.stdout.isatty():
        raise UsageError("-o -: expected a file or a pipe as stdout, found a terminal.")
    tasks = plan_tasks(arguments.inputs, arguments.out, arguments.format, arguments.recursive)
    _check_report(
        arguments.report,
        (path for task in tasks for path in (task.source, task.target) if path is not None),
    )
    make_folders(tasks)
    remove_partials(task.target for task in tasks if task.target is not None)
    with Report(arguments.report) as report:
        skips = arguments.skip_existing or arguments.ray is not None
        pending = _pending(tasks, report) if skips else tasks
        check_folders(pending)  # where all is there, nothing need be written
        if pending:
            _upscale(arguments, pending, report, several=len(tasks) > 1)


def _check_report(path: Path | None, images: Iterable[Path]) -> None:
    """A report must not replace a photo, or a file of many; - is no file's name here."""
    if str(path) == STREAM:
        raise UsageError("--report -: expected a file. For stdout: --report /dev/stdout")
    if path is not None and identity(path) in map(identity, images):
        raise UsageError(f"--report {path}: expected a file of its own, found an image's name.")


def _pending(tasks: Sequence[Task], report: Report) -> list[Task]:
    """The tasks whose output is not there. Outputs appear whole, so what is there is done."""
    pending = []
    for task in tasks:
        if task.target is not None and os.path.isfile(task.target):
            report.add(Record(str(task), str(task.target), "skipped"))
        else:
            pending.append(task)
    if len(pending) < len(tasks):
        tell(f"{len(tasks) - len(pending)} of {len(tasks)} exist already")
    return pending


def _upscale(
    arguments: argparse.Namespace, tasks: Sequence[Task], report: Report, several: bool
) -> None:
    from rcod_runtime.cli.run import run_task, run_tasks
    from rcod_runtime.upscaler import Upscaler

    options = _options(arguments)
    if arguments.ray is not None:
        from rcod_runtime.cli.cluster import upscale_files

        upscale_files(_cluster(arguments), tasks, options, report)
        return
    with Upscaler(**opening(arguments)) as upscaler:
        if several:
            run_tasks(upscaler, tasks, options, report, arguments.jobs or 1)
        else:
            run_task(upscaler, tasks[0], options, report)


def _upscale_tables(arguments: argparse.Namespace) -> None:
    from rcod_runtime.cli.cluster import upscale_tables

    suffix = None if arguments.format is None else SUFFIXES[arguments.format]
    with Report(arguments.report) as report:
        upscale_tables(_cluster(arguments), arguments.inputs, Path(arguments.out), suffix,
                       _options(arguments), report)  # fmt: skip


def _cluster(arguments: argparse.Namespace) -> Cluster:
    from rcod_runtime.cli.cluster import Cluster

    return Cluster(arguments.ray, opening(arguments), arguments.jobs, arguments.ray_gpus)


def _options(arguments: argparse.Namespace) -> Options:
    from rcod_runtime.cli.image import Options

    return Options(
        _realism(arguments.realism),
        arguments.scale,
        arguments.colour_match,
        arguments.tile,
        arguments.overlap,
        arguments.batch,
    )


def _realism(text: str | None) -> str | float | None:
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        return text


if __name__ == "__main__":
    sys.exit(main())
