"""Which backend runs a bundle: ONNX Runtime's providers stand in for a GPU's."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest

from rcod_runtime import Upscaler
from rcod_runtime.backends.choice import CHOICES, open_chain
from rcod_runtime.bundle import open_bundle
from rcod_runtime.cli.opening import BACKENDS
from rcod_runtime.cli.upscale import build_parser
from rcod_runtime.colour import COLOUR_MATCHES, DEFAULT_COLOUR_MATCH
from rcod_runtime.errors import (
    BackendError,
    EngineMismatch,
    HashMismatch,
    RcodError,
    UsageError,
)
from rcod_runtime.manifest import Manifest

CPU, CUDA, TENSORRT = (f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "Tensorrt"))


class Recorder:
    """ONNX Runtime as on a GPU: sessions compute on the CPU and say what they were asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, works: bool = True) -> None:
        self.asked: list[list[tuple[str, dict[str, Any]]]] = []
        real = ort.InferenceSession

        def session(path: str, options: Any, providers: Any, **rest: Any) -> Any:
            self.asked.append(providers)
            opened = real(path, options, providers=[CPU], **rest)
            names = [name for name, _ in providers] if works else [CPU]
            monkeypatch.setattr(opened, "get_providers", lambda: names, raising=False)
            return opened

        monkeypatch.setattr(ort, "InferenceSession", session)
        monkeypatch.setattr(ort, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])


def test_the_command_offers_every_backend_and_colour_match() -> None:
    """It lists them itself, so that --help imports no numpy."""
    assert BACKENDS == CHOICES
    options = {action.dest: action for action in build_parser()._actions}
    assert options["colour_match"].choices == COLOUR_MATCHES
    assert options["colour_match"].default == DEFAULT_COLOUR_MATCH


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"backend": "onnxruntime", "device": "cuda:1"}, [CUDA, CPU]),
        ({"device": "cuda:1"}, [CUDA, CPU]),
        ({"backend": "onnxruntime-tensorrt", "device": "cuda:1"}, [TENSORRT, CUDA, CPU]),
    ],
)
def test_a_gpu_without_engines_runs_on_onnxruntimes_providers(
    monkeypatch: pytest.MonkeyPatch, bundle: Path, options: dict[str, str], wanted: list[str]
) -> None:
    recorder = Recorder(monkeypatch)
    with Upscaler(bundle, **options) as upscaler:
        assert upscaler.backend.startswith(f"onnxruntime {wanted[0]}")
    assert len(recorder.asked) == 4
    for providers in recorder.asked:
        assert [name for name, _ in providers] == wanted
        assert all(chosen["device_id"] == 1 for name, chosen in providers if name != CPU)


