"""Every level on photos held out, during a training: PSNR, SSIM, NIQE, and an image grid."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from rcod_train.board import Board
from rcod_train.checkpoint import LEVEL_NAMES
from rcod_train.data import Batch
from rcod_train.errors import MetricError
from rcod_train.files import disk_errors, file_written_whole
from rcod_train.quality.metrics import psnr_y, ssim_y
from rcod_train.quality.niqe import niqe
from rcod_train.quality.pristine import Pristine
from rcod_train.stages.rcod import RcodStage

log = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]


class Validation:
    """Called with a step, writes ``step-*.json`` and ``step-*.png`` into its folder.

    A row of the grid is a photo: the upsampled lq, every level from fidelity to realism, hq.

    Args:
        pairs: degraded once and for all, one photo each.
        pristine: NIQE's parameters; None leaves it out.
        board: takes figures and grid too.
    """

    def __init__(
        self,
        stage: RcodStage,
        pairs: list[Batch],
        folder: Path,
        pristine: Pristine | None = None,
        board: Board | None = None,
    ) -> None:
        self.stage, self.pairs, self.folder, self.board = stage, pairs, folder, board
        self.pristine = pristine
        self.hq = [to_pixels(pair.hq) for pair in pairs]
        self.judged = self._judged()

    def _judged(self) -> list[int]:
        """The photos that NIQE can judge, which takes two patches with contrast: the same at every
        level and step, so that its means can be compared."""
        if self.pristine is None:
            return []
        judged, reason = [], ""
        for i, hq in enumerate(self.hq):
            try:
                niqe(hq, self.pristine)
                judged.append(i)
            except MetricError as exc:
                reason = reason or str(exc)
        if reason:
            left_out = len(self.hq) - len(judged)
            log.info("NIQE leaves out %d of %d photos. %s", left_out, len(self.hq), reason)
        return judged

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        columns = {"input": [to_pixels(pair.lq) for pair in self.pairs]}
        grouping = self.stage.grouping
        for name, t in zip(LEVEL_NAMES[grouping.n], grouping.timesteps, strict=True):
            columns[name] = []
            for pair in self.pairs:
                level = torch.full((len(pair.lq),), t).to(pair.lq.device)
                _, sr = self.stage.generate(pair, level)
                columns[name].append(to_pixels(to_u8(sr)))
        levels = {name: self._figures(images) for name, images in columns.items()}
        rows = zip(*columns.values(), self.hq, strict=True)
        grid = np.concatenate([np.concatenate(row, axis=1) for row in rows])
        self._write(step, levels, grid)
        if self.board is not None:
            self.board.validation(step, levels, grid)
        log.info("step %d (PSNR dB / SSIM / NIQE): %s", step, ", ".join(
            f"{name} " + " / ".join("-" if v is None else f"{v:.4g}" for v in figures.values())
            for name, figures in levels.items()
        ))  # fmt: skip

    def _figures(self, images: Sequence[Pixels]) -> dict[str, float | None]:
        """Means over the photos; None where there is none."""
        pairs = list(zip(images, self.hq, strict=True))
        return {
            "psnr_y_db": _mean([psnr_y(sr, hq) for sr, hq in pairs]),
            "ssim_y": _mean([ssim_y(sr, hq) for sr, hq in pairs]),
            "niqe": self._niqe(images),
        }

    def _niqe(self, images: Sequence[Pixels]) -> float | None:
        if self.pristine is None:
            return None
        try:
            return _mean([niqe(images[i], self.pristine) for i in self.judged])
        except MetricError:  # of a photo with contrast something flat was made
            return None

    def _write(self, step: int, levels: dict[str, dict[str, float | None]], grid: Pixels) -> None:
        path = self.folder / f"step-{step:07d}"
        text = json.dumps({"step": step, "photos": len(self.pairs), "levels": levels})
        with disk_errors(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            with file_written_whole(path.with_suffix(".png")) as partial:
                Image.fromarray(grid).save(partial, "PNG")
            with file_written_whole(path.with_suffix(".json")) as partial:
                partial.write_text(text + "\n", encoding="utf-8")


def _mean(values: Sequence[float]) -> float | None:
    mean = float(np.mean(values)) if values else math.nan
    return mean if math.isfinite(mean) else None


def to_u8(image: Tensor) -> Tensor:
    """(B, 3, H, W) in about [-1, 1] -> uint8."""
    return ((image.clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)


def to_pixels(image_u8: Tensor) -> Pixels:
    """The only image of a batch, (1, 3, H, W) uint8 -> (H, W, 3)."""
    return image_u8[0].permute(1, 2, 0).contiguous().cpu().numpy()
