"""One loop for all stages: checkpoints that resume bit for bit, EMA, a loss log, a clean stop.

A step is one update of every optimiser, from the gradients of ``accumulate`` batches in each of the
processes.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter
from tqdm import tqdm

from rcod_train.config import LoopConfig
from rcod_train.data import Batch
from rcod_train.errors import CheckpointError, Interrupted, TrainError
from rcod_train.files import disk_errors, file_written_whole
from rcod_train.fingerprint import fingerprint
from rcod_train.precision import Autocast
from rcod_train.ranks import Ranks
from rcod_train.stage_checkpoint import (
    check_inherited,
    check_parameters,
    check_replicas,
    check_settings,
    read_checkpoint,
    write_checkpoint,
)
from rcod_train.stopping import stop_requested

log = logging.getLogger(__name__)

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # GPU, CPU


class Update:
    """One optimiser update asked for by a stage: which group, its loss, and figures for the log.

    Of several batches to a step, each asks for it, and the last one's is made.
    """

    def __init__(self, group: str, loss: Tensor, figures: dict[str, Tensor | float]) -> None:
        self.group, self.loss, self.figures = group, loss, figures


Members = list[tuple[dict[str, Parameter], float]]


class Stage(Protocol):
    """What the loop needs of a stage."""

    name: str
    config: LoopConfig
    groups: dict[str, Members]
    """Optimiser name -> [(parameters by name, learning rate)]; each optimiser steps by itself."""

    def updates(self, batch: Batch, generator: torch.Generator) -> Iterator[Update]:
        """The updates of one step, in order; each is applied before the next is asked for."""
        ...

    def extra_state(self) -> dict[str, Any]:
        """Plain values that belong into the checkpoint beside the parameters."""
        ...

    def load_extra_state(self, state: dict[str, Any]) -> None: ...


def step_generator(seed: int, batch: int) -> torch.Generator:
    """The random source of one batch, counted over all processes: nothing is carried over from one
    to the next."""
    return torch.Generator().manual_seed((seed * 1_000_003 + batch) % (2**63))


def make_optimizer(config: LoopConfig, members: Members) -> torch.optim.Optimizer:
    """AdamW with a learning rate for each set of parameters; "adamw8bit" keeps its moments in 8
    bits (Dettmers et al. 2022) where a tensor has 4096 values or more.

    Raises:
        TrainError: bitsandbytes is missing.
    """
    groups = [{"params": list(named.values()), "lr": rate, "base": rate} for named, rate in members]
    both = {"betas": (0.9, config.beta2), "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **both, fused=False, foreach=True)
    optimizer: torch.optim.Optimizer = adamw8bit()(groups, **both)
    return optimizer


def adamw8bit() -> Any:
    """The class, if its package is installed; else TrainError."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as exc:
        raise TrainError(
            'optimizer adamw8bit: the package bitsandbytes is missing. pip install "rcod[8bit]", '
            "or train with adamw."
        ) from exc
    return AdamW8bit


