"""The options that say which bundle is opened, and on what: one home for all commands."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

# As rcod_runtime.backends.choice.CHOICES, which --help must not import numpy for.
BACKENDS = ("auto", "tensorrt", "openvino", "onnxruntime", "onnxruntime-tensorrt")


def a_path(text: str) -> Path:
    """For options; an empty one, as of a variable that is not set, would be this folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, found an empty one")
    return Path(text)


def add_opening_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--bundle", type=a_path, metavar="DIR", help="default: the embedded model")
    add(
        "--require-signature",
        type=a_path,
        metavar="PEM",
        help="Ed25519 public key that must have signed the bundle",
    )
    add("--device", default="auto", help="auto, cpu or cuda:N (default: %(default)s)")
    add("--backend", choices=BACKENDS, default="auto", help="tensorrt: the bundle's engines")
    add(
        "--precision",
        choices=("auto", "fp32", "fp16", "bf16"),
        default="auto",
        help="bf16 is a few grey levels off; auto: where the processor gains from it "
        "(default: %(default)s)",
    )
    add("--threads", type=int, default=0, metavar="N", help="compute threads (default: all)")


def opening(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of Upscaler."""
    return {
        "bundle": arguments.bundle,
        "device": arguments.device,
        "backend": arguments.backend,
        "precision": arguments.precision,
        "threads": arguments.threads,
        "require_signature": arguments.require_signature,
        "tile_px": getattr(arguments, "tile", None),
    }
