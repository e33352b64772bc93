"""``benchmarks.fullsize``: what is refused before its hours of work."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import fullsize
from rcod_train.checkpoint import info_text
from rcod_train.official import official_info
from rcod_train.official.layouts import RCOD_S


def test_a_kept_checkpoint_of_another_family_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its figures would be reported as the other family's."""
    monkeypatch.setattr(fullsize, "step", lambda *_: pytest.fail("the work began"))
    (tmp_path / "checkpoint").mkdir()
    text = info_text(official_info("random-rcod-s", RCOD_S))
    (tmp_path / "checkpoint" / "rcod.json").write_text(text)
    assert fullsize.main(["--work", str(tmp_path), "--family", "rcod-o"]) == 2
    said = capsys.readouterr().err
    assert "checkpoint: expected a checkpoint of rcod-o, found one of rcod-s" in said
    fullsize.check_family(tmp_path / "checkpoint", "rcod-s")
