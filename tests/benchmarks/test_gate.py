"""The gate: a run is held to its ratios, and a file that could not be judged is refused before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gate import Gate, Threshold, check_runnable, format_judgements, judge, read_gate
from benchmarks.latency import main
from rcod_runtime import UsageError
from tests.benchmarks.conftest import REPOSITORY
from tests.benchmarks.test_latency import FAST

LINE = {
    "backend": "openvino",
    "precision": "fp32",
    "stage": "whole",
    "times_as_fast": 1.5,
    "optional": False,
}


def gate_file(folder: Path, *lines: dict[str, Any], **top: Any) -> Path:
    path = folder / "gate.json"
    path.write_text(json.dumps({"schema_version": 1, "at_least": list(lines), **top}))
    return path


def threshold(**changes: Any) -> Threshold:
    return Threshold(**{**LINE, **changes})


def test_a_ratio_below_its_threshold_falls_short() -> None:
    gate = Gate(1, (threshold(), threshold(precision="bf16", stage="decoder")))
    ratios = {"whole": {"openvino fp32": 1.5}, "decoder": {"openvino bf16": 1.49}}
    reached, missed = judge(gate, ratios, ())
    assert (reached.passed, missed.passed) == (True, False)
    table = format_judgements((reached, missed))
    assert "FELL SHORT" in table.splitlines()[-1]
    assert "ok" in table.splitlines()[-2]


def test_an_absent_variant_passes_only_where_it_is_optional() -> None:
    gate = Gate(1, (threshold(optional=True), threshold()))
    optional, needed = judge(gate, {"whole": {}}, ())
    assert (optional.passed, needed.passed) == (True, False)
    assert format_judgements((optional,)).endswith("not on this machine")


def test_an_optional_variant_is_judged_only_where_auto_takes_it() -> None:
    gate = Gate(1, (threshold(precision="bf16", optional=True),))
    slow = {"whole": {"openvino bf16": 0.9}}
    (here,) = judge(gate, slow, ("openvino bf16",))
    (elsewhere,) = judge(gate, slow, ("openvino fp32",))
    assert (here.passed, elsewhere.passed) == (False, True)
    assert format_judgements((here,)).endswith("FELL SHORT")
    assert format_judgements((elsewhere,)).endswith("auto does not take it here")


def test_command_ends_with_1_and_a_table_where_a_threshold_is_missed(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ("--bundle", str(tiny_bundle), "--checkpoint", str(tiny_checkpoint))
    low, high = {**LINE, "times_as_fast": 1e-3}, {**LINE, "stage": "vpim", "times_as_fast": 1e6}
    for lines, code in (((low,), 0), ((low, high), 1)):
        gate = gate_file(tmp_path, *lines)
        assert main([*model, *FAST, "--quick", "--gate", str(gate)]) == code
        printed = capsys.readouterr().out
        assert ("FELL SHORT" in printed) == bool(code)
        document = json.loads(printed.splitlines()[-1])
        assert [j["passed"] for j in document["gate"]] == [True, False][: len(lines)]
        assert document["gate"][0]["found"] > 0
        # Only what the gate looks at is measured.
        assert (document["steady"] is None, document["stages"] is None) == (False, not code)
        assert document["start"] is None and document["memory"] is None
        assert "pytorch autocast bf16" not in document["steady"]["latency"]


def test_an_optional_variant_that_auto_takes_is_run() -> None:
    gate = Gate(1, (threshold(precision="bf16", optional=True),))
    check_runnable(gate, ("openvino fp32",), (), ("openvino fp32",))
    check_runnable(gate, ("openvino fp32", "openvino bf16"), (), ("openvino bf16",))
    with pytest.raises(UsageError, match="openvino bf16: expected a variant of this run"):
        check_runnable(gate, ("openvino fp32",), (), ("openvino bf16",))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"stage": "no_such"}, "stage 'no_such': expected whole or one of"),
        ({"backend": "no_such"}, "no_such fp32: expected a variant of this run"),
    ],
)
def test_a_threshold_that_cannot_be_judged_is_an_error_before_the_timing(
    tiny_bundle: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    line: dict[str, Any],
    said: str,
) -> None:
    gate = gate_file(tmp_path, {**LINE, **line})
    model = ("--bundle", str(tiny_bundle), "--checkpoint", str(tiny_checkpoint))
    assert main([*model, *FAST, "--quick", "--gate", str(gate)]) == 2
    assert said in capsys.readouterr().err


def test_a_gate_needs_its_baseline(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = gate_file(tmp_path, LINE)
    assert main(["--bundle", str(tiny_bundle), *FAST, "--gate", str(gate)]) == 2
    assert "--checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not readable as JSON"),
        ('{"schema_version": 2, "at_least": []}', "expected 1, which this version reads, found 2"),
        ('{"schema_version": 1, "at_least": []}', "at least one threshold"),
        ('{"schema_version": 1, "at_least": [{}]}', r"at_least\[0\].backend"),
        (json.dumps({"schema_version": 1, "at_least": [{**LINE, "ms": 3}]}), "unknown field"),
        (
            json.dumps({"schema_version": 1, "at_least": [{**LINE, "times_as_fast": 0}]}),
            "a number above 0",
        ),
    ],
)
def test_files_that_are_no_gate_are_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "g.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=said):
        read_gate(path)


def test_the_gate_of_the_embedded_model_can_be_read() -> None:
    gate = read_gate(REPOSITORY / "benchmarks" / "gates" / "nano.json")
    assert {"openvino bf16", "openvino fp32"} <= {t.variant for t in gate.at_least}
    assert all(t.optional for t in gate.at_least if t.precision == "bf16")
