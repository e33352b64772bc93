"""A stage's checkpoints in its folder: written whole, and refused by a run they don't belong to."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from rcod_train.config import LoopConfig
from rcod_train.errors import CheckpointError, TrainError
from rcod_train.files import reason_of
from rcod_train.fingerprint import fingerprint
from rcod_train.ranks import Ranks

KEPT_CHECKPOINTS = 2
# Settings that a stage may be continued with other values of. A stage that later ones were built on
# is not trained on, whatever its steps: see ``loop.run_stage``.
FREE = (
    "steps",
    "checkpoint_steps",
    "validation_steps",
    "gradient_checkpointing",
    "learning_rate",
    "decoder_learning_rate",
    "regulariser_learning_rate",
    "discriminator_learning_rate",
)


def write_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Whole or not at all: written beside, flushed, renamed; older ones pruned after.

    Raises:
        TrainError: it can't be written; the one before it stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:07d}.pt"
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as exc:  # torch's writer makes the second of the first
        partial.unlink(missing_ok=True)
        raise TrainError(
            f"{path}: the checkpoint could not be written ({reason_of(exc)}). "
            "Free space and run again with --resume; the one before it is whole."
        ) from exc
    for old in sorted(folder.glob("step-*.pt"))[:-KEPT_CHECKPOINTS]:
        old.unlink()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A stage checkpoint; only tensors and plain values are unpickled."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, UnpicklingError) as exc:
        raise CheckpointError(f"{path}: not a whole checkpoint ({exc}). Delete it.") from exc
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: expected a checkpoint of rcod-train, found {type(state)}.")
    return state


def check_settings(
    path: Path,
    state: dict[str, Any],
    config: LoopConfig,
    seed: int,
    world: int,
    data: Mapping[str, Any],
) -> None:
    """Whether it was made with this configuration, on processes that make the same steps.

    Args:
        data: what the batches are drawn from.

    Raises:
        CheckpointError: it wasn't.
    """
    # A setting that a checkpoint doesn't have is younger, and its default is what was before.
    defaults = {f.name: f.default for f in dataclasses.fields(LoopConfig)}
    defaults |= {f.name: f.default for f in dataclasses.fields(config)}
    theirs = defaults | state["config"]
    ours = dataclasses.asdict(config)
    # A step is that many batches; one process that accumulates twice as many is two processes.
    per_step = (theirs.pop("accumulate"), state.get("processes", world))
    here = (ours.pop("accumulate"), world)
    differing = {
        key: (theirs[key], value)
        for key, value in ours.items()
        if key not in FREE and theirs[key] != value
    }
    done = state["step"] >= config.steps  # then no step is made here
    if math.prod(per_step) != math.prod(here) and not done:
        differing["accumulate x processes"] = tuple(f"{n} x {w}" for n, w in (per_step, here))
    there = {**data, **state.get("data", {})}  # older checkpoints don't say
    differing |= {key: (there[key], value) for key, value in data.items() if there[key] != value}
    if differing or state["seed"] != seed:
        found = ", ".join(f"{k}: {a} there, {b} here" for k, (a, b) in differing.items())
        raise CheckpointError(
            f"{path}: made with another configuration ({found or 'another seed'}). "
            "Use the same settings, or another --out."
        )


def check_inherited(path: Path, state: dict[str, Any], ours: Mapping[str, str]) -> None:
    """Whether the weights that the stage was built on are those that are there.

    Args:
        ours: the fingerprint that each stage before this one left.

    Raises:
        CheckpointError: they aren't.
    """
    theirs = state.get("inherited", ours)  # older checkpoints don't say
    changed = [name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name)]
    if changed:
        raise CheckpointError(
            f"{path}: was built on other weights of {', '.join(changed)} than are there now: "
            f"trained on or again since. Delete {path.parent} and the later stages' folders "
            "and add --resume to train them again, or use another --out."
        )


def check_replicas(folder: Path, step: int, parameters: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Whether all processes go on from one checkpoint, or begin with the same weights: in training
    they hand each other gradients, and no weights.

    Raises:
        TrainError: they don't.
    """
    if ranks.world == 1:
        return
    found = ranks.gather((step, fingerprint(parameters.values())))
    if len(set(found)) > 1:
        if not any(step for step, _ in found):
            raise TrainError(
                f"{folder}: the processes begin with different weights: of other base models, or "
                "drawn on other kinds of GPU. Give all machines the same files, and GPUs of one "
                "model."
            )
        raise TrainError(
            f"{folder}: expected one checkpoint for all processes, found different ones, at steps "
            f"{', '.join(str(step) for step, _ in found)} (0: none). Give all machines a shared "
            "--out, or a copy of it."
        )


def check_parameters(path: Path, state: dict[str, Any], ours: Mapping[str, Tensor]) -> None:
    """Whether it holds these parameters, in these shapes.

    Raises:
        CheckpointError: it doesn't.
    """
    missing = ours.keys() ^ state["parameters"].keys()
    if missing:
        raise CheckpointError(
            f"{path}: parameters differ, e.g. {sorted(missing)[:3]}: made by another version of "
            "rcod or with other parts (a --backbone, for example). Go on with those, or choose "
            "another --out."
        )
    for name, parameter in ours.items():
        found, expected = state["parameters"][name].shape, parameter.shape
        if found != expected:
            raise CheckpointError(
                f"{path}: parameter {name}: expected {tuple(expected)}, found {tuple(found)}. "
                "The checkpoint belongs to another base model; use that, or another --out."
            )
