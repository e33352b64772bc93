"""Upscale photos with a realism control.

  rcod-upscale photo.jpg -o sharp.png                 the embedded model, on the CPU
  rcod-upscale photos/ -o sharp/ --realism realism    a folder; --recursive: its subfolders too
  rcod-upscale "in/*.png" -o sharp/ --realism 0.3     between fidelity (0) and realism (1)
  rcod-upscale photos/ -o sharp/ --skip-existing      what an earlier run has not written yet
  rcod-upscale - -o - < photo.jpg > sharp.png         stdin to stdout

The paths of the written images go to stdout, one a line; progress and messages to stderr.
Exit codes: 0 all written, 2 wrong arguments, 3 an input image, 4 the bundle, 5 the backend,
6 an output, 7 engines built for another machine, 10 some of several images failed and the others
are written, 130 stopped by Ctrl-C, 143 by SIGTERM; what is written by then is whole.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rcod_runtime.cli.files import SUFFIXES, Task, make_folders, plan_tasks
from rcod_runtime.cli.report import Record, Report
from rcod_runtime.errors import RcodError, UsageError
from rcod_runtime.files import remove_partials

EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
# As rcod_runtime.backends.choice.CHOICES, which --help must not import numpy for.
BACKENDS = ("auto", "tensorrt", "openvino", "onnxruntime", "onnxruntime-tensorrt")


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
        default="neutral",
        metavar="LEVEL",
        help="fidelity, neutral, realism, adaptive, or a number in 0..1 (default: %(default)s)",
    )
    add("--scale", type=float, metavar="S", help="1 to 4 (default: the bundle's, 4)")
    add("--recursive", action="store_true", help="folders with their subfolders, kept in OUT")
    add("--skip-existing", action="store_true", help="leave out images whose output is there")
    add(
        "--format",
        choices=tuple(SUFFIXES),
        help="of results in a folder (default: the input's, PNG where it can't be written) or on "
        "stdout (default: png)",
    )
    add("--report", type=Path, metavar="FILE", help="what became of each image, as JSON Lines")
    add("--bundle", type=Path, metavar="DIR", help="default: the embedded model")
    add(
        "--require-signature",
        type=Path,
        metavar="PEM",
        help="Ed25519 public key that must have signed the bundle",
    )
    add("--device", default="auto", help="auto, cpu or cuda:N (default: %(default)s)")
    add("--backend", choices=BACKENDS, default="auto", help="tensorrt: the bundle's engines")
    add(
        "--precision",
        choices=("auto", "fp32", "fp16", "bf16"),
        default="auto",
        help="bf16 is faster and a few grey levels off; auto: where the processor has it "
        "(default: %(default)s)",
    )
    add("--tile", type=int, metavar="PX", help="side of a tile in the result (default: bundle's)")
    add("--overlap", type=int, metavar="PX", help="overlap of tiles (default: bundle's)")
    add("--batch", type=int, metavar="N", help="tiles run together (default: backend's choice)")
    add("--colour-match", choices=("none", "adain", "wavelet"), default="wavelet")
    add(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="images in work at once: reading and writing overlap with computing "
        "(default: %(default)s)",
    )
    add("--threads", type=int, default=0, metavar="N", help="compute threads (default: all)")
    return parser


class Terminated(BaseException):
    """SIGTERM came."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``rcod-upscale``; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # file names are bytes
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        with _sigterm_raises():
            _run(arguments)
    except RcodError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, Terminated) as stop:
        print("stopped; the images listed are whole", file=sys.stderr)
        return EXIT_TERMINATED if isinstance(stop, Terminated) else EXIT_INTERRUPTED
    return 0


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does, in the block."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.jobs < 1:
        raise UsageError(f"--jobs {arguments.jobs}: expected at least 1.")
    if arguments.out == "-" and sys.stdout.isatty():
        raise UsageError("-o -: expected a file or a pipe as stdout, found a terminal.")
    tasks = plan_tasks(arguments.inputs, arguments.out, arguments.format, arguments.recursive)
    _check_report(arguments.report, tasks)
    make_folders(tasks)
    remove_partials(task.target for task in tasks if task.target is not None)
    with Report(arguments.report) as report:
        pending = _pending(tasks, report) if arguments.skip_existing else tasks
        if pending:
            _upscale(arguments, pending, report, several=len(tasks) > 1)


def _check_report(path: Path | None, tasks: Sequence[Task]) -> None:
    """A report must not replace a photo."""
    images = {image for task in tasks for image in (task.source, task.target) if image is not None}
    if path is not None and os.path.realpath(path) in map(os.path.realpath, images):
        raise UsageError(f"--report {path}: expected a file of its own, found an image's name.")


def _pending(tasks: Sequence[Task], report: Report) -> list[Task]:
    """The tasks whose output is not there. Outputs appear whole, so what is there is done."""
    pending = []
    for task in tasks:
        if task.target is not None and task.target.is_file():
            report.add(Record(str(task), str(task.target), "skipped"))
        else:
            pending.append(task)
    if len(pending) < len(tasks):
        print(f"{len(tasks) - len(pending)} of {len(tasks)} exist already", file=sys.stderr)
    return pending


def _upscale(
    arguments: argparse.Namespace, tasks: Sequence[Task], report: Report, several: bool
) -> None:
    from rcod_runtime.cli.image import Options
    from rcod_runtime.cli.run import run_tasks
    from rcod_runtime.upscaler import Upscaler

    options = Options(
        _realism(arguments.realism),
        arguments.scale,
        arguments.colour_match,
        arguments.tile,
        arguments.overlap,
        arguments.batch,
    )
    with Upscaler(
        arguments.bundle,
        arguments.device,
        arguments.backend,
        precision=arguments.precision,
        threads=arguments.threads,
        require_signature=arguments.require_signature,
    ) as upscaler:
        run_tasks(upscaler, tasks, options, report, arguments.jobs, several)


def _realism(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


if __name__ == "__main__":
    sys.exit(main())
