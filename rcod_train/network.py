"""The one network definition: the parts of an RCOD model, whatever the family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from rcod_train.models.guide import Guide, GuidedMem
from rcod_train.models.mem import Mem
from rcod_train.models.sd import ClipVpim, FixedTokens, SdVae
from rcod_train.models.vae import NanoVae
from rcod_train.models.vpim import Vpim
from rcod_train.schedule import one_step


@dataclass
class Parts:
    """The modules of one model. ``vae`` works on scaled latents; ``mem`` may be absent.

    Both kinds of VAE have ``encode``, ``encode_with_skip``, ``decode``, ``factor``; every kind of
    VPIM turns an image of ``tokens_px`` into tokens.

    With a ``guide`` (rcod-s) the encoder and the U-Net have branches that it feeds, and ``mem``
    reads the guide's features in the place of z_lq. Both are called inside
    ``guide.matrices.filled(vae=..., unet=...)``.
    """

    vae: NanoVae | SdVae
    unet: UNet2DConditionModel
    vpim: Vpim | ClipVpim | FixedTokens
    mem: Mem | GuidedMem | None = None
    guide: Guide | None = None


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Modules made inside get weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


NANO_LATENT_CHANNELS = 32
NANO_SKIP_CHANNELS = 64


def build_nano(seed: int, skip: bool = True) -> Parts:
    """nano's parts with random weights: 29 GMAC for one 512x512 image, 18 M parameters."""
    with seeded(seed):
        vae = NanoVae(NANO_LATENT_CHANNELS)
        unet = UNet2DConditionModel(
            sample_size=64,
            in_channels=NANO_LATENT_CHANNELS,
            out_channels=NANO_LATENT_CHANNELS,
            block_out_channels=(96, 160, 224),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            cross_attention_dim=128,
            attention_head_dim=8,
            norm_num_groups=32,
        )
        parts = Parts(vae, unet, Vpim(), Mem(NANO_LATENT_CHANNELS))
        if skip:  # last: without it the other weights of a seed are the same
            parts.vae = vae.with_skip(NANO_SKIP_CHANNELS)
    for module in (parts.vae, parts.unet, parts.vpim):
        module.to(memory_format=torch.channels_last)
    return parts


def freeze(parts: Parts, device: torch.device) -> None:
    """A loaded base as training wants it: on the device, channels last, without gradients."""
    for module in (parts.vae, parts.unet, parts.vpim):
        module.eval().requires_grad_(False)
        module.to(device).to(memory_format=torch.channels_last)


def restore_frozen(parts: Parts, base: Parts, trained: Iterable[Tensor]) -> None:
    """Weights that were not trained become those of ``base`` again: while others were trained they
    may have been rounded to bf16, which is not to ship."""
    kept = {id(parameter) for parameter in trained}
    for network, whole in (
        (parts.vae, base.vae),
        (parts.unet, base.unet),
        (parts.vpim.encoder, base.vpim.encoder),
    ):
        values = whole.state_dict()
        for name, parameter in network.named_parameters():
            value = values.get(name.replace(".base_layer", ""))  # PEFT puts its layers around
            if value is not None and id(parameter) not in kept:
                parameter.data = value.to(parameter.device)


def predict_eps(unet: UNet2DConditionModel, z_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
    """eps_theta(z_t; t, c): z_t (B, C, h, w), t (B,) int64, tokens (B, N, D) -> (B, C, h, w)."""
    eps: Tensor = unet(z_t, t, encoder_hidden_states=tokens, return_dict=False)[0]
    return eps


def past_the_skip(z_lq: Tensor, channels: int, denoised: Callable[[Tensor], Tensor]) -> Tensor:
    """What the decoder takes, (B, C + S, h, w): ``denoised`` of the first C ``channels`` of
    z_lq, and the rest, the skip, as it came."""
    z_sr = denoised(z_lq[:, :channels])
    return torch.cat([z_sr, z_lq[:, channels:]], 1) if z_lq.shape[1] > channels else z_sr


def denoise(
    unet: UNet2DConditionModel,
    z_lq: Tensor,
    t: Tensor,
    tokens: Tensor,
    alpha: Tensor | float,
    sigma: Tensor | float,
) -> Tensor:
    """One step of the U-Net at t (B,), and Eq. 3: z_lq (B, C + S, h, w), the skip past both, to the
    same of z_sr in fp32, which the decoder takes."""

    def denoised(z: Tensor) -> Tensor:
        return one_step(z, predict_eps(unet, z, t, tokens), alpha, sigma)

    return past_the_skip(z_lq, int(unet.config.in_channels), denoised)
