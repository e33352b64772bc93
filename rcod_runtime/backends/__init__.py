"""What runs the graphs: one small protocol, one module for each library."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from rcod_runtime.errors import BackendError, UsageError
from rcod_runtime.parallel import threads_allowed
from rcod_runtime.processor import read_processor

Array = npt.NDArray[np.float32]
Shapes = Mapping[str, tuple[int, ...]]
BackendName = Literal["openvino", "onnxruntime"]
BACKENDS: tuple[BackendName, ...] = ("openvino", "onnxruntime")  # in the order of preference
LARGE_GRAPH_BYTES = 2**30  # compiled alone, and for one shape: beside others it needs most memory
PRECISIONS = ("auto", "fp32", "fp16", "bf16")


class Session(Protocol):
    """One loaded graph. Not thread-safe."""

    def bind(self, shapes: Shapes, outputs: Shapes | None = None, common: bool = True) -> None:
        """Make ready for inputs of these shapes; cheap if they are bound already.

        Args:
            outputs: the shapes that outputs must have then. A library that knows them before it
                computes refuses others.
            common: many images will have them, so they are worth compiling for.
        """
        ...

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run on inputs of the bound shapes. Outputs are valid until the next run."""
        ...


class Backend(Protocol):
    """A library that loads graphs. ``takes_any_size``: a tile size that it has not seen costs it
    nothing, or once for all of them."""

    name: str
    version: str
    precision: str
    takes_any_size: bool

    def load(self, path: Path) -> Session:
        """Load an ONNX file.

        Raises:
            BackendError: the library refuses the graph.
        """
        ...


def installed(name: BackendName) -> bool:
    """Whether the library of a backend is there; does not import it."""
    return importlib.util.find_spec(name) is not None


@contextmanager
def importing(name: BackendName) -> Iterator[None]:
    """For the imports of an installed backend's library.

    Raises:
        BackendError: it can't be loaded; says why.
    """
    try:
        yield
    except (ImportError, OSError) as exc:
        raise BackendError(
            f"backend {name}: installed, but it can't be loaded ({exc}). Install it again, with "
            "what its message names, or choose another --backend."
        ) from exc


def precisions(name: BackendName) -> tuple[str, ...]:
    """What an installed backend computes in on this machine, the fastest last: auto takes it.

    Raises:
        BackendError: its library can't be loaded.
    """
    if name == "openvino":
        with importing(name):
            from rcod_runtime.backends.openvino_backend import has_native_bf16

        if has_native_bf16():
            return ("fp32", "bf16") if read_processor().gains_from_bf16 else ("bf16", "fp32")
    return ("fp32",)


def choose(name: str, precision: str, threads: int) -> Backend:
    """The CPU backend to use; ``auto`` is the first one installed.

    Args:
        precision: ``fp32``, ``bf16`` (openvino, on processors that compute it natively), or
            ``auto``: bf16 where that is so and faster, otherwise fp32.
        threads: compute threads, 0 for the library's choice.

    Raises:
        UsageError: an unknown backend, or a precision that this processor has not.
        BackendError: its library is not installed (the message has the pip line), or can't be
            loaded.
    """
    if name not in ("auto", *BACKENDS):
        raise UsageError(f"backend {name!r}: expected auto or one of {', '.join(BACKENDS)}.")
    available = [b for b in BACKENDS if installed(b)]
    chosen = next(iter(available), None) if name == "auto" else name
    if chosen is None or chosen not in available:
        line = "pip install rcod" if chosen != "onnxruntime" else 'pip install "rcod[onnxruntime]"'
        missing = chosen or " or ".join(BACKENDS)
        raise BackendError(f"backend {missing}: not installed. {line}")
    # Both libraries count the processors that they see, not the time that a container has of them:
    # with more threads most of them stand still in turns.
    threads = threads or threads_allowed()
    precision = precisions(chosen)[-1] if precision == "auto" else precision
    if precision not in precisions(chosen):
        raise UsageError(
            f"precision {precision}: the backend {chosen} computes in "
            f"{' and '.join(precisions(chosen))} on this machine. Choose one of these, or auto."
        )
    if chosen == "openvino":
        with importing(chosen):
            from rcod_runtime.backends.openvino_backend import OpenVinoBackend

        return OpenVinoBackend(precision, threads)
    with importing("onnxruntime"):
        from rcod_runtime.backends.onnxruntime_backend import OnnxRuntimeBackend

    return OnnxRuntimeBackend(precision, threads)
