"""What each graph of a bundle is made from: module, example inputs, axes that vary, layouts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from rcod_export.graphs import (
    DTYPES,
    DecoderGraph,
    DenoiserGraph,
    EncoderGraph,
    GuideGraph,
    VpimGraph,
)
from rcod_runtime.contract import GUIDE
from rcod_runtime.manifest import MAX_GUIDE_PX, Precision
from rcod_train.checkpoint import CheckpointInfo
from rcod_train.network import Parts

MAX_BATCH = 63  # diffusers' upsampling is another graph from 64 on: torch would trace again
MATRICES = ("vae_matrices", "unet_matrices")
MAX_LATENT_STEPS = 128  # of the U-Net's size step, per side


@dataclass(frozen=True)
class GraphSpec:
    """A graph on its way into a file. ``shapes``: tensor -> (shape with named axes, layout)."""

    name: str
    precision: Precision
    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    dynamic: dict[str, dict[int, Any]]
    shapes: dict[str, tuple[tuple[int | str, ...], Any]]


def latent_step(parts: Parts) -> int:
    """The sides of a latent are multiples of it: the U-Net halves them that often."""
    return int(2 ** (len(parts.unet.config.block_out_channels) - 1))


def handed_on(parts: Parts) -> int:
    """Channels of z_lq and z_sr: the latent's, and the skip's where there is one."""
    return int(parts.vae.config.latent_channels + parts.vae.config.get("skip_channels", 0))


def graph_specs(
    parts: Parts, info: CheckpointInfo, precision: Precision, scale: int
) -> Iterator[GraphSpec]:
    """The graphs, one after another. Each takes its modules over and converts them."""
    c, side = handed_on(parts), parts.vpim.tokens_px
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
    shapes: dict[str, tuple[tuple[int | str, ...], Any]] = {
        "m_l": (("batch",), "N"),
        "adaptive": (("batch", n), "NK"),
        "level": (("batch", n), "NK"),
        "z_lq": (latent_shape, "NCHW"),
        "z_sr": (latent_shape, "NCHW"),
        "tokens": (token_shape, "NLC"),
        "image": (image_shape, "NCHW"),
    }
    matrices: dict[str, Tensor] = {}
    if parts.guide is not None:
        lq = torch.rand(2, 3, 24, 40)
        with torch.no_grad():
            matrices = dict(zip(MATRICES, parts.guide(lq)[1:], strict=True))
        for name, values in matrices.items():
            shapes[name] = (("batch", *values.shape[1:]), "NKRR")
        shapes["lq"] = (("batch", 3, f"height/{scale}", f"width/{scale}"), "NCHW")
        sides = {2 + i: Dim(f"lq_{axis}", min=1, max=MAX_GUIDE_PX) for i, axis in enumerate("hw")}
        yield GraphSpec(
            GUIDE,
            Precision.FP32,
            GuideGraph(parts.guide, parts.mem, info),
            {"lq": lq},
            (*MATRICES, *estimates),
            {"lq": {0: batch, **sides}},
            shapes,
        )
    holder = None if parts.guide is None else parts.guide.matrices
    guided = parts.guide is not None
    yield GraphSpec(
        "encoder",
        precision,
        EncoderGraph(parts.vae, None if guided else parts.mem, info, dtype, holder),
        {"image": small, **{k: v for k, v in matrices.items() if k == "vae_matrices"}},
        ("z_lq", *(() if guided else estimates)),
        {"image": image, "vae_matrices": {0: batch}},
        shapes,
    )
    yield GraphSpec(
        "decoder",
        precision,
        DecoderGraph(parts.vae, dtype),
        {"z_sr": z},
        ("image",),
        {"z_sr": latent},
        shapes,
    )
    yield GraphSpec(
        "vpim",
        precision,
        VpimGraph(parts.vpim, dtype),
        {"image": thumbnail},
        ("tokens",),
        {"image": {0: batch}},
        {**shapes, "image": (("batch", 3, side, side), "NCHW")},
    )
    inputs = {"z_lq": z, "tokens": tokens}
    if n > 1:
        inputs["level"] = torch.full((2, n), 1.0 / n)
    if guided:
        inputs["unet_matrices"] = matrices["unet_matrices"]
    yield GraphSpec(
        "denoiser",
        precision,
        DenoiserGraph(parts.unet, info.levels, dtype, holder),
        inputs,
        ("z_sr",),
        {name: latent if name == "z_lq" else {0: batch} for name in inputs},
        shapes,
    )
