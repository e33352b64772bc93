"""One set of base weights, three networks by switching adapters: generator, regulariser, base."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import nn
from torch.nn import Parameter

from rcod_train.models.sd import UNET_TARGETS, SdVae
from rcod_train.models.vae import NanoVae

Role = Literal["base", "generator", "regulariser"]


def _lora(rank: int, targets: list[str] | str) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights="gaussian")


class SwitchedUnet:
    """A U-Net whose weights are shared by the three roles; ``with use(role)`` switches exactly.

    The generator trains a copy of conv_in in full beside its LoRA.
    """

    def __init__(self, unet: UNet2DConditionModel, rank: int, rank_regulariser: int) -> None:
        unet.requires_grad_(False)
        unet.add_adapter(_lora(rank, UNET_TARGETS), adapter_name="generator")
        with warnings.catch_warnings():  # several adapters are what is wanted here
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            unet.add_adapter(_lora(rank_regulariser, UNET_TARGETS), adapter_name="regulariser")
        self.unet = unet
        self.conv_in_base = unet.conv_in.base_layer
        self.conv_in_generator = copy.deepcopy(self.conv_in_base).requires_grad_(True)
        self.role: Role = "base"
        self._switch("generator")

    def _switch(self, role: Role) -> None:
        if role == "base":
            self.unet.disable_adapters()
        else:
            self.unet.enable_adapters()
            self.unet.set_adapter(role)
        own = self.conv_in_generator if role == "generator" else self.conv_in_base
        self.unet.conv_in.base_layer = own
        self.role = role

    @contextmanager
    def use(self, role: Role) -> Iterator[UNet2DConditionModel]:
        previous = self.role
        self._switch(role)
        try:
            yield self.unet
        finally:
            self._switch(previous)

    def parameters_of(self, role: Role) -> dict[str, Parameter]:
        """The trained parameters of a role, by names that don't depend on the current role."""
        marker = f".{role}."
        named = {n: p for n, p in self.unet.named_parameters() if "lora_" in n and marker in n}
        if role == "generator":
            named |= {f"conv_in.{n}": p for n, p in self.conv_in_generator.named_parameters()}
        return named

    def merge(self) -> UNet2DConditionModel:
        """The generator as a plain U-Net: LoRA fused, other adapters dropped, its own conv_in."""
        self._switch("generator")
        self.unet.delete_adapters("regulariser")
        self.unet.fuse_lora(adapter_names=["generator"])
        self.unet.unload_lora()
        return self.unet


class SwitchedVae:
    """The autoencoder with a LoRA on its encoder (every convolution and projection, and what
    follows it up to the latent); the decoder is trained in full or not at all."""

    def __init__(self, vae: NanoVae | SdVae, rank: int, train_decoder: bool) -> None:
        vae.requires_grad_(False)
        targets = [
            name
            for name, module in vae.named_modules()
            if isinstance(module, (nn.Conv2d, nn.Linear))
            and (name.startswith("encoder.") or name == "quant_conv")
        ]
        vae.add_adapter(_lora(rank, targets), adapter_name="generator")
        vae.decoder.requires_grad_(train_decoder)
        self.vae = vae

    @contextmanager
    def base(self) -> Iterator[NanoVae | SdVae]:
        """The encoder without its LoRA."""
        self.vae.disable_adapters()
        try:
            yield self.vae
        finally:
            self.vae.enable_adapters()

    def encoder_parameters(self) -> dict[str, Parameter]:
        return {n: p for n, p in self.vae.named_parameters() if "lora_" in n}

    def decoder_parameters(self) -> dict[str, Parameter]:
        return {n: p for n, p in self.vae.decoder.named_parameters() if p.requires_grad}

    def merge(self) -> NanoVae | SdVae:
        self.vae.fuse_lora(adapter_names=["generator"])
        self.vae.unload_lora()
        return self.vae
