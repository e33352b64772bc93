"""Builds one engine in a process of its own, so that a builder's crash or hang stays in it.

Run as ``python -m rcod_export.trt_build JOB.json``. JSON lines go to stdout: progress, at the end a
result or an error. The builder's log goes to stderr.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcod_runtime.backends.trt.libraries import gpu_name, load_cuda, load_tensorrt, sm_of
from rcod_runtime.errors import BackendError, OutputError
from rcod_runtime.files import write_whole

Shapes = dict[str, tuple[tuple[int, ...], ...]]
ACTIVATION_LINE = "Total Activation Memory: "  # the builder says it; no API does without a GPU


@dataclass(frozen=True)
class Job:
    """What to build. ``profile``: input -> (min, opt, max) shape; ``sms`` are for RTX engines;
    ``timings``: folder where what was measured of kernels is kept."""

    target: str
    onnx: str
    out: str
    profile: Shapes
    sms: tuple[int, ...]
    workspace_bytes: int
    optimization_level: int | None
    hardware_compatibility: str
    detailed: bool
    timings: str | None


class BuildRefused(Exception):
    """The library refused something; the message says what."""


def build(job: Job) -> dict[str, Any]:
    """Build the engine and write it to ``job.out``.

    Returns:
        ``version`` of the library, ``sm`` the engine is for, ``scratch_bytes`` or -1.

    Raises:
        BuildRefused: the library refuses the graph or a setting.
        BackendError: the library or the GPU it needs is missing.
    """
    trt = load_tensorrt(job.target)
    log = _logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(job.onnx):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        named = "; ".join(
            f"op {e.node_operator() or '?'}, node {e.node_name() or e.node()}: {e.desc()}"
            for e in errors
        )
        raise BuildRefused(f"{Path(job.onnx).name}: the ONNX parser refused it: {named}")
    _let_attention_decompose(trt, network)
    config = builder.create_builder_config()
    sms = _configure(trt, builder, network, config, job)
    cache = None
    if job.timings is not None:
        gpu = re.sub(r"\W+", "-", gpu_name(load_cuda(), 0))
        path = Path(job.timings) / f"{trt.__version__}-{gpu}.bin"
        cache = _timing_cache(config, path)  # held while the builder uses it
    serialized = builder.build_serialized_network(network, config)
    _require(serialized is not None, f"building {Path(job.onnx).name}")
    Path(job.out).write_bytes(serialized)
    if cache is not None:
        _keep_timings(config, path)
    return {"version": trt.__version__, "sm": sms, "scratch_bytes": log.activation_bytes}


def _timing_cache(config: Any, path: Path) -> Any:
    """With what earlier builds measured; empty where the library refuses that, as another
    driver's."""
    found = b""
    with contextlib.suppress(OSError):
        found = path.read_bytes()
    cache = config.create_timing_cache(found)
    if cache is None or not config.set_timing_cache(cache, False):
        sys.stderr.write(f"{path}: refused by the builder; made anew\n")
        cache = config.create_timing_cache(b"")
        _require(cache is not None and config.set_timing_cache(cache, False), "a timing cache")
    return cache


def _keep_timings(config: Any, path: Path) -> None:
    """Where they can't be written, the next build is slower."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, bytes(config.get_timing_cache().serialize()))
    except (OSError, OutputError) as exc:
        sys.stderr.write(f"{path}: not kept ({exc})\n")


def _configure(trt: Any, builder: Any, network: Any, config: Any, job: Job) -> list[int]:
    profile = builder.create_optimization_profile()
    inputs = {network.get_input(i).name for i in range(network.num_inputs)}
    if inputs != set(job.profile):
        raise BuildRefused(
            f"{Path(job.onnx).name}: expected inputs {sorted(job.profile)}, found {sorted(inputs)}"
        )
    for name, shapes in job.profile.items():
        _accepted(profile.set_shape(name, *shapes), f"shapes {shapes} of input {name}")
    _require(config.add_optimization_profile(profile) >= 0, "the optimisation profile")
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace_bytes)
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default; fp32 would not be fp32
    config.profiling_verbosity = (
        trt.ProfilingVerbosity.DETAILED if job.detailed else trt.ProfilingVerbosity.LAYER_NAMES_ONLY
    )
    if job.optimization_level is not None:
        config.builder_optimization_level = job.optimization_level
    if job.hardware_compatibility != "none":
        name = job.hardware_compatibility.replace("-", "_").upper()
        level = getattr(trt.HardwareCompatibilityLevel, name, None)
        if level is None:
            raise BuildRefused(
                f"--hardware-compatibility {job.hardware_compatibility}: {job.target} "
                f"{trt.__version__} has no such level"
            )
        config.hardware_compatibility_level = level
    config.progress_monitor = _progress(trt)
    if job.target != "tensorrt-rtx":
        return [sm_of(load_cuda(), 0)]
    config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # so that CUDA graphs can hold it
    config.num_compute_capabilities = len(job.sms)
    for index, sm in enumerate(job.sms):
        capability = getattr(trt.ComputeCapability, f"SM{sm}", None)
        if capability is None:
            known = [n for n in trt.ComputeCapability.__members__ if n.startswith("SM")]
            raise BuildRefused(f"sm {sm}: {job.target} builds for {', '.join(known)}")
        _accepted(config.set_compute_capability(capability, index), f"sm {sm}")
    return list(job.sms)


def _let_attention_decompose(trt: Any, network: Any) -> None:
    """Attention without a fused kernel for its shape (narrow heads) becomes plain layers; without
    this the builder refuses it. Where a kernel exists it is still taken."""
    kind = getattr(trt.LayerType, "ATTENTION_OUTPUT", None)  # before 10.14 there is none
    for index in range(network.num_layers if kind is not None else 0):
        layer = network.get_layer(index)
        if layer.type == kind:
            layer.__class__ = trt.IAttentionOutputLayer  # get_layer gives the base class
            layer.attention.decomposable = True


def _network_flags(trt: Any) -> int:
    """Strongly typed: the only typing both majors share, and version 11's only one."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _accepted(answer: bool | None, what: str) -> None:
    """Calls that answer None on success in one version and True in another."""
    _require(answer is not False, what)


def _require(good: bool, what: str) -> None:
    if not good:
        raise BuildRefused(f"{what}: refused by the builder; its log says why")


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """The builder's messages to stderr, and the activation memory out of them."""

        def __init__(self) -> None:
            super().__init__()
            self.activation_bytes = -1

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.INFO:
                sys.stderr.write(f"{severity.name}: {message}\n")
                sys.stderr.flush()
            if message.startswith(ACTIVATION_LINE):
                self.activation_bytes = int(message[len(ACTIVATION_LINE) :].split()[0])

    return Log()


def _progress(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Phases of the build to stdout."""

        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            say(phase=phase_name, step=step + 1, steps=self.steps.get(phase_name, 0))
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def say(**line: Any) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main(path: str) -> int:
    raw = json.loads(Path(path).read_text(encoding="utf-8"))
    names = {field.name for field in dataclasses.fields(Job)}
    job = Job(**{name: raw[name] for name in names})
    try:
        say(result=build(job))
    except (BuildRefused, BackendError) as exc:
        say(error=str(exc))
        return 1
    except OSError as exc:
        say(error=f"{job.out}: could not be written ({exc.strerror or exc}). Free space.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
