"""TensorRT engines of a bundle: built when something changed, each written whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from rcod_export.sign import drop_signature
from rcod_export.trt_build import Job, Shapes
from rcod_runtime.backends.trt.cache import cache_folder
from rcod_runtime.backends.trt.libraries import (
    gpu_name,
    load_cuda,
    load_tensorrt,
    operating_system,
    sm_of,
)
from rcod_runtime.bundle import Bundle, open_bundle
from rcod_runtime.contract import GUIDE
from rcod_runtime.errors import BackendError, BundleError, ExportError, OutputError, UsageError
from rcod_runtime.files import write_whole
from rcod_runtime.manifest import (
    MANIFEST_FILE,
    MAX_GUIDE_PX,
    Engine,
    Graph,
    Manifest,
    read_manifest,
    sha256_file,
)

log = logging.getLogger(__name__)

LOG_LINES_SHOWN = 8
DEFAULT_SMS = (89, 120)
DEFAULT_WORKSPACE_BYTES = 4 * 2**30


@dataclass(frozen=True)
class EngineConfig:
    """What to build for. ``sms`` are of RTX GPUs, () is DEFAULT_SMS; tensorrt takes that of this
    machine's GPU, and ``gpu``, its name, where they are for that model alone. ``tile_px`` None is
    the bundle's; ``batch`` is smallest and largest. ``force``: what is up to date is built too, and
    what was built elsewhere is replaced."""

    target: str = "tensorrt-rtx"
    sms: tuple[int, ...] = ()
    tile_px: int | None = None
    batch: tuple[int, int] = (1, 4)
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES
    optimization_level: int | None = None
    hardware_compatibility: str = "none"
    detailed: bool = False
    timeout_s: float = 3600.0
    gpu: str = ""
    force: bool = False
    cache: Path = field(default_factory=cache_folder)

    @property
    def options(self) -> dict[str, str]:
        """Settings that change what comes out and differ from the defaults."""
        options = {}
        if self.workspace_bytes != DEFAULT_WORKSPACE_BYTES:
            options["workspace_bytes"] = str(self.workspace_bytes)
        if self.optimization_level is not None:
            options["optimization_level"] = str(self.optimization_level)
        if self.hardware_compatibility != "none":
            options["hardware_compatibility"] = self.hardware_compatibility
        if self.detailed:
            options["profiling_verbosity"] = "detailed"
        if self.gpu:
            options["gpu"] = self.gpu
        return options


def build_engines(folder: Path, config: EngineConfig) -> Manifest:
    """Build the engines of a bundle that are missing or out of date, and enter them.

    Entries of engines that are out of date leave the manifest first; every new one is entered as
    soon as it is whole. So an interrupted run goes on where it stopped, and engines that were not
    built together never pass for a set.

    Raises:
        BundleError: the bundle is not whole, or a link leads where its engines would be written.
        ExportError: the library is missing, refuses a graph, crashes, or takes too long.
        OutputError: the bundle can't be written, another process builds its engines, or it was
            exported again meanwhile.
        UsageError: a setting that can't be used, or engines that were built elsewhere are in the
            way.
    """
    with _alone(folder):
        return _built(open_bundle(folder), config)


def _built(bundle: Bundle, config: EngineConfig) -> Manifest:
    if bundle.manifest.has_int8:
        raise UsageError(
            f"{bundle.folder}: its int8 graphs are for CPUs; their ranges are not centred on zero, "
            "which TensorRT asks for. Export the bundle for engines with --precision fp16."
        )
    _check(bundle, config)
    try:
        version = str(load_tensorrt(config.target).__version__)
        rtx = config.target == "tensorrt-rtx"
        sms = (config.sms or DEFAULT_SMS) if rtx else (sm_of(load_cuda(), 0),)
    except BackendError as exc:
        raise ExportError(str(exc)) from exc
    if config.sms not in ((), sms):
        raise UsageError(
            f"--sm {' '.join(map(str, config.sms))}: --target tensorrt builds for this machine's "
            f"GPU, sm_{sms[0]}. Leave --sm out."
        )
    config = dataclasses.replace(config, sms=sms, gpu=_one_model(config))
    manifest = bundle.manifest
    planned = [
        planned_engine(manifest, name, graph, config, version)
        for name, graph in manifest.graphs.items()
    ]
    if config.force:
        reasons: dict[str, str | None] = {e.file: "--force was given" for e in planned}
    else:
        _refuse_foreign(bundle, planned)
        reasons = {e.file: _out_of_date(bundle.folder, manifest, e) for e in planned}
    current = tuple(e for e in manifest.engines if reasons.get(e.file) is None)
    if current != manifest.engines:
        manifest = dataclasses.replace(manifest, engines=current)
        _write_manifest(bundle.folder, manifest)
    with tqdm(planned, desc=config.target, unit="engine", dynamic_ncols=True) as bar:
        for wanted in bar:
            reason = reasons[wanted.file]
            if reason is None:
                log.info("%s: up to date", wanted.file)
                continue
            log.info("%s: building, %s", wanted.file, reason)
            engine = _build(bundle, wanted, config, bar)
            there = read_manifest(bundle.folder / MANIFEST_FILE)
            if there.to_json() != manifest.to_json():
                raise OutputError(
                    f"{bundle.folder}: its manifest was changed while {wanted.file} was built. "
                    "Run again."
                )
            manifest = _entered(manifest, engine)
            _write_manifest(bundle.folder, manifest)
    return manifest


def _refuse_foreign(bundle: Bundle, planned: list[Engine]) -> None:
    """Engines of another machine are not this one's to replace: it can't build them again."""
    present = {engine.file: engine for engine in bundle.manifest.engines}
    for wanted in planned:
        found = present.get(wanted.file, wanted)
        theirs = found.options.get("gpu")  # none where they are for more than one model
        ours = _gpu_here() if theirs else None
        if (found.os, theirs) != (wanted.os, ours):
            there, here = (
                f"on {engine.os} for the {gpu} alone" if gpu else f"on {engine.os}"
                for engine, gpu in ((found, theirs), (wanted, ours))
            )
            raise UsageError(
                f"{bundle.folder / wanted.file}: built {there}, and here it would be {here}. Build "
                "in a copy of the bundle, or replace it and the others beside it: --force"
            )


def _one_model(config: EngineConfig) -> str:
    """The name of the GPU, where engines are for that model alone; else empty."""
    if config.target == "tensorrt-rtx" or config.hardware_compatibility != "none":
        return ""
    return _gpu_here()


def _gpu_here() -> str:
    try:
        return gpu_name(load_cuda(), 0)
    except BackendError as exc:
        raise ExportError(str(exc)) from exc


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Of two processes each would write its own manifest over the other's: the second is refused.
    Where folders can't be locked (Windows, some network file systems) nothing keeps them apart."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # what is no folder is named when it is opened as a bundle
        yield
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise OutputError(
                f"{folder}: another process builds its engines. Run again when it is done."
            ) from exc
        except OSError as exc:
            log.info("%s: can't be locked (%s)", folder, exc.strerror or exc)
        yield
    finally:
        os.close(handle)


def _check(bundle: Bundle, config: EngineConfig) -> None:
    low, high = config.batch
    if not 1 <= low <= high <= 64:
        raise UsageError(f"batch {low} {high}: expected 1 <= smallest <= largest <= 64.")
    if config.hardware_compatibility != "none" and config.target == "tensorrt-rtx":
        raise UsageError(
            f"--hardware-compatibility {config.hardware_compatibility}: TensorRT-RTX has no such "
            "engines. Name all GPUs that they are for by --sm."
        )
    check_tile(bundle.manifest, config.tile_px)


def check_tile(manifest: Manifest, tile_px: int | None) -> None:
    """Raises UsageError where the graphs can't take tiles of this size; None is the bundle's."""
    multiple = manifest.image.size_multiple
    if tile_px is not None and (tile_px < multiple or tile_px % multiple):
        raise UsageError(f"--tile {tile_px}: expected a multiple of {multiple}.")


def planned_engine(
    manifest: Manifest, name: str, graph: Graph, config: EngineConfig, version: str
) -> Engine:
    """The manifest's entry of an engine as it should be; hash and sizes come with the build."""
    tile = config.tile_px or manifest.image.tile_px
    low, high = (1, 1) if name in ("vpim", GUIDE) else config.batch
    sides = (tile, tile, tile)
    if name == GUIDE:  # it looks at the photo, not at tiles
        scale = manifest.image.scale
        sides = (scale, min(tile, MAX_GUIDE_PX * scale), MAX_GUIDE_PX * scale)
    profile: Shapes = {
        tensor.name: tuple(
            tensor.sized(batch, side, side)
            for batch, side in zip((low, high, high), sides, strict=True)
        )
        for tensor in graph.inputs
    }
    for_sms = "-".join(f"sm{sm}" for sm in config.sms)
    return Engine(
        file=f"engines/{config.target}/{for_sms}/{tile}px/{name}.engine",
        sha256="0" * 64,
        bytes=1,
        graph=name,
        target=cast(Any, config.target),  # the manifest checks it
        version=version,
        sm=config.sms,
        os=operating_system(),
        profile=profile,
        precision=graph.precision,
        options=config.options,
        onnx_sha256=graph.content_sha256,
        scratch_bytes=-1,
    )


