"""ONNX Runtime on the CPU: the portable one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnxruntime as ort

from rcod_runtime.backends import Array, Shapes
from rcod_runtime.errors import BackendError


class OnnxRuntimeBackend:
    """One session for each graph; it takes any shape."""

    name = "onnxruntime"

    def __init__(self, precision: str, threads: int) -> None:
        self.version = str(ort.__version__)
        self.precision = precision
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
                str(path), self._options, providers=["CPUExecutionProvider"], enable_fallback=False
            )
        except Exception as exc:  # its exceptions share no base class
            raise BackendError(f"{path}: ONNX Runtime {self.version} refused it: {exc}") from exc
        return OnnxRuntimeSession(session, path)


class OnnxRuntimeSession:
    """One graph."""

    def __init__(self, session: ort.InferenceSession, path: Path) -> None:
        self._session, self._path = session, path
        self._names = [output.name for output in session.get_outputs()]

    def bind(self, shapes: Shapes) -> None:
        """Nothing to do: the session takes any shape."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        try:
            results = self._session.run(self._names, dict(feeds))
        except Exception as exc:  # its exceptions share no base class
            raise BackendError(f"{self._path}: could not be run: {exc}") from exc
        return dict(zip(self._names, results, strict=True))
