"""Which arithmetic the matrix products of a training run in."""

from __future__ import annotations

import torch

from rcod_train.errors import ConfigError


def resolve_precision(choice: str) -> str:
    """auto | fp32 | bf16 -> fp32 | bf16: bf16 only where the processor computes it natively."""
    if choice == "auto":
        return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"
    if choice not in ("fp32", "bf16"):
        raise ConfigError(f"precision {choice!r}: expected auto, fp32 or bf16.")
    return choice


class Autocast:
    """``with autocast():`` runs matrix products in the chosen precision, weights stay fp32."""

    def __init__(self, precision: str) -> None:
        self.enabled = precision == "bf16"

    def __call__(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.enabled)
