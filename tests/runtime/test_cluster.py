"""rcod-upscale on a real Ray cluster of several worker processes on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rcod_runtime.cli import upscale
from rcod_runtime.cli.files import Task
from rcod_runtime.cli.report import Record
from rcod_runtime.cli.tables import target_of
from rcod_runtime.errors import ImageError
from rcod_runtime.image_io import encode_image, read_image, write_image

pytest.importorskip("ray", reason='needs pip install "rcod[ray]"')
pa = pytest.importorskip("pyarrow")

Photo = Callable[..., np.ndarray]
CPUS = 3
WORKER = "ray::MapWorker"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for workers in /proc")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of its own, with a token of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = hashlib.sha256(os.urandom(32)).hexdigest()
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"]
    command += [f"--port={port}", f"--num-cpus={CPUS}", "--include-dashboard=false"]
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        with open(f"{folder}/log", "w") as log:
            process = subprocess.Popen(
                [*command, "--disable-usage-stats", f"--temp-dir={folder}"],
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + 300
        while "Ray runtime started" not in Path(folder, "log").read_text():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
        for pid in processes(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(60)
        del os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"]


def start(*arguments: object) -> subprocess.Popen[str]:
    code = "import sys; from rcod_runtime.cli.upscale import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run(*arguments: object) -> tuple[int, str, str]:
    process = start(*arguments)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def records(report: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in report.read_text().splitlines()]


def processes(words: str) -> list[int]:
    """Those with these words in their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if words in (folder / "cmdline").read_text():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def png(pixels: np.ndarray) -> bytes:
    return encode_image(pixels, "PNG", "a test")


# -- files -----------------------------------------------------------------------------------------


def test_a_worker_that_is_killed_loses_nothing_and_nothing_is_made_twice(
    cluster: str, photo: Photo, tmp_path: Path
) -> None:
    photos, out, report = tmp_path / "photos", tmp_path / "out", tmp_path / "report.jsonl"
    photos.mkdir()
    for i in range(24):
        write_image(photos / f"{i:02}.png", photo(96, 96, seed=i))
    (photos / "bad.png").write_bytes(b"nothing")
    out.mkdir()
    (out / "23.png").write_bytes(b"an earlier run's")
    process = start(photos, "-o", out, "--ray", cluster, "--report", report)
    inodes: dict[str, set[int]] = {}
    killed, deadline = 0, time.monotonic() + 600
    while process.poll() is None:
        if time.monotonic() > deadline:
            process.kill()
        for path in out.glob("[0-9]*.png"):
            inodes.setdefault(path.name, set()).add(path.stat().st_ino)
        if not killed and len(inodes) > 5:
            os.kill(processes(WORKER)[0], signal.SIGKILL)
            killed = len(inodes)
        time.sleep(0.01)
    stdout, stderr = process.communicate()
    assert process.returncode == 10, stderr
    assert 5 < killed < 24
    assert "ImageError: " in stderr and "1 of 24 images failed" in stderr

    told = records(report)
    assert len(told) == 25 and len({r["input"] for r in told}) == 25
    status = {str(r["input"]): r["status"] for r in told}
    assert status.pop(str(photos / "bad.png")) == "failed"
    assert status.pop(str(photos / "23.png")) == "skipped"
    # What the dead worker wrote in its last moment is found by the one that takes its work.
    assert list(status.values()).count("written") >= 19
    assert set(status.values()) <= {"written", "skipped"}
    assert (out / "23.png").read_bytes() == b"an earlier run's"
    made = [out / f"{i:02}.png" for i in range(23)]
    assert all(read_image(path).pixels.shape == (384, 384, 3) for path in made)
    # A file that is written again is a new file.
    assert all(len(inodes.get(path.name, {0})) == 1 for path in made)
    assert set(stdout.splitlines()) <= {str(path) for path in made}


def test_pixels_are_those_of_one_process(cluster: str, photo: Photo, tmp_path: Path) -> None:
    for i in range(4):
        write_image(tmp_path / f"{i}.png", photo(20, 24 + i, seed=i))
    one, many = tmp_path / "one", tmp_path / "many"
    options = ("--realism", "0.3", "--threads", "1", "--format", "tiff")
    assert upscale.main([str(tmp_path / "*.png"), "-o", str(one), *options]) == 0
    code, out, err = run(tmp_path / "*.png", "-o", many, *options, "--ray", cluster, "--jobs", 2)
    assert code == 0, err
    assert sorted(out.splitlines()) == [str(many / f"{i}.tif") for i in range(4)]
    for path in one.iterdir():
        assert (many / path.name).read_bytes() == path.read_bytes()