class _Trainer:
    def __init__(
        self,
        stage: Stage,
        folder: Path,
        seed: int,
        autocast: Autocast,
        ranks: Ranks,
        inherited: Mapping[str, str],
        data: Mapping[str, Any],
    ) -> None:
        self.stage, self.folder, self.seed, self.step = stage, folder, seed, 0
        self.inherited, self.data = dict(inherited), dict(data)
        self.ranks, self.device = ranks, autocast.device
        self.parameters = {
            f"{group}.{name}": parameter
            for group, members in stage.groups.items()
            for named, _ in members
            for name, parameter in named.items()
        }
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizers = {
            group: make_optimizer(stage.config, members) for group, members in stage.groups.items()
        }
        self.scalers = {group: autocast.scaler() for group in stage.groups}

    def rate_factor(self) -> float:
        """Linear warm-up, then half a cosine down to ``final_rate``."""
        c = self.stage.config
        warm = min(1.0, (self.step + 1) / max(1, c.warmup_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * self.step / max(1, c.steps)))
        return warm * (c.final_rate + (1.0 - c.final_rate) * cosine)

    def train_step(self, batches: Iterator[Batch]) -> dict[str, float]:
        """One step; returns its row of the log, means over its batches in all processes."""
        n = self.stage.config.accumulate
        rate = self.stage.config.learning_rate * self.rate_factor()
        row: dict[str, float] = {"step": self.step, "learning_rate": rate}
        for i in range(n):
            batch = (self.step * n + i) * self.ranks.world + self.ranks.rank
            generator = step_generator(self.seed, batch)
            for update in self.stage.updates(next(batches), generator):
                figures = {f"{update.group}_loss": update.loss.detach(), **update.figures}
                for key, value in figures.items():
                    row[key] = row.get(key, 0.0) + float(value) / n
                self.backward(update, i)
                if i == n - 1:
                    row[f"{update.group}_grad_norm"] = self.optimise(update.group)
        self.update_ema()
        self.step += 1
        if self.ranks.world > 1:
            figures = torch.tensor(list(row.values()), dtype=torch.float64, device=self.device)
            self.ranks.average_([figures])
            row = dict(zip(row, figures.tolist(), strict=True))
        return row

    def backward(self, update: Update, i: int) -> None:
        """Add the gradients of the step's i-th batch."""
        if not torch.isfinite(update.loss):
            terms = [k for k, v in update.figures.items() if not math.isfinite(float(v))]
            named = f" (not finite: {', '.join(terms)})" if terms else ""
            raise self._diverged(f"the {update.group} loss is {update.loss.item()}{named}")
        if i == 0:
            self.optimizers[update.group].zero_grad(set_to_none=True)
        loss = update.loss / self.stage.config.accumulate
        self.scalers[update.group].scale(loss).backward()

    def optimise(self, group: str) -> float:
        """Clip and apply a group's gradients; returns their norm before.

        With fp16 a step of infinite gradients is left out and the loss scaled less from then on.
        """
        optimizer, scaler = self.optimizers[group], self.scalers[group]
        factor = self.rate_factor()
        for members in optimizer.param_groups:
            members["lr"] = members["base"] * factor
        parameters = [p for members in optimizer.param_groups for p in members["params"]]
        self.ranks.average_([p.grad for p in parameters if p.grad is not None])
        scaler.unscale_(optimizer)
        most = self.stage.config.clip_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(parameters, most)
        if not torch.isfinite(norm) and scaler.get_scale() <= 1.0:  # 1 without fp16
            raise self._diverged(
                f"the gradient of the {group} loss is {norm.item()}, first in {self._broken(group)}"
            )
        scaler.step(optimizer)
        scaler.update()
        return float(norm)

    def _broken(self, group: str) -> str:
        finite = {
            name: p.grad is None or bool(torch.isfinite(p.grad).all())
            for named, _ in self.stage.groups[group]
            for name, p in named.items()
        }
        return next((name for name, ok in finite.items() if not ok), "none: the sum overflows")

    def _diverged(self, what: str) -> TrainError:
        return TrainError(
            f"stage {self.stage.name}, step {self.step}: {what}. Lower its learning rates and add "
            f"--resume (from the newest checkpoint in {self.folder}, if one was written), or train "
            "with --precision fp32 and another --out."
        )

    @torch.no_grad()
    def update_ema(self) -> None:
        decay = min(self.stage.config.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.values()), list(self.parameters.values()), 1.0 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the modules have the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data, self.ema[name] = self.ema[name], parameter.data

    # -- checkpoints ---------------------------------------------------------------------------

    def save(self) -> None:
        """Whole or not at all: written beside, flushed, renamed; older ones pruned after."""
        state = {
            "step": self.step,
            "seed": self.seed,
            "config": dataclasses.asdict(self.stage.config),
            "processes": self.ranks.world,
            "inherited": self.inherited,
            "data": self.data,
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "ema": self.ema,
            "optimizers": {name: o.state_dict() for name, o in self.optimizers.items()},
            "scalers": {name: s.state_dict() for name, s in self.scalers.items()},
            "extra": self.stage.extra_state(),
        }
        write_checkpoint(self.folder, self.step, state)

    def load(self, path: Path) -> None:
        state = read_checkpoint(path)
        check_settings(path, state, self.stage.config, self.seed, self.ranks.world, self.data)
        check_inherited(path, state, self.inherited)
        check_parameters(path, state, self.parameters)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][name])
                self.ema[name].copy_(state["ema"][name])
        for name, optimizer in self.optimizers.items():
            bases = [members["base"] for members in optimizer.param_groups]
            optimizer.load_state_dict(state["optimizers"][name])
            for members, base in zip(optimizer.param_groups, bases, strict=True):
                members["base"] = base  # of now: after a divergence it is a lower one
            if state.get("scalers", {}).get(name):
                self.scalers[name].load_state_dict(state["scalers"][name])
        self.stage.load_extra_state(state["extra"])
        self.step = state["step"]

    @torch.no_grad()
    def take_ema(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(self.ema[name])


def run_stage(
    stage: Stage,
    make_batches: Any,
    folder: Path,
    seed: int,
    resume: bool,
    autocast: Autocast | None = None,
    validate: Callable[[int], None] | None = None,
    ranks: Ranks | None = None,
    log_row: Callable[[dict[str, float]], None] | None = None,
    inherited: Mapping[str, str] | None = None,
    later: Sequence[Path] = (),
    data: Mapping[str, Any] | None = None,
) -> str:
    """Train a stage to its last step and leave its modules with the averaged (EMA) weights; returns
    the fingerprint of these.

    Args:
        make_batches: first batch -> iterable of batches up to the stage's last step, which takes
            ``accumulate`` of them like every step.
        folder: of the checkpoints and ``losses.jsonl``.
        resume: continue from the newest checkpoint; a finished stage only loads its weights.
        autocast: what the stage computes in; None: fp32 on the CPU.
        validate: called with the step every ``validation_steps`` and at the end, with the averaged
            weights, in the first process.
        ranks: the processes that train together; None: this one alone.
        log_row: takes every row of the loss log too, in the first process.
        inherited: the fingerprint that each stage before this one left; the checkpoints keep them.
        later: folders of the stages that build on this one.
        data: what the batches are drawn from; the checkpoints keep it.

    Raises:
        CheckpointError: the checkpoint is of another configuration or was built on other weights,
            or there are steps left to train and a later stage was built on what is there.
        Interrupted: SIGINT or SIGTERM came; the state is saved.
        TrainError: a loss or gradient is not finite, memory does not suffice, a checkpoint or the
            log can't be written, or the processes have different checkpoints.
    """
    autocast, ranks = autocast or Autocast("fp32"), ranks or Ranks()
    trainer = _Trainer(stage, folder, seed, autocast, ranks, inherited or {}, data or {})
    existing = sorted(folder.glob("step-*.pt"))
    if existing and not resume:
        raise CheckpointError(
            f"{folder}: holds checkpoints of an earlier run. Add --resume to continue it, "
            "or choose another --out."
        )
    if existing:
        trainer.load(existing[-1])
        log.info("stage %s: resumed at step %d", stage.name, trainer.step)
    check_replicas(folder, trainer.step, trainer.parameters, ranks)
    if trainer.step < stage.config.steps:
        _check_nothing_is_built_on(trainer, later)
        source = make_batches(trainer.step * stage.config.accumulate)
        name = stage.name
        advice = (
            f"Lower {name}.photos_per_batch and raise {name}.accumulate to keep the batch, or "
            f"lower {name}.crop_px, with another --out."
        )
        with _memory_errors(trainer, "step", advice):
            _train(trainer, source, validate, log_row)
    trainer.take_ema()
    return fingerprint(trainer.parameters.values())


@contextmanager
def _memory_errors(trainer: _Trainer, moment: str, advice: str) -> Iterator[None]:
    """Inside, memory that does not suffice is a TrainError, which says what helps."""
    try:
        yield
    except RuntimeError as exc:
        if not any(words in str(exc) for words in OUT_OF_MEMORY):
            raise
        reason = str(exc).strip().splitlines()[0]
        raise TrainError(
            f"stage {trainer.stage.name}, {moment} {trainer.step}: not enough memory ({reason}). "
            f"{advice}"
        ) from exc


def _check_nothing_is_built_on(trainer: _Trainer, later: Sequence[Path]) -> None:
    """Before the work: the later stages would refuse what it makes, and it prunes the checkpoint
    that they were built on."""
    built = [str(folder) for folder in later if any(folder.glob("step-*.pt"))]
    if built:
        name, steps = trainer.stage.name, trainer.stage.config.steps
        raise CheckpointError(
            f"{trainer.folder}: stage {name} would be trained on from step {trainer.step} to "
            f"{steps}, and later stages were built on what it is now. Keep {name}.steps, or delete "
            f"{' '.join(built)} to train them again, or use another --out."
        )


def _train(
    trainer: _Trainer,
    batches: Iterable[Batch],
    validate: Callable[[int], None] | None,
    log_row: Callable[[dict[str, float]], None] | None,
) -> None:
    stage, steps, ranks = trainer.stage, trainer.stage.config.steps, trainer.ranks
    ranks.wait()  # all have looked for checkpoints
    log_path = trainer.folder / "losses.jsonl"
    if ranks.writes:
        with disk_errors(log_path):
            trainer.folder.mkdir(parents=True, exist_ok=True)
            _cut_log(log_path, trainer.step)
    progress = tqdm(
        total=steps,
        initial=trainer.step,
        desc=stage.name,
        unit="step",
        dynamic_ncols=True,
        mininterval=1.0,
        disable=not ranks.writes,
    )
    with stop_requested() as stopped, progress:
        stream = iter(batches)
        while trainer.step < steps:
            started = time.perf_counter()
            row = trainer.train_step(stream)
            row["step_s"] = time.perf_counter() - started  # waiting for the data is in it
            if ranks.writes:
                _write_row(log_path, row)
                if log_row is not None:
                    log_row(row)
            progress.set_postfix_str(
                " ".join(f"{k} {v:.4g}" for k, v in row.items() if k.endswith("_loss")),
                refresh=False,
            )
            progress.update()
            last = trainer.step == steps
            # Before the validation: what goes wrong there costs no step.
            saves = last or trainer.step % stage.config.checkpoint_steps == 0
            if saves and ranks.writes:
                trainer.save()
            every = stage.config.validation_steps
            if validate is not None and every and (last or trainer.step % every == 0):
                if ranks.writes:
                    advice = (
                        f"Add --resume and --set {stage.name}.validation_steps=0, which goes on "
                        f"without it from the newest checkpoint in {trainer.folder}."
                    )
                    with _memory_errors(trainer, "validation at step", advice), trainer.averaged():
                        validate(trainer.step)
                ranks.wait()
            if ranks.any(bool(stopped), trainer.device):  # also after the last: a stage may follow
                if not saves and ranks.writes:
                    trainer.save()
                ranks.wait()  # a launcher ends all with the first, which may be writing its state
                raise Interrupted(
                    f"stage {stage.name}: stopped at step {trainer.step} of {steps}, state saved "
                    f"in {trainer.folder}. Continue with --resume."
                )


def _write_row(path: Path, row: Mapping[str, float]) -> None:
    """Six digits of each figure; one that is not finite is null. Opened for each row, so that a
    full disk is found here and not when a file is closed."""
    shown = {
        key: value if key == "step" else float(f"{value:.6g}") if math.isfinite(value) else None
        for key, value in row.items()
    }
    with disk_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(shown) + "\n")


def _cut_log(path: Path, step: int) -> None:
    """Drop the rows that a killed run logged after its last checkpoint, or without one."""
    if path.exists():
        rows = path.read_text(encoding="utf-8").splitlines()
        kept = [row for row in rows if row.endswith("}") and json.loads(row)["step"] < step]
        with file_written_whole(path) as partial:
            partial.write_text("".join(row + "\n" for row in kept), encoding="utf-8")
