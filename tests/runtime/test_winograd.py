"""Wide 3x3 convolutions of OpenVINO's graphs with fewer products: the same results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

ov = pytest.importorskip("openvino")

from openvino import opset13 as ops  # noqa: E402

from rcod_runtime import BackendError, Upscaler  # noqa: E402
from rcod_runtime.backends import openvino_backend, winograd  # noqa: E402
from rcod_runtime.backends.openvino_backend import OpenVinoBackend, shared_core  # noqa: E402
from rcod_runtime.backends.winograd import use_winograd  # noqa: E402
from rcod_runtime.processor import Processor  # noqa: E402


def convolution(
    shape: tuple[int, ...] = (1, 96, 32, 32),
    outputs: int = 96,
    kernel: int = 3,
    stride: int = 1,
    border: Any = 1,
    dilation: int = 1,
    stored: Any = np.float16,
    dynamic: bool = False,
    half: bool = False,
) -> Any:
    """A model of one, with a bias and ReLU behind it."""
    rng = np.random.default_rng(0)
    image = source = ops.parameter([-1, shape[1], -1, -1] if dynamic else list(shape), np.float32)
    values = rng.standard_normal((outputs, shape[1], kernel, kernel)) / 30
    weights = ops.constant(values.astype(stored))
    if half:
        image = ops.convert(image, "f16")
    elif stored != np.float32:
        weights = ops.convert(weights, "f32")
    begin, end = border if isinstance(border, tuple) else (border, border)
    y = ops.convolution(image, weights, [stride] * 2, [begin] * 2, [end] * 2, [dilation] * 2)
    bias = rng.standard_normal((1, outputs, 1, 1)).astype(np.float16 if half else np.float32)
    return ov.Model([ops.relu(ops.add(y, ops.constant(bias)))], [source])


def computed(model: Any, image: np.ndarray) -> np.ndarray:
    compiled = shared_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.array(compiled(image)[0])


@pytest.fixture(autouse=True)
def avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "avx2")


def on(monkeypatch: pytest.MonkeyPatch, flags: str) -> None:
    """As on a processor with these flags."""
    processor = Processor(flags=frozenset(flags.split()))
    for module in (winograd, openvino_backend):
        monkeypatch.setattr(module, "read_processor", lambda: processor)


@pytest.mark.parametrize(
    ("shape", "outputs"),
    [((1, 96, 32, 32), 96), ((1, 64, 16, 64), 256), ((3, 256, 36, 20), 64), ((2, 128, 24, 32), 80)],
)
@pytest.mark.parametrize("stored", [np.float16, np.float32])
def test_results_are_those_of_the_convolution(
    shape: tuple[int, ...], outputs: int, stored: Any
) -> None:
    model = convolution(shape, outputs, stored=stored)
    image = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    wanted = computed(model, image)
    assert use_winograd(model) == 1
    assert "Convolution" not in {node.get_type_name() for node in model.get_ops()}
    found = computed(model, image)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() < 2e-5 * np.abs(wanted).max()


@pytest.mark.parametrize(
    "other",
    [
        {"shape": (1, 48, 32, 32), "outputs": 48},  # copies would take longer
        {"shape": (1, 96, 16, 16)},  # weights would
        {"shape": (1, 96, 34, 32)},  # blocks of 4x4 don't cover it
        {"kernel": 1},
        {"border": (0, 1)},
        {"border": (1, 0)},
        {"stride": 2, "shape": (1, 96, 64, 64)},
        {"dilation": 2},
        {"dynamic": True},
        {"stored": np.int8},
        {"half": True},
    ],
)
def test_others_stay_as_they_are(other: dict[str, Any]) -> None:
    model = convolution(**other)
    assert use_winograd(model) == 0
    assert "Convolution" in {node.get_type_name() for node in model.get_ops()}


@pytest.mark.parametrize(("channels", "replaced"), [(96, 0), (128, 1)])
def test_with_avx512_wider_ones_alone_gain(
    monkeypatch: pytest.MonkeyPatch, channels: int, replaced: int
) -> None:
    on(monkeypatch, "avx2 avx512f")
    assert use_winograd(convolution((1, channels, 32, 32), channels)) == replaced


def executed(compiled: Any) -> list[tuple[str, Any]]:
    """(type, output) of what OpenVINO runs, in its order."""
    nodes = compiled.get_runtime_model().get_ops()
    told = [(node.get_rt_info(), node.output(0)) for node in nodes]
    told.sort(key=lambda item: int(item[0]["execOrder"].astype(str)))
    return [(info["layerType"].astype(str), output) for info, output in told]


def three_convolutions() -> tuple[Any, np.ndarray]:
    """Each on what the one before gives, weights in half precision; their input."""
    rng = np.random.default_rng(0)
    y = source = ops.parameter([1, 96, 32, 32], np.float32)
    for _ in range(3):
        weights = ops.constant((rng.standard_normal((96, 96, 3, 3)) / 30).astype(np.float16))
        y = ops.convolution(y, ops.convert(weights, "f32"), [1, 1], [1, 1], [1, 1], [1, 1])
    model = ov.Model([y], [source])
    openvino_backend._keep_stored_weights(model)
    return model, rng.standard_normal((1, 96, 32, 32)).astype(np.float32)


def test_weights_are_held_as_the_file_has_them() -> None:
    """And not transformed: that would be eight times as much."""
    model, image = three_convolutions()
    wanted = computed(model, image)
    assert use_winograd(model) == 3
    compiled = shared_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    shapes = [
        (output.get_partial_shape().to_shape(), output.get_element_type())
        for name, output in executed(compiled)
        if name == "Const"
    ]
    large = [(list(shape), kind) for shape, kind in shapes if np.prod(shape) > 36 * 36]
    assert large == [([96, 96, 3, 3], ov.Type.f16)] * 3
    assert np.abs(np.array(compiled(image)[0]) - wanted).max() < 2e-5 * np.abs(wanted).max()


def test_weights_are_transformed_one_after_the_other() -> None:
    """When their input is there; all at once they would need the room of all."""
    model, _ = three_convolutions()
    use_winograd(model)
    compiled = shared_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    seen = [name for name, _ in executed(compiled) if name in ("ExtractImagePatches", "Gather")]
    assert seen == ["ExtractImagePatches", "Gather"] * 3


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_reads_no_other_rows(value: float) -> None:
    """The numbers of the rows depend on a value of the image."""
    model, image = three_convolutions()
    use_winograd(model)
    image[0, 0, 0, 0] = value
    found = computed(model, image)
    assert not np.isfinite(found[0, :, :4, :4]).any()
    image[0, 0, 0, 0] = 0
    assert np.array_equal(found[0, :, 16:], computed(model, image)[0, :, 16:])


def test_weights_that_are_computed_stay_as_they_are() -> None:
    image, weights = (
        ops.parameter(shape, np.float32) for shape in ([1, 96, 32, 32], [96, 96, 3, 3])
    )
    y = ops.convolution(image, weights, [1, 1], [1, 1], [1, 1], [1, 1])
    assert use_winograd(ov.Model([y], [image, weights])) == 0


@pytest.mark.parametrize(
    ("flags", "gains"), [("avx2 fma", True), ("avx2 avx512f", True), ("", False)]
)
def test_it_is_used_where_it_was_measured(
    monkeypatch: pytest.MonkeyPatch, photo: Callable[..., np.ndarray], flags: str, gains: bool
) -> None:
    """On nano, at the shape of a whole tile; images differ by rounding."""
    replaced: list[int] = []

    def upscaled(flags: str) -> np.ndarray:
        on(monkeypatch, flags)
        with Upscaler(backend="openvino", precision="fp32") as upscaler:
            return upscaler(photo(128, 128)).astype(int)

    monkeypatch.setattr(
        openvino_backend, "use_winograd", lambda *given: replaced.append(use_winograd(*given))
    )
    found = upscaled(flags)
    assert any(replaced) == gains
    if gains:
        away = np.abs(upscaled("") - found)
        assert away.max() <= 1
        assert (away > 0).mean() < 1e-3


def test_too_little_memory_is_the_backend_s_own_error(
    monkeypatch: pytest.MonkeyPatch, photo: Callable[..., np.ndarray]
) -> None:
    def fail(*given: object) -> None:
        raise MemoryError("no room for 37 MB")

    monkeypatch.setattr(openvino_backend, "use_winograd", fail)
    upscaler = Upscaler(backend="openvino", precision="fp32")
    with upscaler, pytest.raises(BackendError, match="no room for 37 MB"):
        upscaler(photo(128, 128))


def test_bf16_has_no_bits_for_it() -> None:
    assert OpenVinoBackend("fp32", 1).uses_winograd
    assert not OpenVinoBackend("bf16", 1).uses_winograd