FAULTS = """
import os, sys
from pathlib import Path
from rcod_runtime.cli import cluster
from rcod_runtime.cli.files import Task
from rcod_runtime.cli.report import Record, Report
from rcod_runtime.errors import PartialFailure

class Faulty(cluster.FileActor):
    def __init__(self, opening, options): pass
    def records(self, unit):
        from rcod_runtime.cli.report import Record
        name = Path(unit["source"]).name
        if name == "deadly":
            with open(unit["target"], "a") as file: file.write("x")
            os._exit(1)
        if name == "faulty":
            raise ValueError("a fault of our own")
        yield Record(unit["source"], unit["target"], "written")

address, out, report = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
cluster.FileActor = Faulty
opening = {"bundle": None, "require_signature": None, "device": "cpu", "threads": 1}
tasks = [Task(Path(n), out / n, "PNG") for n in ("a", "deadly", "b", "faulty")]
try:
    with Report(report) as taken:
        cluster.upscale_files(cluster.Cluster(address, opening), tasks, None, taken)
except PartialFailure as failure:
    print(failure)
"""


def test_an_image_that_kills_its_workers_is_given_up_and_a_fault_of_ours_is_named(
    cluster: str, tmp_path: Path
) -> None:
    report = tmp_path / "report.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, cluster, str(tmp_path), str(report)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "2 of 4 images failed" in done.stdout, done.stderr
    # Four times among others, and four times alone.
    assert len((tmp_path / "deadly").read_text()) == 8
    told = {str(r["input"]): r for r in records(report)}
    assert {name: r["status"] for name, r in told.items()} == {
        "a": "written", "b": "written", "deadly": "failed", "faulty": "failed",
    }  # fmt: skip
    assert "died, again and again" in str(told["deadly"]["message"])
    assert "ValueError: a fault of our own" in str(told["faulty"]["message"])
    assert all(r["output"] == str(tmp_path / name) for name, r in told.items())


def rows_of(actor: Callable[[], Any], units: list[dict[str, object]]) -> list[Any]:
    """The records that Ray gets of an actor, here without Ray."""
    from rcod_runtime.cli.cluster import _Rows

    batches = list(_Rows(actor)(pa.Table.from_pylist(units)))
    return [json.loads(text) for batch in batches for text in batch["record"]]


def test_an_actor_that_cannot_be_made_says_why() -> None:
    """Ray would try for ever to make it."""

    def broken() -> None:
        raise RuntimeError("no such symbol")

    (record,) = rows_of(broken, [{"number": 0}])
    assert record["error"] == "BackendError"
    assert record["message"] == "it can't be started: RuntimeError: no such symbol"


# -- tables ----------------------------------------------------------------------------------------


def test_images_come_from_parquet_files(
    cluster: str, photo: Photo, bundle: Path, tmp_path: Path
) -> None:
    import pyarrow.parquet

    good = png(photo(8, 9))
    rows = [
        {"image": {"bytes": good, "path": "sub/a.jpg"}, "label": 1},
        {"image": {"bytes": good, "path": "../out.png"}, "label": 2},
        {"image": {"bytes": b"no image", "path": "b.png"}, "label": 3},
        {"image": {"bytes": None, "path": "c.png"}, "label": 4},
        {"image": {"bytes": good, "path": None}, "label": 5},
        {"image": {"bytes": good, "path": "d.gif"}, "label": 6},
    ]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "1.parquet",
                                row_group_size=4)  # fmt: skip
    again = [{"name": "d", "content": good}, {"name": "e", "content": good}]
    pyarrow.parquet.write_table(pa.Table.from_pylist(again), tmp_path / "2.parquet")
    tables = [tmp_path / f"{i}.parquet" for i in (1, 2)]
    out, report = tmp_path / "out", tmp_path / "report.jsonl"
    code, stdout, err = run(*tables, "-o", out, "--ray", cluster, "--report", report,
                            "--bundle", bundle)  # fmt: skip
    assert code == 10 and "4 of 8 images failed" in err, err
    hashed = f"{hashlib.sha256(good).hexdigest()[:16]}.png"
    assert {str(p.relative_to(out)) for p in out.rglob("*.*")} == {
        "sub/a.jpg", hashed, "d.png", "e.png",
    }  # fmt: skip
    assert read_image(out / "sub/a.jpg").pixels.shape == (32, 36, 3)
    messages = " | ".join(str(r["message"]) for r in records(report) if r["status"] == "failed")
    for words in (
        "../out.png: expected a name inside",
        "b.png: expected an image",
        "found none. The columns are image, label.",
        "another image has the same",
    ):
        assert words in messages  # fmt: skip

    code, stdout, err = run(*tables, "-o", out, "--ray", cluster, "--report", report,
                            "--bundle", bundle)  # fmt: skip
    assert code == 10 and stdout == ""  # all that can be is there


