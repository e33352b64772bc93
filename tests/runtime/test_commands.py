"""The commands as a user meets them: files, exit codes, messages, and what is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import rcod_runtime
from rcod_runtime import Upscaler
from rcod_runtime.cli import doctor, upscale
from rcod_runtime.image_io import read_image, write_image
from tests.runtime.fakes import make_bundle

Photo = Callable[..., np.ndarray]
Capture = pytest.CaptureFixture[str]


def run(bundle: Path, *arguments: object) -> int:
    return upscale.main([*map(str, arguments), "--bundle", str(bundle)])


def test_one_photo_is_written_and_its_path_printed(
    bundle: Path, photos: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "o.jpg"
    assert run(bundle, photos / "0.png", "-o", out, "--realism", "0.4", "--scale", "2.5") == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert read_image(out).pixels.shape == (25, 30, 3)


def test_a_folder_is_written_name_by_name(
    bundle: Path, photos: Path, tmp_path: Path, capsys: Capture
) -> None:
    (photos / "notes.txt").write_text("not an image")
    assert run(bundle, photos, "-o", tmp_path / "out", "--jobs", "2") == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0.png", "1.png", "2.png"]
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_one_bad_file_in_a_folder_is_reported_and_the_rest_goes_on(
    bundle: Path, photos: Path, tmp_path: Path, capsys: Capture
) -> None:
    (photos / "1.png").write_bytes((photos / "1.png").read_bytes()[:50])
    assert run(bundle, photos, "-o", tmp_path / "out") == 10
    captured = capsys.readouterr()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0.png", "2.png"]
    assert "ImageError" in captured.err and "1.png" in captured.err
    assert "1 of 3 images failed" in captured.err and "Traceback" not in captured.err


def test_alpha_and_grey_files_keep_their_kind(bundle: Path, tmp_path: Path, photo: Photo) -> None:
    write_image(tmp_path / "a.png", photo(channels=4))
    write_image(tmp_path / "g.png", photo(channels=1)[:, :, 0])
    assert run(bundle, tmp_path / "a.png", tmp_path / "g.png", "-o", tmp_path / "out") == 0
    assert read_image(tmp_path / "out/a.png").pixels.shape == (96, 160, 4)
    assert read_image(tmp_path / "out/g.png").pixels.shape == (96, 160)


def test_a_bundle_without_neutral_is_run_at_its_own_level(
    tmp_path: Path, photos: Path, capsys: Capture
) -> None:
    make_bundle(tmp_path / "folded", gains=(1.0,), mem=False)  # its level is fidelity
    out = tmp_path / "o.png"
    assert run(tmp_path / "folded", photos / "0.png", "-o", out) == 0
    assert run(tmp_path / "folded", photos / "0.png", "-o", out, "--realism", "neutral") == 2
    assert "expected one of fidelity, or a number in [0, 1]." in capsys.readouterr().err


def bad_runs(bundle: Path, photos: Path, tmp_path: Path) -> dict[str, tuple[list[object], int]]:
    good, out = photos / "0.png", tmp_path / "o.png"
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "taken" / "0.png").mkdir(parents=True)
    write_image(tmp_path / "0.png", read_image(good).pixels)
    (tmp_path / "plain").write_text("a file")
    return {
        "missing input": ([tmp_path / "none.png", "-o", out], 3),
        "empty input": ([tmp_path / "empty.png", "-o", out], 3),
        "input's name too long": ([tmp_path / f"{'n' * 300}.png", "-o", out], 3),
        "output's name too long": ([good, "-o", tmp_path / f"{'n' * 300}.png", "--skip-existing"],
                                   6),
        "folder without images": ([tmp_path / "folder", "-o", tmp_path / "x"], 3),
        "unknown level": ([good, "-o", out, "--realism", "best"], 2),
        "realism outside": ([good, "-o", out, "--realism", "1.5"], 2),
        "realism nan": ([good, "-o", out, "--realism", "nan"], 2),
        "scale outside": ([good, "-o", out, "--scale", "9"], 2),
        "tile outside": ([good, "-o", out, "--tile", "33"], 2),
        "jobs outside": ([good, "-o", out, "--jobs", "0"], 2),
        "unknown device": ([good, "-o", out, "--device", "tpu"], 2),
        "onto itself": ([good, "-o", photos], 2),
        "unknown suffix": ([good, "-o", tmp_path / "o.xyz"], 6),
        "folder missing": ([good, "-o", tmp_path / "none" / "o.png"], 6),
        "file in the way": ([photos, "-o", tmp_path / "plain"], 6),
        "two of one name": ([good, tmp_path / "0.png", "-o", tmp_path / "y"], 6),
        "a folder of its name": ([good, "-o", tmp_path / "taken"], 6),
        "report to nowhere": ([good, "-o", out, "--report", "-"], 2),
        "too many threads": ([good, "-o", out, "--threads", "5000000000"], 2),
        "no bundle": ([good, "-o", out, "--bundle", tmp_path / "folder"], 4),
    }  # fmt: skip


def test_every_bad_run_has_its_exit_code_a_message_and_leaves_nothing(
    bundle: Path, photos: Path, tmp_path: Path, capsys: Capture
) -> None:
    for name, (arguments, code) in bad_runs(bundle, photos, tmp_path).items():
        defaults = [] if "--bundle" in arguments else ["--bundle", bundle]
        assert upscale.main([*map(str, arguments), *map(str, defaults)]) == code, name
        captured = capsys.readouterr()
        assert captured.out == "" and "Error: " in captured.err, name
        assert "Traceback" not in captured.err, name
        assert not (tmp_path / "o.png").exists(), name
    assert not list(tmp_path.glob("**/.*"))


@pytest.fixture
def computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("computed, and for nothing")

    monkeypatch.setattr(Upscaler, "__call__", never)


def lock(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read-only; said to be so to root, too, who may write everywhere."""
    folder.chmod(0o500)
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path) != folder and access(path, mode)
    )


