"""Which backend runs a bundle on this machine: engines where they fit, otherwise a CPU."""

from __future__ import annotations

import logging
import re

from rcod_runtime.backends import BACKENDS, PRECISIONS, choose
from rcod_runtime.bundle import Bundle
from rcod_runtime.chain import Chain, HostChain
from rcod_runtime.errors import EngineMismatch, UsageError

log = logging.getLogger(__name__)

TENSORRT = "tensorrt"
DEVICES = "auto, cpu or cuda:N"


def open_chain(bundle: Bundle, backend: str, device: str, precision: str, threads: int) -> Chain:
    """The chain that runs a bundle.

    ``auto`` takes the bundle's engines where they fit this machine's GPU, and says in a warning why
    not where the bundle has engines and they don't; then it takes the CPU.

    Args:
        backend: ``auto``, ``tensorrt``, ``openvino`` or ``onnxruntime``.
        device: ``auto``, ``cpu`` or ``cuda:N``; a GPU that is asked for is never replaced by the
            CPU.
        precision: of a CPU backend; engines have their own.
        threads: compute threads on the CPU, 0 for the library's choice.

    Raises:
        UsageError: an unknown backend, device or precision, or two that exclude each other.
        EngineMismatch: engines were asked for and none fits.
        BackendError: a library is missing or refuses a graph.
    """
    if backend not in ("auto", TENSORRT, *BACKENDS):
        raise UsageError(
            f"backend {backend!r}: expected one of auto, {TENSORRT}, {', '.join(BACKENDS)}."
        )
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r}: expected one of {', '.join(PRECISIONS)}.")
    index = gpu_index(device)
    if device == "cpu" or backend in BACKENDS:
        if backend == TENSORRT or index is not None:
            raise UsageError(f"backend {backend} does not run on device {device}.")
        return HostChain(bundle, choose(backend, precision, threads))
    asked = backend == TENSORRT or index is not None
    if not asked and not bundle.manifest.engines:
        return HostChain(bundle, choose(backend, precision, threads))
    from rcod_runtime.backends.trt.engines import find_engines

    found = find_engines(bundle.manifest, index or 0)
    if not isinstance(found, str):
        from rcod_runtime.backends.trt.chain import open_device_chain

        return open_device_chain(bundle, found, index or 0, precision)
    if asked:
        raise EngineMismatch(f"{bundle.folder}: {found}")
    log.warning("the bundle's engines are not used: %s", found)
    return HostChain(bundle, choose(backend, precision, threads))


def gpu_index(device: str) -> int | None:
    """N of ``cuda:N``; None for ``auto`` and ``cpu``.

    Raises:
        UsageError: another text.
    """
    match = re.fullmatch(r"cuda:(\d{1,3})", device)
    if match is None and device not in ("auto", "cpu"):
        raise UsageError(f"device {device!r}: expected {DEVICES}.")
    return None if match is None else int(match[1])
