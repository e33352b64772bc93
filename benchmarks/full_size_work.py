"""Work of the full-size networks (Stable Diffusion 2.1, CLIP ViT-L/14), counted without weights.

The networks are built on PyTorch's meta device, where tensors have shapes and no memory, and every
product that a call dispatches is counted. The level table that ships in the denoiser's graph saves
the timestep's products, some 0.01 % of it, which are counted here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


@dataclass
class Count:
    """Multiply-accumulates, and numbers that products read and write beside weights."""

    macs: int = 0
    activations: int = 0


class ProductCounter(TorchDispatchMode):
    """Counts convolutions and matrix products inside ``with``."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Count()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        kind = func.overloadpacket
        if kind is aten.convolution:
            x, weights = args[0], args[1]
            self._add(out, weights[0].numel(), x)
        elif kind is aten.addmm:  # bias, x, weights
            self._add(out, args[1].shape[-1], args[1])
        elif kind is aten.mm:
            self._add(out, args[0].shape[-1], args[0])
        elif kind in (aten.bmm, aten.baddbmm):
            a, b = args[-2:]
            self._add(out, a.shape[-1], a, b)
        return out

    def _add(self, out: torch.Tensor, macs_each: int, *read: torch.Tensor) -> None:
        self.count.macs += out.numel() * macs_each
        self.count.activations += out.numel() + sum(x.numel() for x in read)


@dataclass(frozen=True)
class Stage:
    """One network of the pipeline at one size. ``io``: numbers in and out."""

    macs: int
    activations: int
    parameters: int
    io: int


def count_full_size(tile_px: int) -> dict[str, Stage]:
    """Encoder, vpim, denoiser and decoder of RCOD_O for one tile, batch 1."""
    from benchmarks.geometry import sd21_unet, sd_vae, vit_l14
    from rcod_train.models.sd import ClipVpim

    side = tile_px // 8
    with torch.device("meta"), torch.no_grad():
        vae, unet, vpim = sd_vae().eval(), sd21_unet().eval(), ClipVpim(vit_l14(), 1024).eval()
        image, z = torch.empty(1, 3, tile_px, tile_px), torch.empty(1, 4, side, side)
        thumbnail = torch.empty(1, 3, 224, 224)
        tokens, t = torch.empty(1, 257, 1024), torch.empty(1, dtype=torch.int64)
        halves = {"encoder": ("encoder.", "quant_conv."), "decoder": ("decoder.", "post_quant")}

        def parameters(module: torch.nn.Module, prefixes: tuple[str, ...] = ("",)) -> int:
            return sum(p.numel() for n, p in module.named_parameters() if n.startswith(prefixes))

        def stage(call: Callable[[], Any], numbers: int, *inputs: torch.Tensor) -> Stage:
            with ProductCounter() as counter:
                out = call()
            io = out.numel() + sum(x.numel() for x in inputs)
            return Stage(counter.count.macs, counter.count.activations, numbers, io)

        vae_names = {part: parameters(vae, prefixes) for part, prefixes in halves.items()}
        return {
            "encoder": stage(lambda: vae.encode(image), vae_names["encoder"], image),
            "decoder": stage(lambda: vae.decode(z), vae_names["decoder"], z),
            "vpim": stage(lambda: vpim(thumbnail), parameters(vpim), thumbnail),
            "denoiser": stage(
                lambda: unet(z, t, encoder_hidden_states=tokens, return_dict=False)[0],
                parameters(unet),
                z,
                tokens,
            ),
        }
