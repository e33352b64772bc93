"""PyTorch against ONNX Runtime, graph by graph and level by level."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rcod_runtime.errors import ParityError
from rcod_runtime.manifest import Parity, Precision

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Limit:
    """What a graph in fp32 may differ from PyTorch in fp32."""

    max_abs: float
    cosine: float


# Both sides sum the same products in fp32 in another order. Latents are about unit size, images
# in [-1, 1]; an image passes more layers at more pixels, so its largest deviation is larger.
LIMITS = {
    "encoder": Limit(max_abs=3e-4, cosine=0.99999),
    "vpim": Limit(max_abs=1e-4, cosine=0.99999),
    "denoiser": Limit(max_abs=1e-4, cosine=0.99999),
    "decoder": Limit(max_abs=3e-4, cosine=0.99999),
}
# Eq. 3 multiplies the U-Net's deviation by sigma/alpha, so the denoiser's limit grows with it.
MIN_SAMPLE_PSNR_DB = 40.0  # whole image, 8 bit, ONNX against PyTorch
MAX_LEVELS_PSNR_DB = 60.0  # two levels closer than this are the same level: a wrongly folded t


def limit_of(graph: str, amplification: float = 1.0) -> Limit:
    """The limit of a graph; ``amplification`` is sigma/alpha of the level, for the denoiser."""
    limit = LIMITS[graph]
    return Limit(limit.max_abs * max(1.0, amplification), limit.cosine)


def run_onnx(path: Path, feeds: dict[str, Array]) -> dict[str, Array]:
    """Run an ONNX file on ONNX Runtime's CPU provider -> outputs by name."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def measure(graph: str, level: str | None, reference: Array, found: Array, limit: Limit) -> Parity:
    """Compare two arrays of one shape.

    Raises:
        ParityError: shapes differ, a value is not finite, or a limit is passed.
    """
    where = graph if level is None else f"{graph}, level {level}"
    if reference.shape != found.shape:
        raise ParityError(f"{where}: PyTorch gives shape {reference.shape}, ONNX {found.shape}.")
    if not (np.isfinite(reference).all() and np.isfinite(found).all()):
        raise ParityError(f"{where}: not all values are finite. Check the checkpoint's weights.")
    a, b = reference.astype(np.float64).ravel(), found.astype(np.float64).ravel()
    max_abs = float(np.abs(a - b).max())
    norms = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    cosine = float(a @ b) / max(norms, 1e-30)
    if max_abs > limit.max_abs or cosine < limit.cosine:
        raise ParityError(
            f"{where}: ONNX differs from PyTorch by {max_abs:.2e} (limit {limit.max_abs:.0e}), "
            f"cosine {cosine:.7f} (limit {limit.cosine}). The bundle was not written: the exported "
            "graph does not compute what the checkpoint does."
        )
    return Parity(
        graph=graph,
        level=level,
        precision=Precision.FP32,
        max_abs=max_abs,
        cosine=cosine,
        limit_max_abs=limit.max_abs,
        limit_cosine=limit.cosine,
    )


def psnr_u8(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """PSNR of two uint8 images in dB; equal images count as 100 dB, so that JSON can hold it."""
    error = float(np.square(a.astype(np.float64) - b.astype(np.float64)).mean())
    return 100.0 if error == 0 else min(100.0, 10 * float(np.log10(255.0**2 / error)))
