"""What the builder's process keeps beside the engines."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from rcod_export.trt_build import _keep_timings, _timing_cache


class Timings:
    """A builder's configuration that takes the timing cache ``good`` and refuses others."""

    good = b"of this GPU"

    def __init__(self) -> None:
        self.cache: bytes | None = None

    def create_timing_cache(self, content: bytes) -> bytes | None:
        return None if content == b"damaged" else content

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.cache = cache if cache in (b"", self.good) else None
        return self.cache is not None

    def get_timing_cache(self) -> SimpleNamespace:
        return SimpleNamespace(serialize=lambda: self.good)


def test_timings_that_are_refused_are_made_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "timing" / "11.4.0-A.bin"
    for content in (None, b"of another driver", b"damaged"):
        if content is not None:
            path.write_bytes(content)
        config = Timings()
        assert _timing_cache(config, path) == config.cache == b""
        assert ("refused by the builder" in capsys.readouterr().err) is (content is not None)
        _keep_timings(config, path)
        assert _timing_cache(config, path) == config.good
    (tmp_path / "file").write_text("where a folder should be")
    _keep_timings(config, tmp_path / "file" / "a.bin")  # the engine is what counts
    assert "not kept" in capsys.readouterr().err
