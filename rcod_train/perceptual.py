"""LPIPS, where the package and its weights can be had."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rcod_train.errors import TrainError


def load_lpips(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS (VGG, Zhang et al. 2018): two images (B, 3, H, W) in [-1, 1] -> (B, 1, 1, 1).

    Raises:
        TrainError: the package is missing, or its backbone's weights can't be downloaded.
    """
    try:
        import lpips
    except ImportError as exc:
        raise TrainError(
            'LPIPS: the package lpips is missing. pip install "rcod[lpips]", or train without this '
            "loss: nano without --lpips, the others with --no-lpips."
        ) from exc
    try:
        network = lpips.LPIPS(net="vgg", verbose=False)
    except Exception as exc:  # the download's errors are of many types
        raise TrainError(
            f"LPIPS: the VGG weights could not be loaded ({exc}). They are downloaded at first "
            "use; without a network train nano without --lpips, the others with --no-lpips."
        ) from exc
    network.requires_grad_(False).to(device)
    forward: Callable[[Tensor, Tensor], Tensor] = network.eval()
    return forward
