"""The end of every benchmark: errors become exit codes, the result its last line and a file."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.errors import BenchmarkError
from rcod_runtime.errors import OutputError, RcodError, UsageError
from rcod_runtime.files import write_whole
from rcod_train.errors import RcodTrainError

EXIT_FELL_SHORT = 1
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Verdict:
    """The document of a benchmark that judges, and what it found. ``write_more``: what is left to
    write of it once line and file are there."""

    document: str
    passed: bool
    write_more: Callable[[], None] | None = None


def run_command(work: Callable[[], str | Verdict], json_file: Path | None) -> int:
    """Do ``work``, print the document it returns, write it to ``json_file``; return the exit code:
    EXIT_FELL_SHORT where a verdict is against it, with line and file written all the same.

    An error of the work goes to stderr in one message, and neither line nor file is written. The
    line comes first, so that a file that can't be written does not cost the result.
    """
    try:
        if json_file is not None:
            check_can_write(json_file)
        result = work()
        verdict = result if isinstance(result, Verdict) else Verdict(result, passed=True)
        try:
            print(verdict.document, flush=True)
        finally:  # whoever reads the line may have gone
            try:
                if json_file is not None:
                    write_whole(json_file, f"{verdict.document}\n".encode())
            finally:
                if verdict.write_more is not None:
                    verdict.write_more()
        return 0 if verdict.passed else EXIT_FELL_SHORT
    except RcodError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except RcodTrainError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return BenchmarkError.exit_code
    except KeyboardInterrupt:
        print("stopped; no result", file=sys.stderr)
        return EXIT_INTERRUPTED


def check_at_least_1(arguments: argparse.Namespace, *names: str) -> None:
    """Numbers of the command line, by their names in ``arguments``; None is not given.

    Raises:
        UsageError: one, or one of a list, is less than 1.
    """
    for name in names:
        value = getattr(arguments, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < 1:
                option = name.replace("_", "-")
                raise UsageError(f"--{option} {number}: expected at least 1.")


def make_folder(option: str, folder: Path) -> None:
    """The folder that an option names, with those above it.

    Raises:
        OutputError: it can't be made, or a file has its name.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise OutputError(
            f"{option} {folder}: expected a folder, or a place for a new one "
            f"({exc.strerror or exc})."
        ) from exc


def check_can_write(path: Path) -> None:
    """Fail before the work if ``path`` could not be written after it.

    Raises:
        OutputError: its folder is missing or not writable, or it is itself a folder.
    """
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OutputError(f"{path}: expected a file name in a folder that can be written.")
