"""Which of a bundle's engines fit this machine, by the manifest alone; nothing is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

from rcod_runtime.backends.trt.libraries import (
    gpu_name,
    load_cuda,
    load_tensorrt,
    operating_system,
    sm_of,
)
from rcod_runtime.errors import BackendError
from rcod_runtime.manifest import Engine, Manifest

AMPERE = 80


@dataclass(frozen=True)
class EngineSet:
    """The engines of all graphs of a bundle, built together."""

    folder: str
    engines: dict[str, Engine]

    @property
    def target(self) -> str:
        return self.engines["encoder"].target

    @property
    def version(self) -> str:
        return self.engines["encoder"].version

    @property
    def precision(self) -> str:
        return self.engines["denoiser"].precision.value

    @property
    def tile_px(self) -> int:
        """Side of the tiles; ``flaw`` has made sure that there is one size only."""
        return self.engines["encoder"].profile["image"][2][-1]

    @property
    def batches(self) -> tuple[int, int]:
        """Smallest and largest tile batch."""
        lowest, _, highest = self.engines["encoder"].profile["image"]
        return lowest[0], highest[0]


def engine_sets(manifest: Manifest) -> list[EngineSet]:
    """Engines by the folder they lie in, in the manifest's order."""
    folders: dict[str, dict[str, Engine]] = {}
    for engine in manifest.engines:
        folder = str(PurePosixPath(engine.file).parent)
        folders.setdefault(folder, {})[engine.graph] = engine
    return [EngineSet(folder, engines) for folder, engines in folders.items()]


def flaw(manifest: Manifest, engines: EngineSet) -> str | None:
    """Why a set can't run a bundle anywhere, or None."""
    missing = sorted(set(manifest.graphs) - set(engines.engines))
    if missing:
        return f"no engine for {', '.join(missing)}; run rcod-export engines again"
    kinds = {(e.target, e.version, e.sm, e.os) for e in engines.engines.values()}
    if len(kinds) > 1:
        return "its engines were not built together; run rcod-export engines again"
    for name, engine in engines.engines.items():
        wanted = {tensor.name for tensor in manifest.graphs[name].inputs}
        if set(engine.profile) != wanted:
            return f"{name}: its profile has not the inputs {', '.join(sorted(wanted))}"
    low, _, high = engines.engines["encoder"].profile["image"]
    if len(high) != 4 or low[2:] != high[2:] or high[2] != high[3]:
        return f"its tiles are {low} to {high}; one square tile size is expected"
    if high[2] % manifest.image.size_multiple:
        return f"its tiles are {high[2]} px, not a multiple of {manifest.image.size_multiple}"
    return None


def obstacle(engine: Engine, index: int = 0) -> str | None:
    """Why this machine can't load an engine, by its entry, or None."""
    try:
        return _mismatch(engine, index)
    except BackendError as exc:
        return str(exc)


def _mismatch(engine: Engine, index: int) -> str | None:
    """Why an engine is for another machine, or None.

    Raises:
        BackendError: no engine runs here: a library, a driver or the GPU is missing.
    """
    if engine.os != operating_system():
        return f"built for {engine.os}, this is {operating_system()}"
    version = str(load_tensorrt(engine.target).__version__)
    if version != engine.version:
        return f"built by {engine.target} {engine.version}, {version} is installed"
    cuda = load_cuda(engine.target)
    sm = sm_of(cuda, index)
    if sm in engine.sm or (_for_later_gpus(engine) and sm >= AMPERE):
        built_on = engine.options.get("gpu")  # TensorRT's kernels are chosen for one model of GPU
        name = gpu_name(cuda, index) if built_on else built_on
        return None if name == built_on else f"built on a {built_on}, this GPU is a {name}"
    return f"built for {', '.join(f'sm_{n}' for n in engine.sm)}, this GPU is sm_{sm}"


def _for_later_gpus(engine: Engine) -> bool:
    """TensorRT-RTX has no such engines; its builder ignores the setting."""
    level = engine.options.get("hardware_compatibility")
    return engine.target == "tensorrt" and level == "ampere-plus"


def find_engines(manifest: Manifest, index: int, tile_px: int | None = None) -> EngineSet | str:
    """The set that fits GPU ``index``, or why none does, with what to do about it. Of several that
    fit the one for tiles of ``tile_px``; None: of the bundle's own size, else the first."""
    fitting: list[EngineSet] = []
    reasons, cure = [], "Without engines: --device cpu"
    for engines in engine_sets(manifest):
        try:
            reason = flaw(manifest, engines) or _mismatch(engines.engines["encoder"], index)
        except BackendError as exc:  # others would not run here either
            reason = str(exc)
        else:
            if reason is None:
                fitting.append(engines)
                continue
            cure = "Build others: rcod-export engines BUNDLE (or --device cpu)"
        reasons.append(f"{engines.folder}: {reason}")
    if fitting:
        of_size = {engines.tile_px: engines for engines in reversed(fitting)}
        if tile_px is None:
            return of_size.get(manifest.image.tile_px, fitting[0])
        if tile_px in of_size:
            return of_size[tile_px]
        return (
            f"its engines are for tiles of {', '.join(map(str, sorted(of_size)))} px, not of "
            f"{tile_px}. Build others: rcod-export engines BUNDLE --target {fitting[0].target} "
            f"--tile {tile_px}"
        )
    if not reasons:
        return "the bundle has no engines. Build them: rcod-export engines BUNDLE"
    return f"{'; '.join(reasons)}. {cure}"
