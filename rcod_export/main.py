"""Export RCOD checkpoints.

  rcod-export bundle CHECKPOINT -o BUNDLE    ONNX graphs, compared with PyTorch, and a manifest;
      of LoRA adapters: rcod-export bundle ADAPTERS --base DIR --clip DIR -o BUNDLE
  rcod-export engines BUNDLE --sm 89 120     TensorRT engines of its graphs, into the bundle
  rcod-export inspect BUNDLE                 what its graphs are made of and cost
  rcod-export verify BUNDLE                  check files, sample and engines again
  rcod-export triton BUNDLE -o REPOSITORY    a model repository for Triton Inference Server
  rcod-export card BUNDLE --quality FILE     a document of benchmarks.quality into its model card
  rcod-export sign BUNDLE --key PRIVATE.pem  an Ed25519 signature over the manifest and its hashes

The path of what was written, or the report, goes to stdout. Exit codes: 0 done, 2 wrong arguments
or key, 3 a photo of --sample or --calibration can't be read, 4 the bundle is damaged, 5 a backend
fails its self-test, 6 output not writable, 8 the export, its comparison with PyTorch or a builder
failed, 9 the checkpoint can't be read, 130 stopped by Ctrl-C, 143 by SIGTERM; engines that were
done are kept.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rcod_runtime.cli.stopping import (
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    Terminated,
    sigterm_raises,
)
from rcod_runtime.errors import ExportError, RcodError
from rcod_train.errors import RcodTrainError

MAX_NUMBER = 1_000_000  # GiB, or seconds


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rcod-export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    bundle = commands.add_parser("bundle", help="merged checkpoint or adapters to a bundle")
    bundle.add_argument("checkpoint", type=Path, help="folder that rcod-train wrote")
    bundle.add_argument("-o", "--out", type=Path, required=True, metavar="BUNDLE")
    bundle.add_argument(
        "--precision",
        choices=("fp32", "fp16", "bf16", "int8"),
        default="fp32",
        help="of the arithmetic; what must stay fp32 does; int8 is for CPUs (default: %(default)s)",
    )
    bundle.add_argument(
        "--calibration",
        type=Path,
        metavar="DIR",
        help="for int8: some twenty photos as they are going to be upscaled",
    )
    bundle.add_argument(
        "--opset",
        type=int,
        choices=(20, 23),
        help="23 has GroupNormalization and Attention as operators (TensorRT 10.14 and later); "
        "default: 20, for bf16 23",
    )
    bundle.add_argument(
        "--timesteps",
        type=int,
        nargs="+",
        default=[],
        metavar="T",
        help="of the levels, one for each (default: those of the training)",
    )
    bundle.add_argument(
        "--fold-level", metavar="NAME", help="bake one level into the denoiser, drop the others"
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
    for option, model in (("--base", "Stable Diffusion"), ("--clip", "CLIP ViT-L/14")):
        bundle.add_argument(
            option,
            metavar="DIR",
            help=f"for adapters alone: {model} as in the training, folder or hub id",
        )
    _add_engines(commands)
    sign = commands.add_parser(
        "sign",
        help="sign a bundle",
        description="Check the bundle's files, then sign its manifest, which holds their hashes. "
        "Keys: openssl genpkey -algorithm ed25519 -out private.pem; "
        "openssl pkey -in private.pem -pubout -out public.pem",
    )
    sign.add_argument("bundle", type=Path, help="folder that rcod-export wrote")
    sign.add_argument(
        "--key", type=Path, required=True, metavar="PEM", help="Ed25519 private key, no password"
    )
    triton = commands.add_parser("triton", help="a model repository for Triton Inference Server")
    triton.add_argument("bundle", type=Path, help="folder that rcod-export wrote")
    triton.add_argument("-o", "--out", type=Path, required=True, metavar="DIR")
    triton.add_argument(
        "--backend",
        choices=("onnxruntime", "tensorrt"),
        default="onnxruntime",
        help="the bundle's ONNX files, or its engines of --target tensorrt (default: %(default)s)",
    )
    triton.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    triton.add_argument("--batch", type=int, default=4, help="tiles in one call (%(default)s)")
    triton.add_argument("--tile", type=int, metavar="PX", help="of the engines (the bundle's)")
    triton.add_argument("--instances", type=int, default=1, help="per device (%(default)s)")
    triton.add_argument(
        "--delay", type=int, default=2000, metavar="US", help="wait for others (%(default)s)"
    )
    card = commands.add_parser("card", help="measured quality into a bundle's model card")
    card.add_argument("bundle", type=Path, help="folder that rcod-export wrote")
    card.add_argument(
        "--quality", type=Path, required=True, metavar="JSON", help="of benchmarks.quality"
    )
    for name, summary in (
        ("inspect", "what a bundle's graphs are made of and cost"),
        ("verify", "check a bundle's files, sample and engines again"),
    ):
        report = commands.add_parser(name, help=summary)
        report.add_argument("bundle", type=Path, help="folder that rcod-export wrote")
    return parser


def _add_engines(commands: Any) -> None:
    engines = commands.add_parser(
        "engines",
        help="TensorRT engines of a bundle's graphs",
        description="Build what is missing or out of date. Engines for RTX GPUs need no GPU here; "
        "those of --target tensorrt are built on the GPU they are for.",
    )
    add = engines.add_argument
    add("bundle", type=Path, help="folder that rcod-export wrote")
    add("--target", choices=("tensorrt", "tensorrt-rtx"), default="tensorrt-rtx")
    add(
        "--sm",
        nargs="+",
        type=int,
        default=[],
        metavar="SM",
        help="compute capabilities of the RTX GPUs (default: 89 120); not for --target tensorrt",
    )
    add("--tile", type=int, metavar="PX", help="tile side (default: the bundle's)")
    add(
        "--batch",
        nargs=2,
        type=int,
        default=[1, 4],
        metavar=("MIN", "MAX"),
        help="tiles in one call; tuned for MAX (default: 1 4)",
    )
    add("--workspace", type=positive, default=4.0, metavar="GIB", help="default: %(default)s")
    add("--optimization-level", type=int, choices=range(6), help="default: the builder's")
    add(
        "--hardware-compatibility",
        choices=("none", "ampere-plus", "same-compute-capability"),
        default="none",
        help="tensorrt: let engines run on other GPUs too, slower (default: %(default)s)",
    )
    add("--detailed", action="store_true", help="keep layer details in the engine for profilers")
    add("--timeout", type=positive, default=3600.0, metavar="S", help="per engine (default: 3600)")
    add("--force", action="store_true", help="build all anew, and replace what was built elsewhere")


def positive(text: str) -> float:
    """A number that a size or a wait can have, for argparse."""
    value = float(text)
    if not 0 < value <= MAX_NUMBER:  # NaN neither
        raise argparse.ArgumentTypeError(f"expected a number above 0, at most {MAX_NUMBER}")
    return value


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``rcod-export``; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        with sigterm_raises():
            return _COMMANDS[arguments.command](arguments)
    except (KeyboardInterrupt, Terminated) as stop:
        print("stopped", file=sys.stderr)
        return EXIT_TERMINATED if isinstance(stop, Terminated) else EXIT_INTERRUPTED
    except (RcodError, RcodTrainError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        print(f'{error.name} is not installed. pip install "rcod[export]"', file=sys.stderr)
        return ExportError.exit_code


def _bundle(arguments: argparse.Namespace) -> int:
    import logging

    from rcod_export.bundle import DEFAULT_SAMPLE, ExportConfig, build_bundle
    from rcod_runtime.manifest import Precision

    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("rcod_export").setLevel(logging.INFO)
    config = ExportConfig(
        precision=Precision(arguments.precision),
        opset=arguments.opset,
        timesteps=tuple(arguments.timesteps),
        fold_level=arguments.fold_level,
        calibration=arguments.calibration,
        tile_px=arguments.tile,
        overlap_px=arguments.overlap,
        sample=arguments.sample or DEFAULT_SAMPLE,
        base=arguments.base,
        clip=arguments.clip,
    )
    manifest = build_bundle(arguments.checkpoint, arguments.out, config)
    for row in manifest.evidence.parity:
        where = row.graph if row.level is None else f"{row.graph} {row.level}"
        print(
            f"{where:<20} {row.precision.value}  max abs {row.max_abs:.1e} "
            f"(limit {row.limit_max_abs:.0e})  cosine {row.cosine:.8f}",
            file=sys.stderr,
        )
    size = sum(path.stat().st_size for path in (arguments.out / "onnx").iterdir())
    psnr = manifest.evidence.sample_psnr_db
    print(f"sample against PyTorch {psnr:.1f} dB, graphs {size / 1e6:.1f} MB", file=sys.stderr)
    print(arguments.out)
    return 0


def _engines(arguments: argparse.Namespace) -> int:
    import logging

    from rcod_export.engines import EngineConfig, build_engines

    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("rcod_export").setLevel(logging.INFO)
    config = EngineConfig(
        target=arguments.target,
        sms=tuple(sorted(set(arguments.sm))),
        tile_px=arguments.tile,
        batch=tuple(arguments.batch),
        workspace_bytes=int(arguments.workspace * 2**30),
        optimization_level=arguments.optimization_level,
        hardware_compatibility=arguments.hardware_compatibility,
        detailed=arguments.detailed,
        timeout_s=arguments.timeout,
        force=arguments.force,
    )
    manifest = build_engines(arguments.bundle, config)
    for engine in manifest.engines:
        print(
            f"{engine.file:<60} {engine.bytes / 1e6:8.1f} MB, "
            f"scratch {engine.scratch_bytes / 1e6:.1f} MB",
            file=sys.stderr,
        )
    print(arguments.bundle)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from rcod_export.inspect import inspect_bundle, verify_bundle

    lines = {"inspect": inspect_bundle, "verify": verify_bundle}[arguments.command]
    for line in lines(arguments.bundle):
        print(line)
    return 0


def _sign(arguments: argparse.Namespace) -> int:
    from rcod_export.sign import sign_bundle

    print(sign_bundle(arguments.bundle, arguments.key))
    return 0


def _triton(arguments: argparse.Namespace) -> int:
    from rcod_export.triton import TritonConfig, build_repository

    config = TritonConfig(
        backend=arguments.backend,
        device=arguments.device,
        batch=arguments.batch,
        tile_px=arguments.tile,
        delay_us=arguments.delay,
        instances=arguments.instances,
    )
    print(build_repository(arguments.bundle, arguments.out, config))
    return 0


def _card(arguments: argparse.Namespace) -> int:
    from rcod_export.card import add_quality

    print(add_quality(arguments.bundle, arguments.quality))
    return 0


_COMMANDS = {
    "triton": _triton,
    "card": _card,
    "bundle": _bundle,
    "engines": _engines,
    "inspect": _report,
    "verify": _report,
    "sign": _sign,
}


if __name__ == "__main__":
    sys.exit(main())
