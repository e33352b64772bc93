"""The report of a run on a disk that is full."""

from __future__ import annotations

from pathlib import Path

import pytest

from rcod_runtime.cli.report import Record, Report
from rcod_runtime.cli.upscale import main
from rcod_runtime.errors import OutputError
from rcod_runtime.image_io import write_image
from tests.runtime.test_images import Photo

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")

RECORD = Record("a.png", "b.png", "written")


def test_a_report_on_a_full_disk_is_an_output_error() -> None:
    """Closing it writes once more, and raised an OSError in the place of this one."""
    message = "/dev/full: the report can't be written"
    with pytest.raises(OutputError, match=message), Report(FULL) as report:
        report.add(RECORD)


def test_a_full_disk_hides_no_other_error() -> None:
    with pytest.raises(KeyboardInterrupt), Report(FULL) as report:
        with pytest.raises(OutputError):
            report.add(RECORD)
        raise KeyboardInterrupt


def test_a_report_that_only_its_end_cannot_write_is_an_output_error() -> None:
    report = Report(FULL)
    with pytest.raises(OutputError):
        report.add(RECORD)
    with pytest.raises(OutputError, match="/dev/full: the report can't be written"), report:
        pass


def test_a_run_whose_report_finds_the_disk_full_ends_with_the_code_of_output_errors(
    bundle: Path, tmp_path: Path, photo: Photo, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(tmp_path / "a.png", photo())
    arguments = [str(tmp_path / "a.png"), "-o", str(tmp_path / "b.png"), "--bundle", str(bundle)]
    assert main([*arguments, "--report", str(FULL)]) == 6
    assert "OutputError: /dev/full: the report can't be written" in capsys.readouterr().err
