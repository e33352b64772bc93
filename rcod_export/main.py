"""Export RCOD checkpoints.

  rcod-export bundle CHECKPOINT -o BUNDLE    ONNX graphs, compared with PyTorch, and a manifest

The bundle's path goes to stdout. Exit codes: 0 done, 2 wrong arguments, 6 output not writable,
8 the export or its comparison with PyTorch failed, 9 the checkpoint can't be read.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rcod_runtime.errors import RcodError
from rcod_train.errors import RcodTrainError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rcod-export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    bundle = commands.add_parser("bundle", help="merged checkpoint to a bundle")
    bundle.add_argument("checkpoint", type=Path, help="folder that rcod-train wrote")
    bundle.add_argument("-o", "--out", type=Path, required=True, metavar="BUNDLE")
    bundle.add_argument(
        "--opset", type=int, choices=(20, 23), default=20, help="default: %(default)s"
    )
    bundle.add_argument(
        "--tile", type=int, default=512, metavar="PX", help="tile side (default: %(default)s)"
    )
    bundle.add_argument(
        "--overlap", type=int, default=64, metavar="PX", help="of tiles (default: %(default)s)"
    )
    bundle.add_argument(
        "--sample", type=Path, metavar="PNG", help="photo for the bundle's self-test"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``rcod-export``; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        return _bundle(arguments)
    except (RcodError, RcodTrainError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


def _bundle(arguments: argparse.Namespace) -> int:
    import logging

    from rcod_export.bundle import DEFAULT_SAMPLE, ExportConfig, build_bundle

    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("rcod_export").setLevel(logging.INFO)
    config = ExportConfig(
        opset=arguments.opset,
        tile_px=arguments.tile,
        overlap_px=arguments.overlap,
        sample=arguments.sample or DEFAULT_SAMPLE,
    )
    manifest = build_bundle(arguments.checkpoint, arguments.out, config)
    for row in manifest.evidence.parity:
        where = row.graph if row.level is None else f"{row.graph} {row.level}"
        print(
            f"{where:<20} max abs {row.max_abs:.1e} (limit {row.limit_max_abs:.0e})  "
            f"cosine {row.cosine:.8f}",
            file=sys.stderr,
        )
    size = sum(graph.bytes for graph in manifest.graphs.values())
    psnr = manifest.evidence.sample_psnr_db
    print(f"sample against PyTorch {psnr:.1f} dB, graphs {size / 1e6:.1f} MB", file=sys.stderr)
    print(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
