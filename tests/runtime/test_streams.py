"""Streams that are closed, full or gone: exit codes stay what they are, and files whole."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import rcod_runtime
from rcod_runtime.cli import serve

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
PHOTO, OUT, NONE = "photos/0.png", "out.png", "none.png"


def shell(folder: Path, line: str) -> subprocess.CompletedProcess[str]:
    """The line in a shell, as a user's: Python's streams are buffered there."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def python(module: str, *arguments: object) -> str:
    return shlex.join([sys.executable, "-m", module, *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "redirected", "code", "said"),
    [
        ((PHOTO, "-o", OUT), ">/dev/full", 6, "stdout: can't be written"),
        ((PHOTO, "-o", "-"), ">/dev/full", 6, "stdout: can't be written"),
        ((PHOTO, "-o", "-"), ">&-", 2, "found it closed"),
        ((NONE, "-o", OUT), "2>/dev/full", 3, ""),
        ((NONE, "-o", OUT), ">&- 2>&-", 3, ""),
        (("photos/", "-o", "photos_out/", "--skip-existing"), "2>/dev/full", 0, ""),
        (("photos/", "-o", "photos_out/"), "<&- >&- 2>&-", 0, ""),
    ],
)
def test_the_exit_code_of_an_upscale_is_its_own(
    bundle: Path,
    photos: Path,
    arguments: tuple[str, ...],
    redirected: str,
    code: int,
    said: str,
) -> None:
    line = python("rcod_runtime.cli.upscale", *arguments, "--bundle", bundle)
    if "--skip-existing" in arguments:
        assert shell(photos.parent, line).returncode == 0
    done = shell(photos.parent, f"{line} {redirected}")
    assert done.returncode == code, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize(
    ("redirected", "code"),
    [(">/dev/full", 6), ("| true", 6), (">&-", 0), ("2>&-", 0), ("<&- >&- 2>&-", 0)],
)
def test_the_exit_code_of_a_doctor_is_its_own(bundle: Path, redirected: str, code: int) -> None:
    done = shell(bundle, f"{python('rcod_runtime.cli.doctor', '--bundle', bundle)} {redirected}")
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", "<&- 2>&-", ">&-", "2>&-"])
def test_no_file_gets_the_number_of_a_stream(tmp_path: Path, closed: str) -> None:
    """C libraries write there, whatever it is by then."""
    code = (
        "import os; from rcod_runtime.cli.streams import open_closed_streams as o; "
        "from pathlib import Path; names = sorted(o()); f = open('first', 'w'); "
        "Path('found').write_text(repr([f.fileno() > 2, names])); os.write(2, b'native')"
    )
    done = shell(tmp_path, f"{shlex.join([sys.executable, '-c', code])} {closed}")
    assert done.returncode == 0, done.stderr
    marks = {"2>&-": "stderr", "<&-": "stdin", ">&-": "stdout"}
    names = [name for mark, name in marks.items() if mark in closed.split()]
    assert (tmp_path / "found").read_text() == repr([True, names])
    assert (tmp_path / "first").read_text() == ""


def test_a_report_is_no_stream(bundle: Path, photos: Path) -> None:
    options = ("-o", "out/", "--report", "report.jsonl", "--bundle", bundle)
    line = python("rcod_runtime.cli.upscale", "photos/", *options)
    assert shell(photos.parent, f"{line} <&- >&- 2>&-").returncode == 0
    lines = (photos.parent / "report.jsonl").read_text().splitlines()
    assert [json.loads(text)["status"] for text in lines] == ["written"] * 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("", "-o", "out"), "found an empty one"),
        (("photos", "-o", ""), "found an empty one"),
        (("photos", "-o", "out", "--bundle", ""), "expected a path, found an empty one"),
        (("photos", "-o", "out", "--ray", "local", "--ray-gpus", "nan"), "--ray-gpus: expected"),
        (("photos", "-o", "out", "--ray", "local", "--threads", "-3"), "--threads -3: expected"),
    ],
)
def test_what_is_empty_or_no_number_is_refused(
    photos: Path, arguments: tuple[str, ...], said: str
) -> None:
    """An empty path would be this folder."""
    done = shell(photos.parent, python("rcod_runtime.cli.upscale", *arguments))
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert sorted(p.name for p in photos.parent.iterdir()) == ["photos"]


# rcod-serve


@pytest.mark.parametrize(
    ("host", "code", "said"), [("", 2, "found none"), ("127.0..1", 6, "is no address")]
)
def test_an_address_that_is_none_is_refused(bundle: Path, host: str, code: int, said: str) -> None:
    pytest.importorskip("fastapi", reason='needs pip install "rcod[serve]"')
    options = ("--host", host, "--bundle", bundle, "--port", 0)
    done = shell(bundle, python("rcod_runtime.cli.serve", *options))
    assert done.returncode == code and said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_stopped_while_it_starts_ends_well(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """The first process of a container doesn't notice a signal that it has no handler for."""
    pytest.importorskip("fastapi", reason='needs pip install "rcod[serve]"')

    def stopped(**_: Any) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr(rcod_runtime, "Upscaler", stopped)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert serve.main([]) == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_server_whose_stdout_is_closed_serves(bundle: Path) -> None:
    pytest.importorskip("fastapi", reason='needs pip install "rcod[serve]"')
    line = f"exec {python('rcod_runtime.cli.serve', '--bundle', bundle, '--port', 0)} >&-"
    with subprocess.Popen(["bash", "-c", line], stderr=subprocess.PIPE, text=True) as process:
        timer = threading.Timer(120, process.kill)  # ends the lines below where it never serves
        timer.start()
        try:
            assert process.stderr is not None
            lines = list(itertools.takewhile(lambda text: "running on" not in text, process.stderr))
            process.terminate()
            assert process.wait(60) == 0 and not any("Traceback" in text for text in lines)
        finally:
            timer.cancel()
            process.kill()
