"""Tells weights apart: what a run was built on must be what it is resumed on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def fingerprint(weights: Iterable[Tensor]) -> str:
    """SHA-256 of the values, in their own precision, one tensor after the other: 2.5 GB of a base
    in bf16 take some seconds and no memory to speak of."""
    digest = hashlib.sha256()
    for weight in weights:
        values = weight.detach().cpu().flatten()  # (N,), whatever the memory format
        digest.update(values.view(torch.uint8).numpy())
    return digest.hexdigest()
