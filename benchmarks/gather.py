"""All methods on all pairs: values, and the images that a strip, a report or a set metric needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import iqa
from benchmarks.page import as_jpeg
from benchmarks.pairs import Pair
from benchmarks.scores import GROUND_TRUTH, Method, Metric, Score, score_pairs
from benchmarks.strips import Panel, draw_strip
from rcod_runtime.image_io import write_image


@dataclass
class Gathered:
    """What scoring all pairs leaves: values, set values by method, JPEGs by pair and method."""

    scores: list[Score]
    whole_set: dict[str, dict[str, float | None]]
    comparisons: dict[str, dict[str, bytes]]


def gather(
    pairs: Sequence[Pair],
    methods: Sequence[Method],
    metrics: Sequence[Metric],
    packaged: Sequence[iqa.Loaded],
    strips: set[str],
    strips_dir: Path | None,
    compared: set[str],
) -> Gathered:
    """Scores without their images, which are only kept until they are drawn or judged as a set.
    ``strips_dir`` is there where there are ``strips``."""
    from tqdm import tqdm

    gathered = Gathered([], {}, {})
    panels: list[Panel] = []
    total = len(pairs) * len(methods)
    lq_of = {pair.name: pair.lq for pair in pairs}
    sets = iqa.SetScores(packaged)
    try:
        for score in tqdm(
            score_pairs(pairs, methods, metrics), total=total, unit="image", disable=None
        ):
            if score.pair in strips:
                panels.append(Panel(score.method, score.sr, _caption(score, metrics)))
                if score.method == methods[-1].name:
                    assert strips_dir is not None
                    strip = draw_strip(lq_of[score.pair], panels)
                    write_image(strips_dir / f"{score.pair}.png", strip)
                    panels = []
            if score.pair in compared:
                of_pair = gathered.comparisons.setdefault(score.pair, {})
                of_pair[score.method] = as_jpeg(score.sr)
            sets.add(score.method, score.pair, score.sr)
            gathered.scores.append(Score(score.pair, score.method, score.sr[:0], score.values))
        for method in methods:
            gathered.whole_set[method.name] = sets.of(method.name, GROUND_TRUTH.name)
    finally:
        sets.close()
    return gathered


def _caption(score: Score, metrics: Sequence[Metric]) -> str:
    shown = {"psnr_y": "{:.1f} dB", "niqe": "NIQE {:.1f}"}
    values = ((shown[m.name], score.values[m.name]) for m in metrics if m.name in shown)
    return ", ".join(text.format(value) for text, value in values if value is not None)
