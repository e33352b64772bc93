"""NIQE, a quality index that needs no reference (Mittal, Soundararajan and Bovik, 2013).

An image is cut into patches; each patch gives 18 statistics of natural scenes on two scales; the
index is the distance of their mean and covariance from those of pristine photographs. The
parameters of the pristine model are data, see rcod_train.quality.pristine. Smaller is better.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from rcod_train.errors import MetricError
from rcod_train.quality.metrics import gaussian, require_scipy
from rcod_train.quality.pristine import Pristine

Floats = npt.NDArray[np.float64]

# Published NIQE figures of super-resolution papers are computed on this luma, rounded: with the Y
# of YCbCr the mean over OSEDiff's RealSR outputs is 0.7 % off, with this one 0.02 %.
GREY_WEIGHTS = np.array([0.299, 0.587, 0.114])

PATCH_PX = 96
SCALES = 2
FEATURES_PER_SCALE = 18
WINDOW_PX, WINDOW_SIGMA_PX = 7, 7 / 6
CONTRAST_FLOOR = 1.0  # C of Eq. 1
NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))  # right, below, and the two diagonals
SHAPES = np.arange(0.2, 10.001, 0.001)  # candidates for the shape parameter


def niqe(image: npt.NDArray[np.uint8], pristine: Pristine) -> float:
    """NIQE of an (H, W, 3) RGB uint8 image; at least two 96 px patches must fit.

    Raises:
        MetricError: another dtype or shape, or fewer than two patches with any contrast.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise MetricError(f"NIQE: expected (H, W, 3) uint8, found {image.shape} {image.dtype}.")
    rows, columns = image.shape[0] // PATCH_PX, image.shape[1] // PATCH_PX
    if rows * columns < 2:
        raise MetricError(
            f"NIQE: expected room for at least two patches of {PATCH_PX} x {PATCH_PX} px, found "
            f"{image.shape[1]} x {image.shape[0]} px. Leave this image out."
        )
    features = patch_features(np.rint(image.astype(np.float64) @ GREY_WEIGHTS))
    whole = features[np.isfinite(features).all(axis=1)]  # a flat patch has no statistics
    if len(whole) < 2:
        raise MetricError(
            f"NIQE: expected at least two patches with contrast, found {len(whole)} of "
            f"{len(features)}. Leave this image out."
        )
    mean = np.nanmean(np.where(np.isfinite(features), features, np.nan), axis=0)
    covariance = np.cov(whole, rowvar=False)
    difference = pristine.mean - mean
    pooled = np.linalg.pinv((pristine.covariance + covariance) / 2)  # Eq. 10
    return float(np.sqrt(difference @ pooled @ difference))


def patch_features(grey: Floats) -> Floats:
    """Statistics of every patch: (H, W) in 0..255 -> (patches, 36), 18 for each scale."""
    rows, columns = grey.shape[0] // PATCH_PX, grey.shape[1] // PATCH_PX
    grey = grey[: rows * PATCH_PX, : columns * PATCH_PX]
    features = []
    for scale in range(SCALES):
        side = PATCH_PX >> scale
        patches = (
            normalised(grey)
            .reshape(rows, side, columns, side)
            .swapaxes(1, 2)
            .reshape(rows * columns, side, side)
        )
        features.append(_statistics(patches))
        if scale + 1 < SCALES:
            grey = halved(grey)
    return np.concatenate(features, axis=1)


def normalised(grey: Floats) -> Floats:
    """Mean-subtracted, contrast-normalised luma (Eq. 1): (H, W) -> (H, W)."""
    require_scipy()
    from scipy.ndimage import correlate1d

    taps = gaussian(WINDOW_PX, WINDOW_SIGMA_PX)

    def smooth(x: Floats) -> Floats:
        columns = correlate1d(x, taps, axis=0, mode="nearest")
        result: Floats = correlate1d(columns, taps, axis=1, mode="nearest")
        return result

    mean = smooth(grey)
    deviation = np.sqrt(np.abs(smooth(grey * grey) - mean * mean))
    return (grey - mean) / (deviation + CONTRAST_FLOOR)


