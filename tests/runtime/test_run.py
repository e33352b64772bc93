"""Folder runs: what is written, told and left, also when something stops them."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rcod_runtime.cli.run
from rcod_runtime.cli import upscale
from rcod_runtime.image_io import decode_image, read_image, write_image
from tests.runtime.fakes import make_bundle

Photo = Callable[..., np.ndarray]
Capture = pytest.CaptureFixture[str]
MANY = 60
SIGINT_COUNTS = (  # shells have background jobs ignore it
    "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
)


def run(bundle: Path, *arguments: object) -> int:
    return upscale.main([*map(str, arguments), "--bundle", str(bundle)])


def command(*arguments: object, code: str = "") -> list[str]:
    """rcod-upscale as a process of its own, after some code."""
    main = "import sys\nfrom rcod_runtime.cli.upscale import main\nsys.exit(main())"
    return [sys.executable, "-c", "\n".join((SIGINT_COUNTS, code, main)), *map(str, arguments)]


def records(report: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in report.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def many(tmp_path: Path, photo: Photo) -> Path:
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(MANY):
        write_image(folder / f"{i:02}.png", photo(60, 60, seed=i))
    return folder


def test_subfolders_are_made_and_filled(bundle: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "sub").mkdir()
    (photos / "1.png").rename(photos / "sub/1.png")
    assert run(bundle, photos, "-o", tmp_path / "out", "--recursive") == 0
    assert contents(tmp_path / "out").keys() == {"0.png", "2.png", "sub/1.png"}


def test_jobs_and_batches_change_no_byte(bundle: Path, many: Path, tmp_path: Path) -> None:
    some = sorted(many.iterdir())[:5]
    assert run(bundle, *some, "-o", tmp_path / "a") == 0
    assert run(bundle, *some, "-o", tmp_path / "b", "--jobs", 3, "--batch", 4) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_what_exists_is_skipped_and_left_alone(
    bundle: Path, photos: Path, tmp_path: Path, capsys: Capture
) -> None:
    out, report = tmp_path / "out", tmp_path / "r.jsonl"
    out.mkdir()
    (out / "1.png").write_bytes(b"an earlier result")
    assert run(bundle, photos, "-o", out, "--skip-existing", "--report", report) == 0
    assert (out / "1.png").read_bytes() == b"an earlier result"
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 2 and "1 of 3 exist already" in printed.err
    assert sorted((Path(r["output"]).name, r["status"]) for r in records(report)) == [
        ("0.png", "written"), ("1.png", "skipped"), ("2.png", "written"),
    ]  # fmt: skip
    assert run(bundle, photos, "-o", out, "--skip-existing") == 0
    assert capsys.readouterr().out == ""


def test_the_report_says_what_became_of_each_image(
    bundle: Path, photos: Path, tmp_path: Path
) -> None:
    (photos / "1.png").write_bytes(b"no image")
    report = tmp_path / "r.jsonl"
    report.write_text("of an earlier run")
    assert run(bundle, photos, "-o", tmp_path / "out", "--report", report, "--scale", 2) == 10
    zero, one, two = sorted(records(report), key=lambda record: str(record["input"]))
    assert zero["seconds"] > 0  # type: ignore[operator]
    assert {**two, "seconds": None} == {
        "input": str(photos / "2.png"), "output": str(tmp_path / "out/2.png"), "status": "written",
        "input_height_px": 12, "input_width_px": 12, "output_height_px": 24, "output_width_px": 24,
        "seconds": None, "error": None, "message": None,
    }  # fmt: skip
    assert (one["status"], one["error"], one["output_width_px"]) == ("failed", "ImageError", None)
    assert "1.png: expected an image" in str(one["message"])


def test_a_report_does_not_replace_a_photo(
    bundle: Path, photos: Path, tmp_path: Path, capsys: Capture
) -> None:
    before = contents(photos)
    assert run(bundle, photos, "-o", tmp_path / "o", "--report", photos / "0.png") == 2
    os.link(photos / "0.png", tmp_path / "second")  # as 0.PNG is on some disks
    assert run(bundle, photos, "-o", tmp_path / "o", "--report", tmp_path / "second") == 2
    assert contents(photos) == before
    assert run(bundle, photos, "-o", tmp_path / "o", "--report", tmp_path / "none/r") == 6
    assert "the report can't be written" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_leaves_the_others_alone(
    bundle: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    out, report, fsync, calls = tmp_path / "out", tmp_path / "r.jsonl", os.fsync, []

    def full_once(file: int) -> None:
        calls.append(file)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        fsync(file)

    monkeypatch.setattr("os.fsync", full_once)
    (out / "2.png").mkdir(parents=True)  # in the way
    assert run(bundle, photos, "-o", out, "--report", report) == 10
    assert [p.name for p in sorted(out.iterdir())] == ["0.png", "2.png"]
    said = capsys.readouterr().err
    assert "1.png: can't be written (No space left on device)" in said
    assert "2 of 3 images failed" in said and "Traceback" not in said
    assert [r["error"] for r in records(report)] == [None, "OutputError", "OutputError"]


def test_a_part_that_cannot_be_removed_leaves_the_others_alone(
    bundle: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """In a folder where files may be made and no more: the part's error hid the output's."""

    def refused(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted", str(self))

    monkeypatch.setattr(Path, "replace", refused)
    monkeypatch.setattr(Path, "unlink", refused)
    report = tmp_path / "report.jsonl"
    assert run(bundle, photos, "-o", tmp_path / "out", "--report", report) == 10
    assert "Operation not permitted" in capsys.readouterr().err
    assert [r["status"] for r in records(report)] == ["failed"] * 3


@pytest.mark.parametrize("stream", ["stdin", "stdout", "stderr"])
def test_a_closed_stream_stops_nothing(
    bundle: Path, photos: Path, tmp_path: Path, stream: str
) -> None:
    """As daemons have them: Python's are None then."""
    closed, out = f"import sys; sys.{stream} = None", tmp_path / "out"
    options = ("--bundle", bundle)
    process = subprocess.run(command(photos, "-o", out, *options, code=closed), timeout=120)
    assert process.returncode == 0 and len(list(out.iterdir())) == 3
    if stream != "stderr":
        ends = ("-", tmp_path / "o.png") if stream == "stdin" else (photos / "0.png", "-")
        process = subprocess.run(
            command(ends[0], "-o", ends[1], *options, code=closed),
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert process.returncode == {"stdin": 3, "stdout": 2}[stream], process.stderr
        assert "closed" in process.stderr and "Traceback" not in process.stderr


@pytest.mark.parametrize("several", [False, True])
def test_infinity_from_a_graph_is_told_and_never_written(
    tmp_path: Path, photos: Path, capsys: Capture, several: bool
) -> None:
    make_bundle(tmp_path / "hot", gains=(1.0, 1.0, float("inf")))
    inputs = photos if several else photos / "0.png"
    (tmp_path / "out").mkdir()
    found = run(tmp_path / "hot", inputs, "-o", tmp_path / "out", "--realism", "realism")
    assert found == (10 if several else 5)
    assert "NonFiniteOutput: graph denoiser, realism realism, tile row 0, column 0" in (
        capsys.readouterr().err
    )
    assert list((tmp_path / "out").iterdir()) == []


def test_stdin_to_stdout_gives_the_bytes_of_the_file(
    bundle: Path, photos: Path, tmp_path: Path
) -> None:
    assert run(bundle, photos / "0.png", "-o", tmp_path / "o.png") == 0
    call = command("-", "-o", "-", "--bundle", bundle)
    lq = (photos / "0.png").read_bytes()
    done = subprocess.run(call, input=lq, capture_output=True, timeout=300)
    assert done.stdout == (tmp_path / "o.png").read_bytes(), done.stderr
    done = subprocess.run([*call, "--format", "jpeg"], input=b"", capture_output=True, timeout=300)
    assert (done.returncode, done.stdout) == (3, b"")
    assert b"stdin: expected an image, found an empty file" in done.stderr
    done = subprocess.run([*call, "--format", "jpeg"], input=lq, capture_output=True, timeout=300)
    assert done.stdout[:2] == b"\xff\xd8" and decode_image(done.stdout, "o").pixels.shape[0] == 40


def test_no_more_than_an_image_may_have_is_taken_from_stdin(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("rcod_runtime.cli.image.MAX_INPUT_BYTES", 9)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(bytes(10))))
    assert run(bundle, "-", "-o", tmp_path / "o.png") == 3
    assert "stdin: can't be read (over the limit of 9 bytes)" in capsys.readouterr().err


