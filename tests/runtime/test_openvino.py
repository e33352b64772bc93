"""What OpenVINO does to a process, and what is compiled for which image."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rcod_runtime import Upscaler, chain
from rcod_runtime.backends import precisions
from rcod_runtime.bundle import default_bundle_path, open_bundle

Photo = Callable[..., np.ndarray]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="can't be asked here")
def test_no_thread_is_bound_to_a_processor(bundle: Path) -> None:
    """Two Upscalers of one thread each would be bound to the same one."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor")
    code = f"""
        import contextlib, os, threading
        import numpy as np
        from rcod_runtime import Upscaler

        lq = np.zeros((240, 240, 3), np.uint8)
        upscaler = Upscaler({str(bundle)!r}, backend="openvino", threads=1)
        worker = threading.Thread(target=lambda: upscaler(lq, tile_px=320))
        seen = set()
        worker.start()
        while worker.is_alive():
            for thread in os.listdir("/proc/self/task"):
                with contextlib.suppress(OSError):  # it has ended
                    seen.add(frozenset(os.sched_getaffinity(int(thread))))
        assert seen == {{frozenset(os.sched_getaffinity(0))}}, seen
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_large_graphs_are_compiled_alone_and_first(
    bundle: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside others, the one that needs the most memory needs theirs too."""
    opened = open_bundle(bundle)
    sizes = {name: opened.graph_bytes(name) for name in opened.manifest.graphs}
    large = sorted(sizes, key=lambda name: -sizes[name])[:2]
    monkeypatch.setattr(chain, "LARGE_GRAPH_BYTES", sizes[large[-1]] - 1)
    began: list[tuple[str, int]] = []
    real = chain.HostChain._bind

    def bind(self: Any, name: str, *given: Any) -> None:
        began.append((name, threading.get_ident()))
        real(self, name, *given)

    monkeypatch.setattr(chain.HostChain, "_bind", bind)
    with Upscaler(bundle, backend="openvino") as upscaler:
        upscaler(photo(32, 32))
    assert [name for name, _ in began[:2]] == large
    assert {name for name, _ in began[2:]} == set(sizes) - set(large)
    assert len({thread for _, thread in began[:2]}) == 1


