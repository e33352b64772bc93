"""What callers of an Upscaler may give, and what is said of the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rcod_runtime import Upscaler
from rcod_runtime.errors import UsageError

Photo = Callable[..., np.ndarray]


def test_kinds_of_numpys_arrays_are_plain_ones_and_masked_pixels_are_refused(
    upscaler: Upscaler, photo: Photo
) -> None:
    """Masked ones came out as garbage: arithmetic leaves what lies under a mask as it is."""
    grey = photo(channels=1)[:, :, 0]
    expected = upscaler(grey)
    with pytest.warns(PendingDeprecationWarning):
        matrix = np.asmatrix(grey)
    for same in (matrix, np.ma.asarray(grey), grey.view(np.recarray)):
        found = upscaler(same)
        assert type(found) is np.ndarray
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(UsageError, match=r"found masked ones. .*image\.filled\(\)"):
        upscaler(np.ma.masked_less(grey, int(grey.mean())))


class Elsewhere:
    """As a tensor on a GPU."""

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"out": Elsewhere()}, "out: expected an array .* found Elsewhere"),
        ({"tile_px": 64.0}, "tile size 64.0: expected a whole number"),
        ({"tile_px": "64"}, "tile size '64': expected a whole number"),
        ({"overlap_px": 3.5}, "overlap 3.5: expected a whole number"),
        ({"overlap_px": "3"}, "overlap '3': expected a whole number"),
        ({"realism": np.array([0.1, 0.2])}, r"realism: expected a level's name .* found array"),
        ({"colour_match": np.array(["none"])}, r"colour_match array.*: expected one of none"),
        ({"progress": 5}, "progress 5: expected a function"),
        ({"batch": True}, "batch True: expected an integer"),
    ],
)
def test_what_a_call_cannot_use_is_named(
    upscaler: Upscaler, photo: Photo, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        upscaler(photo(), **arguments)


@pytest.mark.parametrize("runs", [0, -1, 2.5])
def test_a_profile_is_of_one_run_at_least(upscaler: Upscaler, runs: Any) -> None:
    with pytest.raises(UsageError, match=f"runs {runs}: expected an integer"):
        upscaler.profile(runs)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"threads": "2"}, "threads '2': expected 0"),
        ({"threads": 2.5}, "threads 2.5: expected 0"),
        ({"threads": True}, "threads True: expected 0"),
        ({"threads": 2**31}, "threads 2147483648: expected 0 .* to 1024"),
        ({"backend": np.array(["auto"])}, "backend array.*: expected one of auto"),
        ({"device": np.array(["cpu"])}, "device array.*: expected auto, cpu or cuda:N"),
        ({"require_signature": 5}, "require_signature 5: expected a path"),
        ({"device": None}, "device None: expected auto, cpu or cuda:N"),
    ],
)
def test_what_a_bundle_cannot_be_opened_with_is_named(
    bundle: Path, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        Upscaler(bundle, **arguments)


def test_a_bundle_is_a_path() -> None:
    with pytest.raises(UsageError, match="bundle 5: expected a path"):
        Upscaler(5)  # type: ignore[arg-type]


def test_numpys_integers_are_numbers(bundle: Path, photo: Photo) -> None:
    with Upscaler(bundle, threads=np.int64(1)) as upscaler:
        np.testing.assert_array_equal(upscaler(photo(), batch=np.int64(2)), upscaler(photo()))


@pytest.mark.parametrize("shape", [(10,), None, (-1, 5, 3), (10.5, 3), (0, 4), (4, 4, 3, 1)])
def test_a_shape_is_two_or_three_numbers(upscaler: Upscaler, shape: Any) -> None:
    with pytest.raises(UsageError, match="image_shape .*: expected"):
        upscaler.output_shape(shape)