def test_a_reader_that_went_away_is_an_output_error(
    bundle: Path, photos: Path, tmp_path: Path
) -> None:
    for arguments in ([photos / "0.png", "-o", "-"], [photos, "-o", tmp_path / "out"]):
        reader, writer = os.pipe()
        os.close(reader)
        call = command(*arguments, "--bundle", bundle)
        done = subprocess.run(call, stdout=writer, stderr=subprocess.PIPE, timeout=300)
        os.close(writer)
        assert done.returncode == 6, done.stderr
        assert b"stdout: can't be written" in done.stderr and b"Traceback" not in done.stderr


def test_names_that_are_not_unicode_or_not_in_stdouts_encoding_are_written_and_printed(
    bundle: Path, photos: Path, tmp_path: Path
) -> None:
    name = "写真".encode() + b"caf\xe9.png"
    odd = os.fsencode(photos) + b"/" + name
    os.rename(photos / "0.png", odd)
    out, report = tmp_path / "out", tmp_path / "r"
    arguments = (os.fsdecode(odd), photos / "1.png", "-o", out, "--report", report)
    strict = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    call = command(*arguments, "--bundle", bundle)
    done = subprocess.run(call, capture_output=True, timeout=300, env=strict)
    assert done.returncode == 0, done.stderr
    assert os.fsencode(out) + b"/" + name in done.stdout.splitlines()
    assert len(records(report)) == 2


