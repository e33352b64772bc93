"""One loop for all stages: checkpoints that resume bit for bit, EMA, a loss log, a clean stop."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter
from tqdm import tqdm

from rcod_train.config import LoopConfig
from rcod_train.data import Batch
from rcod_train.errors import CheckpointError, Interrupted, TrainError

log = logging.getLogger(__name__)

KEPT_CHECKPOINTS = 2


class Update:
    """One optimiser update asked for by a stage: which group, its loss, and figures for the log."""

    def __init__(self, group: str, loss: Tensor, figures: dict[str, Tensor | float]) -> None:
        self.group, self.loss, self.figures = group, loss, figures


class Stage(Protocol):
    """What the loop needs of a stage."""

    name: str
    config: LoopConfig
    groups: dict[str, list[tuple[dict[str, Parameter], float]]]
    """Optimiser name -> [(parameters by name, learning rate)]; each optimiser steps by itself."""

    def updates(self, batch: Batch, generator: torch.Generator) -> Iterator[Update]:
        """The updates of one step, in order; each is applied before the next is asked for."""
        ...

    def extra_state(self) -> dict[str, Any]:
        """Plain values that belong into the checkpoint beside the parameters."""
        ...

    def load_extra_state(self, state: dict[str, Any]) -> None: ...


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random source of one step: nothing is carried over from step to step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % (2**63))


class _Trainer:
    def __init__(self, stage: Stage, folder: Path, seed: int) -> None:
        self.stage, self.folder, self.seed, self.step = stage, folder, seed, 0
        self.parameters = {
            f"{group}.{name}": parameter
            for group, members in stage.groups.items()
            for named, _ in members
            for name, parameter in named.items()
        }
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizers = {
            group: torch.optim.AdamW(
                [
                    {"params": list(named.values()), "lr": rate, "base": rate}
                    for named, rate in members
                ],
                betas=(0.9, 0.99),
                weight_decay=stage.config.weight_decay,
                fused=False,
                foreach=True,
            )
            for group, members in stage.groups.items()
        }

    def rate_factor(self) -> float:
        """Linear warm-up, then half a cosine down to a twentieth."""
        c = self.stage.config
        warm = min(1.0, (self.step + 1) / max(1, c.warmup_steps))
        return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * self.step / max(1, c.steps))))

    def apply(self, update: Update) -> float:
        optimizer = self.optimizers[update.group]
        factor = self.rate_factor()
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * factor
        if not torch.isfinite(update.loss):
            raise TrainError(
                f"stage {self.stage.name}, step {self.step}: the {update.group} loss is "
                f"{update.loss.item()}. Lower the learning rate, or --set precision=fp32; "
                f"the last checkpoint in {self.folder} is whole."
            )
        optimizer.zero_grad(set_to_none=True)
        update.loss.backward()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.stage.config.clip_norm)
        optimizer.step()
        return float(norm)

    @torch.no_grad()
    def update_ema(self) -> None:
        decay = min(self.stage.config.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.values()), list(self.parameters.values()), 1.0 - decay)

    # -- checkpoints ---------------------------------------------------------------------------

    def save(self) -> None:
        """Whole or not at all: written beside, flushed, renamed; older ones pruned after."""
        state = {
            "step": self.step,
            "seed": self.seed,
            "config": dataclasses.asdict(self.stage.config),
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "ema": self.ema,
            "optimizers": {name: o.state_dict() for name, o in self.optimizers.items()},
            "extra": self.stage.extra_state(),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{self.step:07d}.pt"
        partial = path.with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as exc:
            partial.unlink(missing_ok=True)
            raise TrainError(
                f"{path}: the checkpoint could not be written ({exc.strerror or exc}). "
                "Free space and run again with --resume; the one before it is whole."
            ) from exc
        for old in sorted(self.folder.glob("step-*.pt"))[:-KEPT_CHECKPOINTS]:
            old.unlink()

    def load(self, path: Path) -> None:
        state = read_checkpoint(path)
        ours = dataclasses.asdict(self.stage.config)
        differing = {
            key: (state["config"].get(key), value)
            for key, value in ours.items()
            if key not in ("steps", "checkpoint_steps") and state["config"].get(key) != value
        }
        if differing or state["seed"] != self.seed:
            found = ", ".join(f"{k}: {a} there, {b} here" for k, (a, b) in differing.items())
            raise CheckpointError(
                f"{path}: made with another configuration ({found or 'another seed'}). "
                "Use the same settings, or another --out."
            )
        missing = self.parameters.keys() ^ state["parameters"].keys()
        if missing:
            raise CheckpointError(f"{path}: parameters differ, e.g. {sorted(missing)[:3]}.")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][name])
        self.ema = state["ema"]
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.stage.load_extra_state(state["extra"])
        self.step = state["step"]

    @torch.no_grad()
    def take_ema(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(self.ema[name])


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A stage checkpoint; only tensors and plain values are unpickled."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, UnpicklingError) as exc:
        raise CheckpointError(f"{path}: not a whole checkpoint ({exc}). Delete it.") from exc
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: expected a checkpoint of rcod-train, found {type(state)}.")
    return state


@contextmanager
def _stop_requested() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, so that the loop stops between two steps."""
    received: list[int] = []
    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            previous[number] = signal.signal(number, lambda n, _: received.append(n))
        except ValueError:  # not in the main thread: the caller handles signals
            break
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_stage(
    stage: Stage,
    make_batches: Any,
    folder: Path,
    seed: int,
    resume: bool,
) -> None:
    """Train a stage to its last step and leave its modules with the averaged (EMA) weights.

    Args:
        make_batches: first step -> iterable of batches up to the stage's last step.
        folder: of the checkpoints and ``losses.jsonl``.
        resume: continue from the newest checkpoint; a finished stage only loads its weights.

    Raises:
        CheckpointError: the checkpoint is of another configuration.
        Interrupted: SIGINT or SIGTERM came; the state is saved.
        TrainError: a loss is not finite, or a checkpoint can't be written.
    """
    trainer = _Trainer(stage, folder, seed)
    existing = sorted(folder.glob("step-*.pt"))
    if existing and not resume:
        raise CheckpointError(
            f"{folder}: holds checkpoints of an earlier run. Add --resume to continue it, "
            "or choose another --out."
        )
    if existing:
        trainer.load(existing[-1])
        log.info("stage %s: resumed at step %d", stage.name, trainer.step)
    if trainer.step < stage.config.steps:
        _train(trainer, make_batches(trainer.step), resume)
    trainer.take_ema()


