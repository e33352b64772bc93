"""What PyTorch computes in fp32 from a checkpoint: the reference that exported graphs meet.

It is computed before the export, which takes the modules over one by one: no second copy of a
large model is ever held.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rcod_export.specs import MATRICES, handed_on, latent_step
from rcod_runtime.arrays import guide_window
from rcod_runtime.contract import GUIDE
from rcod_runtime.resample import resize_for_tokens, upsample
from rcod_train import network
from rcod_train.checkpoint import CheckpointInfo
from rcod_train.network import Parts

Array = npt.NDArray[np.float32]
BATCH = 3


@dataclass(frozen=True)
class Case:
    """One call of a graph: its inputs, and what its outputs must be.

    ``amplification`` is by how much Eq. 3 enlarges the U-Net's deviation, sigma / alpha.
    """

    graph: str
    level: str | None
    feeds: dict[str, Array]
    expected: dict[str, Array]
    amplification: float = 1.0


@contextmanager
def guided(parts: Parts, lq: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Inside, the networks have the branches of lq (B, 3, h, w) in [0, 1], where there is a guide;
    gives its outputs: features, vae and unet matrices."""
    if parts.guide is None:
        yield ()
        return
    outputs = parts.guide(lq)
    with parts.guide.matrices.filled(vae=outputs[1], unet=outputs[2]):
        yield outputs


def denoise(parts: Parts, z_lq: Tensor, tokens: Tensor, info: CheckpointInfo, index: int) -> Tensor:
    """The plain form at a level: the U-Net called by its timestep, then Eq. 3."""
    level = info.levels[index]
    t = torch.full((len(z_lq),), level.timestep)
    return network.denoise(parts.unet, z_lq, t, tokens, level.alpha, level.sigma)


@torch.no_grad()
def parity_cases(parts: Parts, info: CheckpointInfo) -> Iterator[Case]:
    """A case for every graph, for the denoiser one of every level; sizes that no export saw."""
    generator = torch.Generator().manual_seed(1)
    c, side, n = handed_on(parts), parts.vpim.tokens_px, len(info.levels)
    h, w = 2 * latent_step(parts), 3 * latent_step(parts)
    pixels = (BATCH, 3, h * parts.vae.factor, w * parts.vae.factor)
    image = torch.rand(pixels, generator=generator) * 2 - 1
    thumbnail = torch.rand(BATCH, 3, side, side, generator=generator) * 2 - 1
    z = torch.randn(BATCH, c, h, w, generator=generator)
    lq = torch.rand(BATCH, 3, 20, 28, generator=generator)

    with guided(parts, lq) as outputs:
        z_lq = parts.vae.encode_with_skip(image)
        latent = z_lq[:, : parts.vae.config.latent_channels]
        m_l = None if parts.mem is None else parts.mem(outputs[0] if outputs else latent)
        estimate = {} if m_l is None else {"m_l": m_l.numpy()}
        matrices = {k: v.numpy() for k, v in zip(MATRICES, outputs[1:], strict=False)}
        feeds = {"image": image.numpy()}
        if outputs:
            yield Case(GUIDE, None, {"lq": lq.numpy()}, matrices | estimate)
            feeds["vae_matrices"] = matrices["vae_matrices"]
            yield Case("encoder", None, feeds, {"z_lq": z_lq.numpy()})
        else:
            yield Case("encoder", None, feeds, {"z_lq": z_lq.numpy()} | estimate)
        decoded = parts.vae.decode(z).clamp(-1, 1)
        yield Case("decoder", None, {"z_sr": z.numpy()}, {"image": decoded.numpy()})
        tokens = parts.vpim(thumbnail)
        yield Case("vpim", None, {"image": thumbnail.numpy()}, {"tokens": tokens.numpy()})
        for index, level in enumerate(info.levels):
            feeds = {"z_lq": z.numpy(), "tokens": tokens.numpy()}
            if n > 1:
                feeds["level"] = np.eye(n, dtype=np.float32)[np.full(BATCH, index)]
            if outputs:
                feeds["unet_matrices"] = matrices["unet_matrices"]
            z_sr = denoise(parts, z, tokens, info, index).numpy()
            yield Case("denoiser", level.name, feeds, {"z_sr": z_sr}, level.sigma / level.alpha)


@torch.no_grad()
def photo_cases(
    parts: Parts, info: CheckpointInfo, lq: npt.NDArray[np.uint8], scale: int, decoded: bool = True
) -> Iterator[Case]:
    """The pipeline in one piece, lq (h, w, 3) uint8 -> sr (3, scale h, scale w) in [-1, 1] of every
    level, as a call of the encoder and one of denoiser and decoder for each level.

    Without ``decoded`` what is expected of the decoder, most of the work, is left out.
    """
    height, width = (side * scale for side in lq.shape[:2])

    def prepared(image: Any) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None] / 127.5 - 1.0

    tokens = parts.vpim(prepared(resize_for_tokens(lq, parts.vpim.tokens_px)))
    image = prepared(upsample(lq, (height, width)))
    with guided(parts, torch.from_numpy(guide_window(lq))) as outputs:
        matrices = {"vae_matrices": outputs[1]} if outputs else {}
        z_lq = parts.vae.encode_with_skip(image)
        yield Case("encoder", None, _arrays({"image": image} | matrices), _arrays({"z_lq": z_lq}))
        for index, level in enumerate(info.levels):
            z_sr = denoise(parts, z_lq, tokens, info, index)
            feeds = {"z_lq": z_lq, "tokens": tokens}
            if len(info.levels) > 1:
                feeds["level"] = torch.eye(len(info.levels))[index : index + 1]
            if outputs:
                feeds["unet_matrices"] = outputs[2]
            made = _arrays({"z_sr": z_sr})
            yield Case("denoiser", level.name, _arrays(feeds), made, level.sigma / level.alpha)
            images = {"image": parts.vae.decode(z_sr).clamp(-1, 1)} if decoded else {}
            yield Case("decoder", level.name, made, _arrays(images))


def _arrays(tensors: dict[str, Tensor]) -> dict[str, Array]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def whole_images(cases: Iterable[Case]) -> dict[str, npt.NDArray[np.uint8]]:
    """Of one photo's ``photo_cases``: level -> sr (H, W, 3)."""
    return {
        case.level: np.rint((case.expected["image"][0].transpose(1, 2, 0) + 1.0) * 127.5).astype(
            np.uint8
        )
        for case in cases
        if case.graph == "decoder" and case.level is not None
    }
