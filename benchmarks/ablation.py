"""What each part of the method gains: variants of nano trained with the same budget, one table.

  python -m benchmarks.ablation --data photos --stages runs/nano --dataset realsr --out ablation
  python -m benchmarks.ablation ... --variants rcod vanilla --set rcod.steps=800

All variants share the autoencoder and the base denoiser of --stages, a run folder of
``rcod-train nano``; each is trained from there by ``rcod-train``, exported by ``rcod-export`` and
scored by ``benchmarks.quality``. A variant that is finished in --out is not trained again, and one
that was stopped goes on; with other settings, photos, stages or another dataset it is refused. One
that was scored by an earlier version, or with other metrics than can be had now, is scored again.
Prints one JSON document as the last line, with the commit and the machine that each variant was
trained with; those of its scores are in its quality.json. Exit codes: those of rcod-upscale, and 11
where a command fails or --stages or --out is not what it should be.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import iqa, report
from benchmarks.command import make_folder, run_command
from benchmarks.errors import CommandFailed, DatasetError
from benchmarks.tables import shown
from rcod_runtime.files import write_whole
from rcod_runtime.manifest import sha256_file
from rcod_train.files import written_whole

SCHEMA_VERSION = 3  # 3: PIQE of RGB, which had its red and blue swapped before
# What differs from the whole method, as settings of rcod-train.
VARIANTS: dict[str, tuple[str, ...]] = {
    "rcod": (),
    # The same method on other crops of the photos: what chance alone moves.
    "other_crops": ("regression.context_px=400", "rcod.context_px=400"),
    "vanilla": ("rcod.n=1", "rcod.k=500"),  # one fixed t for every photo
    "no_vsd": ("rcod.vsd_weight=0",),
    "uniform_t_r": ("rcod.das=uniform",),
    "no_vpim": ("rcod.vpim=false",),
    "l1_metric": ("rcod.metric=l1",),
    "n_2": ("rcod.n=2",),
    "n_4": ("rcod.n=4", "rcod.k=249"),  # the schedule ends at t = 999
    "no_adversary": ("rcod.adversarial_weight=0",),
    "no_regression": ("regression.steps=1",),
    "mild_share": ("rcod.mild_share=0.4", "rcod.heavy_share=0.25"),  # degradations, not the method
}
BUDGET = ("regression.steps=400", "rcod.steps=400", "refine.steps=0", "mem.steps=50")
SHOWN = (("psnr_y", "PSNR", 2), ("ssim_y", "SSIM", 3), ("niqe", "NIQE", 2), ("piqe", "PIQE", 1))
SHARED = ("vae", "base")  # stages that all variants start from
MADE_WITH = "made_with.json"  # in a variant's folder, from its first moment


@dataclass(frozen=True)
class AblationConfig:
    """``settings`` go to every variant, after the budget's."""

    data: tuple[str, ...]
    stages: Path
    dataset: Path
    out: Path
    variants: tuple[str, ...]
    settings: tuple[str, ...]
    endings: tuple[str, ...]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", nargs="+", required=True, metavar="DIR", help="folders of training photos")
    add("--stages", type=Path, required=True, metavar="DIR", help="a run of rcod-train nano")
    add("--dataset", type=Path, required=True, metavar="DIR", help="folder with LR/ and HR/")
    add("--out", type=Path, required=True, metavar="DIR", help="a folder for each variant")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME",
        help=f"of {', '.join(VARIANTS)} (default: all)")  # fmt: skip
    add("--set", action="append", default=[], metavar="FIELD=VALUE", dest="settings",
        help=f"for every variant (default budget: {' '.join(BUDGET)})")  # fmt: skip
    add("--names-ending", nargs="+", default=[], metavar="TEXT", help="see benchmarks.quality")
    add("--json", type=Path, metavar="FILE", help="write the JSON document here too")
    return parser


def shared_settings(stages: Path) -> tuple[str, ...]:
    """The settings of the stages that are taken over, from the run's config.json.

    Raises:
        DatasetError: it is no run of rcod-train nano, or a stage is not finished.
    """
    path = stages / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        steps = {stage: int(config[stage]["steps"]) for stage in SHARED}
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise DatasetError(
            f"{path}: expected the configuration of a run of rcod-train nano ({exc})."
        ) from exc
    for stage, last in steps.items():
        if not (stages / stage / f"step-{last:07d}.pt").is_file():
            raise DatasetError(
                f"{stages / stage}: expected its last checkpoint, step-{last:07d}.pt, found none. "
                "Finish the run with --resume."
            )
    values = {f"{s}.{key}": value for s in SHARED for key, value in config[s].items()}
    return tuple(f"{key}={value}" for key, value in values.items()) + (
        f"validation_share={config['validation_share']}",
    )


