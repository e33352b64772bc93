"""Train RCOD models.

  rcod-train nano --data DIR --out DIR    from photos to a merged checkpoint in DIR/checkpoint
  rcod-train rcod-o --base DIR --clip DIR --data DIR --out DIR    the same on Stable Diffusion;
      LoRA adapters in DIR/adapters too
  rcod-train rcod-s --base DIR --clip DIR --estimator FILE --data DIR --out DIR    the same with
      branches guided by the photo's degradation, on SD-Turbo
  rcod-train estimator --data DIR --out DIR    the degradation estimator for rcod-s, to
      DIR/estimator.safetensors
  rcod-train stats --model DIR --data DIR | --pairs DIR --out DIR    the distribution of M
  rcod-train import-official FILE --base DIR ... --out DIR    published weights: rcod_o.pkl
      --clip DIR; rcod_s.pkl --clip DIR --estimator FILE [--mem FILE]; osediff.pkl --tokens FILE

Progress goes to stderr, the path of the result to stdout. Exit codes: 0 done, 2 wrong
arguments, 9 the training could not go on (the message says why), 130 stopped by a signal with
its state saved: run again with --resume.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rcod_train.errors import ConfigError, Interrupted, RcodTrainError
from rcod_train.stopping import is_one_of_several, sigterm_as_ctrl_c


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rcod-train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    nano = commands.add_parser("nano", help="the small model, from scratch, on CPU or GPU-less CI")
    _add_run(nano, "nano", "Apache-2.0")
    _add_device(nano, default="cpu")
    nano.add_argument("--lpips", action="store_true", help="add the LPIPS loss")
    nano.add_argument(
        "--from",
        dest="start",
        default="",
        metavar="DIR",
        help="go on from a merged nano checkpoint, for photos of your own: the stages refine and "
        "mem alone; one without a skip past the U-Net gets one",
    )
    _add_rcod_o(commands)
    _add_rcod_s(commands)
    estimator = commands.add_parser("estimator", help="the degradation estimator for rcod-s")
    _add_loop(estimator)
    _add_device(estimator)
    _add_stats(commands)
    _add_import(commands)
    return parser


def _add_run(parser: argparse.ArgumentParser, name: str, licence: str) -> None:
    """The arguments of every training of a model."""
    _add_loop(parser)
    add = parser.add_argument
    add(
        "--pairs",
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders with LR/ and HR/, x4, the same names: taken as they are, beside --data or "
        "in its place",
    )
    add("--name", type=_name, default=name, help="name of the model (default: %(default)s)")
    add("--licence", default=licence, help="SPDX licence of the weights (default: %(default)s)")
    add(
        "--source",
        action="append",
        default=[],
        metavar="TEXT",
        help="origin and licence of the photos, kept in the model card; may be repeated",
    )
    add("--validation", default="", metavar="DIR", help="photos to validate on, not trained on")


def _add_loop(parser: argparse.ArgumentParser) -> None:
    """The arguments of every training."""
    add = parser.add_argument
    add(
        "--data",
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders of photos, and .tar shards of them (as webdataset has them)",
    )
    add("--out", required=True, metavar="DIR", help="checkpoints, logs and the result")
    add("--resume", action="store_true", help="continue from the newest checkpoint")
    add("--seed", type=int, default=0, help="default: %(default)s")
    _add_precision(parser)
    add("--workers", type=int, default=1, help="data processes (default: %(default)s)")
    add("--threads", type=int, default=0, help="compute threads; 0: all cores")
    add("--tensorboard", action="store_true", help="log for TensorBoard too, in OUT/tensorboard")
    add(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        dest="overrides",
        help="any field of the configuration, e.g. rcod.steps=500 (see rcod_train/config.py)",
    )


def _add_rcod_o(commands: Any) -> None:
    parser = commands.add_parser("rcod-o", help="LoRA, VSD and VPIM on Stable Diffusion 2.1-base")
    add = parser.add_argument
    base = "Stable Diffusion 2.1-base or another eps-prediction base: folder or hub id"
    add("--base", required=True, metavar="DIR", help=base)
    _add_run(parser, "rcod-o", "LicenseRef-CreativeML-OpenRAIL-PlusPlus-M")
    _add_sd_run(parser)
    add(
        "--text",
        default="",
        metavar="FILE",
        help="text embeddings (safetensors) that regulariser and base are conditioned on; without, "
        "the visual tokens of the HQ image",
    )
    _add_choice(parser, "--das", "Eq. 7, or the published code's intervals")


def _add_sd_run(parser: argparse.ArgumentParser) -> None:
    """The arguments of a training on Stable Diffusion."""
    add = parser.add_argument
    add("--clip", required=True, metavar="DIR", help="CLIP ViT-L/14: folder or hub id")
    _add_device(parser)
    add("--no-lpips", action="store_true", help="leave the LPIPS loss out (package or weights)")
    bins = "Eq. 5 with measured M_min and M_max, or the published code's fixed bins"
    _add_choice(parser, "--grouping", bins)
    pair = "of Eq. 3: those of t, or the published code's one pair"
    _add_choice(parser, "--constants", pair)


def _add_device(parser: argparse.ArgumentParser, default: str = "auto") -> None:
    help_ = "auto, cpu, cuda or cuda:N (default: %(default)s)"
    parser.add_argument("--device", default=default, help=help_)


def _add_stats(commands: Any) -> None:
    parser = commands.add_parser(
        "stats", help="the distribution of M, and how it follows SSIM: stats.json, stats.png"
    )
    add = parser.add_argument
    model = "merged checkpoint, or base model with vae/: folder or hub id"
    add("--model", required=True, metavar="DIR", help=model)
    add("--data", nargs="+", default=[], metavar="DIR", help="folders of photos to degrade")
    add("--pairs", default="", metavar="DIR", help="folder with LR/ and HR/, x4, taken whole")
    add("--out", required=True, metavar="DIR")
    add("--count", type=int, default=512, help="crops of --data (default: %(default)s)")
    add("--crop", type=int, default=512, metavar="PX", help="their side (default: %(default)s)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    _add_device(parser)
    _add_precision(parser)


def _add_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="of matrix products and frozen weights; auto: bf16 where it is faster here "
        "(default: %(default)s)",
    )


def _add_choice(parser: argparse.ArgumentParser, option: str, help_: str) -> None:
    both, help_ = ("paper", "official"), f"{help_} (default: %(default)s)"
    parser.add_argument(option, choices=both, default="paper", help=help_)


def _add_rcod_s(commands: Any) -> None:
    parser = commands.add_parser("rcod-s", help="degradation-guided branches on SD-Turbo")
    add = parser.add_argument
    base = "SD-Turbo or another eps-prediction base: folder or hub id"
    add("--base", required=True, metavar="DIR", help=base)
    _add_run(parser, "rcod-s", "LicenseRef-Stability-AI-SD-Turbo")
    _add_sd_run(parser)
    estimator = "degradation estimator: S3Diff's de_net.pth, or of rcod-train estimator"
    add("--estimator", required=True, metavar="FILE", help=estimator)
    add(
        "--backbone",
        default="",
        metavar="DIR",
        help="vision model that the discriminator looks through, such as DINOv2: folder or hub id; "
        "without, a small discriminator on the pixels",
    )


def _add_import(commands: Any) -> None:
    official = commands.add_parser(
        "import-official", help="published weights of RCOD_O, RCOD_S, OSEDiff to a checkpoint"
    )
    add = official.add_argument
    add(
        "file",
        type=Path,
        help="rcod_o.pkl, rcod_s.pkl or osediff.pkl, told by its content; no code in it is run",
    )
    add(
        "--base",
        required=True,
        metavar="DIR",
        help="folder or hub id: Stable Diffusion 2.1-base, for rcod_s.pkl SD-Turbo",
    )
    add("--clip", metavar="DIR", help="CLIP ViT-L/14 (rcod_o.pkl, rcod_s.pkl): folder or hub id")
    add("--estimator", type=Path, metavar="FILE", help="de_net.pth of S3Diff (rcod_s.pkl)")
    add("--mem", type=Path, metavar="FILE", help="rcod_s_mem.pkl, for adaptive (rcod_s.pkl)")
    add(
        "--tokens",
        type=Path,
        metavar="FILE",
        help="safetensors file with the embedding `tokens` (N, 1024) of a prompt (osediff.pkl)",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="the merged checkpoint")
    add("--name", type=_name, help="name of the model (default: that of the published one)")


def _name(text: str) -> str:
    """As a bundle's manifest has it."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", text):
        raise argparse.ArgumentTypeError(
            f"expected 1 to 64 letters, digits, dots, - and _, found {text!r}"
        )
    return text


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``rcod-train``; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    code, together = RcodTrainError.exit_code, False
    try:
        with sigterm_as_ctrl_c():
            code, together = _COMMANDS[arguments.command](arguments), True
    except RcodTrainError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code, together = error.exit_code, isinstance(error, Interrupted)
    except ModuleNotFoundError as error:
        print(f'{error.name} is not installed. pip install "rcod[train]"', file=sys.stderr)
    except KeyboardInterrupt:  # a stage's steps end as Interrupted, with their state saved
        print("stopped; what is written is whole", file=sys.stderr)
        code = Interrupted.exit_code
    except Exception:
        if not is_one_of_several():
            raise
        traceback.print_exc()
    if is_one_of_several():
        from rcod_train.ranks import leave

        leave(code, together)
    return code


