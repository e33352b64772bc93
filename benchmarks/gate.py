"""A gate: how many times as fast as PyTorch each variant must be, judged within one run.

A gate file is JSON:

    {"schema_version": 1, "at_least": [
        {"backend": "openvino", "precision": "bf16", "stage": "whole",
         "times_as_fast": 1.5, "optional": true}]}

``stage`` is ``whole`` or the name of a graph. ``times_as_fast`` is against PyTorch eager fp32 of
the same run, never an absolute time: a slower or busier machine slows both. ``optional`` is for
precisions that not every CPU has, or gains from: it is judged where ``auto`` would take it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import format_table
from rcod_runtime import UsageError
from rcod_runtime.errors import ManifestError
from rcod_runtime.schema import Record, parse_json, record_from_json

VERSION = 1
WHOLE = "whole"


@dataclass(frozen=True)
class Threshold(Record):
    """One line of a gate file."""

    backend: str
    precision: str
    stage: str
    times_as_fast: float
    optional: bool

    @property
    def variant(self) -> str:
        return f"{self.backend} {self.precision}"

    def check(self) -> None:
        self.require("times_as_fast", self.times_as_fast > 0, "a number above 0")


@dataclass(frozen=True)
class Gate(Record):
    """What a run must reach."""

    schema_version: int
    at_least: tuple[Threshold, ...]

    def check(self) -> None:
        known = self.schema_version == VERSION
        self.require("schema_version", known, f"{VERSION}, which this version reads")
        self.require("at_least", bool(self.at_least), "at least one threshold")

    @property
    def stages(self) -> set[str]:
        """Graphs it has thresholds for, and WHOLE."""
        return {threshold.stage for threshold in self.at_least}


@dataclass(frozen=True)
class Judgement:
    """What became of one threshold; ``found`` None: the variant is not on this machine."""

    threshold: Threshold
    found: float | None
    passed: bool
    judged: bool


def read_gate(path: Path) -> Gate:
    """A gate file, every field checked.

    Raises:
        UsageError: it can't be read, or a field is unknown, missing or of no use.
    """
    try:
        gate = record_from_json(Gate, parse_json(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as exc:
        raise UsageError(f"--gate {path}: not readable as JSON ({exc}).") from exc
    except ManifestError as exc:
        raise UsageError(
            f'--gate {path}: "{exc.field}": expected {exc.expected}, found {exc.found!r}. '
            "The fields are those of benchmarks/gates/nano.json."
        ) from exc
    assert isinstance(gate, Gate)
    return gate


def check_runnable(
    gate: Gate, variants: Sequence[str], stages: Sequence[str], taken: Collection[str]
) -> None:
    """Fail before anything is timed where a threshold could not be judged.

    Args:
        taken: the variants that ``auto`` takes on this machine, one of each backend.

    Raises:
        UsageError: a graph the bundle hasn't, or a variant that isn't run, and is taken or isn't
            optional.
    """
    for threshold in gate.at_least:
        if threshold.stage != WHOLE and threshold.stage not in stages:
            raise UsageError(
                f"--gate: stage {threshold.stage!r}: expected {WHOLE} or one of "
                f"{', '.join(stages)}."
            )
        needed = not threshold.optional or threshold.variant in taken
        if threshold.variant not in variants and needed:
            raise UsageError(
                f"--gate: {threshold.variant}: expected a variant of this run "
                f"({', '.join(variants)}). Install it or run it, or make it optional."
            )


def judge(
    gate: Gate, ratios: Mapping[str, Mapping[str, float | None]], taken: Collection[str]
) -> tuple[Judgement, ...]:
    """Every threshold against ``ratios``: stage -> variant -> times as fast as PyTorch.

    Args:
        taken: the variants that ``auto`` takes on this machine, one of each backend.
    """
    judgements = []
    for threshold in gate.at_least:
        found = ratios[threshold.stage].get(threshold.variant)
        judged = not threshold.optional or (found is not None and threshold.variant in taken)
        reached = found is not None and found >= threshold.times_as_fast
        judgements.append(Judgement(threshold, found, reached or not judged, judged))
    return tuple(judgements)


def format_judgements(judgements: Sequence[Judgement]) -> str:
    rows = [
        [
            f"{j.threshold.stage} {j.threshold.variant}",
            f"{j.threshold.times_as_fast:.2f}",
            "-" if j.found is None else f"{j.found:.2f}",
            _said(j),
        ]
        for j in judgements
    ]
    return format_table(("gate", "at least", "found", ""), rows)


def _said(judgement: Judgement) -> str:
    if judgement.found is None:
        return "not on this machine"
    if not judgement.judged:
        return "not judged: auto does not take it here"
    return "ok" if judgement.passed else "FELL SHORT"


def as_document(judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    return [asdict(judgement) for judgement in judgements]