def test_photos_smaller_than_a_tile_share_what_is_compiled(
    bundle: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiling takes longer than many of them; the tile of large images has its own."""
    pytest.importorskip("openvino")
    from rcod_runtime.backends.openvino_backend import OpenVinoSession

    compiled: list[str] = []
    real = OpenVinoSession._compiled
    monkeypatch.setattr(
        OpenVinoSession,
        "_compiled",
        lambda self, *given: (compiled.append(self._path.stem), real(self, *given))[1],
    )
    sizes = ((7, 8), (7, 12), (24, 8), (20, 20), (7, 40))  # the last one in two tiles
    with Upscaler(bundle, backend="openvino", precision="fp32") as upscaler:
        images = [upscaler(photo(*size), tile_px=128) for size in sizes]
        assert sorted(compiled) == ["decoder", "denoiser", "encoder", "vpim"]
        upscaler(photo(40, 40), tile_px=128)
        assert sorted(compiled[4:]) == ["decoder", "denoiser", "encoder"]
        for size, image in zip(sizes, images, strict=True):
            assert np.array_equal(upscaler(photo(*size), tile_px=128), image)
        assert len(compiled) == 7


def test_of_a_large_graph_one_variant_for_a_shape_is_held(
    bundle: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has all its weights once more: 3.4 GB of Stable Diffusion's U-Net."""
    from rcod_runtime.backends import openvino_backend

    sizes = ((32, 32), (8, 8), (24, 72), (32, 32))
    with Upscaler(bundle, backend="openvino", precision="fp32") as upscaler:
        expected = [upscaler(photo(*size), tile_px=128, batch=2) for size in sizes]
    monkeypatch.setattr(openvino_backend, "LARGE_GRAPH_BYTES", -1)
    with Upscaler(bundle, backend="openvino", precision="fp32") as upscaler:
        sessions = [s._session for s in upscaler._chain._sessions.values()]  # type: ignore[attr-defined]
        for size, image in zip(sizes, expected, strict=True):
            found = upscaler(photo(*size), tile_px=128, batch=2)
            np.testing.assert_array_equal(found, image)
            assert all(len(session._requests) <= 1 for session in sessions)


def test_one_token_first_makes_no_later_image_wrong() -> None:
    """OpenVINO's attention for any shape was wrong for all larger ones then, in fp32 without a
    word. The embedded model has one: its lowest level has a token for 32 x 32 px."""
    rng = np.random.default_rng(0)
    small, larger = (rng.integers(0, 256, (n, n + 8, 3)).astype(np.uint8) for n in (1, 48))
    for precision in precisions("openvino"):
        with Upscaler(backend="openvino", precision=precision) as fresh:
            expected = fresh(larger)
        with Upscaler(backend="openvino", precision=precision) as upscaler:
            upscaler(small[:, :1])
            found = upscaler(larger)
        assert np.abs(found.astype(int) - expected).max() <= (1 if precision == "fp32" else 3)


def test_ctrl_c_after_models_were_closed_does_not_crash_the_process(bundle: Path) -> None:
    """Two OpenVINO cores that ended in the order they began left a freed signal stack behind."""
    code = f"""
        import gc, os, signal, time
        from pathlib import Path
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
        from rcod_runtime.backends.openvino_backend import OpenVinoBackend

        def opened():
            session = OpenVinoBackend("fp32", 1).load(Path({str(bundle)!r}) / "onnx/vpim.onnx")
            session.bind({{"image": (1, 3, 16, 16)}})
            return session

        first, second = opened(), opened()
        del first
        gc.collect()
        del second
        gc.collect()
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            print("interrupted")
    """
    command = [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.strip()) == (0, "interrupted"), done.stderr


def test_weights_are_held_once_as_they_are_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """And packed; OpenVINO alone holds them in fp32 too, twice their size in the file."""
    pytest.importorskip("openvino")
    from rcod_runtime.backends import openvino_backend

    def compiled() -> tuple[set[str], np.ndarray]:
        session = openvino_backend.OpenVinoBackend("fp32", 1).load(
            default_bundle_path() / "onnx/vpim.onnx"
        )
        session.bind({"image": (1, 3, 64, 64)})
        image = np.random.default_rng(0).random((1, 3, 64, 64), np.float32)
        (tokens,) = session.run({"image": image}).values()
        model = session._request.get_compiled_model().get_runtime_model()
        layers = [n for n in model.get_ops() if n.get_rt_info()["layerType"].value == "Convolution"]
        return {n.input_value(1).get_element_type().get_type_name() for n in layers}, tokens

    held, tokens = compiled()
    assert held == {"f16"}
    monkeypatch.setattr(openvino_backend, "_keep_stored_weights", lambda model: None)
    doubled, same = compiled()
    assert doubled == {"f32"}
    assert np.abs(tokens - same).max() < 1e-5 * np.abs(same).max()


def test_graphs_that_are_bound_at_once_in_a_new_process_do_not_wait_for_each_other() -> None:
    """OpenVINO's bindings look up numpy at first use; two threads at once never came back."""
    pytest.importorskip("openvino")
    code = """
        import os, sys, threading
        import numpy as np
        import openvino as ov
        from rcod_runtime.backends import openvino_backend

        sys.setswitchinterval(1e-6)
        weights = [ov.op.Constant(ov.Type.f16, ov.Shape([4]), [1.0] * 4) for _ in range(8)]
        barrier = threading.Barrier(8)

        def read(constant):
            barrier.wait()
            constant.data
            ov.op.Constant(np.zeros(4, np.float32), shared_memory=True)

        threads = [threading.Thread(target=read, args=(w,), daemon=True) for w in weights]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        print(sum(thread.is_alive() for thread in threads), end="", flush=True)
        os._exit(0)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    for _ in range(4):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (0, "0"), done.stderr
