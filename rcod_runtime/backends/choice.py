"""Which backend runs a bundle on this machine: engines where they fit, otherwise a CPU."""

from __future__ import annotations

import hashlib
import logging
import re

from rcod_runtime.backends import BACKENDS, PRECISIONS, choose, importing, installed
from rcod_runtime.bundle import Bundle
from rcod_runtime.chain import Chain, HostChain
from rcod_runtime.errors import BackendError, EngineMismatch, UsageError
from rcod_runtime.tiles import check_tile, is_whole

log = logging.getLogger(__name__)

TENSORRT = "tensorrt"
ORT, ORT_TENSORRT = "onnxruntime", "onnxruntime-tensorrt"
CHOICES = ("auto", TENSORRT, *BACKENDS, ORT_TENSORRT)
DEVICES = "auto, cpu or cuda:N"
MAX_THREADS = 1024


def open_chain(
    bundle: Bundle,
    backend: str,
    device: str,
    precision: str,
    threads: int,
    tile_px: int | None = None,
) -> Chain:
    """The chain that runs a bundle.

    ``auto`` takes the bundle's engines where they fit this machine's GPU and can be opened; where
    there are some and they don't or can't, a warning says why, and the CPU it is. A GPU that is
    asked for by its number is never replaced by the CPU: without engines, ONNX Runtime's CUDA
    provider it is.

    Args:
        backend: ``auto``, ``tensorrt`` (the bundle's engines), ``openvino``, ``onnxruntime`` (CPU,
            or CUDA with a device cuda:N), or ``onnxruntime-tensorrt`` (it builds engines at first
            use).
        device: ``auto``, ``cpu`` or ``cuda:N``.
        precision: on a CPU; a GPU computes in the precision of the graphs.
        threads: compute threads on the CPU, 0 for the library's choice.
        tile_px: of the engines, where the bundle has some for several sizes; None: its own.

    Raises:
        UsageError: an unknown backend, device or precision, two that exclude each other, or
            ``threads`` that are no number in 0..1024.
        EngineMismatch: engines were asked for and none fits.
        BackendError: a library is missing or refuses a graph.
    """
    known = (("backend", backend, CHOICES), ("precision", precision, PRECISIONS))
    for name, value, choices in known:
        if not isinstance(value, str) or value not in choices:
            raise UsageError(f"{name} {value!r}: expected one of {', '.join(choices)}.")
    if not is_whole(threads) or not 0 <= threads <= MAX_THREADS:
        raise UsageError(
            f"threads {threads!r}: expected 0 (the library's choice) to {MAX_THREADS}."
        )
    threads = int(threads)  # of numpy's
    index = gpu_index(device)
    only_gpu, only_cpu = backend in (TENSORRT, ORT_TENSORRT), backend == "openvino"
    if (only_gpu and device == "cpu") or (only_cpu and index is not None):
        raise UsageError(f"backend {backend} does not run on device {device}.")
    if backend == ORT_TENSORRT or (backend == ORT and index is not None):
        return _onnxruntime(bundle, backend, index or 0, precision)
    asked = backend == TENSORRT or index is not None
    if device == "cpu" or backend in BACKENDS or not (asked or bundle.manifest.engines):
        return HostChain(bundle, choose(backend, precision, threads))
    from rcod_runtime.backends.trt.engines import find_engines

    if tile_px is not None:
        check_tile(tile_px, bundle.manifest.image.size_multiple)
    found = find_engines(bundle.manifest, index or 0, tile_px)
    if not isinstance(found, str):
        from rcod_runtime.backends.trt.chain import open_device_chain

        try:
            return open_device_chain(bundle, found, index or 0, precision)
        except (BackendError, EngineMismatch) as exc:  # its memory is another's, an older driver
            if asked:
                raise
            found = str(exc)
    if backend == TENSORRT or (asked and not _has_cuda_provider()):
        raise EngineMismatch(f"{bundle.folder}: {found}")
    log.warning("the bundle's engines are not used: %s", found)
    if asked:
        return _onnxruntime(bundle, ORT, index or 0, precision)
    return HostChain(bundle, choose(backend, precision, threads))


def _onnxruntime(bundle: Bundle, backend: str, index: int, precision: str) -> HostChain:
    if bundle.manifest.has_int8:
        raise UsageError(
            f"{bundle.folder}: its int8 graphs are for CPUs. Use --device cpu, or export a "
            "bundle for the GPU with --precision fp16."
        )
    own = bundle.manifest.graphs["denoiser"].precision.value
    if precision not in ("auto", own):
        raise UsageError(
            f"precision {precision}: on a GPU the graphs run as they are, in {own}. Choose that or "
            "auto, or export the bundle in another precision."
        )
    if bundle.manifest.has_bf16:
        raise UsageError(
            f"{bundle.folder}: its graphs are in bf16, in which ONNX Runtime enlarges no images. "
            "Build engines (rcod-export engines), or export the bundle with --precision fp16."
        )
    if not installed("onnxruntime"):
        raise BackendError(f'backend {backend}: not installed. pip install "rcod[cuda]"')
    with importing("onnxruntime"):
        from rcod_runtime.backends.onnxruntime_backend import OnnxRuntimeBackend

    engines_of = _content(bundle) if backend == ORT_TENSORRT else None
    return HostChain(bundle, OnnxRuntimeBackend(own, 0, index, engines_of))


def _content(bundle: Bundle) -> str:
    """A name for all graphs with their weights."""
    graphs = bundle.manifest.graphs
    digests = "".join(graphs[name].content_sha256 for name in sorted(graphs))
    return hashlib.sha256(digests.encode()).hexdigest()[:32]


def _has_cuda_provider() -> bool:
    if not installed("onnxruntime"):
        return False
    with importing("onnxruntime"):
        import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def gpu_index(device: str) -> int | None:
    """N of ``cuda:N``; None for ``auto`` and ``cpu``.

    Raises:
        UsageError: another text.
    """
    is_text = isinstance(device, str)
    match = re.fullmatch(r"cuda:(\d{1,3})", device) if is_text else None
    if match is None and not (is_text and device in ("auto", "cpu")):
        raise UsageError(f"device {device!r}: expected {DEVICES}.")
    return None if match is None else int(match[1])
