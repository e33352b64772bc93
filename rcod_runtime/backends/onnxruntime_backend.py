"""ONNX Runtime: the portable one on the CPU, and for GPUs without engines.

On a GPU inputs and outputs cross the bus between the graphs. Latents and tokens of a 512 px tile
are 1 MB; the image is 3 MB each way and has to cross in any case. At 10 GB/s that is under 1 ms,
where the graphs of Stable Diffusion 2.1 take 28 ms at least on an RTX 4090 (rcod-export inspect).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort

from rcod_runtime.backends import Array, Shapes
from rcod_runtime.backends.trt.cache import cache_folder
from rcod_runtime.errors import BackendError

CPU, CUDA, TENSORRT = (f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "Tensorrt"))
_LIBRARIES = {CUDA: "CUDA and cuDNN", TENSORRT: "CUDA, cuDNN and TensorRT"}


class OnnxRuntimeBackend:
    """One session for each graph; it takes any shape.

    Args:
        precision: ``fp32`` on the CPU; on a GPU that of the bundle's graphs, ``fp32`` or ``fp16``.
        threads: of the CPU, 0 for ONNX Runtime's choice.
        gpu: None for the CPU, otherwise the GPU's number.
        engines_of: on a GPU, ONNX Runtime's TensorRT provider, which builds engines at first use
            and keeps them in the user's cache folder, under this name of what they are made of: it
            knows a graph again by its names, not by its weights. It multiplies fp32 as TF32 where
            a GPU has that; NVIDIA_TF32_OVERRIDE=0 in the environment prevents it. None: the CUDA
            provider.

    Raises:
        BackendError: the installed ONNX Runtime has no such provider; says the pip line.
    """

    def __init__(
        self, precision: str, threads: int, gpu: int | None = None, engines_of: str | None = None
    ) -> None:
        self.version = str(ort.__version__)
        self.precision = precision
        if engines_of and precision == "fp32" and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0":
            self.precision = "tf32"
        self._providers = _providers(gpu, engines_of)
        self.takes_any_size = gpu is None  # a GPU's library looks for its fastest kernels again
        self.name = "onnxruntime" if gpu is None else f"onnxruntime {self._providers[0][0]}"
        self._options = ort.SessionOptions()
        self._options.log_severity_level = 3
        self._options.intra_op_num_threads = threads
        # An arena keeps the largest activations of every graph for good: 4 GB more at Stable
        # Diffusion's size, and not faster.
        self._options.enable_cpu_mem_arena = False
        # Four sessions, one after another: the threads of one that has run must not spin on while
        # the next one computes (1.8 times as fast on two cores).
        self._options.add_session_config_entry("session.force_spinning_stop", "1")

    def load(self, path: Path) -> OnnxRuntimeSession:
        try:
            # Without its fallback: it would print to stdout and try the same provider again.
            session = ort.InferenceSession(
                str(path), self._options, providers=self._providers, enable_fallback=False
            )
        except Exception as exc:  # its exceptions share no base class
            raise BackendError(f"{path}: ONNX Runtime {self.version} refused it: {exc}") from exc
        wanted, used = self._providers[0][0], session.get_providers()[0]
        if used != wanted:  # it goes on with the next one, with a line in its log
            raise BackendError(
                f"{path}: expected {wanted}, ONNX Runtime fell back to {used}. Check that its "
                f"{_LIBRARIES[wanted]} libraries are installed, or use --device cpu."
            )
        return OnnxRuntimeSession(session, path)


def _providers(gpu: int | None, engines_of: str | None) -> list[tuple[str, dict[str, Any]]]:
    if gpu is None:
        return [(CPU, {})]
    # TF32 is on by default; fp32 would not be fp32.
    wanted: list[tuple[str, dict[str, Any]]] = [(CUDA, {"device_id": gpu, "use_tf32": 0})]
    if engines_of:
        cache = cache_folder() / "onnxruntime" / engines_of
        try:  # the provider makes no more than the last folder
            cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as exc:
            raise BackendError(
                f"{cache}: expected a folder for TensorRT's engines, it can't be made "
                f"({exc.strerror or exc}). Set XDG_CACHE_HOME to one that can be written."
            ) from exc
        # Not trt_fp16_enable: without it the provider takes the types of the graph, and with it
        # fp16 where the graph has fp32 too, as Eq. 3 and the levels (microsoft/onnxruntime#18707).
        options = {"trt_engine_cache_enable": True, "trt_engine_cache_path": str(cache)}
        wanted.insert(0, (TENSORRT, {"device_id": gpu, **options}))
    if wanted[0][0] not in ort.get_available_providers():
        raise BackendError(
            f"this ONNX Runtime {ort.__version__} has no {wanted[0][0]}. "
            "pip uninstall onnxruntime onnxruntime-gpu (they share their files), then "
            'pip install "rcod[cuda]"'
        )
    with contextlib.redirect_stdout(sys.stderr):  # it prints; stdout may be an image
        ort.preload_dlls(directory="")  # those of NVIDIA's packages, where they are installed
    return [*wanted, (CPU, {})]


class OnnxRuntimeSession:
    """One graph."""

    def __init__(self, session: ort.InferenceSession, path: Path) -> None:
        self._session, self._path = session, path
        self._names = [output.name for output in session.get_outputs()]

    def bind(self, shapes: Shapes, outputs: Shapes | None = None, common: bool = True) -> None:
        """Nothing to do: the session takes any shape."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        try:
            results = self._session.run(self._names, dict(feeds))
        except Exception as exc:  # its exceptions share no base class
            raise BackendError(f"{self._path}: could not be run: {exc}") from exc
        return dict(zip(self._names, results, strict=True))