def shared_weights(stages: Path) -> dict[str, str]:
    """The SHA-256 of the checkpoint that each stage goes on from, its last one."""
    return {stage: sha256_file(max((stages / stage).glob("step-*.pt"))) for stage in SHARED}


def scoring() -> dict[str, Any]:
    """What scores of one table have in common: how they are made, and the metrics of packages
    that can be had here; the built-in ones are always there."""
    loaded, _ = iqa.load([packaged.name for packaged in iqa.PACKAGED])
    names = [metric.packaged.name for metric in loaded]
    return {"schema_version": SCHEMA_VERSION, "packaged_metrics": names}


def train_and_score(
    name: str,
    config: AblationConfig,
    shared: Sequence[str],
    weights: Mapping[str, str],
    scored_with: Mapping[str, Any],
) -> dict[str, Any]:
    """One variant, from the shared stages to its figures; kept in its folder.

    Raises:
        CommandFailed: a command did, with the end of what it said.
        DatasetError: the folder holds the variant made with something else.
    """
    folder = config.out / name
    settings = [*shared, *BUDGET, *config.settings, *VARIANTS[name]]
    wanted = {
        "settings": settings,
        "data": [str(Path(photos).resolve()) for photos in config.data],
        "stages": dict(weights),
        "dataset": [str(config.dataset.resolve()), *config.endings],
    }
    made_with, finished = folder / MADE_WITH, folder / "variant.json"
    if not folder.exists():
        with written_whole(folder) as partial:
            for stage in SHARED:
                shutil.copytree(config.stages / stage, partial / stage)
            (partial / MADE_WITH).write_text(json.dumps(wanted), encoding="utf-8")
    found = json.loads(made_with.read_text(encoding="utf-8")) if made_with.is_file() else None
    if found != wanted:
        raise DatasetError(
            f"{made_with}: expected the variant with {wanted}, found it with "
            f"{found or 'what nobody wrote down'}. Choose another --out."
        )
    bundle, scores = str(folder / "bundle"), folder / "quality.json"
    kept: dict[str, Any] = {}
    if finished.is_file():
        kept = json.loads(finished.read_text(encoding="utf-8"))
        if kept.get("scored_with") == scored_with:
            return kept
    else:
        train = ["rcod_train.main", "nano", "--data", *config.data, "--out", str(folder)]
        train += ["--resume", *(part for s in settings for part in ("--set", s))]
        _run(name, train)
    if not finished.is_file() or not Path(bundle).is_dir():
        _run(name, ["rcod_export.main", "bundle", str(folder / "checkpoint"), "-o", bundle])
    quality = ["benchmarks.quality", "--dataset", str(config.dataset), "--bundle", bundle]
    quality += ["--json", str(scores)]
    if config.endings:
        quality += ["--names-ending", *config.endings]
    _run(name, quality)
    methods = json.loads(scores.read_text(encoding="utf-8"))["methods"]
    variant = {
        "settings": list(VARIANTS[name]),
        "card": kept.get("card") or asdict(report.machine_card()),
        "scored_with": scored_with,
        "levels": {m["name"]: m["mean"] for m in methods if m["kind"] == "model"},
    }
    write_whole(finished, json.dumps(variant).encode())
    return variant


def _run(name: str, module: Sequence[str]) -> None:
    print(f"{name}: {module[0]}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", *module]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.read()  # its progress bar stays on stderr
    if process.returncode:
        raise CommandFailed(
            f"{name}: python -m {' '.join(module[:2])} ended with exit code {process.returncode}. "
            f"{said[-500:]}".strip()
        )


def table(variants: dict[str, dict[str, Any]]) -> str:
    rows = [
        (name, level, *(shown(mean.get(key), decimals) for key, _, decimals in SHOWN))
        for name, variant in variants.items()
        for level, mean in variant["levels"].items()
    ]
    return report.format_table(("variant", "level", *(title for _, title, _ in SHOWN)), rows)


def measure(config: AblationConfig) -> str:
    shared = shared_settings(config.stages)
    make_folder("--out", config.out)
    weights, scored_with = shared_weights(config.stages), scoring()
    variants = {
        name: train_and_score(name, config, shared, weights, scored_with)
        for name in config.variants
    }
    print(table(variants))
    budget = [*BUDGET, *config.settings]
    card = report.machine_card()
    return report.document("ablation", SCHEMA_VERSION, card, budget=budget, variants=variants)


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    config = AblationConfig(
        data=tuple(arguments.data),
        stages=arguments.stages,
        dataset=arguments.dataset,
        out=arguments.out,
        variants=tuple(arguments.variants),
        settings=tuple(arguments.settings),
        endings=tuple(arguments.names_ending),
    )
    return run_command(lambda: measure(config), arguments.json)


if __name__ == "__main__":
    sys.exit(main())