def _common(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fields of RunConfig; progress is logged from here on."""
    import logging

    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("rcod_train").setLevel(logging.INFO)
    names = ("out", "seed", "precision", "workers", "threads", "validation", "tensorboard",
             "device")  # fmt: skip
    given = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    pairs = tuple(getattr(arguments, "pairs", ()))
    return {"data": tuple(arguments.data), "pairs": pairs, **given}


def _run_nano(arguments: argparse.Namespace) -> int:
    from rcod_train.config import TrainConfig
    from rcod_train.nano import train_nano, with_levels_of_start

    config = TrainConfig(**_common(arguments), use_lpips=arguments.lpips, start=arguments.start)
    if arguments.start:
        config = with_levels_of_start(config)
    for assignment in arguments.overrides if arguments.start else ():
        stage = assignment.partition(".")[0]
        if stage in config.stages and stage not in ("refine", "mem"):
            raise ConfigError(
                f"--set {assignment!r}: with --from the stages refine and mem alone run. Settings "
                "of the RCOD stage are refine's there, as in refine.steps=500."
            )
    return _train(train_nano, config, arguments)


def _run_rcod_o(arguments: argparse.Namespace) -> int:
    from rcod_train.config import RCOD_O, RcodOConfig
    from rcod_train.rcod_o import train_rcod_o

    rcod = dataclasses.replace(
        RCOD_O,
        grouping=arguments.grouping,
        das=arguments.das,
        constants=arguments.constants,
        # The base was never trained on visual tokens: there is nothing to guide away from.
        guidance=RCOD_O.guidance if arguments.text else 1.0,
    )
    config = RcodOConfig(**_common(arguments), **_sd(arguments), text=arguments.text, rcod=rcod)
    return _train(train_rcod_o, config, arguments)


def _run_rcod_s(arguments: argparse.Namespace) -> int:
    from rcod_train.config import RCOD_S, RcodSConfig
    from rcod_train.rcod_s import train_rcod_s

    rcod = dataclasses.replace(RCOD_S, grouping=arguments.grouping, constants=arguments.constants)
    config = RcodSConfig(
        **_common(arguments),
        **_sd(arguments),
        estimator=arguments.estimator,
        backbone=arguments.backbone,
        rcod=rcod,
    )
    return _train(train_rcod_s, config, arguments)


def _sd(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fields of the configurations on Stable Diffusion."""
    return {
        "use_lpips": not arguments.no_lpips,
        "base_model": arguments.base,
        "clip": arguments.clip,
    }


def _train(train: Callable[..., Path], config: Any, arguments: argparse.Namespace) -> int:
    from rcod_train.overrides import with_overrides
    from rcod_train.ranks import is_first

    named = (arguments.name, arguments.licence, tuple(arguments.source))
    checkpoint = train(with_overrides(config, arguments.overrides), arguments.resume, *named)
    if is_first():
        print(checkpoint)
    return 0


def _run_estimator(arguments: argparse.Namespace) -> int:
    from rcod_train.config import EstimatorConfig
    from rcod_train.estimator import train_estimator
    from rcod_train.overrides import with_overrides
    from rcod_train.ranks import is_first

    config = with_overrides(EstimatorConfig(**_common(arguments)), arguments.overrides)
    path = train_estimator(config, arguments.resume)
    if is_first():
        print(path)
    return 0


def _run_stats(arguments: argparse.Namespace) -> int:
    from rcod_train.stats import StatsConfig, measure, table

    config = StatsConfig(
        model=arguments.model,
        out=arguments.out,
        data=tuple(arguments.data),
        pairs=arguments.pairs,
        count=arguments.count,
        crop_px=arguments.crop,
        seed=arguments.seed,
        device=arguments.device,
        precision=arguments.precision,
    )
    print(table(measure(config)))
    return 0


def _import_official(arguments: argparse.Namespace) -> int:
    from rcod_train.checkpoint import check_replaceable, save_merged
    from rcod_train.official import OfficialImport, import_official

    request = OfficialImport(
        file=arguments.file,
        base=arguments.base,
        clip=arguments.clip,
        tokens=arguments.tokens,
        estimator=arguments.estimator,
        mem=arguments.mem,
        name=arguments.name,
    )
    check_replaceable(arguments.out)
    parts, info = import_official(request)
    save_merged(arguments.out, parts, info)
    print(arguments.out)
    return 0


_COMMANDS = {
    "nano": _run_nano,
    "rcod-o": _run_rcod_o,
    "rcod-s": _run_rcod_s,
    "estimator": _run_estimator,
    "stats": _run_stats,
    "import-official": _import_official,
}


if __name__ == "__main__":
    sys.exit(main())
