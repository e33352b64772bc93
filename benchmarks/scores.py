"""Metrics as data, and every method's scores on every pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.errors import DatasetError
from benchmarks.iqa import Loaded
from benchmarks.pairs import Pair, read_rgb
from rcod_runtime.resample import upsample
from rcod_train.errors import MetricError
from rcod_train.quality.metrics import psnr_y, require_scipy, ssim_y
from rcod_train.quality.niqe import niqe
from rcod_train.quality.pristine import Pristine

Image = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Metric:
    """One figure of an image. ``compute`` takes (sr, hq); without ``needs_hq`` only sr counts."""

    name: str
    header: str
    decimals: int
    needs_hq: bool
    higher_is_better: bool
    protocol: str
    compute: Callable[[Image, Image], float]


@dataclass(frozen=True)
class Method:
    """One way to an sr image. ``run`` takes the pair, its lq and its hq."""

    name: str
    kind: str  # reference, baseline, outputs or model
    run: Callable[[Pair, Image, Image], Image]


@dataclass(frozen=True)
class Score:
    """A method's image of one pair, and its values by metric; None where one doesn't apply."""

    pair: str
    method: str
    sr: Image
    values: dict[str, float | None]


METRIC_NAMES = ("psnr_y", "ssim_y", "niqe")


def build_metrics(names: Sequence[str], pristine: Callable[[], Pristine]) -> list[Metric]:
    """The metrics of these names; ``pristine`` is asked only where NIQE is among them.

    Raises:
        MissingPackage: a package that one of them needs is not installed.
    """
    metrics = []
    for name in names:
        if name == "psnr_y":
            protocol = "Y of YCbCr, float, not rounded, no crop, peak 255"
            metrics.append(Metric(name, "PSNR dB", 3, True, True, protocol, psnr_y))
        elif name == "ssim_y":
            require_scipy()
            protocol = "rounded Y, gaussian 11x11 sigma 1.5, valid area, contrast clamped at 0"
            metrics.append(Metric(name, "SSIM", 4, True, True, protocol, ssim_y))
        elif name == "niqe":
            require_scipy()
            metrics.append(_niqe_metric(pristine()))
        else:
            raise MetricError(f"metric {name!r}: expected one of {', '.join(METRIC_NAMES)}.")
    return metrics


def _niqe_metric(pristine: Pristine) -> Metric:
    kind = "original parameters" if pristine.is_original else "OTHER PARAMETERS than published ones"
    protocol = f"rounded grey, 96 px patches, {kind} (sha256 {pristine.sha256[:12]})"
    header = "NIQE" if pristine.is_original else "NIQE (own parameters)"
    return Metric("niqe", header, 3, False, False, protocol, lambda sr, hq: niqe(sr, pristine))


def packaged_metric(loaded: Loaded) -> Metric:
    """Another package's metric of single images."""
    assert loaded.of_image is not None
    kind = loaded.packaged
    return Metric(
        kind.name,
        kind.header,
        kind.decimals,
        kind.needs_hq,
        kind.higher_is_better,
        loaded.protocol,
        loaded.of_image,
    )


def bicubic(lq: Image, size_hw: tuple[int, int]) -> Image:
    """Bicubic interpolation in floating point, rounded once: what the runtime feeds its graphs."""
    return np.rint(np.clip(upsample(lq, size_hw), 0, 255)).astype(np.uint8)


BICUBIC = Method("bicubic", "baseline", lambda pair, lq, hq: bicubic(lq, hq.shape[:2]))
GROUND_TRUTH = Method("hq", "reference", lambda pair, lq, hq: hq)


def outputs_method(name: str, images: Mapping[str, Path]) -> Method:
    """A folder of finished images, by the name of their pair."""
    return Method(name, "outputs", lambda pair, lq, hq: read_rgb(images[pair.name]))


def scale_of(pair: Pair, lq: Image, hq: Image) -> float:
    """Enlargement from lq to hq.

    Raises:
        DatasetError: it isn't the same for both sides.
    """
    scale = float(hq.shape[0] / lq.shape[0])
    if round(lq.shape[1] * scale) != hq.shape[1]:
        raise DatasetError(
            f"{pair.hq}: expected {pair.lq.name} enlarged by one factor, found "
            f"{lq.shape[1]} x {lq.shape[0]} px and {hq.shape[1]} x {hq.shape[0]} px."
        )
    return scale


def score_pairs(
    pairs: Sequence[Pair], methods: Sequence[Method], metrics: Sequence[Metric]
) -> Iterator[Score]:
    """Every method on every pair, pair by pair.

    Raises:
        DatasetError: a method's image has another size than the ground truth.
    """
    for pair in pairs:
        lq, hq = read_rgb(pair.lq), read_rgb(pair.hq)
        scale_of(pair, lq, hq)
        for method in methods:
            sr = method.run(pair, lq, hq)
            if sr.shape != hq.shape:
                raise DatasetError(
                    f"{method.name}, {pair.name}: expected {hq.shape[1]} x {hq.shape[0]} px as in "
                    f"{pair.hq}, found {sr.shape[1]} x {sr.shape[0]} px."
                )
            is_itself = method.kind == "reference"
            values = {
                m.name: None if m.needs_hq and is_itself else m.compute(sr, hq) for m in metrics
            }
            yield Score(pair.name, method.name, sr, values)


def mean_of(values: Sequence[float | None]) -> float | None:
    """Mean of per-image values; None where one is missing."""
    numbers = [value for value in values if value is not None]
    return float(np.mean(numbers)) if numbers and len(numbers) == len(values) else None
