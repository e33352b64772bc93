"""Degradation-guided low-rank branches: layers whose LoRA has a matrix of the input in its middle.

S3Diff (and RCOD_S on top of it) puts an r x r matrix M between the two factors of every LoRA, one
for each block of the network and each image. What it adds depends on the image, so it can't be
merged: y = W x + B (M^T (A x)). PEFT's factor lora_alpha / r is part of M: it costs nothing there.

The matrices reach the layers by a plain object that whoever calls the network fills first. It is
no module and no tensor is an attribute of a module, so a tracer sees the matrices as what they
are: values computed from the inputs of the graph. It must be filled inside what is traced.

Blocks and orientation are those of ArcticHare105/S3Diff and Zongliang-Wu/RCOD, which agree: the
row vector (A x)^T is multiplied by M from the right.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from rcod_train.models.sd import UNET_TARGETS

Network = Literal["vae", "unet"]


@dataclass(eq=False)
class BlockMatrices:
    """The matrices of the call that is running: vae (B, blocks, r, r), unet (B, blocks, r, r).

    One object is shared by all branches of a model; ``copy.deepcopy`` of one network alone gives
    that copy an object of its own.
    """

    vae: Tensor | None = None
    unet: Tensor | None = None
    bypass: bool = False

    @contextmanager
    def filled(self, vae: Tensor | None = None, unet: Tensor | None = None) -> Iterator[None]:
        """Inside, the networks can be called; B is that of their inputs. Afterwards it is empty."""
        self.vae, self.unet = vae, unet
        try:
            yield
        finally:
            self.vae = self.unet = None

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Inside, the branches add nothing: the networks are those of the base model."""
        self.bypass = True
        try:
            yield
        finally:
            self.bypass = False


@dataclass(frozen=True, eq=False)
class Branch:
    """Which matrix a layer takes."""

    matrices: BlockMatrices
    network: Network
    block: int

    def matrix(self) -> Tensor:
        """M (B, r, r)."""
        matrices: Tensor | None = getattr(self.matrices, self.network)
        assert matrices is not None, f"BlockMatrices.{self.network} is empty: call inside filled()"
        return matrices[:, self.block]


class GuidedLinear(nn.Linear):
    """A linear layer, taken over with its parameters, and its branch: (B, L, in) -> (B, L, out)."""

    def __init__(self, base: nn.Linear, rank: int, branch: Branch) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias = base.weight, base.bias
        like = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A = nn.Linear(base.in_features, rank, **like)
        self.lora_B = nn.Linear(rank, base.out_features, **like)
        self.branch = branch
        _start(self.lora_A, self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        if self.branch.matrices.bypass:
            return super().forward(x)
        low = torch.bmm(self.lora_A(x), self.branch.matrix())  # (B, L, r)
        return super().forward(x) + self.lora_B(low)


class GuidedConv2d(nn.Conv2d):
    """A convolution, taken over with its parameters, and its branch: A has the kernel, the stride
    and the padding, B is 1x1. (B, in, h, w) -> (B, out, h', w')."""

    def __init__(self, base: nn.Conv2d, rank: int, branch: Branch) -> None:
        shape = (base.kernel_size, base.stride, base.padding, base.dilation)
        super().__init__(base.in_channels, base.out_channels, *shape, bias=False, device="meta")
        self.weight, self.bias = base.weight, base.bias
        like = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A = nn.Conv2d(base.in_channels, rank, *shape, **like)
        self.lora_B = nn.Conv2d(rank, base.out_channels, 1, **like)
        self.branch = branch
        _start(self.lora_A, self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        if self.branch.matrices.bypass:
            return super().forward(x)
        low = self.lora_A(x)  # (B, r, h', w')
        mixed = torch.bmm(self.branch.matrix().transpose(1, 2), low.flatten(2))  # (B, r, h' w')
        return super().forward(x) + self.lora_B(mixed.view_as(low))


def _start(a: nn.Module, b: nn.Module) -> None:
    """As PEFT's "gaussian": the branch adds nothing until it is trained or loaded."""
    nn.init.normal_(a.weight, std=1.0 / b.weight.shape[1])
    nn.init.zeros_(b.weight)


def vae_branches(vae: AutoencoderKL) -> dict[str, int]:
    """Every layer of the encoder -> its block: the down blocks, the middle, then the rest
    (conv_in, conv_out); quant_conv has none. 31 layers and 6 blocks at full size."""
    down = len(vae.encoder.down_blocks)
    return {
        f"encoder.{name}": _block(name, {"down_blocks": 0}, middle=down, rest=down + 1)
        for name, module in vae.encoder.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }


def unet_branches(unet: UNet2DConditionModel) -> dict[str, int]:
    """OSEDiff's layers but conv_in, which is trained in full -> their blocks: the down blocks, the
    middle, the up blocks, then the rest (conv_out). 257 layers and 10 blocks at full size."""
    down, up = len(unet.down_blocks), len(unet.up_blocks)
    starts = {"down_blocks": 0, "up_blocks": down + 1}
    endings = tuple(f".{target}" for target in UNET_TARGETS if target != "conv_in")
    return {
        name: _block(name, starts, middle=down, rest=down + up + 1)
        for name, module in unet.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and f".{name}".endswith(endings)
    }


def _block(name: str, starts: dict[str, int], middle: int, rest: int) -> int:
    stage, _, inner = name.partition(".")
    if stage in starts:
        return starts[stage] + int(inner.partition(".")[0])
    return middle if stage == "mid_block" else rest


def add_branches(
    network: AutoencoderKL | UNet2DConditionModel, rank: int, matrices: BlockMatrices
) -> None:
    """Put a branch on every layer of ``vae_branches`` or ``unet_branches``, in place.

    The layers keep their names and weights; lora_A and lora_B stand beside them in the state dict.
    """
    is_unet = isinstance(network, UNet2DConditionModel)
    kind: Network = "unet" if is_unet else "vae"
    for name, block in (unet_branches if is_unet else vae_branches)(network).items():
        base = network.get_submodule(name)
        guided = GuidedConv2d if isinstance(base, nn.Conv2d) else GuidedLinear
        with torch.no_grad():
            layer = guided(base, rank, Branch(matrices, kind, block))
        network.set_submodule(name, layer)
