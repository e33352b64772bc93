"""Write a merged checkpoint of full size with random weights: FAMILY FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from benchmarks.geometry import sd21_unet, sd_vae, vit_l14
from rcod_train.checkpoint import save_merged
from rcod_train.models.sd import ClipVpim
from rcod_train.network import Parts
from rcod_train.official import official_info


def main(family: str, folder: Path) -> int:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    parts = Parts(sd_vae(), sd21_unet(), ClipVpim(vit_l14(), 1024))
    save_merged(folder, parts, official_info(f"random-{family}"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
