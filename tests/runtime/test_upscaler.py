"""The Python API: what it computes, what it takes, what it refuses."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rcod_runtime import Upscaler
from rcod_runtime.backends import BACKENDS, precisions
from rcod_runtime.errors import BackendError, NonFiniteOutput, UsageError
from rcod_runtime.levels import adaptive_level, default_level, level_weights
from rcod_runtime.manifest import MetricRange
from tests.runtime.fakes import GAINS, LEVELS, make_bundle

Photo = Callable[..., np.ndarray]


def expected_image(lq: np.ndarray, gain: float) -> np.ndarray:
    """The fake network by hand: bicubic x4, 3x3 blur, gain on values in [-1, 1]."""
    height, width = (4 * side for side in lq.shape[:2])
    planes = []
    for c in range(3):
        plane = Image.fromarray(lq[:, :, c].astype(np.float32))
        up = np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC)) / 127.5 - 1
        padded = np.pad(up, 1)
        weights = np.outer([1, 2, 1], [1, 2, 1]) / 16
        blurred = sum(
            weights[i, j] * padded[i : i + height, j : j + width]
            for i in range(3)
            for j in range(3)
        )
        planes.append(np.clip(blurred * gain, -1, 1))
    return np.rint((np.stack(planes, 2) + 1) * 127.5)


@pytest.mark.parametrize(
    ("realism", "gain"),
    [
        ("fidelity", GAINS[0]),
        ("neutral", GAINS[1]),
        ("realism", GAINS[2]),
        (0, GAINS[0]),
        (1.0, GAINS[2]),
        (0.25, 0.5 * (GAINS[0] + GAINS[1])),
        (0.75, 0.5 * (GAINS[1] + GAINS[2])),
    ],
)
def test_every_realism_setting_reaches_the_network(
    upscaler: Upscaler, photo: Photo, realism: str | float, gain: float
) -> None:
    lq = photo(16, 24)  # one tile: zero padding of the blur is at the image's own edge
    sr = upscaler(lq, realism, colour_match="none", tile_px=96, overlap_px=0)
    inner = np.s_[2:-2, 2:-2]
    assert np.abs(sr[inner] - expected_image(lq, gain)[inner]).max() <= 1


@pytest.mark.parametrize(("mean", "level"), [(0.95, 0), (0.5, 1), (-0.8, 2)])
def test_adaptive_chooses_the_level_of_eq_5(upscaler: Upscaler, mean: float, level: int) -> None:
    lq = np.full((40, 40, 3), round((mean + 1) * 127.5), np.uint8)
    adaptive = upscaler(lq, "adaptive")
    np.testing.assert_array_equal(adaptive, upscaler(lq, LEVELS[level].name))


def test_adaptive_level_follows_eq_5_and_is_clamped() -> None:
    metric = MetricRange(0.25, 1.0, 250)
    for m, t in [(0.25, 750), (0.49, 750), (0.5, 500), (0.74, 500), (0.75, 250), (1.0, 250)]:
        assert adaptive_level(m, metric, LEVELS).timestep == t
    assert adaptive_level(-1.0, metric, LEVELS).timestep == 750
    assert adaptive_level(1.4, metric, LEVELS).timestep == 250


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_level_with_a_metric_estimator_has_nothing_to_choose(
    tmp_path: Path, photo: Photo, backend: str
) -> None:
    make_bundle(tmp_path, gains=GAINS[2:])
    with Upscaler(tmp_path, backend=backend, precision="fp32") as upscaler:
        expected = upscaler(photo(), "fidelity")  # the one level's name in this bundle
        assert expected.std() > 10
        np.testing.assert_array_equal(upscaler(photo()), expected)
        with pytest.raises(UsageError, match="expected one of fidelity, adaptive, or a number"):
            upscaler(photo(), "neutral")
        np.testing.assert_array_equal(upscaler(photo(), "adaptive"), expected)
        np.testing.assert_array_equal(upscaler(photo(8, 8), 0.7), upscaler(photo(8, 8), "adaptive"))


def test_the_adaptive_level_of_a_large_image_looks_at_each_tile_once(
    upscaler: Upscaler, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[np.ndarray] = []
    real = upscaler._chain._encode
    monkeypatch.setattr(
        upscaler._chain,
        "_encode",
        lambda feed, image: (encoded.append(image.copy()), real(feed, image))[1],
    )
    upscaler(photo(40, 40), "adaptive", tile_px=64, overlap_px=16, batch=4)  # 3 x 3 tiles
    assert len(encoded) == 6, "three batches for the level, one for each row of tiles"
    assert len(np.unique(np.concatenate(encoded[:3]).reshape(9, -1), axis=0)) == 9


def test_adaptive_without_a_metric_estimator_is_refused(tmp_path: Path, photo: Photo) -> None:
    make_bundle(tmp_path / "plain", mem=False)
    with (
        Upscaler(tmp_path / "plain") as upscaler,
        pytest.raises(UsageError, match="no metric estimation module"),
    ):
        upscaler(photo(), "adaptive")


@pytest.mark.parametrize("realism", ["sharp", "", -0.01, 1.01, float("nan"), True])
def test_unknown_realism_is_refused(upscaler: Upscaler, photo: Photo, realism: object) -> None:
    with pytest.raises(UsageError, match="realism.*expected"):
        upscaler(photo(), realism)  # type: ignore[arg-type]


def test_the_default_is_neutral_or_the_middle_level() -> None:
    assert default_level(LEVELS) == default_level(LEVELS[1:]) == "neutral"
    assert default_level(LEVELS[2:]) == "realism" and default_level(LEVELS[::2]) == "fidelity"


def test_level_weights_sum_to_one_everywhere() -> None:
    for r in np.linspace(0, 1, 101):
        weights = level_weights(float(r), LEVELS)
        assert weights.sum() == pytest.approx(1) and (weights >= 0).all()
        assert np.count_nonzero(weights) <= 2


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 50), (37, 1), (7, 13), (33, 129)])
@pytest.mark.parametrize("scale", [1, 1.5, 2, 3.7, 4])
def test_sizes_are_exact(
    upscaler: Upscaler, photo: Photo, height: int, width: int, scale: float
) -> None:
    sr = upscaler(photo(height, width), scale=scale)
    assert sr.shape == (round(height * scale), round(width * scale), 3)
    assert upscaler.output_shape((height, width, 3), scale) == sr.shape


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(9, 11), (9, 11, 1), (9, 11, 2), (9, 11, 3), (9, 11, 4)])
def test_layout_and_depth_are_kept(upscaler: Upscaler, dtype: type, shape: tuple[int, ...]) -> None:
    top = np.iinfo(dtype).max
    image = np.random.default_rng(1).integers(0, top + 1, shape).astype(dtype)
    sr = upscaler(image, "realism")
    assert sr.dtype == dtype and sr.shape == (36, 44, *shape[2:])
    if shape[2:] in [(2,), (4,)]:
        alpha = Image.fromarray(image[:, :, -1].astype(np.float32))
        up = np.asarray(alpha.resize((44, 36), Image.Resampling.BICUBIC))
        assert np.abs(sr[:, :, -1] - np.clip(up, 0, top)).max() <= 0.5 + 1e-6 * top


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize("hidden", [0, 255])
def test_a_cut_out_gets_no_fringe_of_what_it_hides(
    upscaler: Upscaler, dtype: type, channels: int, hidden: int
) -> None:
    """A grey disc over its own grey was ringed by the black that editors leave under alpha 0."""
    y, x = np.mgrid[-60:61, -60:61]
    alpha = np.clip((48.5 - np.hypot(y, x)) * 255, 0, 255)
    disc = np.full((121, 121, channels), 240, np.uint8)
    disc[alpha == 0] = hidden
    disc[:, :, -1] = alpha
    unit = np.iinfo(dtype).max // 255
    sr = upscaler(disc.astype(dtype) * dtype(unit), 1.0).astype(np.float64) / unit
    share = sr[:, :, -1:] / 255
    composite = share * sr[:, :, :-1] + (1 - share) * 240
    print("from", composite.min(), "to", composite.max())
    assert np.abs(composite - 240).max() <= 2


def test_grey_stays_grey(upscaler: Upscaler, photo: Photo) -> None:
    grey = photo(channels=1)[:, :, 0]
    colour = np.repeat(grey[:, :, None], 3, axis=2)
    difference = upscaler(grey, 1).astype(int) - upscaler(colour, 1)[:, :, 1]
    assert np.abs(difference).max() <= 1


def test_16_bit_agrees_with_8_bit_and_has_values_between(upscaler: Upscaler, photo: Photo) -> None:
    lq = photo()
    deep = upscaler(lq.astype(np.uint16) * 257, 1, colour_match="none")
    assert np.abs(deep / 257 - upscaler(lq, 1, colour_match="none")).max() <= 0.51
    assert len(np.unique(deep)) > 256


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "dtype uint8 or uint16, found float32"),
        (np.full((4, 4, 3), np.nan, np.float32), "holds NaN"),
        (np.zeros((4, 4, 3), np.int64), "found int64"),
        (np.zeros((4, 4, 5), np.uint8), "expected shape"),
        (np.zeros((2, 4, 4, 3), np.uint8), "expected shape"),
        (np.zeros(4, np.uint8), "expected shape"),
        (np.zeros((0, 4, 3), np.uint8), "at least one pixel"),
        ([[1, 2], [3, 4]], "expected a numpy array, found list"),
    ],
)
def test_arrays_that_are_no_images_are_refused(
    upscaler: Upscaler, image: np.ndarray, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        upscaler(image)


@pytest.mark.parametrize("scale", [0.5, 4.01, -1, float("nan"), "4", True])
def test_scales_outside_1_to_4_are_refused(upscaler: Upscaler, photo: Photo, scale: float) -> None:
    with pytest.raises(UsageError, match="scale"):
        upscaler(photo(), scale=scale)


@pytest.mark.parametrize(
    "options",
    [
        {"colour_match": "sepia"},
        {"batch": 0},
        {"batch": 1.5},
        {"tile_px": 50},
        {"overlap_px": 60},
        {"out": np.zeros((3, 3, 3), np.uint8)},
        {"out": np.zeros((96, 160, 3), np.uint16)},
    ],
)
def test_options_that_cannot_be_used_are_refused(
    upscaler: Upscaler, photo: Photo, options: dict[str, object]
) -> None:
    with pytest.raises(UsageError, match="expected"):
        upscaler(photo(), **options)  # type: ignore[arg-type]


def test_out_is_filled_and_returned(upscaler: Upscaler, photo: Photo) -> None:
    lq = photo()
    out = np.zeros((96, 160, 3), np.uint8)
    assert upscaler(lq, out=out) is out
    np.testing.assert_array_equal(out, upscaler(lq))
    strided = np.zeros((96, 320, 4), np.uint8)[:, ::2]
    rgba = np.dstack([lq, lq[:, :, 0]])
    np.testing.assert_array_equal(upscaler(rgba, out=strided), upscaler(rgba))


def test_an_image_may_be_replaced_by_its_own_result(upscaler: Upscaler, photo: Photo) -> None:
    lq = photo(200, 150)
    expected = upscaler(lq, scale=1)
    np.testing.assert_array_equal(upscaler(lq, scale=1, out=lq), expected)


def test_the_same_input_gives_the_same_bytes(upscaler: Upscaler, photo: Photo) -> None:
    lq = photo(60, 50)
    first = upscaler(lq, 0.3)
    upscaler(photo(20, 90), 0.9)  # other shapes and levels in between leave no trace
    assert upscaler(lq, 0.3).tobytes() == first.tobytes()


def test_backends_agree(bundle: Path, photo: Photo) -> None:
    lq = photo(50, 70)
    with (
        Upscaler(bundle, backend="openvino", precision="fp32") as a,
        Upscaler(bundle, backend="onnxruntime") as b,
    ):
        assert np.abs(a(lq, 0.4).astype(int) - b(lq, 0.4).astype(int)).max() <= 1


def test_auto_is_bf16_where_the_processor_has_it(
    bundle: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = "rcod_runtime.backends.openvino_backend.has_native_bf16"
    monkeypatch.setattr(native, lambda: False)
    with Upscaler(bundle, backend="openvino") as plain:
        assert plain.backend.endswith("fp32")
        expected = plain(photo())
    with pytest.raises(UsageError, match="precision bf16: .* computes in fp32 on this machine"):
        Upscaler(bundle, backend="openvino", precision="bf16")
    monkeypatch.undo()
    if "bf16" not in precisions("openvino"):
        pytest.skip("this processor has no bf16")
    with Upscaler(bundle, backend="openvino", precision="bf16") as half:
        assert half.backend.endswith("bf16")
        assert np.abs(half(photo()).astype(int) - expected.astype(int)).max() <= 8


def test_threads_share_an_upscaler(upscaler: Upscaler, photo: Photo) -> None:
    inputs = [photo(20 + 7 * i, 30, seed=i) for i in range(4)]
    expected = [upscaler(lq, i / 3) for i, lq in enumerate(inputs)]
    found: dict[int, np.ndarray] = {}

    def work(i: int) -> None:
        for _ in range(3):
            found[i] = upscaler(inputs[i], i / 3)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i, sr in enumerate(expected):
        np.testing.assert_array_equal(found[i], sr)


@pytest.mark.parametrize("method", ["adain", "wavelet", "consistent"])
def test_colour_match_restores_the_inputs_mean(
    upscaler: Upscaler, photo: Photo, method: str
) -> None:
    lq = photo(48, 64) // 2 + 20  # the fake's gain pulls it towards grey
    shifted = upscaler(lq, "fidelity", colour_match="none")
    matched = upscaler(lq, "fidelity", colour_match=method)  # type: ignore[arg-type]
    before = np.abs(shifted.mean((0, 1)) - lq.mean((0, 1))).max()
    after = np.abs(matched.mean((0, 1)) - lq.mean((0, 1))).max()
    assert before > 10 and after < 1


@pytest.mark.parametrize("scale", [1, 1.9])
def test_below_twice_the_size_consistent_match_is_wavelet_match(
    upscaler: Upscaler, photo: Photo, scale: float
) -> None:
    lq = photo(40, 48)
    consistent = upscaler(lq, "realism", scale, colour_match="consistent")
    np.testing.assert_array_equal(
        consistent, upscaler(lq, "realism", scale, colour_match="wavelet")
    )
    other = upscaler(lq, "realism", 2, colour_match="wavelet")
    assert not np.array_equal(upscaler(lq, "realism", 2), other)


def test_wavelet_match_keeps_fine_detail(upscaler: Upscaler, photo: Photo) -> None:
    lq = photo(48, 64)
    plain = upscaler(lq, "realism", colour_match="none").astype(float)
    matched = upscaler(lq, "realism", colour_match="wavelet").astype(float)
    np.testing.assert_allclose(np.diff(matched, axis=0), np.diff(plain, axis=0), atol=3)


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_infinity_from_a_graph_is_named_and_not_returned(
    tmp_path: Path, photo: Photo, backend: str
) -> None:
    make_bundle(tmp_path / "hot", gains=(1.0, 1.0, float("inf")))
    with (
        Upscaler(tmp_path / "hot", backend=backend) as upscaler,
        pytest.raises(NonFiniteOutput, match="graph denoiser, realism realism, tile row 0"),
    ):
        upscaler(photo(), "realism")


def test_nan_for_the_degradation_is_named(
    upscaler: Upscaler, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        upscaler._chain, "estimate", lambda feed, tiles: [np.full(len(t), np.nan) for t in tiles]
    )
    with pytest.raises(NonFiniteOutput, match="graph encoder, realism adaptive: gave NaN"):
        upscaler(photo(40, 40), "adaptive")  # several tiles


def test_after_shapes_that_a_graph_refused_the_ones_before_work_again(
    upscaler: Upscaler, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BackendError("too large")

    expected = upscaler(photo(40, 40), tile_px=64)
    sessions = upscaler._chain._sessions  # type: ignore[attr-defined]
    with monkeypatch.context() as patched, pytest.raises(BackendError, match="too large"):
        patched.setattr(sessions["decoder"], "bind", refuse)
        upscaler(photo(40, 40), tile_px=96)
    np.testing.assert_array_equal(upscaler(photo(40, 40), tile_px=64), expected)


def test_a_closed_upscaler_says_so_and_closing_twice_is_harmless(
    bundle: Path, photo: Photo
) -> None:
    upscaler = Upscaler(bundle)
    upscaler.close()
    upscaler.close()
    with pytest.raises(UsageError, match="closed"):
        upscaler(photo())


@pytest.mark.parametrize("options", [{"backend": "tpu"}, {"device": "gpu"}, {"precision": "int8"}])
def test_unknown_backends_devices_and_precisions_are_refused(
    bundle: Path, options: dict[str, str]
) -> None:
    with pytest.raises(UsageError, match="expected"):
        Upscaler(bundle, **options)  # type: ignore[arg-type]


def test_a_missing_backend_says_the_pip_line(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rcod_runtime.backends.installed", lambda name: name == "openvino")
    with pytest.raises(BackendError, match=r'pip install "rcod\[onnxruntime\]"'):
        Upscaler(bundle, backend="onnxruntime")
    monkeypatch.setattr("rcod_runtime.backends.installed", lambda name: False)
    with pytest.raises(BackendError, match="pip install rcod"):
        Upscaler(bundle)


def test_progress_counts_every_tile(upscaler: Upscaler, photo: Photo) -> None:
    seen: list[tuple[int, int]] = []
    upscaler(photo(40, 60), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))] and len(seen) > 4
