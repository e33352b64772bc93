"""Several processes of one training, on the CPU: what they make is what one process makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rcod_train.nano
import rcod_train.run
from rcod_train.config import LoopConfig, TrainConfig
from rcod_train.main import main
from rcod_train.nano import train_base
from rcod_train.network import build_nano
from rcod_train.ranks import Ranks, join
from rcod_train.run import Run
from tests.tiny_sd import save_base

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 3
SETTINGS = [
    f"rcod.steps={STEPS}", "rcod.metric_samples=4", "rcod.warmup_steps=1",
    "rcod.learning_rate=0.0001", "rcod.regulariser_learning_rate=0.0001",
    "rcod.checkpoint_steps=2", "rcod.validation_steps=3", "validation_share=0.25",
    "mem.steps=1", "mem.photos_per_batch=1",
    *(f"{stage}.{field}" for stage in ("rcod", "mem") for field in ("crop_px=64", "context_px=64")),
]  # fmt: skip


def arguments(base: Path, photos: Path, out: Path, accumulate: int) -> list[str]:
    argv = ["rcod-o", "--base", str(base / "sd"), "--clip", str(base / "clip")]
    argv += ["--data", str(photos), "--out", str(out), "--threads", "1", "--workers", "0"]
    argv += ["--no-lpips", "--precision", "fp32"]  # on the CPU, where there is no GPU
    for setting in (*SETTINGS, f"rcod.accumulate={accumulate}"):
        argv += ["--set", setting]
    return argv


def launched(argv: list[str], *options: str) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*torchrun, "--nproc-per-node", "2", "-m", "rcod_train.main", *argv]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)


def test_two_processes_are_one_with_the_double_batch(photos: Path, tmp_path: Path) -> None:
    save_base(tmp_path)
    done = launched(arguments(tmp_path, photos, tmp_path / "two", accumulate=1))
    assert done.returncode == 0, done.stderr[-3000:]
    assert main(arguments(tmp_path, photos, tmp_path / "one", accumulate=2)) == 0
    one, two = (
        torch.load(tmp_path / run / "rcod" / f"step-000000{STEPS}.pt", weights_only=True)
        for run in ("one", "two")
    )
    start = max(p.abs().max().item() for n, p in one["parameters"].items() if "lora_B" in n)
    assert start > 1e-4, "nothing was trained"
    for kind in ("parameters", "ema"):
        worst = max((v - two[kind][n]).abs().max().item() for n, v in one[kind].items())
        assert worst <= 1e-5, f"{kind}: {worst}"
    logs = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (tmp_path / run / "rcod" / "losses.jsonl" for run in ("one", "two"))
    ]
    assert [row["step"] for row in logs[1]] == list(range(STEPS))
    for a, b in zip(*logs, strict=True):
        assert {k: a[k] for k in a if k != "step_s"} == pytest.approx(
            {k: b[k] for k in b if k != "step_s"}, rel=1e-3, abs=1e-4
        )
    files = [sorted(p.name for p in (tmp_path / run / "rcod").rglob("*")) for run in ("one", "two")]
    assert files[0] == files[1]
    assert done.stdout == f"{tmp_path / 'two' / 'checkpoint'}\n", "one process writes"


def test_alone_nothing_is_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = join("cpu")
    assert (ranks.rank, ranks.world, ranks.writes) == (0, 1, True)
    value = torch.ones(2)
    ranks.average_([value])
    ranks.wait()
    assert value.tolist() == [1, 1] and not torch.distributed.is_initialized()
    device = torch.device("cpu")
    assert ranks.any(True, device) and not ranks.any(False, device)
    assert not Ranks(1, 2).writes


class Second(Ranks):
    """Of two, the first of which has measured something else."""

    def __init__(self, theirs: Any) -> None:
        super().__init__(1, 2)
        self.theirs = theirs

    def gather(self, value: Any) -> list[Any]:
        return [self.theirs, value]


def test_all_go_on_with_what_the_first_one_measured(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPUs of two kinds differ in the last bits, and with them the groups at their borders."""
    monkeypatch.setattr(rcod_train.run, "measure_metric_range", lambda *_: (0.1, 0.8))
    monkeypatch.setattr(rcod_train.nano, "measure_scaling_factor", lambda *_: 2.0)
    config = TrainConfig((str(photos),), str(tmp_path), workers=0)
    run = Run(config, (LoopConfig(context_px=96, crop_px=64),), resume=False)
    run.ranks = Second({"m_min": 0.2, "m_max": 0.9})
    parts = build_nano(0)
    grouping = run.grouping(parts, config.rcod, 64)
    assert (grouping.m_min, grouping.m_max) == (0.2, 0.9)
    run.ranks = Second(3.0)
    monkeypatch.setattr(run, "train", lambda *_: None)
    monkeypatch.setattr(run, "batches_of", lambda *_: lambda first: ())
    train_base(run, parts, config)
    assert parts.vae.config.scaling_factor == 3.0


def test_one_that_fails_alone_is_gone_at_once() -> None:
    """At the end of a process NCCL waits for the others, which wait for this one."""
    code = (
        "import atexit; from rcod_train.ranks import leave; atexit.register(print, 'waits'); "
        "print('said'); leave(9, together=False)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (9, "said\n")
