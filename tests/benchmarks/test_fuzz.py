"""The fuzzer: a small part of it as a test, what it found before, and its watchdog."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import fuzz
from benchmarks.corpus import image_corpus
from benchmarks.errors import BenchmarkError
from benchmarks.fuzz import Tally, main, run_cases
from benchmarks.fuzz_cases import KINDS, open_cases, outcome
from benchmarks.mutate import with_valid_png_sums
from rcod_runtime.errors import ImageError
from rcod_runtime.image_io import decode_image

SEED = 1
COUNTS = {"images": 400, "bundles": 120}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Decoders warn of damage, which is what they are given."""
    logging.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_input_ends_in_a_result_or_a_typed_error(kind: str, tmp_path: Path) -> None:
    case = open_cases(kind, tmp_path)
    results = [outcome(case, SEED, kind, number) for number in range(COUNTS[kind])]
    found = [r for r in results if r["outcome"] == "untyped" or r["seconds"] > 30]
    assert not found
    kinds = {r["outcome"] for r in results}
    expected = {"images": {"image", "ImageError"}, "bundles": {"upscaled", "ManifestError"}}
    assert expected[kind] <= kinds  # the damage is neither harmless nor always fatal


def test_a_case_is_made_from_its_number_alone(tmp_path: Path) -> None:
    case = open_cases("images", tmp_path)
    again = [outcome(case, SEED, "images", n)["outcome"] for n in (7, 3, 7, 3)]
    assert again[:2] == again[2:]


def test_every_format_and_mode_of_the_corpus_is_read_undamaged() -> None:
    for name, data in image_corpus().items():
        if name == "tiff-F":
            with pytest.raises(ImageError, match="floating point"):
                decode_image(data, name)
        else:
            assert decode_image(data, name).pixels.shape[:2] in [(24, 32), (32, 24)], name


def test_a_png_with_wrong_sums_gets_right_ones() -> None:
    data = image_corpus()["png-RGB"]
    assert with_valid_png_sums(data) == data
    changed = bytearray(data)
    changed[19] = 33  # of the width
    assert with_valid_png_sums(bytes(changed)) != bytes(changed)
    assert with_valid_png_sums(data[:40])[:29] == data[:29]


WORKER = """
import json, os, sys, time
for number in range(int(sys.argv[1]), int(sys.argv[2])):
    print(json.dumps({"case": number}), flush=True)
    if number == 1:
        os.abort()
    if number == 3:
        time.sleep(60)
    if number == 5:
        sys.exit(9)
    print("noise of a library")
    print(json.dumps({"case": number, "outcome": "fine", "seconds": 6.0 * (number == 6)}))
"""


def test_crashes_hangs_and_slow_cases_are_recorded_and_the_run_goes_on() -> None:
    tally = Tally()
    run_cases((sys.executable, "-c", WORKER), range(8), tally, hang_s=5)
    assert tally.counts == {"fine": 5, "crash": 2, "hang": 1}
    assert [(f["case"], f["outcome"], f.get("detail")) for f in tally.findings] == [
        (1, "crash", "SIGABRT"),
        (3, "hang", None),
        (5, "crash", "exit code 9"),
        (6, "slow", None),
    ]


def test_a_process_that_dies_after_its_last_case_is_a_crash() -> None:
    """Memory that a case spoilt may be noticed no sooner."""
    worker = WORKER + "import os; os.abort()\n"
    tally = Tally()
    run_cases((sys.executable, "-c", worker), range(6, 8), tally, hang_s=10)
    assert tally.counts == {"fine": 2, "crash": 1}
    assert tally.findings[-1]["detail"] == "at its end, SIGABRT"


@pytest.mark.parametrize(
    ("error", "code"), [(BenchmarkError("ended before a case ran"), 11), (KeyboardInterrupt(), 130)]
)
def test_what_was_found_is_told_at_once_and_where_the_run_ends_early(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
) -> None:
    told: list[str] = []

    def one_process(worker: object, first: int, last: int, tally: Tally, *_: object) -> int:
        if first > 0:
            told.append(capsys.readouterr().err)
            raise error
        tally.add({"case": 0, "outcome": "crash", "detail": "SIGABRT"})
        return 1

    monkeypatch.setattr(fuzz, "_one_process", one_process)
    assert main(["--images", "8", "--bundles", "8"]) == code
    found = "FOUND {'case': 0, 'outcome': 'crash', 'detail': 'SIGABRT'}"
    assert found in told[0]
    assert found in capsys.readouterr().out


def test_the_command_prints_one_document_and_runs_single_cases(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--case", "images", "3"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["benchmark"] == "fuzz" and document["images"]["counts"] in (
        {"image": 1},
        {"ImageError": 1},
    )
    assert main(["--case", "sounds", "3"]) == 2
    assert main(["--seed", "-1"]) == 2  # every case would end its process


def test_peak_memory_is_that_of_the_cases_alone(capsys: pytest.CaptureFixture[str]) -> None:
    held = bytearray(800_000_000)  # the parent's memory must not count
    held[::4096] = b"x" * len(held[::4096])
    assert main(["--case", "images", "3"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 20e6 < document["images"]["peak_bytes"] < 800e6
    assert held
