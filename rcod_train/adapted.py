"""The networks of a family with what is trained on them: what the RCOD and MEM stages work with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from rcod_train.adapters import SwitchedUnet, SwitchedVae
from rcod_train.config import RcodStageConfig
from rcod_train.data import Batch, to_unit
from rcod_train.network import Parts
from rcod_train.precision import Autocast


class Adapted(Protocol):
    """A base model's networks as the generator that is trained."""

    def parameters(self) -> dict[str, Parameter]:
        """What is trained of U-Net, encoder and guide, by name."""
        ...

    def decoder_parameters(self) -> dict[str, Parameter]: ...

    def adapt(self, batch: Batch) -> None:
        """Called before the networks are, for each batch."""
        ...

    @contextmanager
    def base_encoder(self) -> Iterator[None]:
        """Inside, the encoder is that of the base model."""
        ...

    def mem_input(self, batch: Batch) -> Tensor:
        """What the MEM estimates M from, without gradients."""
        ...

    def merge(self) -> None:
        """Leave in ``parts`` what ships."""
        ...


class LoraModel:
    """nano and rcod-o: LoRA on U-Net and encoder, conv_in in full, and nano's decoder. The MEM
    looks at z_lq."""

    def __init__(self, parts: Parts, config: RcodStageConfig, autocast: Autocast) -> None:
        self.parts, self.autocast = parts, autocast
        ranks, alpha = (config.rank_unet, config.rank_regulariser), config.lora_alpha
        self.unet = SwitchedUnet(parts.unet, *ranks, alpha)
        self.vae = SwitchedVae(parts.vae, config.rank_vae, config.train_decoder, alpha)

    def parameters(self) -> dict[str, Parameter]:
        named = {f"unet.{n}": p for n, p in self.unet.parameters_of("generator").items()}
        return named | {f"vae.{n}": p for n, p in self.vae.encoder_parameters().items()}

    def decoder_parameters(self) -> dict[str, Parameter]:
        return {f"decoder.{n}": p for n, p in self.vae.decoder_parameters().items()}

    def adapt(self, batch: Batch) -> None:
        pass

    @contextmanager
    def base_encoder(self) -> Iterator[None]:
        with self.vae.base():
            yield

    @torch.no_grad()
    def mem_input(self, batch: Batch) -> Tensor:
        with self.autocast():
            return self.parts.vae.encode(to_unit(batch.lq)).float()

    def merge(self) -> None:
        self.unet.merge()
        self.vae.merge()


class GuidedModel:
    """rcod-s: the branches of U-Net and encoder, the guide that feeds them and conv_in, all in
    fp32; the degradation estimator is frozen. The MEM looks at the estimator's features.

    Nothing is merged: what the branches add depends on the image.
    """

    def __init__(self, parts: Parts) -> None:
        assert parts.guide is not None
        self.parts, self.guide = parts, parts.guide
        self.guide.float().network.requires_grad_(True)
        parts.unet.conv_in.float().requires_grad_(True)
        for network in (parts.unet, parts.vae):
            for name, parameter in network.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.float()
                    parameter.requires_grad_(True)

    def parameters(self) -> dict[str, Parameter]:
        modules = (("unet", self.parts.unet), ("vae", self.parts.vae), ("guide", self.guide))
        return {
            f"{prefix}.{name}": parameter
            for prefix, module in modules
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def decoder_parameters(self) -> dict[str, Parameter]:
        return {}

    def adapt(self, batch: Batch) -> None:
        # Not for the length of a call only: blocks that are computed again in the backward pass
        # need the matrices then.
        _, self.guide.matrices.vae, self.guide.matrices.unet = self.guide(native(batch))

    @contextmanager
    def base_encoder(self) -> Iterator[None]:
        with self.guide.matrices.bypassed():
            yield

    @torch.no_grad()
    def mem_input(self, batch: Batch) -> Tensor:
        _, features = self.guide.estimator(native(batch))
        return features

    def merge(self) -> None:
        self.guide.matrices.vae = self.guide.matrices.unet = None
        self.parts.unet.float()
        self.parts.vae.float()


def native(batch: Batch) -> Tensor:
    """What the guide looks at: lq before it was upsampled, (B, 3, h, w) in [0, 1]."""
    assert batch.lq_native is not None, "a batch without degradation has no lq of its own"
    return batch.lq_native.float() / 255.0
