"""Several processes of one training, on the CPU: what they make is what one process makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rcod_train.main import main
from rcod_train.ranks import Ranks, join
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


def test_one_that_fails_alone_is_gone_at_once() -> None:
    """At the end of a process NCCL waits for the others, which wait for this one."""
    code = (
        "import atexit; from rcod_train.ranks import leave; atexit.register(print, 'waits'); "
        "print('said'); leave(9, together=False)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (9, "said\n")
