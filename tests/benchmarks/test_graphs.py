"""Single graphs get what the runtime's chain gives them, whatever the family and its levels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.accounting import graph_calls
from benchmarks.graphs import graph_stages
from benchmarks.picture import draw_picture
from rcod_runtime import Upscaler
from rcod_runtime.chain import to_pixels
from tests.runtime.fakes import make_bundle

FOLDED = {"gains": (0.5,), "mem": False}  # one level, which is part of the graph


@pytest.mark.parametrize(
    ("kind", "level"),
    [
        ({}, "realism"),
        ({}, "adaptive"),
        ({"guided": True}, "neutral"),
        ({"guided": True}, "adaptive"),
        (FOLDED, "fidelity"),
    ],
)
def test_one_after_another_they_make_the_image(
    kind: dict[str, Any], level: str, tmp_path: Path
) -> None:
    manifest = make_bundle(tmp_path, **kind)
    lq = draw_picture(16, 16)
    for backend, tile_px in (("onnxruntime", 64), ("openvino", 64), ("openvino", 128)):
        calls: dict[str, Any] = graph_stages(tmp_path, backend, "fp32", 1, lq, level, tile_px)
        assert set(calls) == set(manifest.graphs)
        image = to_pixels(calls["decoder"]()["image"])[0]
        with Upscaler(tmp_path, "cpu", backend, precision="fp32", threads=1) as upscaler:
            sr = upscaler(lq, level, colour_match="none", tile_px=tile_px)
        difference = np.abs(np.clip(image, 0, 255) - sr).max()
        assert difference <= 0.51, f"{backend}: off by {difference}"


@pytest.mark.parametrize("kind", [{"guided": True}, FOLDED])
def test_all_graphs_of_a_bundle_can_be_held_against_their_floors(
    kind: dict[str, Any], tmp_path: Path
) -> None:
    manifest = make_bundle(tmp_path, **kind)
    calls = graph_calls(tmp_path, manifest.image.tile_px, threads=1)
    assert {name.split()[0] for name in calls} == set(manifest.graphs)
    for call in calls.values():
        call()
