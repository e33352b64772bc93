"""Say what this machine can run, and test a bundle on its own sample.

  rcod-doctor                     the embedded model
  rcod-doctor --bundle DIR        another bundle

The report goes to stdout. Exit codes: 0 healthy, 4 the bundle is damaged or not signed
as required, 5 no backend runs it or
the self-test's image differs from the bundle's.
"""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path

from rcod_runtime.errors import BackendError, RcodError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rcod-doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="default: the embedded model")
    parser.add_argument(
        "--require-signature",
        type=Path,
        metavar="PEM",
        help="Ed25519 public key that must have signed the bundle",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``rcod-doctor``; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        examine(arguments.bundle, arguments.require_signature)
    except RcodError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def examine(folder: Path | None, require_signature: Path | None = None) -> None:
    """Print the report.

    Raises:
        BundleError: the bundle is damaged, or not signed by the required key.
        BackendError: no backend runs it, or one gives another image than the bundle's sample.
    """
    from rcod_runtime.backends import BACKENDS, installed, precisions
    from rcod_runtime.bundle import open_bundle
    from rcod_runtime.selftest import self_test

    print(f"python {platform.python_version()}, {platform.system()} {platform.machine()}")
    bundle = open_bundle(folder, require_signature)
    identity, levels = bundle.manifest.identity, bundle.manifest.levels
    print(f"bundle {identity.name} ({identity.family}): files are whole")
    if require_signature is not None:
        print(f"signed by {require_signature}")
    print("levels " + ", ".join(f"{level.name} t={level.timestep}" for level in levels))
    usable = [name for name in BACKENDS if installed(name)]
    for name in BACKENDS:
        if name not in usable:
            print(f"backend {name}: not installed")
    if not usable:
        raise BackendError("no backend is installed. pip install rcod")
    for name in usable:
        for precision in precisions(name):
            print(f"backend {name}: {self_test(bundle, name, precision, require_signature)}")
    print(f"used by default: {usable[0]} {precisions(usable[0])[-1]}")


if __name__ == "__main__":
    sys.exit(main())
