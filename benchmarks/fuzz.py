"""Damaged images and bundles through the public entry: no crash, no hang, only typed errors.

  python -m benchmarks.fuzz                              20000 images, 5000 bundles
  python -m benchmarks.fuzz --seed 7 --images 100000
  python -m benchmarks.fuzz --case images 1551           one case again

Cases run in a process of their own with a limit on its memory and a watchdog on its time: one that
kills or blocks it is recorded with its number, and the run goes on after it. An image is decoded
under the real limits, its corner upscaled and the result written; a bundle is opened and used once
by each backend. What is found is said at once on stderr. Prints a machine card, what was found, a
table of outcomes, and one JSON document as the last line. Exit codes: those of rcod-upscale, 11
what can't be run, 12 something was found.
"""

from __future__ import annotations

import argparse
import json
import queue
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import report
from benchmarks.command import run_command
from benchmarks.errors import BenchmarkError
from rcod_runtime import UsageError

SCHEMA_VERSION = 1
EXIT_FOUND = 12
KINDS = ("images", "bundles")
WORKER = (sys.executable, "-m", "benchmarks.fuzz_cases")
SLOW_S = 5.0  # a case that takes longer is a finding
HANG_S = 20.0  # then its process is ended
START_S = 120.0  # imports and the first bundle
MAX_PEAK_BYTES = 2 * 2**30  # more resident memory is a finding
CASES_PER_PROCESS = 2500


@dataclass
class Tally:
    """What came of the cases of one kind."""

    counts: Counter[str] = field(default_factory=Counter)
    findings: list[dict[str, Any]] = field(default_factory=list)
    slowest_s: float = 0.0
    peak_bytes: int = 0

    def add(self, result: dict[str, Any]) -> None:
        self.counts[result["outcome"]] += 1
        self.slowest_s = max(self.slowest_s, result.get("seconds", 0.0))
        peak_bytes = result.get("peak_bytes") or 0  # None: the system doesn't tell
        before, self.peak_bytes = self.peak_bytes, max(self.peak_bytes, peak_bytes)
        if self.peak_bytes > MAX_PEAK_BYTES >= before:
            self._find({**result, "outcome": "memory"})
        if result["outcome"] in ("untyped", "crash", "hang"):
            self._find(result)
        elif result.get("seconds", 0.0) > SLOW_S:
            self._find({**result, "outcome": "slow"})

    def _find(self, finding: dict[str, Any]) -> None:
        """Said at once too: a run of hours may be killed before its end."""
        self.findings.append(finding)
        tqdm.write(f"FOUND {finding}", file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--images", type=int, default=20000, metavar="N", help="default: %(default)s")
    add("--bundles", type=int, default=5000, metavar="N", help="default: %(default)s")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--case", nargs=2, metavar=("KIND", "NUMBER"), help="run one case of images or bundles")
    add("--json", type=Path, metavar="FILE", help="write the JSON document here too")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    found: list[dict[str, Any]] = []
    code = run_command(lambda: run(_ranges(arguments), arguments.seed, found), arguments.json)
    return code or (EXIT_FOUND if found else 0)


def _ranges(arguments: argparse.Namespace) -> dict[str, range]:
    if arguments.seed < 0:
        raise UsageError(f"--seed {arguments.seed}: expected at least 0.")
    if arguments.case is not None:
        kind, number = arguments.case
        if kind not in KINDS or not number.isdecimal():
            raise UsageError(f"--case {kind} {number}: expected images or bundles and a number.")
        return {kind: range(int(number), int(number) + 1)}
    return {kind: range(max(0, getattr(arguments, kind))) for kind in KINDS}


def run(ranges: dict[str, range], seed: int, found: list[dict[str, Any]]) -> str:
    """Run the cases, print card and table, add findings to ``found``; return the document. What was
    found is printed also where the run ends early."""
    card = report.machine_card()
    print(report.format_card(card))
    tallies = {kind: Tally() for kind in ranges}
    try:
        for kind, numbers in ranges.items():
            with tqdm(total=len(numbers), desc=kind, unit="case", disable=None) as bar:
                worker = (*WORKER, kind, str(seed))
                run_cases(worker, numbers, tallies[kind], lambda: bar.update(1))
    finally:
        found += [finding for tally in tallies.values() for finding in tally.findings]
        for finding in found:
            print(f"FOUND {finding}")
    rows = [
        [f"{kind}: {name}", f"{count}"]
        for kind, tally in tallies.items()
        for name, count in tally.counts.most_common()
    ]
    print(report.format_table(("outcome", "cases"), rows))
    return report.document(
        "fuzz",
        SCHEMA_VERSION,
        card,
        config={"seed": seed, **{kind: len(numbers) for kind, numbers in ranges.items()}},
        limits={"slow_s": SLOW_S, "hang_s": HANG_S, "peak_bytes": MAX_PEAK_BYTES},
        **{kind: {**vars(tally)} for kind, tally in tallies.items()},
    )


def run_cases(
    worker: Sequence[str],
    numbers: range,
    tally: Tally,
    progress: Callable[[], object] = lambda: None,
    hang_s: float = HANG_S,
) -> None:
    """Run cases in processes ``worker FIRST LAST``, a new one after each crash or hang, and count
    them in ``tally``.

    Raises:
        BenchmarkError: a process ended before its first case, so that none will run.
    """
    following = numbers.start
    while following < numbers.stop:
        last = min(numbers.stop, following + CASES_PER_PROCESS)
        following = _one_process(worker, following, last, tally, progress, hang_s)


def _one_process(
    worker: Sequence[str],
    first: int,
    last: int,
    tally: Tally,
    progress: Callable[[], object],
    hang_s: float,
) -> int:
    """Returns the number of the first case that was not run."""
    command = [*worker, str(first), str(last)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, errors="replace"
    )
    lines: queue.Queue[str | None] = queue.Queue()
    reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
    reader.start()
    running: int | None = None
    following = first
    try:
        while True:
            try:
                line = lines.get(timeout=START_S if running is None else hang_s)
            except queue.Empty:
                tally.add({"case": following, "outcome": "hang"})
                progress()
                return following + 1
            if line is None:
                break
            try:
                result = json.loads(line)
            except ValueError:
                continue  # a library wrote to stdout
            running = result["case"]
            if "outcome" in result:
                tally.add(result)
                progress()
                following = running + 1
        code = process.wait()
    finally:
        process.kill()
        process.wait()
        reader.join()
        assert process.stdout is not None
        process.stdout.close()
    if following < last:
        if running is None:
            raise BenchmarkError(
                f"{' '.join(command)}: ended with exit code {code} before a case ran."
            )
        tally.add({"case": following, "outcome": "crash", "detail": _ending(code)})
        progress()
        return following + 1
    if code != 0:  # with all cases done: its memory was spoilt before
        how = f"at its end, {_ending(code)}"
        tally.add({"case": last - 1, "outcome": "crash", "detail": how})
    return last


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


if __name__ == "__main__":
    sys.exit(main())
