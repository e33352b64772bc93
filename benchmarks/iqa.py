"""Learned metrics through pyiqa, where it is installed and its weights can be had.

pyiqa is no extra of this package: its licence (PolyForm Noncommercial) is for each user to
accept. What can't be had is not replaced by something else: it is missing, with the reason.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]

INSTALL_LINE = 'pip install "pyiqa>=0.1.13,<0.2"'
MANIQA_SEED = 0  # it judges random crops
# What a package may raise that fetches weights while it is built: no network, no file, no hash.
BUILDING_FAILS = (ImportError, OSError, RuntimeError, ValueError, KeyError, AssertionError)


@dataclass(frozen=True)
class Learned:
    """One of pyiqa's metrics. ``whole_set``: of two folders, not of one image."""

    name: str
    pyiqa_name: str
    header: str
    decimals: int
    needs_hq: bool
    higher_is_better: bool
    whole_set: bool = False


LEARNED = (
    Learned("lpips", "lpips", "LPIPS", 4, True, False),
    Learned("dists", "dists", "DISTS", 4, True, False),
    Learned("musiq", "musiq", "MUSIQ", 2, False, True),
    Learned("maniqa", "maniqa-pipal", "MANIQA", 4, False, True),
    Learned("clipiqa", "clipiqa", "CLIPIQA", 4, False, True),
    Learned("fid", "fid", "FID", 2, True, False, whole_set=True),
)


@dataclass(frozen=True)
class Loaded:
    """A metric that is ready: ``of_image`` (sr, hq), or ``of_folders`` (sr folder, hq folder)."""

    learned: Learned
    protocol: str
    of_image: Callable[[Image, Image], float] | None
    of_folders: Callable[[Path, Path], float] | None


def load(names: Sequence[str]) -> tuple[list[Loaded], dict[str, str]]:
    """Those of ``names`` that can be had, and of the others why not."""
    chosen = [learned for learned in LEARNED if learned.name in names]
    if not chosen:
        return [], {}
    try:
        import pyiqa
    except ImportError as exc:
        reason = f"{exc.name or 'pyiqa'} is not installed: {INSTALL_LINE}"
        return [], {learned.name: reason for learned in chosen}
    loaded, missing = [], {}
    for learned in chosen:
        try:
            metric = pyiqa.create_metric(learned.pyiqa_name, device="cpu")
        except BUILDING_FAILS as exc:
            said = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
            missing[learned.name] = f"its weights can't be had here ({said[:200]})"
            continue
        protocol = f"pyiqa {getattr(pyiqa, '__version__', '')} {learned.pyiqa_name}".strip()
        loaded.append(_wrapped(learned, metric, protocol))
    return loaded, missing


def _wrapped(learned: Learned, metric: Any, protocol: str) -> Loaded:
    if learned.whole_set:
        return Loaded(learned, protocol, None, lambda sr, hq: float(metric(str(sr), str(hq))))

    def of_image(sr: Image, hq: Image) -> float:
        import torch

        torch.manual_seed(MANIQA_SEED)
        with torch.no_grad():
            images = [_tensor(sr), _tensor(hq)] if learned.needs_hq else [_tensor(sr)]
            return float(metric(*images))

    return Loaded(learned, protocol, of_image, None)


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
            metric.learned.name: None
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
