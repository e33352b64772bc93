"""Every level on photos held out, during a training: PSNR, SSIM, and an image grid to look at."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from rcod_train.checkpoint import LEVEL_NAMES
from rcod_train.data import Batch
from rcod_train.errors import TrainError
from rcod_train.metrics import psnr_y, ssim_y
from rcod_train.stages.rcod import RcodStage

log = logging.getLogger(__name__)


class Validation:
    """Called with a step, writes ``step-*.json`` and ``step-*.png`` into its folder.

    A row of the grid is a photo: the upsampled lq, every level from fidelity to realism, hq.

    Args:
        pairs: degraded once and for all, one photo each.
    """

    def __init__(self, stage: RcodStage, pairs: list[Batch], folder: Path) -> None:
        self.stage, self.pairs, self.folder = stage, pairs, folder

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        names = LEVEL_NAMES[self.stage.grouping.n]
        images: list[list[Tensor]] = [[pair.lq] for pair in self.pairs]
        for t in self.stage.grouping.timesteps:
            for row, pair in zip(images, self.pairs, strict=True):
                _, sr = self.stage.generate(pair, torch.full((len(pair.lq),), t).to(pair.lq.device))
                row.append(to_u8(sr))
        hq = torch.cat([pair.hq for pair in self.pairs])
        figures: dict[str, dict[str, float]] = {}
        for i, name in enumerate(("input", *names)):
            sr = torch.cat([row[i] for row in images])
            figures[name] = {
                "psnr_y_db": float(psnr_y(sr, hq).mean()),
                "ssim_y": float(ssim_y(sr, hq).mean()),
            }
        for row, pair in zip(images, self.pairs, strict=True):
            row.append(pair.hq)
        self._write(step, figures, images)
        log.info("step %d: %s", step, ", ".join(
            f"{name} {f['psnr_y_db']:.2f} dB / {f['ssim_y']:.3f}" for name, f in figures.items()
        ))  # fmt: skip

    def _write(
        self, step: int, figures: dict[str, dict[str, float]], images: list[list[Tensor]]
    ) -> None:
        path = self.folder / f"step-{step:07d}"
        grid = torch.cat([torch.cat(row, 3) for row in images], 2)[0]  # (3, rows H, columns W)
        text = json.dumps({"step": step, "photos": len(images), "levels": figures})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(grid.permute(1, 2, 0).cpu().numpy()).save(f"{path}.partial", "PNG")
            os.replace(f"{path}.partial", f"{path}.png")
            Path(f"{path}.partial").write_text(text + "\n", encoding="utf-8")
            os.replace(f"{path}.partial", f"{path}.json")
        except OSError as exc:
            raise TrainError(
                f"{path}: the validation could not be written ({exc.strerror or exc}). "
                "Free space and run again with --resume."
            ) from exc


def to_u8(image: Tensor) -> Tensor:
    """(B, 3, H, W) in about [-1, 1] -> uint8."""
    return ((image.clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)
