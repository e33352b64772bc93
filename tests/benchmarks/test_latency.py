"""The latency benchmark through its command, on a model too small to say anything about speed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import steady
from benchmarks.eager import EAGER, EagerPipeline
from benchmarks.errors import CommandFailed
from benchmarks.latency import main
from benchmarks.picture import draw_picture
from benchmarks.processes import measure_contestant, measure_peak_memory, write_photo
from benchmarks.steady import Comparison, check_comparable
from rcod_runtime import Upscaler, UsageError
from rcod_runtime.backends import precisions
from rcod_runtime.manifest import read_manifest
from rcod_train.checkpoint import save_merged
from rcod_train.precision import resolve_precision
from tests.runtime.fakes import make_bundle
from tests.tiny import tiny_info, tiny_parts

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "nano"
FAST = ("--size", "16", "--runs", "2", "--warmup", "1", "--start-runs", "1", "--threads", "1")
PYTORCH = {"pytorch eager fp32", "pytorch eager fp32, NHWC"}
BF16 = {f"pytorch autocast bf16{order}" for order in ("", ", NHWC")}
UNCOMPILED = ("--pytorch", "nhwc", "autocast", "autocast-nhwc")  # compiling takes half a minute


def test_backends_and_pytorch_are_timed_side_by_side(
    tiny_bundle: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ("--bundle", str(tiny_bundle), "--checkpoint", str(tiny_checkpoint))
    code = main([*model, *FAST, *UNCOMPILED, "--parts", "steady", "stages"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "no files, no loading, no compiling" in printed.out
    document = json.loads(printed.out.splitlines()[-1])
    assert (document["benchmark"], document["schema_version"]) == ("latency", 5)
    assert document["card"]["packages"]["torch"]
    assert document["config"]["threads"] == 1
    assert set(document["stages"]) == {"vpim", "encoder", "denoiser", "decoder"}
    openvino = {f"openvino {precision}" for precision in precisions("openvino")}
    bf16 = BF16 if resolve_precision("auto") == "bf16" else set()
    assert set(document["missing"]) == BF16 - bf16
    variants = {*openvino, "onnxruntime fp32", *PYTORCH, *bf16}
    assert set(document["steady"]["first_call_ms"]) == variants
    for part in (document["steady"], *document["stages"].values()):
        assert set(part["latency"]) == variants
        assert all(latency["runs"] == 2 for latency in part["latency"].values())
        ratios = part["times_as_fast_as_pytorch"]
        assert ratios["pytorch eager fp32"] == pytest.approx(1.0)
        for name, (low, high) in part["times_as_fast_p10_p90"].items():
            assert low <= ratios[name] <= high
    for agreement in document["steady"]["agreement"]:
        assert agreement["max_abs_u8"] <= (8 if "bf16" in agreement["b"] else 1)
    assert document["start"] is None
    assert document["memory"] is None


def test_every_combination_of_size_level_and_batch_is_a_steady_state(
    tiny_bundle: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the agreement of all variants, so that a batch is the same image in all of them."""
    model = ("--bundle", str(tiny_bundle), "--checkpoint", str(tiny_checkpoint), "--quick")
    several = ("--size", "16", "8", "--level", "neutral", "realism", "--batch", "1", "3")
    assert main([*model, *FAST, *several, "--precision", "fp32"]) == 0
    printed = capsys.readouterr().out
    assert "steady state, realism, 3 tiles of 8 x 8 px in" in printed
    document = json.loads(printed.splitlines()[-1])
    points = [document["steady"], *document["sweep"]]
    assert [(p["side_px"], p["level"], p["batch"]) for p in points] == [
        (side, level, batch)
        for side in (16, 8) for level in ("neutral", "realism") for batch in (1, 3)
    ]  # fmt: skip
    assert [p["tile_px"] for p in points] == [64, 64, 64, 64, 64, 32, 64, 32]
    for point in points:
        assert len(point["agreement"]) == 2  # the others with the first
        assert all(agreement["max_abs_u8"] <= 1 for agreement in point["agreement"])
        assert point["times_as_fast_as_pytorch"][EAGER] == pytest.approx(1.0)


def test_one_image_takes_the_path_of_rcod_upscale_and_a_batch_tiles_of_its_own(
    tiny_bundle: Path,
) -> None:
    asked = []

    class Recording:
        manifest = read_manifest(tiny_bundle / "manifest.json")

        def __call__(self, lq: np.ndarray, level: str, **options: int) -> np.ndarray:
            asked.append(options)
            return lq

    for side, batch in ((8, 1), (24, 1), (8, 3)):
        comparison = Comparison(tiny_bundle, None, side, "neutral", (), 1, batch=batch)
        lq = draw_picture(side, side * batch)
        steady._runtime_call(Recording(), lq, comparison)()  # type: ignore[arg-type]
    assert asked == [{}, {}, {"tile_px": 32, "overlap_px": 0, "batch": 3}]


