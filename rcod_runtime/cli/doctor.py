"""Say what this machine can run, and test a bundle on its own sample.

  rcod-doctor                     the embedded model
  rcod-doctor --bundle DIR        another bundle

The report goes to stdout. Exit codes: 0 healthy, 4 the bundle is damaged, 5 no backend runs it or
the self-test's image differs from the bundle's.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from pathlib import Path

from rcod_runtime.errors import BackendError, RcodError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rcod-doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="default: the embedded model")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``rcod-doctor``; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        examine(arguments.bundle)
    except RcodError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def examine(folder: Path | None) -> None:
    """Print the report.

    Raises:
        BundleError: the bundle is damaged.
        BackendError: no backend runs it, or one gives another image than the bundle's sample.
    """
    from rcod_runtime.backends import BACKENDS, installed
    from rcod_runtime.bundle import open_bundle

    print(f"python {platform.python_version()}, {platform.system()} {platform.machine()}")
    bundle = open_bundle(folder)
    identity, levels = bundle.manifest.identity, bundle.manifest.levels
    print(f"bundle {identity.name} ({identity.family}): files are whole")
    print("levels " + ", ".join(f"{level.name} t={level.timestep}" for level in levels))
    usable = [name for name in BACKENDS if installed(name)]
    for name in BACKENDS:
        if name not in usable:
            print(f"backend {name}: not installed")
    if not usable:
        raise BackendError("no backend is installed. pip install rcod")
    for name in usable:
        print(f"backend {name}: {_self_test(bundle.folder, name)}")
    print(f"used by default: {usable[0]}")


def _self_test(folder: Path, backend: str) -> str:
    import numpy as np

    from rcod_runtime.image_io import read_image
    from rcod_runtime.manifest import sha256_file
    from rcod_runtime.upscaler import Upscaler

    with Upscaler(folder, backend=backend) as upscaler:
        sample = upscaler.manifest.sample
        if sample is None:
            return f"{upscaler.backend}, loads; the bundle has no sample to test on"
        files = {sample.lq: sample.lq_sha256, sample.sr: sample.sr_sha256}
        for name, digest in files.items():
            if sha256_file(folder / name) != digest:
                raise BackendError(f"{folder / name}: the self-test's file was changed.")
        lq, sr = (read_image(folder / name).pixels for name in files)
        upscaler(lq, realism=sample.realism)
        started = time.perf_counter()
        found = upscaler(lq, realism=sample.realism)
        elapsed_ms = (time.perf_counter() - started) * 1e3
        worst = int(np.abs(found.astype(np.int32) - sr.astype(np.int32)).max())
        if worst > sample.max_abs_diff_u8:
            raise BackendError(
                f"backend {backend}: the sample's image differs by {worst} of 255, "
                f"expected at most {sample.max_abs_diff_u8}."
            )
        size = f"{lq.shape[1]}x{lq.shape[0]} -> {sr.shape[1]}x{sr.shape[0]}"
        return (
            f"{upscaler.backend}, self-test passed ({size} in {elapsed_ms:.0f} ms, off by {worst})"
        )


if __name__ == "__main__":
    sys.exit(main())