def _statistics(patches: Floats) -> Floats:
    """18 parameters of each patch: of its values and of four products of neighbours."""
    from scipy.special import gamma

    count = len(patches)
    shape, left, right = fit_asymmetric_gaussian(patches.reshape(count, -1))
    columns = [shape, (left + right) / 2]
    for offset in NEIGHBOURS:
        products = patches * np.roll(patches, offset, axis=(1, 2))
        shape, left, right = fit_asymmetric_gaussian(products.reshape(count, -1))
        mean = (right - left) * gamma(2 / shape) / gamma(1 / shape)  # Eq. 8
        columns += [shape, mean, left, right]
    return np.stack(columns, axis=1)


def fit_asymmetric_gaussian(x: Floats) -> tuple[Floats, Floats, Floats]:
    """Shape and the two scale parameters of an asymmetric generalised gaussian (Eq. 4), by moments.

    Args:
        x: (N, samples); each row is fitted by itself.

    Returns:
        shape, left, right: (N,) each; NaN where a row has no values on one side of zero.
    """
    from scipy.special import gamma

    with np.errstate(divide="ignore", invalid="ignore"):
        left, right = _one_sided_rms(x < 0, x), _one_sided_rms(x > 0, x)
        asymmetry = left / right
        ratio = np.mean(np.abs(x), axis=1) ** 2 / np.mean(x**2, axis=1)
    ratio *= (asymmetry**3 + 1) * (asymmetry + 1) / (asymmetry**2 + 1) ** 2
    curve = _moment_ratio()
    # The curve rises with the shape, so the nearest candidate is one of two neighbours.
    upper = np.clip(np.searchsorted(curve, ratio), 1, len(curve) - 1)
    nearer_lower = ratio - curve[upper - 1] <= curve[upper] - ratio
    shape = SHAPES[np.where(nearer_lower, upper - 1, upper)]
    shape = np.where(np.isfinite(ratio), shape, np.nan)
    scale = np.sqrt(gamma(1 / shape) / gamma(3 / shape))
    return shape, left * scale, right * scale


def _one_sided_rms(side: npt.NDArray[np.bool_], x: Floats) -> Floats:
    rms: Floats = np.sqrt(np.where(side, x**2, 0.0).sum(axis=1) / side.sum(axis=1))
    return rms


@functools.cache
def _moment_ratio() -> Floats:
    from scipy.special import gamma

    curve: Floats = gamma(2 / SHAPES) ** 2 / (gamma(1 / SHAPES) * gamma(3 / SHAPES))
    return curve


def halved(image: Floats) -> Floats:
    """Half the size by antialiased bicubic interpolation, edges mirrored: (H, W) -> (H/2, W/2)."""
    return _halving_matrix(image.shape[0]) @ image @ _halving_matrix(image.shape[1]).T


@functools.lru_cache(maxsize=8)
def _halving_matrix(length: int) -> Floats:
    """Weights of one axis, (length/2, length): Keys' cubic (a = -0.5), stretched to twice its width
    so that it also removes what the smaller grid can't hold."""
    centres = 2.0 * np.arange(length // 2) + 0.5
    taps = np.floor(centres)[:, None].astype(int) + np.arange(-3, 5)  # (length/2, 8)
    distance = np.abs(taps - centres[:, None]) / 2
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
    weights /= weights.sum(axis=1, keepdims=True)
    mirrored = np.mod(taps, 2 * length)
    mirrored = np.where(mirrored >= length, 2 * length - 1 - mirrored, mirrored)
    matrix = np.zeros((length // 2, length))
    np.add.at(matrix, (np.arange(length // 2)[:, None], mirrored), weights)
    return matrix