def test_images_come_from_tar_shards_up_to_where_one_is_damaged(
    cluster: str, photo: Photo, bundle: Path, tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    members = {
        "a.png": png(photo(8, 9)), "a.txt": b"text", "sub/b.jpg": png(photo(6, 7)),
        "c.json": b"{}", "d.png": png(noise),
    }  # fmt: skip
    with tarfile.open(tmp_path / "whole.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    content = (tmp_path / "whole.tar").read_bytes()
    # In the middle of the last image.
    (tmp_path / "cut.tar").write_bytes(content[: content.index(members["d.png"]) + 1000])
    options = ("--ray", cluster, "--bundle", bundle, "--format", "png")
    code, _, err = run(tmp_path / "cut.tar", "-o", tmp_path / "out", *options)
    assert code == 10 and "cut.tar: can't be read as what its name says" in err, err
    code, out, err = run(tmp_path / "whole.tar", "-o", tmp_path / "out", *options)
    assert code == 0 and out == f"{tmp_path / 'out' / 'd.png'}\n", err
    names = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")}
    assert names == {"a.png", "sub/b.png", "d.png"}


def test_a_fault_of_ours_costs_one_image_of_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rcod_runtime.cli import cluster

    def upscale_image(_: object, task: Task, *rest: object, data: bytes) -> tuple[Record, None]:
        if data == b"b":
            raise ValueError("a fault of our own")
        return Record(str(task), str(task.target), "written"), None

    def opened(upscaler: object, **_: object) -> None: ...

    monkeypatch.setattr(cluster, "upscale_image", upscale_image)
    monkeypatch.setattr("rcod_runtime.Upscaler.__init__", opened)
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in "abc":
            info = tarfile.TarInfo(f"{name}.png")
            info.size = 1
            tar.addfile(info, io.BytesIO(name.encode()))
    unit = {"number": 0, "path": str(tmp_path / "s.tar"), "part": 0}
    told = rows_of(lambda: cluster.TableActor({}, None, tmp_path, None), [unit])  # type: ignore[arg-type]
    assert told.pop() is None, "the unit is done"
    assert [r["status"] for r in told] == ["written", "failed", "written"]
    assert told[1]["message"] == "b.png: ValueError: a fault of our own"
    assert told[1]["output"] == str(tmp_path / "b.png")


@pytest.mark.parametrize(
    "name",
    ["/etc/x.png", "a/../../x.png", "..\\x.png", "C:x.png", "C:\\x.png", r"\\host\s\x.png",
     "..jpg", "sub/..jpg", "...jpg"],
)  # fmt: skip
def test_no_name_in_a_table_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    """On Windows a backslash separates and C: is another disk."""
    with pytest.raises(ImageError, match="expected a name inside the output's folder"):
        target_of(name, tmp_path, None)
    assert target_of("2026-01-01T10:00:00.png", tmp_path, None).parent == tmp_path


# -- what can't be used ----------------------------------------------------------------------------


def test_what_can_not_be_used_is_said(
    cluster: str, photos: Path, bundle: Path, tmp_path: Path
) -> None:
    import pyarrow.parquet

    out, table = tmp_path / "out", tmp_path / "t.parquet"
    table.write_bytes(b"PAR1")
    empty = tmp_path / "empty.parquet"
    pyarrow.parquet.write_table(pa.table({"image": pa.array([], pa.binary())}), empty)
    local = ("--ray", cluster)
    for arguments, code, words in (
        ((photos, "-o", out, *local, "--jobs", 9), 2, "the cluster has room for 3 (CPU 3, GPU 0)"),
        ((photos, "-o", out, *local, "--ray-gpus", 1), 2, "the cluster has room for 0"),
        ((photos, "-o", out, *local, "--realism", "loud"), 2, "realism 'loud': expected one of"),
        ((photos, "-o", out, *local, "--bundle", tmp_path), 4, "manifest.json"),
        ((photos, "-o", out, *local, "--backend", "tensorrt"), 5, "a worker: EngineMismatch: "),
        ((empty, "-o", out, *local), 3, "empty.parquet: no images in it"),
        ((table, "-o", out, *local), 3, "t.parquet: can't be read as what its name says"),
        ((tmp_path / "none.tar", "-o", out, *local), 3, "none.tar"),
        ((photos, table, "-o", out, *local), 2, "expected only Parquet files and .tar"),
        (("-", "-o", out / "x.png", *local), 2, "--ray: expected files, found stdin"),
        ((photos, "-o", out, "--ray-gpus", 1), 2, "--ray-gpus: expected --ray beside it"),
        ((photos, table, "-o", out), 2, "t.parquet: files of many images need --ray local"),
        ((table, "-o", out, *local, "--report", table), 2, "--report "),
        ((table, "-o", "-", *local), 2, "-o -: expected a folder for several images"),
        ((table, "-o", tmp_path / "a.png", *local), 2, "a.png: expected a folder for several"),
    ):
        found, stdout, err = run(*arguments)
        assert (found, stdout) == (code, ""), (arguments, err)
        assert words in err and "Traceback" not in err, err
