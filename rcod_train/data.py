"""Photos to training batches: deterministic from (seed, step), so that a run can be resumed."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rcod_train.config import LoopConfig
from rcod_train.degradation import PRESETS, Strength, degrade, upsample_lq
from rcod_train.errors import ConfigError, DataError

log = logging.getLogger(__name__)

PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
SCALE = 4


def find_photos(folders: tuple[str, ...], min_side_px: int) -> list[Path]:
    """All photos below the folders that open and are large enough, sorted by name.

    The others are counted and named in a warning.

    Raises:
        DataError: a folder is missing, or no photo is left.
    """
    candidates: list[Path] = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise DataError(f"{folder}: expected a folder of photos, found none. Check --data.")
        candidates += [p for p in folder.rglob("*") if p.suffix.lower() in PHOTO_SUFFIXES]
    photos, skipped = [], []
    for path in sorted(candidates):
        try:
            with Image.open(path) as image:
                large_enough = min(image.size) >= min_side_px
        except (OSError, Image.DecompressionBombError):
            large_enough = False
        (photos if large_enough else skipped).append(path)
    if skipped:
        names = ", ".join(p.name for p in skipped[:5]) + (", ..." if len(skipped) > 5 else "")
        log.warning(
            "%d of %d files skipped (unreadable, or a side under %d px): %s",
            len(skipped),
            len(candidates),
            min_side_px,
            names,
        )
    if not photos:
        raise DataError(
            f"{', '.join(folders)}: expected photos with both sides at least {min_side_px} px, "
            f"found {len(candidates)} image files and none large enough. "
            "Add photos, or lower the stage's context_px."
        )
    return photos


@dataclass(frozen=True)
class Batch:
    """uint8 NCHW tensors, RGB. lq is already upsampled to the size of hq."""

    hq: Tensor  # (B, 3, crop, crop)
    lq: Tensor  # (B, 3, crop, crop); the same as hq where the stage has no degradation
    tokens_hq: Tensor  # (B, 3, S, S): the whole context, antialiased
    tokens_lq: Tensor  # (B, 3, S, S)
    photo: Tensor  # (B,) int64: which of the photos
    # None without degradation: lq before it was upsampled, (B, 3, crop/4, crop/4), and the scores
    # of its blur and noise, (B, 2) float32 in [0, 1).
    lq_native: Tensor | None = None
    scores: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        tensors = (getattr(self, f.name) for f in dataclasses.fields(self))
        return Batch(*(t if t is None else t.to(device, non_blocking=True) for t in tensors))


def to_unit(image_u8: Tensor) -> Tensor:
    """uint8 0..255 -> float32 [-1, 1], channels last in memory (what CPU convolutions want)."""
    return (image_u8.float() / 127.5 - 1.0).contiguous(memory_format=torch.channels_last)


class PhotoBatches(Dataset[Batch]):
    """Item i is the whole i-th batch, made from (seed, i) alone."""

    def __init__(
        self,
        photos: list[Path],
        config: LoopConfig,
        seed: int,
        tokens_px: int,
        heavy_share: float | None,
    ) -> None:
        if not 0 < config.crop_px <= config.context_px:
            raise ConfigError(
                f"crop_px: expected 1 to context_px ({config.context_px}), found {config.crop_px}."
            )
        # Before OpenCV's first call: threads of its pool don't live on in a forked worker, which
        # waits for them for ever.
        cv2.setNumThreads(1)
        self.photos, self.config, self.seed = photos, config, seed
        self.tokens_px, self.heavy_share = tokens_px, heavy_share

    def __getitem__(self, i: int) -> Batch:
        rng = np.random.default_rng((self.seed, i))
        c = self.config
        rows: list[tuple[np.ndarray, ...]] = []
        scores: list[tuple[float, float]] = []
        chosen = rng.choice(len(self.photos), c.photos_per_batch)
        for index in chosen:
            context_hq = self._context(self.photos[index], rng)
            context_lq, native, strength = context_hq, None, Strength()
            if self.heavy_share is not None:
                preset = "osediff" if rng.random() < self.heavy_share else "s3diff"
                native = degrade(context_hq, PRESETS[preset], rng, SCALE, strength)
                context_lq = upsample_lq(native, context_hq.shape[:2])
            thumbnails = [self._thumbnail(x) for x in (context_hq, context_lq)]
            for _ in range(c.crops_per_photo):
                top, left = rng.integers(0, (c.context_px - c.crop_px) // SCALE + 1, 2) * SCALE
                window = np.s_[top : top + c.crop_px, left : left + c.crop_px]
                rows.append((context_hq[window], context_lq[window], *thumbnails))
                if native is not None:
                    rows[-1] += (native[_divided(window, SCALE)],)
                    scores.append(strength.scores())
        arrays = [np.ascontiguousarray(np.stack(column)) for column in zip(*rows, strict=True)]
        images = [torch.from_numpy(a).permute(0, 3, 1, 2) for a in arrays]
        photo = torch.from_numpy(chosen.repeat(c.crops_per_photo))
        if not scores:
            return Batch(*images, photo)
        return Batch(*images[:4], photo, images[4], torch.tensor(scores))

    def _context(self, path: Path, rng: np.random.Generator) -> np.ndarray:
        side = self.config.context_px
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        top = rng.integers(0, pixels.shape[0] - side + 1)
        left = rng.integers(0, pixels.shape[1] - side + 1)
        pixels = pixels[top : top + side, left : left + side]
        pixels = pixels[:, ::-1] if rng.random() < 0.5 else pixels
        return np.ascontiguousarray(
            np.rot90(pixels, rng.integers(0, 4) if rng.random() < 0.3 else 0)
        )

    def _thumbnail(self, image: np.ndarray) -> np.ndarray:
        size = (self.tokens_px, self.tokens_px)
        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def _divided(window: tuple[slice, ...], by: int) -> tuple[slice, ...]:
    return tuple(slice(s.start // by, s.stop // by) for s in window)


def _start_worker(_: int) -> None:
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def batches(dataset: PhotoBatches, indices: range, workers: int) -> Iterator[Batch]:
    """These batches, in order."""
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=indices,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_start_worker,
    )
    return iter(loader)
