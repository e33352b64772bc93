"""What regulariser and base are conditioned on: visual tokens of the HQ image, or text embeddings.

Each is called with a batch and gives two (B, N, D): the condition, and what guidance leads away
from.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rcod_train.data import Batch, to_unit
from rcod_train.errors import DataError
from rcod_train.models.sd import ClipVpim
from rcod_train.models.vpim import Vpim
from rcod_train.photos import Photo

Condition = Callable[[Batch], tuple[Tensor, Tensor]]
NEGATIVE, PROMPT = "negative", "prompt"
TEXTS_COMPARED = 100
LAYOUT = (
    "a safetensors file of last hidden states (N, D) of the base model's text encoder: "
    f'"{NEGATIVE}", and for every photo one under its path below its --data folder, or one '
    f'"{PROMPT}" for all that have none'
)


class HqTokens:
    """The tokens of the HQ image through the alignment as it is when this is made; the negative is
    zeros. No captions are needed."""

    def __init__(self, vpim: Vpim | ClipVpim) -> None:
        self.vpim = vpim
        self.align: nn.Module = copy.deepcopy(vpim.align).requires_grad_(False)

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            tokens: Tensor = self.align(self.vpim.features(to_unit(batch.tokens_hq)))
        return tokens, torch.zeros_like(tokens)


class TextEmbeddings:
    """Precomputed text embeddings, read one by one when they are asked for.

    Args:
        path: of the file, see ``LAYOUT``.
        photos: in the order of ``Batch.photo``; the text of one lies under its name.
        cross_attention_dim: D, the width of the U-Net's cross-attention.

    Raises:
        DataError: the file can't be read, has tensors of other shapes, lacks a photo, or two photos
            would share the text of one.
    """

    def __init__(self, path: Path, photos: Sequence[Photo], cross_attention_dim: int) -> None:
        try:
            self.file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as exc:
            raise DataError(f"{path}: not readable ({exc}). Expected {LAYOUT}.") from exc
        keys = set(self.file.keys())
        if NEGATIVE not in keys:
            raise DataError(f'{path}: no "{NEGATIVE}". Expected {LAYOUT}.')
        missing = [photo.name for photo in photos if photo.name not in keys]
        if missing and PROMPT not in keys:
            raise DataError(
                f'{path}: {len(missing)} of {len(photos)} photos have no embedding ("{missing[0]}"'
                f' is the first) and there is no "{PROMPT}". Expected {LAYOUT}.'
            )
        named: dict[str, Photo] = {}
        for photo in photos:
            other = named.setdefault(photo.name, photo)
            if photo.name in keys and photo.file != other.file:
                raise DataError(
                    f'{path}: "{photo.name}" is the name of two photos, {other} and {photo}, and '
                    "an embedding belongs to one. Give the folder that holds both as --data, or "
                    "rename one."
                )
        self.keys = [photo.name if photo.name in keys else PROMPT for photo in photos]
        shape = tuple(self.file.get_slice(NEGATIVE).get_shape())
        for key in (NEGATIVE, *sorted(set(self.keys))):
            found = tuple(self.file.get_slice(key).get_shape())
            if len(found) != 2 or found != shape or found[1] != cross_attention_dim:
                raise DataError(
                    f'{path}: "{key}": expected (N, {cross_attention_dim}) as in the base model, '
                    f'with one N for all, found {found} ("{NEGATIVE}": {shape}).'
                )

    def first_texts(self) -> Iterator[Tensor]:
        """The negative and the texts of the first photos, which tell files apart: all of a large
        one take minutes to read."""
        for key in (NEGATIVE, *self.keys[:TEXTS_COMPARED]):
            yield self.file.get_tensor(key)

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        device = batch.photo.device
        rows = [self.file.get_tensor(self.keys[i]).float() for i in batch.photo.tolist()]
        negative = self.file.get_tensor(NEGATIVE).float().expand(len(rows), -1, -1)
        return torch.stack(rows).to(device), negative.to(device)
