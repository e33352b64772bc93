"""nano's size, counted and not estimated."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from rcod_train.network import NANO_LATENT_CHANNELS, build_nano, past_the_skip, predict_eps

MAX_GMAC = 60.0


def test_one_512_px_image_takes_at_most_60_gmac() -> None:
    parts = build_nano(0)
    for module in (parts.vae, parts.unet, parts.vpim):
        module.to("meta")
    image, thumbnail = torch.empty(1, 3, 512, 512), torch.empty(1, 3, 64, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tokens = parts.vpim(thumbnail.to("meta"))
        z_lq = parts.vae.encode_with_skip(image.to("meta"))
        t = torch.empty(1, dtype=torch.long, device="meta")
        parts.vae.decode(
            past_the_skip(
                z_lq, NANO_LATENT_CHANNELS, lambda z: predict_eps(parts.unet, z, t, tokens)
            )
        )
    gmac = counter.get_total_flops() / 2e9
    assert 10 < gmac <= MAX_GMAC, f"{gmac:.1f} GMAC"
