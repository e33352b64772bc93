"""One complete step of ``rcod-train rcod-o`` at full size, with random weights, on the CPU.

  python -m benchmarks.trainstep

A step is what the training loop does for one batch of one crop: the metric of Eq. 6, generator with
MSE, LPIPS and VSD (regulariser and guided base), backward, optimiser, then the regulariser's own
loss, backward, optimiser. The networks have Stable Diffusion 2.1's and CLIP ViT-L/14's geometry.
The first step is a warm-up of time, not of memory: the peak is the kernel's record for the whole
process (VmHWM), loading included. The last line of stdout is one JSON document. Exit codes: those
of rcod-upscale, 1 beyond a limit (the table has them), 11 for what can't be measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.command import Verdict, run_command
from benchmarks.errors import BenchmarkError
from benchmarks.geometry import sd21_unet, sd_vae, vit_l14
from benchmarks.picture import draw_picture
from benchmarks.report import document, format_card, format_table, machine_card
from rcod_train.config import RCOD_O
from rcod_train.data import Batch
from rcod_train.errors import Interrupted, MissingPackage
from rcod_train.grouping import Grouping
from rcod_train.loop import run_stage
from rcod_train.models.sd import ClipVpim
from rcod_train.network import Parts, freeze
from rcod_train.precision import DTYPES, Autocast
from rcod_train.quality.lpips import Lpips
from rcod_train.stages.rcod import RcodStage

SCHEMA_VERSION = 1
LIMITS = {"peak_bytes": 14e9, "switching_share": 0.03}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trainstep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--precision", choices=tuple(DTYPES), default="bf16", help="of the frozen base")
    add("--crop", type=int, default=512, metavar="PX", help="default: %(default)s")
    add("--steps", type=int, default=2, help="the first is a warm-up (default: %(default)s)")
    add("--guidance", type=float, default=RCOD_O.guidance, help="default: %(default)s")
    add("--keep-activations", action="store_true", help="without gradient checkpointing")
    add("--without-lpips", action="store_true", help="its package is not needed then")
    add("--json", type=Path, metavar="FILE", help="write the last line there too")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: run(arguments), arguments.json)


def run(arguments: argparse.Namespace) -> Verdict:
    """Load, train, measure; returns the JSON document with its verdict."""
    if arguments.crop < 64 or arguments.crop % 64 or arguments.steps < 2:
        raise BenchmarkError(
            f"expected a crop of 64, 128, ... px and at least 2 steps, found {arguments.crop} "
            f"and {arguments.steps}."
        )
    card = machine_card()
    print(format_card(card))
    loss = None if arguments.without_lpips else _lpips()
    parts = random_parts(DTYPES[arguments.precision])
    try:
        figures = measure(
            parts,
            arguments.precision,
            arguments.crop,
            arguments.steps,
            perceptual=loss,
            guidance=arguments.guidance,
            gradient_checkpointing=not arguments.keep_activations,
        )
    except Interrupted as exc:
        raise KeyboardInterrupt from exc
    rows = [
        ("weights loaded, GB", f"{figures['loaded_bytes'] / 1e9:.2f}", ""),
        (
            "peak resident, GB",
            f"{figures['peak_bytes'] / 1e9:.2f}",
            f"{LIMITS['peak_bytes'] / 1e9:.0f}",
        ),
        ("step, s", f"{figures['step_s']:.1f}", ""),
        ("switching adapters, ms", f"{figures['switching_s'] * 1e3:.2f}", ""),
        ("its share", f"{figures['switching_share']:.2%}", f"{LIMITS['switching_share']:.0%}"),
    ]
    print(format_table(("", "measured", "limit"), rows))
    settings = {k: v for k, v in vars(arguments).items() if k != "json"}
    return Verdict(
        document("trainstep", SCHEMA_VERSION, card, settings=settings, limits=LIMITS, **figures),
        passed=all(figures[name] <= limit for name, limit in LIMITS.items()),
    )


def _lpips() -> Lpips:
    try:
        return Lpips("vgg")
    except MissingPackage as exc:
        raise BenchmarkError(f"{exc}\n    or measure without it: --without-lpips") from exc


def random_parts(dtype: torch.dtype) -> Parts:
    """RCOD_O's networks at full size with random frozen weights; the alignment is fp32."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        parts = Parts(sd_vae(), sd21_unet(), ClipVpim(vit_l14(), 1024))
    finally:
        torch.set_default_dtype(before)
    parts.vpim.align.float()
    freeze(parts, torch.device("cpu"))
    return parts


def measure(
    parts: Parts, precision: str, crop_px: int, steps: int, perceptual: Any, **settings: Any
) -> dict[str, Any]:
    """Train ``steps`` steps of one crop by the shipping loop; the figures of the last ones."""
    config = dataclasses.replace(
        RCOD_O, steps=steps, accumulate=1, crop_px=crop_px, context_px=crop_px,
        checkpoint_steps=steps, **settings,
    )  # fmt: skip
    autocast = Autocast(precision)
    stage = RcodStage(parts, config, Grouping(0.2, 0.9), autocast, perceptual)
    loaded = memory("VmRSS")
    times: list[float] = []
    for switched in (stage.model.unet, stage.model.vae):
        switched._switch = timed(switched._switch, times)  # type: ignore[method-assign]
    one = batch(crop_px, parts.vpim.tokens_px)
    with tempfile.TemporaryDirectory() as folder:
        run_stage(stage, lambda first: [one] * steps, Path(folder), 0, False, autocast)
        log = (Path(folder) / "losses.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = [json.loads(row)["step_s"] for row in log]
    step_s = statistics.median(seconds[1:])
    switching_s = sum(times) / steps
    return {
        "loaded_bytes": loaded,
        "peak_bytes": memory("VmHWM"),
        "step_s": step_s,
        "all_steps_s": seconds,
        "switches_per_step": len(times) / steps,
        "switching_s": switching_s,
        "switching_share": switching_s / step_s,
        "trained_parameters": sum(
            p.numel() for members in stage.groups.values() for named, _ in members
            for p in named.values()
        ),
    }  # fmt: skip


def timed(call: Callable[..., None], times: list[float]) -> Callable[..., None]:
    """The same call, its seconds appended to ``times``."""

    def wrapped(*arguments: Any) -> None:
        begin = time.perf_counter()
        call(*arguments)
        times.append(time.perf_counter() - begin)

    return wrapped


def batch(crop_px: int, tokens_px: int) -> Batch:
    """A drawn picture and a noisy copy, one crop."""

    def image(side: int) -> Tensor:
        return torch.from_numpy(draw_picture(side, side)).permute(2, 0, 1)[None].contiguous()

    hq, tokens = image(crop_px), image(tokens_px)
    noise = torch.randint(-20, 21, hq.shape, generator=torch.Generator().manual_seed(0))
    lq = (hq + noise).clamp(0, 255).to(torch.uint8)
    return Batch(hq, lq, tokens, tokens, torch.zeros(1, dtype=torch.int64))


def memory(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes.

    Raises:
        BenchmarkError: this system doesn't tell.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError as exc:
        raise BenchmarkError("peak memory is read from /proc: run this on Linux.") from exc
    return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024


if __name__ == "__main__":
    sys.exit(main())