@pytest.mark.usefixtures("computes_nothing")
@pytest.mark.parametrize("several", [False, True])
def test_a_read_only_folder_is_an_output_error_before_the_work(
    bundle: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    several: bool,
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    (locked / "0.png").touch()
    lock(locked, monkeypatch)
    assert run(bundle, *([photos] if several else [photos / "0.png"]), "-o", locked) == 6
    assert f"OutputError: {locked}: expected a folder that you may" in capsys.readouterr().err
    # Where all is there already, there is nothing to refuse.
    assert run(bundle, photos / "0.png", "-o", locked, "--skip-existing") == 0


@pytest.mark.usefixtures("computes_nothing")
@pytest.mark.parametrize(
    ("shape", "dtype", "name", "message"),
    [
        ((8, 8, 4), np.uint8, "o.jpg", "JPEG can't hold transparency. Write PNG or WebP."),
        ((8, 8), np.uint16, "o.webp", "WEBP can't hold 16 bits"),
        ((2, 4200, 3), np.uint8, "o.webp", "16800 x 8 px; WEBP holds at most 16383 px a side"),
        ((16400, 2), np.uint8, "o.jpg", "8 x 65600 px; JPEG holds at most 65500 px a side"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_the_work(
    bundle: Path,
    tmp_path: Path,
    capsys: Capture,
    shape: tuple[int, ...],
    dtype: type,
    name: str,
    message: str,
) -> None:
    write_image(tmp_path / "i.png", np.ones(shape, dtype))
    assert run(bundle, tmp_path / "i.png", "-o", tmp_path / name) == 6
    assert f"OutputError: {tmp_path / name}: " in (said := capsys.readouterr().err)
    assert message in said


def test_in_a_folder_run_each_result_keeps_its_format_or_fails_and_a_gif_becomes_png(
    bundle: Path, tmp_path: Path, photo: Photo, capsys: Capture
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    Image.fromarray(photo()).save(folder / "a.gif")
    write_image(folder / "b.webp", photo())
    write_image(folder / "c.webp", photo(4, 4200))
    assert run(bundle, folder, "-o", out) == 10
    assert sorted(p.name for p in out.iterdir()) == ["a.png", "b.webp"]
    assert "c.webp: the result would have 16800 x 16 px" in capsys.readouterr().err
    assert run(bundle, folder, "-o", out, "--format", "png", "--skip-existing") == 0
    assert sorted(p.name for p in out.iterdir()) == ["a.png", "b.png", "b.webp", "c.png"]


def test_doctor_reports_backends_and_fails_on_a_damaged_bundle(
    bundle: Path, own_bundle: Path, capsys: Capture
) -> None:
    assert doctor.main(["--bundle", str(bundle)]) == 0
    report = capsys.readouterr().out
    assert "graphs are whole" in report and "used by default: openvino" in report
    (own_bundle / "onnx/vpim.onnx").write_bytes(b"x")
    assert doctor.main(["--bundle", str(own_bundle)]) == 4
    assert "HashMismatch" in capsys.readouterr().err


def test_doctor_finds_a_sample_that_differs_and_one_that_was_changed(
    own_bundle: Path, photo: Photo
) -> None:
    from rcod_runtime.manifest import sha256_file

    lq = photo(8, 8)
    write_image(own_bundle / "lq.png", lq)
    write_image(own_bundle / "sr.png", np.zeros((32, 32, 3), np.uint8))
    manifest = json.loads((own_bundle / "manifest.json").read_text())
    manifest["sample"] = {
        "lq": "lq.png",
        "sr": "sr.png",
        "realism": "neutral",
        "lq_sha256": sha256_file(own_bundle / "lq.png"),
        "sr_sha256": sha256_file(own_bundle / "sr.png"),
        "max_abs_diff_u8": 2,
    }
    (own_bundle / "manifest.json").write_text(json.dumps(manifest))
    assert doctor.main(["--bundle", str(own_bundle)]) == 5
    write_image(own_bundle / "sr.png", np.ones((32, 32, 3), np.uint8))
    assert doctor.main(["--bundle", str(own_bundle)]) == 4


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=300
    )


FOREIGN = {"torch", "diffusers", "transformers", "onnx", "peft", "rcod_train", "rcod_export"}


def test_upscaling_imports_none_of_the_training_stack(
    bundle: Path, photos: Path, tmp_path: Path
) -> None:
    arguments = [str(photos / "0.png"), "-o", str(tmp_path / "o.png"), "--bundle", str(bundle)]
    done = python(
        "import sys\n"
        "from rcod_runtime.cli.upscale import main\n"
        f"assert main({arguments!r}) == 0\n"
        f"found = {FOREIGN!r} & sys.modules.keys()\n"
        "assert not found, found\n"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["upscale", "doctor"])
def test_help_answers_without_heavy_imports(command: str) -> None:
    done = python(
        "import sys\n"
        f"from rcod_runtime.cli.{command} import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'numpy', 'openvino', 'onnxruntime', 'PIL', 'torch', 'cryptography'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    assert done.returncode == 0, done.stderr
    assert "Exit codes" in done.stdout


def test_importing_the_package_imports_no_library() -> None:
    done = python(
        "import sys, rcod_runtime\n"
        "heavy = {'numpy', 'openvino', 'onnxruntime', 'PIL', 'torch'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    assert done.returncode == 0, done.stderr


def test_all_names_exactly_what_is_exported() -> None:
    for name in rcod_runtime.__all__:
        assert getattr(rcod_runtime, name).__name__ == name
    assert dir(rcod_runtime) == sorted(rcod_runtime.__all__)
    with pytest.raises(AttributeError, match="no attribute 'upscaler_'"):
        rcod_runtime.upscaler_  # noqa: B018