def _train(trainer: _Trainer, batches: Iterable[Batch], resume: bool) -> None:
    stage, steps = trainer.stage, trainer.stage.config.steps
    trainer.folder.mkdir(parents=True, exist_ok=True)
    log_path = trainer.folder / "losses.jsonl"
    if resume and log_path.exists():
        _cut_log(log_path, trainer.step)
    progress = tqdm(
        total=steps,
        initial=trainer.step,
        desc=stage.name,
        unit="step",
        dynamic_ncols=True,
        mininterval=1.0,
    )
    with (
        _stop_requested() as stopped,
        log_path.open("a", buffering=1, encoding="utf-8") as log_file,
        progress,
    ):
        for batch in batches:
            started = time.perf_counter()
            generator = step_generator(trainer.seed, trainer.step)
            row: dict[str, float] = {"step": trainer.step}
            for update in stage.updates(batch, generator):
                row[f"{update.group}_loss"] = float(update.loss.detach())
                row |= {key: float(value) for key, value in update.figures.items()}
                row[f"{update.group}_grad_norm"] = trainer.apply(update)
            trainer.update_ema()
            trainer.step += 1
            row["step_s"] = time.perf_counter() - started
            log_file.write(json.dumps({k: round(v, 6) for k, v in row.items()}) + "\n")
            progress.set_postfix_str(
                " ".join(f"{k} {v:.4g}" for k, v in row.items() if k.endswith("_loss")),
                refresh=False,
            )
            progress.update()
            last = trainer.step == steps
            if last or stopped or trainer.step % stage.config.checkpoint_steps == 0:
                log_file.flush()
                trainer.save()
            if stopped and not last:
                raise Interrupted(
                    f"stage {stage.name}: stopped at step {trainer.step} of {steps}, state saved "
                    f"in {trainer.folder}. Continue with --resume."
                )


def _cut_log(path: Path, step: int) -> None:
    """Drop the rows that a killed run logged after its last checkpoint."""
    rows = path.read_text(encoding="utf-8").splitlines()
    kept = [row for row in rows if row.endswith("}") and json.loads(row)["step"] < step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(row + "\n" for row in kept), encoding="utf-8")
    shutil.move(partial, path)
