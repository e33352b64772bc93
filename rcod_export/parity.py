"""PyTorch in fp32 against exported graphs, graph by graph, level by level, and whole images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rcod_export.reference import Case
from rcod_runtime.contract import GRAPHS, GUIDE
from rcod_runtime.errors import ParityError
from rcod_runtime.manifest import Parity, Precision

Array = npt.NDArray[np.float32]
Images = Mapping[str, npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class Limit:
    """What a graph may differ from PyTorch in fp32."""

    max_abs: float
    cosine: float


# fp32: both sides sum the same products in another order. Latents are about unit size, images in
# [-1, 1]; an image passes more layers at more pixels, so its largest deviation is larger.
# fp16 and bf16 round every value to 11 and 8 bits: an error that grows with the depth. int8 rounds
# the inputs of a convolution to 256 values of their range: measured on a photo, whose range it is.
LIMITS = {
    Precision.FP32: {
        GUIDE: Limit(max_abs=1e-4, cosine=0.99999),
        "encoder": Limit(max_abs=3e-4, cosine=0.99999),
        "vpim": Limit(max_abs=1e-4, cosine=0.99999),
        "denoiser": Limit(max_abs=1e-4, cosine=0.99999),
        "decoder": Limit(max_abs=3e-4, cosine=0.99999),
    },
    Precision.FP16: dict.fromkeys(GRAPHS, Limit(max_abs=1e-2, cosine=0.9999)),
    Precision.BF16: dict.fromkeys(GRAPHS, Limit(max_abs=1e-1, cosine=0.999)),
    Precision.INT8: dict.fromkeys(GRAPHS, Limit(max_abs=5e-1, cosine=0.99)),
}
# Whole image, 8 bit, graphs against PyTorch.
MIN_SAMPLE_PSNR_DB = {
    Precision.FP32: 40.0,
    Precision.FP16: 40.0,
    Precision.BF16: 35.0,
    Precision.INT8: 35.0,
}
MAX_MEAN_SHIFT_U8 = 0.5  # of a channel's mean: no colour shift
MAX_LEVELS_PSNR_DB = 60.0  # two levels closer than this are the same level: a wrongly folded t


def limit_of(graph: str, precision: Precision, amplification: float = 1.0) -> Limit:
    """The limit of a graph. Eq. 3 enlarges the U-Net's deviation by ``amplification``, sigma/alpha
    of the level, and the denoiser's limit grows with it."""
    limit = LIMITS[precision][graph]
    return Limit(limit.max_abs * max(1.0, amplification), limit.cosine)


LATENTS = ("z_lq", "z_sr")
SKIP = "skip"  # the row of the channels behind the latent's

Run = Callable[[Mapping[str, Array]], dict[str, Array]]


def onnxruntime_session(path: Path) -> Run:
    """An ONNX file on ONNX Runtime's CPU provider: feeds by name -> outputs by name."""
    from rcod_runtime.backends.onnxruntime_backend import OnnxRuntimeBackend

    return OnnxRuntimeBackend("fp32", 0).load(path).run


def openvino_session(path: Path) -> Run:
    """An ONNX file on OpenVINO, products in bf16 where the processor has them."""
    from rcod_runtime.backends.openvino_backend import OpenVinoBackend, has_native_bf16

    session = OpenVinoBackend("bf16" if has_native_bf16() else "fp32", 0).load(path)

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        session.bind({name: value.shape for name, value in feeds.items()})
        return {name: value.copy() for name, value in session.run(feeds).items()}

    return run


def compare(
    cases: Iterable[Case], path: Path, precision: Precision, latent_channels: int
) -> Iterator[Parity]:
    """A graph's outputs against its cases; the first output names a row, others have their own, and
    so has what skips the denoiser: beside its channels, which are merely handed on, the latent's
    deviation would look small.

    Raises:
        ParityError: a limit is passed.
    """
    run = (openvino_session if precision is Precision.BF16 else onnxruntime_session)(path)
    for case in cases:
        found = run(case.feeds)
        limit = limit_of(case.graph, precision, case.amplification)
        for index, (name, expected) in enumerate(case.expected.items()):
            label = case.level if index == 0 else name
            pair = expected, found[name]
            if name in LATENTS and expected.shape[1] > latent_channels:
                skip = expected[:, latent_channels:], found[name][:, latent_channels:]
                yield measure(case.graph, SKIP, precision, *skip, limit)
                pair = expected[:, :latent_channels], found[name][:, :latent_channels]
            yield measure(case.graph, label, precision, *pair, limit)


def measure(
    graph: str,
    level: str | None,
    precision: Precision,
    reference: Array,
    found: Array,
    limit: Limit,
) -> Parity:
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
    if precision is not Precision.FP32:  # what a half rounds off is relative to the values
        rms = float(np.sqrt(np.square(a).mean()))
        limit = Limit(limit.max_abs * max(1.0, rms), limit.cosine)
    norms = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    # Two zeros agree, such as the m_l of a photo for which the MEM's ReLU is closed.
    cosine = float(a @ b) / norms if norms > 0 else float(not a.any() and not b.any())
    if max_abs > limit.max_abs or cosine < limit.cosine:
        why = "the exported graph does not compute what the checkpoint does."
        if precision is Precision.INT8:
            why = "8 bits are too few for this model, or its photos for --calibration too few."
        raise ParityError(
            f"{where}: ONNX differs from PyTorch by {max_abs:.2e} (limit {limit.max_abs:.0e}), "
            f"cosine {cosine:.7f} (limit {limit.cosine}). The bundle was not written: {why}"
        )
    return Parity(
        graph=graph,
        level=level,
        precision=precision,
        max_abs=max_abs,
        cosine=cosine,
        limit_max_abs=limit.max_abs,
        limit_cosine=limit.cosine,
    )


def check_levels_differ(images: Images) -> None:
    """Raises ParityError where two neighbouring levels give nearly the same image."""
    names = list(images)
    for a, b in zip(names, names[1:], strict=False):
        closeness = psnr_u8(images[a], images[b])
        if closeness > MAX_LEVELS_PSNR_DB:
            raise ParityError(
                f"levels {a} and {b} give nearly the same image ({closeness:.1f} dB, limit "
                f"{MAX_LEVELS_PSNR_DB}): the timestep does not reach the U-Net. Train longer, or "
                "check the level table."
            )


def check_sample(reference: Images, found: Images, precision: Precision) -> float:
    """The lowest PSNR of the levels' images against PyTorch's, in dB.

    Raises:
        ParityError: it is under the limit, or a channel's mean is shifted.
    """
    lowest = MIN_SAMPLE_PSNR_DB[precision]
    worst = min(psnr_u8(reference[name], image) for name, image in found.items())
    if worst < lowest:
        raise ParityError(
            f"sample image: {precision.value} graphs against PyTorch {worst:.1f} dB, expected at "
            f"least {lowest}. The bundle was not written."
        )
    for name, image in found.items():
        shift = np.abs(image.mean((0, 1)) - reference[name].mean((0, 1))).max()
        if shift > MAX_MEAN_SHIFT_U8:
            raise ParityError(
                f"sample image, level {name}: a channel's mean is shifted by {shift:.2f} of 255, "
                f"expected at most {MAX_MEAN_SHIFT_U8}. The bundle was not written."
            )
    return worst


def psnr_u8(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """PSNR of two uint8 images in dB; equal images count as 100 dB, so that JSON can hold it."""
    error = float(np.square(a.astype(np.float64) - b.astype(np.float64)).mean())
    return 100.0 if error == 0 else min(100.0, 10 * float(np.log10(255.0**2 / error)))
