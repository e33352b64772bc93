"""Upscale photos with a realism control.

  rcod-upscale photo.jpg -o sharp.png                 the embedded model, on the CPU
  rcod-upscale photos/ -o sharp/ --realism realism    a folder
  rcod-upscale a.png b.png -o sharp/ --realism 0.3    between fidelity (0) and realism (1)

The paths of the written images go to stdout, one a line; progress and messages to stderr.
Exit codes: 0 all written, 2 wrong arguments, 3 an input image, 4 the bundle, 5 the backend,
6 an output, 10 some of several images failed and the others are written, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcod_runtime.errors import ImageError, OutputError, PartialFailure, RcodError, UsageError

if TYPE_CHECKING:
    from rcod_runtime.upscaler import Upscaler

EXIT_INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rcod-upscale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("inputs", nargs="+", type=Path, metavar="IN", help="images, or folders of images")
    add(
        "-o",
        "--out",
        type=Path,
        required=True,
        metavar="OUT",
        help="a file for one image, otherwise a folder (made if it is missing)",
    )
    add(
        "--realism",
        default="neutral",
        metavar="LEVEL",
        help="fidelity, neutral, realism, adaptive, or a number in 0..1 (default: %(default)s)",
    )
    add("--scale", type=float, metavar="S", help="1 to 4 (default: the bundle's, 4)")
    add("--bundle", type=Path, metavar="DIR", help="default: the embedded model")
    add(
        "--require-signature",
        type=Path,
        metavar="PEM",
        help="Ed25519 public key that must have signed the bundle",
    )
    add("--device", default="auto", help="auto or cpu (default: %(default)s)")
    add("--backend", choices=("auto", "openvino", "onnxruntime"), default="auto")
    add(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="bf16 is faster and a few grey levels off; auto: where the processor has it "
        "(default: %(default)s)",
    )
    add("--tile", type=int, metavar="PX", help="side of a tile in the result (default: bundle's)")
    add("--overlap", type=int, metavar="PX", help="overlap of tiles (default: bundle's)")
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
    return parser  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What a run does to each image."""

    realism: str | float
    scale: float | None
    colour_match: Any
    tile_px: int | None
    overlap_px: int | None


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``rcod-upscale``; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        return _run(arguments)
    except RcodError as error:
        _report(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the images listed are whole", file=sys.stderr)
        return EXIT_INTERRUPTED


def _report(error: RcodError) -> None:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.jobs < 1:
        raise UsageError(f"--jobs {arguments.jobs}: expected at least 1.")
    jobs = plan_files(arguments.inputs, arguments.out)
    options = Options(
        _realism(arguments.realism),
        arguments.scale,
        arguments.colour_match,
        arguments.tile,
        arguments.overlap,
    )
    from rcod_runtime.upscaler import Upscaler

    with Upscaler(
        arguments.bundle,
        arguments.device,
        arguments.backend,
        precision=arguments.precision,
        threads=arguments.threads,
        require_signature=arguments.require_signature,
    ) as upscaler:
        if len(jobs) == 1:
            _one(upscaler, *jobs[0], options, show_tiles=True)
            print(jobs[0][1])
            return 0
        return _many(upscaler, jobs, options, arguments.jobs)


def _realism(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def plan_files(inputs: Iterable[Path], out: Path) -> list[tuple[Path, Path]]:
    """(input, output) of every image; folders are made here, so that a bad one shows early.

    Raises:
        ImageError: an input is missing, or a folder holds no image.
        OutputError: the output can't be made, or two inputs would write the same file.
        UsageError: an output would replace its input.
    """
    from rcod_runtime.image_io import FORMATS, READ_SUFFIXES, check_format

    inputs = list(inputs)
    sources: list[Path] = []
    for path in inputs:
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in READ_SUFFIXES)
            if not found:
                raise ImageError(f"{path}: a folder without images ({', '.join(READ_SUFFIXES)}).")
            sources += found
        elif path.exists():
            sources.append(path)
        else:
            raise ImageError(f"{path}: not found.")
    as_file = len(inputs) == 1 and not inputs[0].is_dir() and not out.is_dir() and out.suffix
    if as_file:
        check_format(out)
        if not out.parent.is_dir():
            raise OutputError(f"{out}: the folder {out.parent} does not exist. Make it first.")
        pairs = [(sources[0], out)]
    else:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise OutputError(f"{out}: can't be made ({exc.strerror or exc}).") from exc
        pairs = []
        for source in sources:
            suffix = source.suffix if source.suffix.lower() in FORMATS else ".png"
            pairs.append((source, out / (source.stem + suffix)))
    targets: dict[Path, Path] = {}
    for source, target in pairs:
        if target.exists() and target.samefile(source):
            raise UsageError(f"{target}: would replace its input. Choose another -o.")
        if target in targets:
            raise OutputError(f"{target}: both {targets[target]} and {source} would write it.")
        targets[target] = source
    return pairs


def _one(
    upscaler: Upscaler, source: Path, target: Path, options: Options, show_tiles: bool = False
) -> Path:
    from tqdm import tqdm

    from rcod_runtime.image_io import read_image, write_image

    photo = read_image(source)
    with tqdm(
        desc=source.name, unit="tile", disable=None if show_tiles else True, leave=False
    ) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        sr = upscaler(
            photo.pixels,
            options.realism,
            options.scale,
            colour_match=options.colour_match,
            tile_px=options.tile_px,
            overlap_px=options.overlap_px,
            progress=progress,
        )
    write_image(target, sr, photo.icc)
    return target


def _many(upscaler: Upscaler, jobs: list[tuple[Path, Path]], options: Options, workers: int) -> int:
    """Each image by itself: one that fails is reported and the rest goes on."""
    from tqdm import tqdm

    failed = 0
    with ThreadPoolExecutor(workers) as pool:
        futures: dict[Future[Path], Path] = {
            pool.submit(_one, upscaler, source, target, options): source for source, target in jobs
        }
        try:
            for future in tqdm(
                as_completed(futures), total=len(futures), unit="image", disable=None
            ):
                try:
                    print(future.result(), flush=True)
                except UsageError:
                    raise  # wrong for one image is wrong for all
                except RcodError as error:
                    failed += 1
                    _report(error)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if failed:
        raise PartialFailure(f"{failed} of {len(jobs)} images failed; the others are written.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
