"""Photos to training batches: deterministic from (seed, step), so that a run can be resumed."""

from __future__ import annotations

import dataclasses
import logging
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rcod_train.config import LoopConfig
from rcod_train.degradation import PRESETS, Strength, degrade, upsample_lq
from rcod_train.errors import DataError, RcodTrainError, TrainError
from rcod_train.photos import SCALE, UNREADABLE, Photo, Pixels

log = logging.getLogger(__name__)


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
    unreadable: tuple[tuple[str, str], ...] = ()  # photos that others took the place of, and why

    def to(self, device: torch.device) -> Batch:
        values = (getattr(self, f.name) for f in dataclasses.fields(self))
        return Batch(*(
            v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for v in values
        ))  # fmt: skip


def to_unit(image_u8: Tensor) -> Tensor:
    """uint8 0..255 -> float32 [-1, 1], channels last in memory (what CPU convolutions want)."""
    return (image_u8.float() / 127.5 - 1.0).contiguous(memory_format=torch.channels_last)


class PhotoBatches(Dataset[Batch]):
    """Item i is the whole i-th batch, made from (seed, i) alone.

    Args:
        photos: photos, pairs, or both.
        degradations: the share of each of ``PRESETS``; None: nothing is degraded.
        pairs_share: of samples that are pairs, where there are both.
    """

    def __init__(
        self,
        photos: list[Photo],
        config: LoopConfig,
        seed: int,
        tokens_px: int,
        degradations: Mapping[str, float] | None,
        pairs_share: float = 0.5,
    ) -> None:
        # Before OpenCV's first call: threads of its pool don't live on in a forked worker, which
        # waits for them for ever.
        cv2.setNumThreads(1)
        self.photos, self.config, self.seed = photos, config, seed
        self.tokens_px, self.degradations = tokens_px, degradations
        paired = np.array([photo.lq is not None for photo in photos])
        self.plain, self.paired = np.flatnonzero(~paired), np.flatnonzero(paired)
        self.pairs_share = pairs_share

    def __getitem__(self, i: int) -> Batch:
        rng = np.random.default_rng((self.seed, i))
        c = self.config
        rows: list[tuple[np.ndarray, ...]] = []
        scores: list[tuple[float, float]] = []
        unreadable: dict[str, str] = {}
        chosen = self._choose(rng)
        for n, index in enumerate(chosen):
            context_hq, native, strength, chosen[n] = self._sample(index, rng, unreadable)
            context_lq = context_hq
            if native is not None:
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
        problems = tuple(unreadable.items())
        if not scores:
            return Batch(*images, photo, unreadable=problems)
        return Batch(*images[:4], photo, images[4], torch.tensor(scores), problems)

    def _choose(self, rng: np.random.Generator) -> NDArray[np.int64]:
        count = self.config.photos_per_batch
        if not (len(self.plain) and len(self.paired)):
            return rng.choice(len(self.photos), count)
        from_pairs = rng.random(count) < self.pairs_share
        return np.where(from_pairs, rng.choice(self.paired, count), rng.choice(self.plain, count))

    def _sample(
        self, index: int, rng: np.random.Generator, unreadable: dict[str, str]
    ) -> tuple[Pixels, Pixels | None, Strength, int]:
        """hq and lq (None without degradation) of a photo, what was done to it, and which it is:
        the next one in the place of one that can't be decoded, which is noted with its reason."""
        for step in range(len(self.photos)):
            i = (index + step) % len(self.photos)
            photo = self.photos[i]
            try:
                hq = photo.read()
                lq = photo.read_lq() if photo.lq and self.degradations is not None else None
            except UNREADABLE as exc:
                unreadable[str(photo)] = str(exc)
                continue
            strength = Strength()
            if lq is not None:
                hq, lq = self._context(hq, rng, lq)
            else:
                hq, _ = self._context(hq, rng)
                if self.degradations is not None:
                    lq = degrade(hq, PRESETS[self._preset(rng)], rng, SCALE, strength)
            return hq, lq, strength, i
        raise DataError(
            f"{self.photos[0]} and {len(self.photos) - 1} others: none can be decoded any more. "
            "Are the files still there?"
        )

    def _preset(self, rng: np.random.Generator) -> str:
        assert self.degradations is not None
        upto = np.cumsum(list(self.degradations.values()))
        last = len(upto) - 1  # the shares' sum may be a little below 1
        return list(self.degradations)[min(last, int(np.searchsorted(upto, rng.random(), "right")))]

    def _context(
        self, hq: Pixels, rng: np.random.Generator, lq: Pixels | None = None
    ) -> tuple[Pixels, Pixels | None]:
        """The same window of both, turned and mirrored alike."""
        side, grid = self.config.context_px, 1 if lq is None else SCALE
        top = rng.integers(0, (hq.shape[0] - side) // grid + 1) * grid
        left = rng.integers(0, (hq.shape[1] - side) // grid + 1) * grid
        window = np.s_[top : top + side, left : left + side]
        mirrored = rng.random() < 0.5
        turns = rng.integers(0, 4) if rng.random() < self.config.turned_share else 0

        def moved(pixels: Pixels) -> Pixels:
            pixels = pixels[:, ::-1] if mirrored else pixels
            return np.ascontiguousarray(np.rot90(pixels, turns))

        return moved(hq[window]), None if lq is None else moved(lq[_divided(window, SCALE)])

    def _thumbnail(self, image: np.ndarray) -> np.ndarray:
        size = (self.tokens_px, self.tokens_px)
        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def _divided(window: tuple[slice, ...], by: int) -> tuple[slice, ...]:
    return tuple(slice(s.start // by, s.stop // by) for s in window)


class _Typed(Dataset[Any]):
    """Our own errors as items: DataLoader would wrap them in a worker's traceback."""

    def __init__(self, dataset: PhotoBatches) -> None:
        self.dataset = dataset

    def __getitem__(self, i: int) -> Batch | RcodTrainError:
        try:
            return self.dataset[i]
        except RcodTrainError as error:
            return error


def _start_worker(_: int) -> None:
    # A signal to all processes of a run means its first one, which saves its state and ends them.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def batches(
    dataset: PhotoBatches, indices: range, workers: int, named: set[str] | None = None
) -> Iterator[Batch]:
    """These batches, in order. A photo that can't be decoded is named in a warning once.

    Args:
        named: the photos that were; more are added.

    Raises:
        TrainError: a worker died while its batch was waited for; see ``worker_deaths``.
        DataError: no photo can be decoded any more.
    """
    loader = DataLoader(
        _Typed(dataset),
        batch_size=None,
        sampler=indices,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_start_worker,
    )
    named = set() if named is None else named
    with worker_deaths():
        for item in loader:
            if isinstance(item, RcodTrainError):
                raise item
            for photo, reason in item.unreadable:
                if photo not in named:
                    named.add(photo)
                    log.warning("%s: can't be decoded (%s); the next photo takes its place; "
                                "%d so far", photo, reason, len(named))  # fmt: skip
            yield item


@contextmanager
def worker_deaths() -> Iterator[None]:
    """Inside, the death of a data worker is a TrainError. It may come at any time, not only where
    a batch is waited for: PyTorch raises it from a signal handler."""
    try:
        yield
    except RuntimeError as exc:
        if not str(exc).startswith("DataLoader worker (pid"):
            raise
        raise TrainError(
            f"a data worker died ({str(exc).strip()}). Is there enough memory? Run again with "
            "--resume, and fewer --workers (0: none)."
        ) from exc