def _out_of_date(folder: Path, manifest: Manifest, wanted: Engine) -> str | None:
    """Why the engine must be built, or None."""
    present = next((e for e in manifest.engines if e.file == wanted.file), None)
    if present is None:
        return "it is new"
    measured = ("sha256", "bytes", "scratch_bytes")
    for name in (f.name for f in dataclasses.fields(Engine) if f.name not in measured):
        before, now = getattr(present, name), getattr(wanted, name)
        if before != now:
            return f"{name} was {before}, is {now}"
    path = folder / present.file
    if not path.is_file():
        return "its file is missing"
    try:
        changed = sha256_file(path) != present.sha256
    except OSError as exc:
        return f"its file can't be read ({exc.strerror or exc})"
    return "its file was changed" if changed else None


def _build(bundle: Bundle, wanted: Engine, config: EngineConfig, bar: Any) -> Engine:
    path = bundle.folder / wanted.file
    # A name that nobody can have put there, as a link to somewhere else.
    partial = path.with_suffix(f".{secrets.token_hex(8)}.partial")
    # The RTX builder compiles without timing.
    timings = str(config.cache / "timing") if config.target == "tensorrt" else None
    job = Job(
        target=wanted.target,
        onnx=str(bundle.graph_path(wanted.graph)),
        out=str(partial),
        profile=wanted.profile,
        sms=wanted.sm,
        workspace_bytes=config.workspace_bytes,
        optimization_level=config.optimization_level,
        hardware_compatibility=config.hardware_compatibility,
        detailed=config.detailed,
        timings=timings,
    )
    which = hashlib.sha256(os.fsencode(bundle.folder)).hexdigest()[:8]
    log_file = config.cache / "logs" / f"{bundle.manifest.identity.name}-{which}-{wanted.graph}.log"
    try:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        log_file.touch()
    except OSError as exc:
        raise OutputError(
            f"{log_file}: the builder's log can't be written ({exc.strerror or exc}). Set "
            "XDG_CACHE_HOME to a folder where it can."
        ) from exc
    try:
        _make_folders(bundle.folder, path.parent)
        for left in path.parent.glob(f"{path.stem}.*.partial"):  # by a process that was killed
            left.unlink()
        result = _run(job, log_file, config.timeout_s, bar)
        engine = dataclasses.replace(
            wanted,
            sha256=sha256_file(partial),
            bytes=partial.stat().st_size,
            scratch_bytes=result["scratch_bytes"],
        )
        with partial.open("r+b") as file:
            os.fsync(file.fileno())  # or a power cut could leave the manifest without it
        partial.replace(path)
    except OSError as exc:
        raise OutputError(
            f"{path}: could not be written ({exc.strerror or exc}). Free space, then run again: "
            "engines that are done are kept."
        ) from exc
    finally:
        partial.unlink(missing_ok=True)
    return engine


