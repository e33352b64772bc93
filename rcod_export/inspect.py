"""What a bundle is made of and what it costs, and whether it is whole: for people to read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from rcod_export.cost import GPUS, Cost, measure_cost
from rcod_runtime.backends import BACKENDS, precisions
from rcod_runtime.backends.trt.engines import obstacle
from rcod_runtime.bundle import Bundle, check_hash, open_bundle
from rcod_runtime.errors import HashMismatch
from rcod_runtime.manifest import Engine, Precision
from rcod_runtime.selftest import cpu_obstacle, self_test

NODE_KINDS_SHOWN = 12


def inspect_bundle(folder: Path) -> Iterator[str]:
    """Lines about every graph at the bundle's tile size, batch 1: nodes, parameters, MACs, bytes,
    and the time floor on some GPUs, which is arithmetic and not a measurement."""
    bundle = open_bundle(folder)
    manifest = bundle.manifest
    tile = manifest.image.tile_px
    costs = {
        name: measure_cost(
            bundle.graph_path(name), {t.name: t.sized(1, tile, tile) for t in graph.inputs}
        )
        for name, graph in manifest.graphs.items()
    }
    identity = manifest.identity
    yield f"{identity.name} ({identity.family}), tile {tile} px, batch 1"
    yield f"{'graph':<10}{'opset':>6}{'nodes':>7}{'Mparam':>9}{'GMAC':>9}{'MB':>9}  scratch MB"
    for name, graph in manifest.graphs.items():
        c = costs[name]
        scratch = [f"{e.scratch_bytes / 1e6:.0f}" for e in manifest.engines if e.graph == name]
        yield (
            f"{name:<10}{graph.opset:>6}{sum(c.nodes.values()):>7}{c.parameters / 1e6:>9.2f}"
            f"{c.macs / 1e9:>9.2f}{c.weight_bytes / 1e6:>9.1f}  {', '.join(scratch) or 'no engine'}"
        )
    yield ""
    if manifest.has_int8:
        yield from (f"{name:<10}{_histogram(cost)}" for name, cost in costs.items())
        return  # for CPUs
    yield f"{'time floor, ms':<16}" + "".join(f"{name:>10}" for name in costs) + f"{'all':>10}"
    for gpu in GPUS:
        floors = [
            1e3 * cost.floor_s(gpu, manifest.graphs[name].precision is not Precision.FP32)
            for name, cost in costs.items()
        ]
        row = "".join(f"{ms:>10.3f}" for ms in (*floors, sum(floors)))
        yield f"{gpu.name:<16}{row}   {gpu.source}"
    yield ""
    for name, cost in costs.items():
        yield f"{name:<10}{_histogram(cost)}"


def _histogram(cost: Cost) -> str:
    kinds = list(cost.nodes.items())
    rest = sum(count for _, count in kinds[NODE_KINDS_SHOWN:])
    shown = [f"{kind} {count}" for kind, count in kinds[:NODE_KINDS_SHOWN]]
    return ", ".join([*shown, *([f"others {rest}"] if rest else [])])


def verify_bundle(folder: Path) -> Iterator[str]:
    """Lines about a bundle whose files, sample and engines were checked again.

    Raises:
        BundleError: a file is missing or is not the one that was exported or built.
        BackendError: a backend gives another image than the bundle's sample.
    """
    bundle = open_bundle(folder)
    yield f"{len(bundle.manifest.graphs)} graphs: files are whole"
    check_engines(bundle, bundle.manifest.engines)
    if bundle.manifest.engines:
        yield f"{len(bundle.manifest.engines)} engines: files are whole"
    for name in BACKENDS:
        reason = cpu_obstacle(bundle.manifest, name)
        if reason is not None:
            yield f"backend {name}: {reason}"
            continue
        for precision in precisions(name):
            yield f"backend {name}: {self_test(bundle, name, precision)}"
    yield from _loadable(bundle)


def check_engines(bundle: Bundle, engines: Iterable[Engine]) -> None:
    """Hold the files of engines to their hashes.

    Raises:
        BundleError: a file is missing, can't be read, or is not the one that was built.
    """
    for engine in engines:
        try:
            check_hash(bundle.path(engine.file), engine.sha256)
        except HashMismatch as exc:
            raise HashMismatch(
                f"{exc} Engines are programs: don't load it; rcod-export engines builds it again."
            ) from exc


def _loadable(bundle: Bundle) -> Iterator[str]:
    for engine in bundle.manifest.engines:
        reason = obstacle(engine)
        yield f"{engine.file}: {'fits this machine' if reason is None else 'not here, ' + reason}"
