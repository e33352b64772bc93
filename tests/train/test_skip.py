"""nano's skip past the denoiser: from the encoder's features to the decoder's."""

from __future__ import annotations

import torch

from rcod_train.adapters import SwitchedVae
from rcod_train.config import VaeStageConfig
from rcod_train.models.vae import NanoVae
from rcod_train.network import past_the_skip
from rcod_train.precision import Autocast
from rcod_train.stages.vae import VaeStage
from tests.tiny import tiny_parts

LATENT, SKIP = 4, 8


def image() -> torch.Tensor:
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def test_the_latent_comes_first_and_is_the_one_without_a_skip() -> None:
    vae = tiny_parts().vae
    z = vae.encode_with_skip(image())
    assert z.shape == (2, LATENT + SKIP, 4, 6)
    torch.testing.assert_close(z[:, :LATENT], vae.encode(image()), atol=0, rtol=0)


@torch.no_grad()
def test_the_decoder_uses_the_skip_where_it_is_given() -> None:
    vae = tiny_parts().vae
    z = vae.encode_with_skip(image())
    plain, whole = vae.decode(z[:, :LATENT]), vae.decode(z)
    assert plain.shape == whole.shape and (plain - whole).abs().max() > 1e-3


@torch.no_grad()
def test_what_skips_stays_where_it_was_in_the_photo() -> None:
    """One value of the skip reaches what the decoder's convolutions after it see, and no more."""
    vae = tiny_parts().vae
    z = vae.encode_with_skip(image())
    changed = z.clone()
    changed[0, LATENT, 0, 0] += 100
    rows, columns = (vae.decode(changed) - vae.decode(z))[0].abs().sum(0).nonzero().T
    assert 0 < rows.max() < 31 and 0 < columns.max() < 47
    assert not rows.min() and not columns.min()


@torch.no_grad()
def test_a_new_skip_changes_no_image() -> None:
    before = NanoVae(4, (8, 16, 16), (1, 1, 1), (1, 1, 1), scaling_factor=1.7)
    after = before.with_skip(SKIP)
    assert after.config.skip_channels == SKIP and after.config.scaling_factor == 1.7
    z = after.encode_with_skip(image())
    assert z.shape[1] == LATENT + SKIP
    torch.testing.assert_close(after.decode(z), before.decode(before.encode(image())))


def test_the_denoiser_sees_the_latent_alone() -> None:
    z = torch.randn(1, 6, 2, 2)
    seen = []

    def denoised(latent: torch.Tensor) -> torch.Tensor:
        seen.append(latent)
        return latent + 1

    found = past_the_skip(z, 4, denoised)
    assert torch.equal(seen[0], z[:, :4])
    assert torch.equal(found, torch.cat([z[:, :4] + 1, z[:, 4:]], 1))
    assert torch.equal(past_the_skip(z, 6, denoised), z + 1)


def test_the_autoencoder_is_trained_without_it_and_the_decoder_with_it() -> None:
    parts = tiny_parts()
    trained = VaeStage(parts, VaeStageConfig(), Autocast("fp32")).groups["vae"][0][0]
    assert trained and not [name for name in trained if "skip" in name]
    decoder = SwitchedVae(parts.vae, 2, train_decoder=True).decoder_parameters()
    assert {n for n in decoder if n.startswith("skip.")} == {
        "skip.leave.weight", "skip.leave.bias", "skip.enter.weight", "skip.enter.bias",
    }  # fmt: skip
    parts.vae.decode(parts.vae.encode_with_skip(image())).mean().backward()
    assert all(parameter.grad is not None for parameter in decoder.values())