def _make_folders(bundle: Path, folder: Path) -> None:
    """The folder of engines, in the bundle itself.

    Raises:
        BundleError: a link is in the way.
        OSError: it can't be made.
    """
    part = bundle
    for name in folder.relative_to(bundle).parts:
        part = part / name
        if part.is_symlink():
            raise BundleError(
                f"{part}: expected a folder for engines, found a link to {os.readlink(part)}. "
                "Remove it."
            )
        part.mkdir(exist_ok=True)


def _run(job: Job, log_file: Path, timeout_s: float, bar: Any) -> dict[str, Any]:
    """The build in its own process, with its log in ``log_file``."""
    name = Path(job.onnx).name
    answer: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary, log_file.open("wb") as errors:
        spec = Path(temporary) / "job.json"
        spec.write_text(json.dumps(dataclasses.asdict(job)), encoding="utf-8")
        command = [sys.executable, "-m", "rcod_export.trt_build", str(spec)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
        with _killed_at_the_end(process, timeout_s) as timed_out:
            assert process.stdout is not None
            for line in process.stdout:
                answer = _parsed(line) or answer
                if "phase" in answer:
                    where = f"{answer['phase']} {answer['step']}/{answer['steps']}"
                    bar.set_postfix_str(f"{name}: {where}", refresh=False)
                    bar.update(0)
            code = process.wait()
    if timed_out.is_set():
        raise ExportError(
            f"{name}: not built within {timeout_s:g} s. Give more with --timeout. Log: {log_file}"
        )
    if "error" in answer:
        raise ExportError(f"{answer['error']}{_tail(log_file)}")
    if code != 0 or "result" not in answer:
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        raise ExportError(f"{name}: the builder died ({how}).{_tail(log_file)}")
    result: dict[str, Any] = answer["result"]
    return result


@contextlib.contextmanager
def _killed_at_the_end(
    process: subprocess.Popen[str], timeout_s: float
) -> Iterator[threading.Event]:
    """No process is left behind: not after Ctrl-C, not after the time limit."""
    timed_out = threading.Event()

    def stop() -> None:
        timed_out.set()
        process.kill()

    timer = threading.Timer(timeout_s, stop)
    timer.start()
    try:
        yield timed_out
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _parsed(line: str) -> dict[str, Any]:
    """A line of the protocol; libraries print other things to stdout too."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _tail(log_file: Path) -> str:
    lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    shown = "".join(f"\n    {line}" for line in lines[-LOG_LINES_SHOWN:])
    return f" Log: {log_file}, it ends:{shown or ' (it is empty)'}"


def _entered(manifest: Manifest, engine: Engine) -> Manifest:
    others = tuple(e for e in manifest.engines if e.file != engine.file)
    engines = tuple(sorted((*others, engine), key=lambda e: e.file))
    return dataclasses.replace(manifest, engines=engines)


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    write_whole(folder / MANIFEST_FILE, manifest.to_json().encode())
    drop_signature(folder)
