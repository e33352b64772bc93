"""LPIPS, where the package and its weights can be had."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rcod_train.errors import TrainError


def load_lpips() -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS (VGG, Zhang et al. 2018): two images (B, 3, H, W) in [-1, 1] -> (B, 1, 1, 1).

    Raises:
        TrainError: the package is missing, or its backbone's weights can't be downloaded.
    """
    try:
        import lpips
    except ImportError as exc:
        raise TrainError(
            'use_lpips: the package lpips is missing. pip install "rcod[lpips]", '
            "or train without it (the default)."
        ) from exc
    try:
        network = lpips.LPIPS(net="vgg", verbose=False)
    except Exception as exc:  # the download's errors are of many types
        raise TrainError(
            f"use_lpips: the VGG weights could not be loaded ({exc}). They are downloaded at first "
            "use; train without LPIPS (the default) where there is no network."
        ) from exc
    network.requires_grad_(False)
    forward: Callable[[Tensor, Tensor], Tensor] = network.eval()
    return forward
