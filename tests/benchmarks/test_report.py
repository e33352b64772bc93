"""The card, the table and the JSON line that every benchmark ends with."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import platform
import re
from pathlib import Path

import pytest

from benchmarks.command import Verdict, run_command
from benchmarks.errors import DatasetError
from benchmarks.report import (
    MachineCard,
    document,
    format_card,
    format_table,
    machine_card,
    summarise,
)
from rcod_runtime import OutputError
from rcod_runtime.files import write_whole


@pytest.fixture(scope="module")
def card() -> MachineCard:
    return machine_card()


def test_card_knows_the_machine_and_the_versions(card: MachineCard) -> None:
    assert card.cpus_available >= 1
    assert card.python == platform.python_version()
    assert card.packages["numpy"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", card.date_utc)


def test_card_does_not_name_the_machine_or_its_user(card: MachineCard) -> None:
    text = json.dumps(dataclasses.asdict(card)) + format_card(card)
    host = platform.node()
    assert not host or not re.search(rf"\b{re.escape(host)}\b", text)
    assert str(Path.home()) not in text.replace("//", "/") or str(Path.home()) == "/"


def test_card_says_when_other_work_competes(card: MachineCard) -> None:
    busy = dataclasses.replace(card, load_average_1min=float(card.cpus_available))
    idle = dataclasses.replace(card, load_average_1min=0.0)
    assert "other work competes" in format_card(busy)
    assert "other work competes" not in format_card(idle)


def test_percentiles_are_worked_by_hand() -> None:
    latency = summarise([float(ms) for ms in range(101)])
    assert (latency.median_ms, latency.p90_ms, latency.p99_ms) == (50.0, 90.0, 99.0)
    assert (latency.runs, latency.min_ms, latency.max_ms) == (101, 0.0, 100.0)


def test_columns_line_up() -> None:
    table = format_table(["name", "ms"], [["a", "1.0"], ["long name", "100.0"]])
    assert table.splitlines() == [
        "name          ms",
        "---------  -----",
        "a            1.0",
        "long name  100.0",
    ]


def test_document_is_one_line_with_its_schema(card: MachineCard) -> None:
    text = document("x", 3, card, psnr=math.inf, rows=[{"value": math.nan}, (1.5,)])
    assert "\n" not in text
    found = json.loads(text)
    assert (found["benchmark"], found["schema_version"]) == ("x", 3)
    assert set(found["card"]) == {field.name for field in dataclasses.fields(MachineCard)}
    assert found["psnr"] is None
    assert found["rows"] == [{"value": None}, [1.5]]


def test_result_is_the_last_line_and_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(lambda: '{"a": 1}', tmp_path / "r.json") == 0
    assert capsys.readouterr().out.splitlines()[-1] == '{"a": 1}'
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": 1}


def test_an_error_leaves_a_message_a_code_and_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> str:
        raise DatasetError("a.png: expected a partner.")

    assert run_command(work, tmp_path / "r.json") == DatasetError.exit_code == 11
    printed = capsys.readouterr()
    assert printed.err == "DatasetError: a.png: expected a partner.\n"
    assert printed.out == ""
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_found_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> str:
        raise AssertionError("worked")

    assert run_command(work, tmp_path / "none" / "r.json") == OutputError.exit_code
    assert "r.json: expected a file name" in capsys.readouterr().err


def test_what_cannot_be_written_does_not_cost_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OutputError(f"{path}: can't be written (no space).")

    with monkeypatch.context() as patched:
        patched.setattr("benchmarks.command.write_whole", full)
        code = run_command(lambda: '{"a": 1}', tmp_path / "r.json")
    printed = capsys.readouterr()
    assert (code, printed.out) == (OutputError.exit_code, '{"a": 1}\n')
    assert "r.json: can't be written" in printed.err

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    more = Verdict('{"a": 1}', True, write_more=(tmp_path / "report").touch)
    with monkeypatch.context() as patched, pytest.raises(BrokenPipeError):
        patched.setattr("sys.stdout", Gone())
        run_command(lambda: more, tmp_path / "r.json")
    assert (tmp_path / "r.json").read_text() == '{"a": 1}\n'
    assert (tmp_path / "report").exists()


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "r.json").mkdir()
    with pytest.raises(OutputError, match=r"r\.json: can't be written"):
        write_whole(tmp_path / "r.json", b"{}")
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