def interrupted(
    call: Sequence[str], number: int, images: int = 3, wait_s: float = 0
) -> tuple[int, bytes]:
    """Exit code and stderr of a run that gets a signal when its first images are done."""
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(images):
            process.stdout.readline()
        time.sleep(wait_s)
        process.send_signal(number)
        _, said = process.communicate(timeout=300)
    return process.returncode, said


SLOWLY = """
import time
import rcod_runtime.cli.image as image
upscale_image = image.upscale_image
def slowly(*arguments):
    time.sleep(0.1)
    return upscale_image(*arguments)
image.upscale_image = slowly
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_a_run_that_is_stopped_keeps_what_is_done_and_can_be_resumed(
    bundle: Path, many: Path, tmp_path: Path, number: int, code: int
) -> None:
    out, report = tmp_path / "out", tmp_path / "r.jsonl"
    arguments = (many, "-o", out, "--jobs", 2, "--skip-existing", "--report", report)
    call = command(*arguments, "--bundle", bundle, code=SLOWLY)
    found, said = interrupted(call, number)
    assert found == code and b"Traceback" not in said, said
    done = {Path(str(record["output"])) for record in records(report)}
    assert 3 <= len(done) < MANY, "the signal came too late to test anything"
    for path in out.glob("*.png"):
        assert read_image(path).pixels.shape == (240, 240, 3)
    if number != signal.SIGKILL:
        assert b"stopped" in said
        assert done == set(out.iterdir())
    kept = contents(out)
    assert run(bundle, *arguments) == 0
    resumed = contents(out)
    assert resumed.keys() == {f"{i:02}.png" for i in range(MANY)}, "lost, or left behind"
    assert all(resumed[name] == data for name, data in kept.items() if name in resumed)


def test_a_stop_while_tasks_are_handed_out_leaves_the_rest(
    bundle: Path, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pool(ThreadPoolExecutor):
        def submit(self, *call: Any) -> Any:  # type: ignore[override]
            if self._work_queue.qsize() > 20:
                raise KeyboardInterrupt
            return super().submit(*call)

    monkeypatch.setattr(rcod_runtime.cli.run, "ThreadPoolExecutor", Pool)
    assert run(bundle, many, "-o", tmp_path / "out") == 130
    assert len(contents(tmp_path / "out")) < 20


def test_a_stop_does_not_wait_for_the_end_of_a_large_image(
    bundle: Path, photos: Path, photo: Photo, tmp_path: Path
) -> None:
    write_image(photos / "1.png", photo(1600, 1600))
    call = command(photos, "-o", tmp_path / "out", "--bundle", bundle)
    assert interrupted(call, signal.SIGINT, images=1, wait_s=0.3)[0] == 130  # now in its tiles
    assert contents(tmp_path / "out").keys() == {"0.png"}


KILL_WHILE_WRITING = (
    "import os, signal\nos.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)"
)


def test_the_rest_of_a_file_whose_writer_was_killed_is_removed_and_no_image(
    bundle: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = (photos, "-o", out, "--bundle", bundle, "--skip-existing")
    killed = subprocess.run(command(*arguments, code=KILL_WHILE_WRITING), timeout=300)
    assert killed.returncode == -signal.SIGKILL
    (left,) = out.iterdir()
    assert left.name.startswith(".") and left.suffix == ".rcod-partial"
    foreign = out / f".0123456789ab.{left.name.split('.')[-2]}.rcod-partial"
    foreign.touch()  # another process may be at work on another file here
    assert run(bundle, out, "-o", tmp_path / "again") == 3, "taken as an image"
    assert run(*(bundle, *arguments)) == 0
    assert {p.name for p in out.iterdir()} == {"0.png", "1.png", "2.png", foreign.name}