def test_engines_are_kept_apart_by_the_weights_they_are_made_of(
    monkeypatch: pytest.MonkeyPatch, bundle: Path, tmp_path: Path
) -> None:
    """The provider knows an engine again by the names of files and tensors: those of another
    bundle, of the same names, it would take for this one's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    recorder = Recorder(monkeypatch)
    retrained = tmp_path / "retrained"
    shutil.copytree(bundle, retrained)
    text = (retrained / "manifest.json").read_text()
    graph = onnx.load(retrained / "onnx" / "decoder.onnx")
    graph.doc_string = "other weights"
    onnx.save(graph, retrained / "onnx" / "decoder.onnx")
    content = (retrained / "onnx" / "decoder.onnx").read_bytes()
    known = json.loads(text)["graphs"]["decoder"]
    text = text.replace(known["sha256"], hashlib.sha256(content).hexdigest())
    text = text.replace(f'"bytes": {known["bytes"]}', f'"bytes": {len(content)}')
    (retrained / "manifest.json").write_text(text)
    for folder in (bundle, retrained, bundle):
        with Upscaler(folder, backend="onnxruntime-tensorrt", device="cuda:0") as upscaler:
            assert upscaler.backend.endswith(" tf32")
    options = [dict(providers[0][1]) for providers in recorder.asked]
    assert not any("trt_fp16_enable" in chosen for chosen in options), "types are the graph's"
    caches = [chosen["trt_engine_cache_path"] for chosen in options]
    first, second, third = (set(caches[i : i + 4]) for i in (0, 4, 8))
    assert len(first) == len(second) == 1 and first == third != second
    assert all(Path(cache).is_dir() for cache in caches)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    with Upscaler(bundle, backend="onnxruntime-tensorrt", device="cuda:0") as upscaler:
        assert upscaler.backend.endswith(" fp32")


@pytest.mark.parametrize("error", [BackendError, EngineMismatch, HashMismatch])
def test_engines_that_cannot_be_opened_leave_the_cpu_where_no_gpu_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
    bundle: Path,
    caplog: pytest.LogCaptureFixture,
    error: type[RcodError],
) -> None:
    """As where another process has the GPU's memory. Engines that were changed are no such case."""

    def refused(*_: object) -> None:
        raise error("decoder.engine: out of memory")

    opened = open_bundle(bundle)
    object.__setattr__(opened.manifest, "engines", ("there are some",))
    monkeypatch.setattr("rcod_runtime.backends.trt.engines.find_engines", lambda *_: object())
    monkeypatch.setattr("rcod_runtime.backends.trt.chain.open_device_chain", refused)
    never = [("auto", "cuda:0"), ("tensorrt", "auto")]
    for backend, device in [*never, ("auto", "auto")] if error is HashMismatch else never:
        with pytest.raises(error, match="out of memory"):
            open_chain(opened, backend, device, "auto", 1)
    if error is not HashMismatch:
        assert open_chain(opened, "auto", "auto", "auto", 1).name == "openvino"
        assert "engines are not used: decoder.engine: out of memory" in caplog.text


@pytest.mark.parametrize("backend", ["onnxruntime", "onnxruntime-tensorrt"])
def test_onnxruntime_gets_no_bf16_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, bundle: Path, backend: str
) -> None:
    Recorder(monkeypatch)
    monkeypatch.setattr(Manifest, "has_bf16", True)
    with pytest.raises(UsageError, match="bf16, in which ONNX Runtime enlarges no images"):
        Upscaler(bundle, backend=backend, device="cuda:0")


def test_a_silent_fallback_to_the_cpu_is_an_error(
    monkeypatch: pytest.MonkeyPatch, bundle: Path
) -> None:
    Recorder(monkeypatch, works=False)
    with pytest.raises(BackendError, match=f"expected {CUDA}.*fell back to {CPU}"):
        Upscaler(bundle, backend="onnxruntime", device="cuda:0")


@pytest.mark.skipif(CUDA in ort.get_available_providers(), reason="this one has CUDA")
def test_an_onnxruntime_without_cuda_says_which_package_has_it(bundle: Path) -> None:
    for backend, missing in (("onnxruntime", CUDA), ("onnxruntime-tensorrt", TENSORRT)):
        with pytest.raises(BackendError, match=rf"no {missing}.*rcod\[cuda\]"):
            Upscaler(bundle, backend=backend, device="cuda:0")
    with pytest.raises(EngineMismatch, match="has no engines. Build them: rcod-export engines"):
        Upscaler(bundle, device="cuda:0")


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "onnxruntime-tensorrt", "device": "cpu"},
        {"backend": "onnxruntime", "device": "cuda:0", "precision": "bf16"},
        {"threads": -1},
    ],
)
def test_choices_that_exclude_each_other_or_cannot_be_are_refused(
    monkeypatch: pytest.MonkeyPatch, bundle: Path, options: dict[str, Any]
) -> None:
    Recorder(monkeypatch)
    with pytest.raises(UsageError):
        Upscaler(bundle, **options)


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_a_backend_that_is_installed_but_cannot_be_imported_is_named(
    monkeypatch: pytest.MonkeyPatch, bundle: Path, name: str
) -> None:
    monkeypatch.setattr("rcod_runtime.backends.installed", lambda name: True)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"rcod_runtime.backends.{name}_backend", raising=False)
    with pytest.raises(BackendError, match=rf"backend {name}: installed, but it can't be loaded"):
        Upscaler(bundle, backend=name)
