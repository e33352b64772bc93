"""One set of base weights, three networks by switching adapters: generator, regulariser, base.

The base may be of any precision; what is trained is fp32.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import Parameter

from rcod_train.models.sd import UNET_TARGETS, SdVae
from rcod_train.models.vae import NanoVae

Role = Literal["base", "generator", "regulariser"]


def _lora(rank: int, alpha: int, targets: list[str] | str) -> LoraConfig:
    return LoraConfig(
        r=rank, lora_alpha=alpha or rank, target_modules=targets, init_lora_weights="gaussian"
    )


def _trained(network: nn.Module) -> None:
    """All adapters of a network in fp32 and with gradients."""
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


class SwitchedUnet:
    """A U-Net whose weights are shared by the three roles; ``with use(role)`` switches exactly.

    The generator trains a copy of conv_in in full beside its LoRA.

    An adapter that is not in use gets no gradient: nothing is computed with it. Blocks that are
    computed again in a backward pass (gradient checkpointing) need the role of their forward pass.

    Args:
        alpha: PEFT's lora_alpha of both adapters, 0 for their ranks.
    """

    def __init__(
        self, unet: UNet2DConditionModel, rank: int, rank_regulariser: int, alpha: int = 0
    ) -> None:
        unet.requires_grad_(False)
        unet.add_adapter(_lora(rank, alpha, UNET_TARGETS), adapter_name="generator")
        with warnings.catch_warnings():  # several adapters are what is wanted here
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            regulariser = _lora(rank_regulariser, alpha, UNET_TARGETS)
            unet.add_adapter(regulariser, adapter_name="regulariser")
        self.unet = unet
        self.conv_in_base = unet.conv_in.base_layer
        _trained(unet)
        self.conv_in_generator = copy.deepcopy(self.conv_in_base).float().requires_grad_(True)
        self.layers = [module for module in unet.modules() if isinstance(module, LoraLayer)]
        self.role: Role = "base"
        self._switch("generator")

    def _switch(self, role: Role) -> None:
        # What PEFT's enable_adapters and set_adapter come down to. They walk all modules and turn
        # requires_grad on and off: 8 and 19 ms at full size, this 0.3 and 0.6, six times a step.
        for layer in self.layers:
            layer._disable_adapters = role == "base"
            if role != "base":
                layer._active_adapter = [role]
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
        self.unet.float()  # a sum in half precision would round most of the LoRA away
        self.unet.delete_adapters("regulariser")
        self.unet.fuse_lora(adapter_names=["generator"])
        self.unet.unload_lora()
        return self.unet


class SwitchedVae:
    """The autoencoder with a LoRA on its encoder (every convolution and projection, and what
    follows it up to the latent); the decoder, and nano's skip to it, are trained in full or not at
    all. ``alpha`` is as the U-Net's."""

    def __init__(
        self, vae: NanoVae | SdVae, rank: int, train_decoder: bool, alpha: int = 0
    ) -> None:
        vae.requires_grad_(False)
        targets = [
            name
            for name, module in vae.named_modules()
            if isinstance(module, (nn.Conv2d, nn.Linear))
            and (name.startswith("encoder.") or name == "quant_conv")
        ]
        vae.add_adapter(_lora(rank, alpha, targets), adapter_name="generator")
        _trained(vae)
        self.decoder = {"": vae.decoder}
        if isinstance(vae, NanoVae) and vae.skip is not None:
            self.decoder["skip."] = vae.skip
        if train_decoder:
            for module in self.decoder.values():
                module.float().requires_grad_(True)
        self.vae = vae
        self.layers = [module for module in vae.modules() if isinstance(module, LoraLayer)]

    def _switch(self, adapted: bool) -> None:
        for layer in self.layers:
            layer._disable_adapters = not adapted

    @contextmanager
    def base(self) -> Iterator[NanoVae | SdVae]:
        """The encoder without its LoRA."""
        self._switch(False)
        try:
            yield self.vae
        finally:
            self._switch(True)

    def encoder_parameters(self) -> dict[str, Parameter]:
        return {n: p for n, p in self.vae.named_parameters() if "lora_" in n}

    def decoder_parameters(self) -> dict[str, Parameter]:
        return {
            prefix + name: parameter
            for prefix, module in self.decoder.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def merge(self) -> NanoVae | SdVae:
        self.vae.float()
        self.vae.fuse_lora(adapter_names=["generator"])
        self.vae.unload_lora()
        return self.vae
