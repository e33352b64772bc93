"""Images on a Ray cluster: actors open the bundle once and write each result where it belongs.

What is there is never made again: a run that was stopped goes on by the same command, and what a
worker had in hand when it died goes to another one, which leaves out what was written. All
machines of the cluster need this package and the same view of inputs, outputs and bundle.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import signal
import sys
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rcod_runtime.bundle import open_bundle
from rcod_runtime.cli import tables
from rcod_runtime.cli.files import Task
from rcod_runtime.cli.image import Options, upscale_image
from rcod_runtime.cli.report import Record, Report
from rcod_runtime.cli.results import Results, progress
from rcod_runtime.errors import BackendError, ImageError, RcodError, UsageError
from rcod_runtime.files import remove_partials
from rcod_runtime.image_io import format_of

# Ray's: no reports to its makers; of its own log, what ends it alone.
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
# Units that a worker takes at once, and another again when it dies: handing them out costs some ten
# milliseconds each time. Fewer where there are not BLOCKS for each actor, more over MAX_BLOCKS.
BLOCK_UNITS, BLOCKS, MAX_BLOCKS = 16, 8, 10_000
NOT_STARTED = -1
RETRIES = 3  # of what a worker had in hand when it died


@dataclass(frozen=True)
class Cluster:
    """Where actors run, and what each is.

    address: "local", "auto" or HOST:PORT. opening: arguments of the actors' Upscaler; an actor has
    as many processor cores as it has threads, at least one. actors: None, as many as there is room
    for. gpus: of each; 0.5 shares one.
    """

    address: str
    opening: dict[str, Any]
    actors: int | None = None
    gpus: float = 0.0

    def actor_opening(self) -> dict[str, Any]:
        """``opening``, the same from any working directory, and on the GPU that Ray gives."""
        paths = {
            name: value and os.path.abspath(value)
            for name, value in self.opening.items()
            if name in ("bundle", "require_signature")
        }
        device = self.opening["device"]
        if self.gpus and device == "auto":
            device = "cuda:0"
        return self.opening | paths | {"device": device, "threads": self.cores}

    @property
    def cores(self) -> int:
        threads: int = self.opening["threads"]
        return max(1, threads)


def upscale_files(
    cluster: Cluster, tasks: Sequence[Task], options: Options, report: Report
) -> None:
    """Upscale files.

    Raises:
        PartialFailure: some images failed; each was reported.
        UsageError: an option that can't be used, or more actors than there is room for.
        BundleError, SignatureError: as Upscaler.
        BackendError: Ray is missing, has no such cluster, or gives up.
    """
    units = [{"source": _absolute(t.source), "target": _absolute(t.target)} for t in tasks]

    def as_named(number: int, record: Record) -> Record:
        task = tasks[number]
        return dataclasses.replace(record, input=str(task), output=str(task.target))

    names = [str(task) for task in tasks]
    actor = functools.partial(FileActor, cluster.actor_opening(), options)
    _upscale(cluster, actor, units, names, report, as_named)


def upscale_tables(
    cluster: Cluster,
    inputs: Sequence[str],
    out: Path,
    suffix: str | None,
    options: Options,
    report: Report,
) -> None:
    """Upscale the images in Parquet files or tar shards to files in ``out``, named as there.

    Args:
        inputs: files, or URIs that pyarrow reads (s3://, gs://).
        suffix: of the results; None: each one's own, PNG for kinds that are not written.

    Raises: as upscale_files, and ImageError where an input is missing or no such file.
    """
    _require_ray()
    units = list(tables.units_of(inputs))
    names = [f"{unit['path']} (part {unit['part']})" for unit in units]
    outputs: set[str] = set()

    def once(_: int, record: Record) -> Record:
        if record.output in outputs:
            again = ImageError(f"{record.input}: another image has the same output.")
            return failed(record.input, "", again)
        if not record.output:
            return record
        outputs.add(record.output)
        return dataclasses.replace(record, output=str(out / Path(record.output).relative_to(root)))

    root = Path(os.path.abspath(out))
    actor = functools.partial(TableActor, cluster.actor_opening(), options, root, suffix)
    try:
        count = _upscale(cluster, actor, units, names, report, once) if units else 0
    finally:  # what workers that died left
        remove_partials(map(Path, outputs))
    if not count:
        raise ImageError(f"{', '.join(inputs)}: no images in it.")


def _upscale(
    cluster: Cluster,
    actor: Callable[[], Actor],
    units: Sequence[dict[str, Any]],
    names: Sequence[str],
    report: Report,
    told: Callable[[int, Record], Record],
) -> int:
    """All units through the actors; the number of images. ``told`` is the record that a user gets
    in the place of one of the i-th unit. A unit whose worker died too often is reported by its
    name."""
    left = dict(enumerate(names))
    images = len(units) if "source" in units[0] else None
    results = Results(report, None)
    # Ray says on stdout what it should say on stderr.
    with (
        redirect_stdout(sys.stderr),
        _Connection(cluster, len(units)) as ray,
        progress(images) as results.bar,
    ):
        # What was lost with the workers that died is tried once more, each unit by itself: most of
        # it had only been waiting beside what is deadly.
        for alone in (False, True):
            rows = [{"number": number} | units[number] for number in left]
            for number, record in ray.records(actor, rows, alone) if rows else ():
                if record is None:
                    del left[number]
                else:
                    results.add(told(number, record))
        for number, name in left.items():
            error = BackendError(
                f"{name}: the workers that took it died, again and again. Is there enough memory? "
                "Run again, with fewer --jobs."
            )
            results.add(told(number, failed(name, "", error)))
    results.check()
    return results.count


class Actor(ABC):
    """What runs on a worker: units -> the records of their images."""

    def __init__(self, opening: dict[str, Any], options: Options) -> None:
        from rcod_runtime.upscaler import Upscaler

        self.upscaler, self.options = Upscaler(**opening), options

    @abstractmethod
    def records(self, unit: dict[str, Any]) -> Iterator[Record]: ...

    def upscale(self, task: Task, data: bytes | None = None) -> Record:
        assert task.target is not None
        target = str(task.target)
        if os.path.isfile(target):  # by another run, or by a worker that died before it said so
            return Record(str(task), target, "skipped")
        try:
            return upscale_image(self.upscaler, task, self.options, data=data)[0]
        except Exception as exc:  # the unit's other images go on
            return failed(str(task), target, _fault(str(task), exc))


class FileActor(Actor):
    def records(self, unit: dict[str, Any]) -> Iterator[Record]:
        target = Path(unit["target"])
        yield self.upscale(Task(Path(unit["source"]), target, format_of(target)))


class TableActor(Actor):
    def __init__(
        self, opening: dict[str, Any], options: Options, out: Path, suffix: str | None
    ) -> None:
        super().__init__(opening, options)
        self.out, self.suffix = out, suffix

    def records(self, unit: dict[str, Any]) -> Iterator[Record]:
        try:
            for name, data in tables.images_of(unit):
                yield self._record(name, data)
        except ImageError as error:  # of the table: nothing more can be read from it
            yield failed(unit["path"], "", error)

    def _record(self, name: str, data: bytes | ImageError) -> Record:
        if isinstance(data, ImageError):
            return failed(name, "", data)
        try:
            target = tables.target_of(name, self.out, self.suffix)
        except ImageError as error:
            return failed(name, "", error)
        return self.upscale(Task(Path(name), target, format_of(target)), data)


class _Rows:
    """The actor as Ray Data wants it: a table of units -> rows with a unit's number and a record as
    JSON, "null" where the unit is done. NOT_STARTED: why there is no actor; Ray would try for ever
    to make one."""

    def __init__(self, actor: Callable[[], Actor]) -> None:
        self.error: RcodError | None = None
        try:
            self.actor = actor()
        except RcodError as error:
            self.error = error
        except Exception as exc:
            self.error = _fault("it can't be started", exc)

    def __call__(self, batch: Any) -> Iterator[dict[str, list[Any]]]:
        if self.error is not None:
            record = failed("", "", self.error)
            yield {"unit": [NOT_STARTED], "record": [json.dumps(asdict(record))]}
            return
        for unit in batch.to_pylist():
            for record in self._records(unit):
                yield {"unit": [unit["number"]], "record": [json.dumps(asdict(record))]}
            yield {"unit": [unit["number"]], "record": ["null"]}

    def _records(self, unit: dict[str, Any]) -> Iterator[Record]:
        try:
            yield from self.actor.records(unit)
        except Exception as exc:  # Ray would drop the block and say nothing of it
            name = str(unit.get("source") or unit.get("path"))
            yield failed(name, "", _fault(name, exc))


def failed(name: str, output: str, error: RcodError) -> Record:
    """The record of an image that failed before it was in work."""
    return Record(name, output, "failed", error=type(error).__name__, message=str(error))


def _fault(what: str, exc: Exception) -> BackendError:
    return BackendError(f"{what}: {type(exc).__name__}: {exc}")


def _absolute(path: Path | None) -> str:
    if path is None:
        raise UsageError("--ray: expected files, found stdin or stdout.")
    return os.path.abspath(path)


def _require_ray() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import pyarrow  # noqa: F401
        import ray.data  # noqa: F401
    except ImportError as exc:
        message = f'--ray: the package {exc.name} is missing. pip install "rcod[ray]"'
        raise BackendError(message) from exc


class _Connection:
    """A connection to a cluster, for a block."""

    def __init__(self, cluster: Cluster, units: int) -> None:
        self.cluster, self.units = cluster, units

    def __enter__(self) -> _Connection:
        opening = self.cluster.actor_opening()
        open_bundle(opening["bundle"], opening["require_signature"])  # once here, not in each actor
        _require_ray()
        import ray
        import ray.data

        self.ray: Any = ray
        self.data = ray.data
        address = self.cluster.address
        own: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
        before = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **own)
        except (ConnectionError, ValueError, RuntimeError) as exc:
            message = f"--ray {address}: no cluster can be reached there ({exc})."
            raise BackendError(message) from exc
        finally:
            if threading.current_thread() is threading.main_thread():  # Ray exits with 15
                signal.signal(signal.SIGTERM, before)
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.max_errored_blocks = -1  # a worker that dies again and again costs its block only
        return self

    def __exit__(self, *error: object) -> None:
        self.ray.shutdown()

    def records(
        self, actor: Callable[[], Actor], rows: list[dict[str, Any]], alone: bool
    ) -> Iterator[tuple[int, Record | None]]:
        """What actors make of the units, as it comes, in any order: the unit's number and a record,
        None where the unit is done. ``alone``: no unit waits beside another at a worker."""
        actors = self._actors()
        blocks = max(BLOCKS * actors, len(rows) // BLOCK_UNITS)
        blocks = len(rows) if alone else min(len(rows), blocks, MAX_BLOCKS)
        dataset = self.data.from_items(rows, override_num_blocks=blocks)
        pool = self.data.ActorPoolStrategy(
            size=actors, max_tasks_in_flight_per_actor=1 if alone else None
        )
        with warnings.catch_warnings():
            # max_task_retries has no other place until Ray 2.64; without it a deadly image is tried
            # for ever.
            warnings.simplefilter("ignore", DeprecationWarning)
            results = dataset.map_batches(
                _Rows,
                fn_constructor_kwargs={"actor": actor},
                compute=pool,
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=self.cluster.cores,
                num_gpus=self.cluster.gpus,
                max_task_retries=RETRIES,
            )
        try:
            for batch in results.iter_batches(batch_size=None, prefetch_batches=0):
                for number, text in zip(batch["unit"], batch["record"], strict=True):
                    fields = json.loads(text)
                    if number == NOT_STARTED:
                        raise BackendError(f"a worker: {fields['error']}: {fields['message']}")
                    yield int(number), None if fields is None else Record(**fields)
        except self.ray.exceptions.RayError as exc:
            raise BackendError(f"Ray gives up: {exc}") from exc

    def _actors(self) -> int:
        cluster, there = self.cluster, dict(self.ray.cluster_resources())
        room = int(there.get("CPU", 0) // cluster.cores)
        if cluster.gpus:
            room = min(room, int(there.get("GPU", 0) // cluster.gpus))
        if room < (cluster.actors or 1):
            raise UsageError(
                f"{cluster.actors or 1} actors of {cluster.cores} cores and {cluster.gpus:g} GPUs: "
                f"the cluster has room for {room} (CPU {there.get('CPU', 0):g}, "
                f"GPU {there.get('GPU', 0):g}). Choose fewer --jobs or --threads."
            )
        return min(cluster.actors or room, self.units)
