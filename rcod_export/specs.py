"""What each graph of a bundle is made from: module, example inputs, axes that vary, layouts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from rcod_export.graphs import DTYPES, DecoderGraph, DenoiserGraph, EncoderGraph, VpimGraph
from rcod_runtime.manifest import Precision
from rcod_train.checkpoint import CheckpointInfo
from rcod_train.network import Parts

MAX_BATCH = 64
MAX_LATENT_STEPS = 128  # of the U-Net's size step, per side


@dataclass(frozen=True)
class GraphSpec:
    """A graph on its way into a file. ``shapes``: tensor -> (shape with named axes, layout)."""

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    dynamic: dict[str, dict[int, Any]]
    shapes: dict[str, tuple[tuple[int | str, ...], Any]]


def latent_step(parts: Parts) -> int:
    """The sides of a latent are multiples of it: the U-Net halves them that often."""
    return int(2 ** (len(parts.unet.config.block_out_channels) - 1))


def graph_specs(parts: Parts, info: CheckpointInfo, precision: Precision) -> Iterator[GraphSpec]:
    """The graphs, one after another. Each takes its modules over and converts them."""
    c, side = int(parts.vae.config.latent_channels), parts.vpim.tokens_px
    factor, n, step = parts.vae.factor, len(info.levels), latent_step(parts)
    dtype = DTYPES[precision]
    batch = Dim("batch", min=1, max=MAX_BATCH)
    h, w = (Dim(name, min=1, max=MAX_LATENT_STEPS) for name in "hw")
    latent = {0: batch, 2: step * h, 3: step * w}
    image = {0: batch, 2: factor * step * h, 3: factor * step * w}
    thumbnail = torch.zeros(2, 3, side, side)
    with torch.no_grad():
        tokens = parts.vpim(thumbnail)
    latent_shape: tuple[int | str, ...] = ("batch", c, f"height/{factor}", f"width/{factor}")
    image_shape: tuple[int | str, ...] = ("batch", 3, "height", "width")
    token_shape: tuple[int | str, ...] = ("batch", *tokens.shape[1:])
    z = torch.randn(2, c, 4 * step, 6 * step)
    small = torch.rand(2, 3, 4 * step * factor, 6 * step * factor)

    estimates = () if parts.mem is None else ("m_l", "adaptive")
    yield GraphSpec(
        "encoder",
        EncoderGraph(parts.vae, parts.mem, info, dtype),
        {"image": small},
        ("z_lq", *estimates),
        {"image": image},
        {
            "image": (image_shape, "NCHW"),
            "z_lq": (latent_shape, "NCHW"),
            "m_l": (("batch",), "N"),
            "adaptive": (("batch", n), "NK"),
        },
    )
    yield GraphSpec(
        "decoder",
        DecoderGraph(parts.vae, dtype),
        {"z_sr": z},
        ("image",),
        {"z_sr": latent},
        {"z_sr": (latent_shape, "NCHW"), "image": (image_shape, "NCHW")},
    )
    yield GraphSpec(
        "vpim",
        VpimGraph(parts.vpim, dtype),
        {"image": thumbnail},
        ("tokens",),
        {"image": {0: batch}},
        {"image": (("batch", 3, side, side), "NCHW"), "tokens": (token_shape, "NLC")},
    )
    inputs = {"z_lq": z, "tokens": tokens}
    dynamic = {"z_lq": latent, "tokens": {0: batch}}
    if n > 1:
        inputs["level"], dynamic["level"] = torch.full((2, n), 1.0 / n), {0: batch}
    yield GraphSpec(
        "denoiser",
        DenoiserGraph(parts.unet, info.levels, dtype),
        inputs,
        ("z_sr",),
        dynamic,
        {
            "z_lq": (latent_shape, "NCHW"),
            "tokens": (token_shape, "NLC"),
            "level": (("batch", n), "NK"),
            "z_sr": (latent_shape, "NCHW"),
        },
    )
