"""Write a merged checkpoint of full size with random weights: FAMILY FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from benchmarks.geometry import sd21_unet, sd_vae, vit_l14
from rcod_train.checkpoint import save_merged
from rcod_train.models.guide import Guide, GuidedMem
from rcod_train.models.sd import ClipVpim
from rcod_train.network import Parts
from rcod_train.official import official_info
from rcod_train.official.layouts import RCOD_O, RCOD_S


def main(family: str, folder: Path) -> int:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    parts = Parts(sd_vae(), sd21_unet(), ClipVpim(vit_l14(), 1024))
    layout = RCOD_O
    if family == "rcod-s":
        layout = RCOD_S
        parts.guide, parts.mem = Guide(), GuidedMem()
        torch.nn.init.constant_(parts.mem.mlp[0].bias, 0.5)  # opens its ReLU
        for network in (parts.vae, parts.unet):
            parts.guide.add_branches(network)
            for name, parameter in network.named_parameters():
                if "lora_B" in name:  # they start at zero, and would count for nothing
                    torch.nn.init.normal_(parameter, std=0.02)
    save_merged(folder, parts, official_info(f"random-{family}", layout))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