def test_a_model_with_a_guide_is_measured_without_pytorch_or_not_at_all(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_bundle(tmp_path, guided=True)
    alone = Comparison(tmp_path, None, 16, "neutral", (), 1)
    check_comparable(alone, manifest)
    with pytest.raises(UsageError, match="Leave --checkpoint out"):
        check_comparable(dataclasses.replace(alone, checkpoint=tiny_checkpoint), manifest)
    guided = tiny_parts()
    guided.guide = torch.nn.Identity()
    monkeypatch.setattr("rcod_train.checkpoint.load_merged", lambda folder: (guided, tiny_info()))
    plain = read_manifest(tiny_bundle / "manifest.json")
    with pytest.raises(UsageError, match="Leave --checkpoint out"):
        EagerPipeline(tiny_checkpoint, plain, "neutral", threads=1)


def test_without_a_checkpoint_the_ratio_is_unknown(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ("--parts", "steady", "--backends", "openvino", "--precision", "fp32")
    assert main(["--bundle", str(tiny_bundle), *FAST, *chosen]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["steady"]["times_as_fast_as_pytorch"] == {"openvino fp32": None}


def test_new_processes_are_timed_and_import_nothing_heavy(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "r.json"
    chosen = ("--parts", "start", "--json", str(result))
    assert main(["--bundle", str(tiny_bundle), *FAST, *chosen]) == 0
    capsys.readouterr()
    start = json.loads(result.read_text())["start"]
    assert start["heavy_modules"] == []
    assert start["first_command_ms"] == start["command"]["median_ms"]
    assert "openvino fp32" in start["contestants"]
    for cost in start["contestants"].values():
        assert all(cost[name] > 0 for name in ("import_ms", "load_ms", "first_ms", "peak_bytes"))


def test_pytorch_begins_in_a_process_of_its_own_too(
    tiny_bundle: Path, tiny_checkpoint: Path
) -> None:
    task = {"bundle": str(tiny_bundle), "checkpoint": str(tiny_checkpoint), "mode": EAGER,
            "side_px": 16, "level": "neutral", "threads": 1}  # fmt: skip
    cost = measure_contestant(task, runs=1)
    assert cost["import_ms"] > 100, "importing torch was not in the time"
    assert cost["peak_bytes"] > 100e6


def test_the_baseline_takes_the_levels_of_the_bundle() -> None:
    """The shipped checkpoint was trained at other timesteps than its bundle's levels are at."""
    lq = draw_picture(32, 32)
    with Upscaler(backend="onnxruntime", precision="fp32") as upscaler:
        for name in ("fidelity", "realism"):
            eager = EagerPipeline(CHECKPOINT, upscaler.manifest, name, threads=1)
            difference = eager(lq).astype(int) - upscaler(lq, name).astype(int)
            assert abs(difference).max() <= 1


def test_without_a_compiler_torch_compile_is_missing_and_says_why(
    tiny_bundle: Path,
    tiny_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    model = ("--bundle", str(tiny_bundle), "--checkpoint", str(tiny_checkpoint))
    assert main([*model, *FAST, "--parts", "steady", "--pytorch", "compile"]) == 0
    printed = capsys.readouterr().out
    document = json.loads(printed.splitlines()[-1])
    assert "no C++ compiler" in document["missing"]["pytorch compile fp32"]
    assert "pytorch compile fp32" not in document["steady"]["latency"]
    assert "missing: pytorch compile fp32: no C++ compiler" in printed


def test_peak_memory_is_that_of_the_command_alone(tiny_bundle: Path, tmp_path: Path) -> None:
    held = bytearray(600_000_000)  # the parent's memory must not count
    held[::4096] = b"x" * len(held[::4096])
    peak = measure_peak_memory(write_photo(tmp_path, 16), ("--bundle", str(tiny_bundle)))
    assert 20e6 < peak.peak_bytes < 600e6
    assert held


def test_a_command_that_fails_is_an_error_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match=r"found 4: .*no_bundle"):
        measure_peak_memory(write_photo(tmp_path, 16), ("--bundle", str(tmp_path / "no_bundle")))


def test_another_model_is_not_compared(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_merged(tmp_path / "other", tiny_parts(seed=1), tiny_info())
    model = ("--bundle", str(tiny_bundle), "--checkpoint", str(tmp_path / "other"))
    assert main([*model, *FAST, "--parts", "steady", "--pytorch", "eager"]) == 11
    assert "checkpoint that the bundle was exported from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--size", "17"), 2, "--size 17: expected a multiple of 8 px"),
        (("--size", "16", "17", "--parts", "start"), 2, "--size 17: expected a multiple of 8 px"),
        (("--size", "24", "--checkpoint", "no_such"), 2, "Expected at most 16 px beside"),
        (("--runs", "0"), 2, "--runs 0"),
        (("--level", "no_such"), 2, "no_such"),
        (("--checkpoint", "no_such"), 11, "no_such"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(
    tiny_bundle: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    found = main(["--bundle", str(tiny_bundle), *FAST, "--parts", "steady", *arguments])
    printed = capsys.readouterr()
    assert found == code
    assert said in printed.err
    assert printed.out == ""
