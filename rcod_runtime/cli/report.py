"""What became of each image, as JSON Lines: whole after every image, whatever stops the run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, TextIO

from rcod_runtime.errors import OutputError


@dataclass(frozen=True)
class Record:
    """One image. None where it is not known, or does not apply.

    ``input`` and ``output`` are paths, or - for stdin and stdout. ``seconds`` is from the start of
    reading to the end of writing, with what was waited for other images in between.
    """

    input: str
    output: str
    status: Literal["written", "skipped", "failed"]
    input_height_px: int | None = None
    input_width_px: int | None = None
    output_height_px: int | None = None
    output_width_px: int | None = None
    seconds: float | None = None
    error: str | None = None
    message: str | None = None


class Report:
    """A file that takes records; None takes them and keeps nothing.

    An earlier file is replaced: a report is about one run. As a context it closes the file; what
    that runs into hides no error that is on its way already.

    Raises:
        OutputError: it can't be written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._file: TextIO | None = None
        if path is not None:
            try:
                self._file = path.open("w", encoding="utf-8", newline="\n")
            except OSError as exc:
                raise self._error(exc) from exc

    def add(self, record: Record) -> None:
        """Write a line, out of this process when it returns.

        Raises:
            OutputError: it can't be written.
        """
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(asdict(record)) + "\n")
            self._file.flush()
        except OSError as exc:
            raise self._error(exc) from exc

    def _error(self, exc: OSError) -> OutputError:
        return OutputError(f"{self.path}: the report can't be written ({exc.strerror or exc}).")

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is None:
            return
        try:
            self._file.close()  # writes again what could not be written
        except OSError as exc:
            if error is None:
                raise self._error(exc) from exc
