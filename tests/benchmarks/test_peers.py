"""Peers: their files are read as they are, on our engine, and what isn't installed is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import peer_models, peers
from benchmarks.errors import BenchmarkError, MissingPackage
from benchmarks.ncnn_file import HALF_FLAG, read_layers, read_network
from benchmarks.peer_models import PEERS, Peer, find_param, open_peer, weight_bytes
from benchmarks.processes import measure_contestant
from rcod_runtime.backends.openvino_backend import shared_core
from rcod_runtime.bundle import default_bundle_path

CHANNELS = 48  # 3 x 4 x 4: one convolution, and its pixels shuffled to four times the size
PARAM = f"""7767517
8 9
Input data 0 1 data
MemoryData mean 0 1 mean 0=1 1=1 2=3
BinaryOp sub 2 1 data mean centred 0=1
BinaryOp mul 1 1 centred scaled 0=2 1=1 2=2.000000e+00
Convolution conv 1 1 scaled c 0={CHANNELS} 1=3 4=1 5=1 6={CHANNELS * 27} 9=2 -23310=1,5.000000e-01
Split split 1 2 c c0 c1
Eltwise sum 2 1 c0 c1 s 0=1 -23301=2,2.000000e-01,1.000000e+00
PixelShuffle shuffle 1 1 s output 0=4
"""
PEER = Peer("drawn x4", "a_peer_for_tests", "models/net.param", "pip install a-peer-for-tests")


def numbers(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    mean = np.array([0.4, 0.5, 0.6], np.float32)
    weights = random.normal(0, 0.1, (CHANNELS, 3, 3, 3)).astype(np.float16)
    return mean, weights, random.normal(0, 0.1, CHANNELS).astype(np.float32)


def write_network(param: Path, text: str = PARAM, tail: bytes = b"") -> Path:
    mean, weights, bias = numbers()
    param.parent.mkdir(parents=True, exist_ok=True)
    param.write_text(text)
    flag = HALF_FLAG.to_bytes(4, "little")
    data = mean.tobytes() + flag + weights.tobytes() + bias.tobytes() + tail
    param.with_suffix(".bin").write_bytes(data)
    return param


def plain(image: np.ndarray) -> np.ndarray:
    """The same network by loops: (1, 3, h, w) -> (1, 3, 4h, 4w)."""
    mean, weights, bias = numbers()
    _, _, height, width = image.shape
    padded = np.pad((image[0] - mean[:, None, None]) * 2, ((0, 0), (1, 1), (1, 1)))
    c = np.empty((CHANNELS, height, width))
    for y in range(height):
        for x in range(width):
            window = padded[:, y : y + 3, x : x + 3]
            c[:, y, x] = (weights.astype(np.float64) * window).sum(axis=(1, 2, 3)) + bias
    c = np.where(c > 0, c, 0.5 * c) * 1.2
    shuffled = c.reshape(3, 4, 4, height, width).transpose(0, 3, 1, 4, 2)
    return shuffled.reshape(1, 3, 4 * height, 4 * width)


def test_network_read_from_its_files_equals_plain_loops(tmp_path: Path) -> None:
    model = read_network(write_network(tmp_path / "net.param"))
    image = np.random.default_rng(1).random((1, 3, 6, 5), np.float32)
    compiled = shared_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    difference = np.abs(compiled(image)[0] - plain(image)).max()
    assert difference < 1e-5, f"off by {difference}"


def test_an_array_option_is_read_as_one(tmp_path: Path) -> None:
    (layer,) = (layer for layer in read_layers(write_network(tmp_path / "n.param")) if
                layer.kind == "Eltwise")  # fmt: skip
    assert layer.options == {0: 1, 1: (0.2, 1.0)}
    assert layer.inputs == ("c0", "c1") and layer.outputs == ("s",)


@pytest.mark.parametrize(
    ("text", "tail", "said"),
    [
        ("7767518\n", b"", "no ncnn network"),
        (PARAM.replace("PixelShuffle", "Softmax"), b"", "a Softmax like this one is not known"),
        (PARAM.replace("9=2", "9=4"), b"", "activation 4 is not known"),
        (PARAM, b"1234", "4 bytes are left over"),
        (PARAM.replace("5=1 ", "5=1 7=1 ").replace("2=3\n", "2=4096\n"), b"", "ends before"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    tmp_path: Path, text: str, tail: bytes, said: str
) -> None:
    with pytest.raises(BenchmarkError, match=said):
        read_network(write_network(tmp_path / "net.param", text, tail))


def test_a_package_that_is_missing_is_an_error_with_its_pip_line() -> None:
    with pytest.raises(MissingPackage, match="pip install a-peer-for-tests"):
        find_param(PEER)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of that name, which must not be imported: its code raises."""
    package = tmp_path / "site" / PEER.package
    write_network(package / PEER.file)
    (package / "__init__.py").write_text("raise RuntimeError('needs a GPU')\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(peer_models, "PEERS", (PEER,))
    monkeypatch.setattr(peers, "PEERS", (PEER, PEERS[0]))


@pytest.mark.usefixtures("installed")
def test_a_peer_makes_an_image_of_four_times_the_size() -> None:
    lq = np.random.default_rng(2).integers(0, 255, (12, 9, 3), np.uint8)
    sr = open_peer(PEER, "openvino fp32", threads=1)(lq)
    expected = plain(lq.transpose(2, 0, 1)[None] / np.float32(255))[0].transpose(1, 2, 0)
    difference = sr - np.clip(expected * 255, 0, 255)
    assert sr.shape == (48, 36, 3) and np.abs(difference).max() < 0.51
    assert weight_bytes(PEER) == len(PARAM) + 12 + 4 + 2 * CHANNELS * 27 + 4 * CHANNELS


@pytest.mark.usefixtures("installed")
def test_ncnn_makes_the_same_image() -> None:
    pytest.importorskip("ncnn", reason='pip install "rcod[peers]"')
    lq = np.random.default_rng(3).integers(0, 255, (16, 16, 3), np.uint8)
    ours, theirs = (open_peer(PEER, engine, 1)(lq) for engine in ("openvino fp32", "ncnn fp32"))
    assert np.abs(ours.astype(int) - theirs).max() <= 1


@pytest.mark.usefixtures("installed")
def test_table_has_time_memory_size_and_quality_of_everyone(
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    np.savez(tmp_path / "p.npz", mu_pris_param=np.zeros(36), cov_pris_param=np.eye(36))
    tasks: list[dict[str, Any]] = []

    def contestant(task: dict[str, Any], runs: int) -> dict[str, float | None]:
        tasks.append(task)
        return {"load_ms": 1.0, "peak_bytes": 2e6}

    monkeypatch.setattr(peers, "measure_contestant", contestant)
    monkeypatch.setattr(peers, "RATIO_TO", PEER.name)
    arguments = ["--dataset", str(dataset), "--limit", "1", "--runs", "1", "--threads", "1"]
    arguments += ["--engines", "openvino fp32", "--niqe-params", str(tmp_path / "p.npz")]
    own = shutil.copytree(default_bundle_path(), tmp_path / "own")
    arguments += ["--bundle", str(own)]
    assert peers.main(arguments) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["name"]: row for row in document["contestants"]}
    drawn = f"{PEER.name}, openvino fp32"
    levels = [
        f"{bundle} {level}, openvino fp32"
        for bundle in ("nano", "own")
        for level in ("fidelity", "neutral", "realism")
    ]
    assert set(rows) - {f"{PEERS[0].name}, openvino fp32"} == {"bicubic", *levels, drawn}
    assert document["ratio_to"] == drawn and rows[drawn]["times_as_fast"] == 1.0
    assert rows[drawn]["weight_bytes"] == weight_bytes(PEER)
    assert len(tasks) == len(rows)
    opened = [task["bundle"] for task in tasks if "bundle" in task]
    assert opened == [None] * 3 + [str(own)] * 3
    for row in rows.values():
        assert row["latency"]["median_ms"] > 0 and row["peak_bytes"] == 2e6
        assert set(row["mean"]) == {"psnr_y", "ssim_y", "niqe"}
    assert rows["nano fidelity, openvino fp32"]["mean"]["psnr_y"] > rows[drawn]["mean"]["psnr_y"]


@pytest.mark.parametrize("folders", [("a/same", "b/same"), ("nano",), ("./nano/.",)])
def test_two_bundles_of_one_name_are_refused(
    folders: tuple[str, ...], dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table and the document have a row for each name: one's figures would be the other's."""
    assert peers.main(["--dataset", str(dataset), "--bundle", *folders]) == 2
    assert "expected folders of different names" in capsys.readouterr().err


def test_a_limit_below_one_is_refused(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.main(["--dataset", str(dataset), "--limit", "0"]) == 2
    assert "--limit 0: expected at least 1" in capsys.readouterr().err


def test_bicubic_in_a_process_of_its_own_is_measured() -> None:
    cost = measure_contestant({"bicubic": 4, "side_px": 32, "threads": 1}, runs=1)
    assert cost["first_ms"] is not None and cost["first_ms"] > 0
    assert cost["peak_bytes"] is None or 10e6 < cost["peak_bytes"] < 300e6
