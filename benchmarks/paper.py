"""The paper's Tables 2 and 3 as data (paper.json), with the protocol they were made by."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

FILE = Path(__file__).with_name("paper.json")
Dataset = Literal["RealSR", "DRealSR"]
DATASETS: tuple[Dataset, ...] = ("RealSR", "DRealSR")


@dataclass(frozen=True)
class Published:
    """One row of Table 2: means over all pairs of the set, by metric. NIQE, LPIPS, DISTS and FID
    are better when smaller."""

    method: str
    values: dict[str, float]
    note: str | None


@dataclass(frozen=True)
class Efficiency:
    """One row of Table 3. ``seconds`` is for a 512x512 output in PyTorch on an A100."""

    method: str
    psnr_y: float
    maniqa: float
    seconds: float
    trainable_millions: float


def table_2(dataset: Dataset) -> list[Published]:
    """Rows of one set, without those that their note says not to use."""
    rows = [row for row in _read()["table_2"]["rows"] if row["dataset"] == dataset]
    return [Published(row["method"], row["values"], row["note"]) for row in rows if not row["note"]]


def pairs(dataset: Dataset) -> int | None:
    """How many pairs a set of Table 2 has; None where that is not known here."""
    count: int | None = _read()["table_2"]["pairs"].get(dataset)
    return count


def table_3() -> list[Efficiency]:
    return [Efficiency(**row) for row in _read()["table_3"]["rows"]]


def protocol(table: Literal["table_2", "table_3"]) -> str:
    """How the figures of a table were made."""
    text: str = _read()[table]["protocol"]
    return text


def source() -> str:
    text: str = _read()["source"]
    return text


def _read() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return content
