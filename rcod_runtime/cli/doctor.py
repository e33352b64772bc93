"""Say what this machine can run, and test a bundle on its own sample.

  rcod-doctor                     the embedded model
  rcod-doctor --bundle DIR        another bundle
  rcod-doctor --bundle DIR --device cuda:0   the bundle's engines must fit and run

The report goes to stdout. Exit codes, for CI and health checks: 0 healthy, 4 the bundle is damaged
or not signed as required, 5 no backend runs it or the self-test's image differs from the bundle's,
6 stdout can't be written, 7 no engine fits the GPU that was asked for, 130 and 143 stopped.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rcod_runtime.cli.opening import a_path
from rcod_runtime.cli.stopping import Terminated, exit_code, sigterm_raises
from rcod_runtime.cli.streams import leave_streams, open_closed_streams, print_line, tell
from rcod_runtime.errors import BackendError, RcodError

if TYPE_CHECKING:
    from rcod_runtime.bundle import Bundle

PACKAGES = (
    "rcod",
    "numpy",
    "pillow",
    "openvino",
    "onnxruntime",
    "onnxruntime-gpu",
    "cuda-bindings",
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rcod-doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--bundle", type=a_path, metavar="DIR", help="default: the embedded model")
    add("--device", default="auto", help="what must work: auto, cpu or cuda:N (%(default)s)")
    add(
        "--require-signature",
        type=a_path,
        metavar="PEM",
        help="Ed25519 public key that must have signed the bundle",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``rcod-doctor``; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    open_closed_streams()
    try:
        with sigterm_raises():
            for line in examine(arguments.bundle, arguments.device, arguments.require_signature):
                print_line(line)
    except RcodError as error:
        tell(f"{type(error).__name__}: {error}")
        return error.exit_code
    except (KeyboardInterrupt, Terminated) as stop:
        tell("stopped; nothing is said of what was not tested")
        return exit_code(stop)
    finally:
        leave_streams()
    return 0


def examine(
    folder: Path | None, device: str = "auto", require_signature: Path | None = None
) -> Iterator[str]:
    """The report, line by line.

    Raises:
        BundleError: the bundle is damaged, or not signed by the required key.
        BackendError: no backend runs it, or one gives another image than the bundle's sample.
        EngineMismatch: a GPU is asked for, and no engine of the bundle fits it.
        UsageError: an unknown device.
    """
    from rcod_runtime.backends import BACKENDS, precisions
    from rcod_runtime.backends.choice import gpu_index
    from rcod_runtime.bundle import open_bundle
    from rcod_runtime.selftest import cpu_obstacle, self_test

    gpu = gpu_index(device)
    yield f"python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield ", ".join(f"{name} {version}" for name, version in _versions())
    bundle = open_bundle(folder, require_signature)
    identity, levels = bundle.manifest.identity, bundle.manifest.levels
    yield f"bundle {identity.name} ({identity.family}): graphs are whole"
    if require_signature is not None:
        yield f"signed by {require_signature}"
    yield "levels " + ", ".join(f"{level.name} t={level.timestep}" for level in levels)
    engines = None if device == "cpu" else (yield from _engines(bundle, gpu or 0, gpu is not None))
    if engines is not None:
        line = self_test(bundle, "tensorrt", "auto", require_signature, f"cuda:{gpu or 0}")
        yield f"backend tensorrt: {line}"
    obstacles = {name: cpu_obstacle(bundle.manifest, name) for name in BACKENDS}
    usable = [name for name, reason in obstacles.items() if reason is None]
    for name, reason in obstacles.items():
        if reason is not None:
            yield f"backend {name}: {reason}"
    if not usable and engines is None:
        raise BackendError("no backend that is installed runs this bundle. pip install rcod")
    for name in usable:
        for precision in precisions(name):
            yield f"backend {name}: {self_test(bundle, name, precision, require_signature)}"
    told = bundle.manifest.precision_with
    chosen = engines or f"{usable[0]} {told(precisions(usable[0])[-1])}"
    yield f"used by default: {chosen}"


def _versions() -> Iterator[tuple[str, str]]:
    """Of the packages that are installed."""
    from rcod_runtime.backends.trt.libraries import MODULES, load_tensorrt

    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    for target in MODULES:
        try:
            yield target, str(load_tensorrt(target).__version__)
        except BackendError:
            continue


def _engines(bundle: Bundle, index: int, required: bool) -> Generator[str, None, str | None]:
    """Lines about the GPU and every set of engines; returns what of them would be used, if any.

    Raises:
        BackendError, EngineMismatch: they are required, and none fits or can be opened.
    """
    from rcod_runtime.backends.choice import open_chain
    from rcod_runtime.backends.trt.engines import engine_sets, find_engines, flaw, obstacle
    from rcod_runtime.backends.trt.libraries import load_cuda, sm_of
    from rcod_runtime.errors import EngineMismatch

    try:
        yield f"gpu cuda:{index}: sm_{sm_of(load_cuda(), index)}"
    except BackendError as exc:
        yield f"gpu: {exc}"
    manifest = bundle.manifest
    for engines in engine_sets(manifest):
        reason = flaw(manifest, engines) or obstacle(engines.engines["encoder"], index)
        yield f"{engines.folder}: {'fits' if reason is None else f'not used, {reason}'}"
    found = find_engines(manifest, index)
    if not isinstance(found, str):
        try:
            open_chain(bundle, "tensorrt", f"cuda:{index}", "auto", 0).close()
        except (BackendError, EngineMismatch) as exc:
            if required:
                raise
            yield f"backend tensorrt: not used, {exc}"
            return None
        return f"{found.target} {found.version} {found.precision} on cuda:{index}"
    if required:
        raise EngineMismatch(f"{bundle.folder}: {found}")
    return None


if __name__ == "__main__":
    sys.exit(main())
